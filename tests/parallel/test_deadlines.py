"""The clock for what may hang. In programs of their own that import no jax."""

import re
import signal
import subprocess
import sys
import time

import pytest
from pairs import ROOT

from spiral_jax.errors import SpiralError
from spiral_jax.parallel.deadlines import DeadlineConfig

HEADER = """
import time
from spiral_jax.parallel import deadlines
from spiral_jax.parallel.deadlines import DeadlineConfig, Watchdog
deadlines._SECONDS_OF_A_TICK = 0.05

def stuck(seconds):
    time.sleep(seconds)
"""


def start(code):
    return subprocess.Popen(
        [sys.executable, "-c", HEADER + code], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_what_does_not_end_in_time_is_named_with_all_stacks():
    code = """
with Watchdog(DeadlineConfig(step_minutes=0.5 / 60)) as watchdog:
    watchdog.expect("step 7", "step_minutes")
    stuck(20)
"""
    process = start(code)
    _, errors = process.communicate(timeout=10)
    assert process.returncode == 43
    *stacks, last = errors.splitlines()
    assert re.fullmatch(r"error: step 7 did not end in 0\.00833\d+ min; allowed by deadlines.step_minutes", last), last
    assert any("in stuck" in line for line in stacks)


@pytest.mark.parametrize("then", ["watchdog.expect('step', 'step_minutes')", "watchdog.expect_nothing()"])
def test_what_goes_on_is_left_alone(then):
    """As is what a field of 0 allows all the time in the world."""
    code = f"""
with Watchdog(DeadlineConfig(step_minutes=0.6 / 60, save_minutes=0)) as watchdog:
    watchdog.expect("step", "step_minutes")
    for _ in range(4):
        stuck(0.3)
        {then}
    watchdog.expect("the save", "save_minutes")
    stuck(0.5)
stuck(0.5)
"""
    process = start(code)
    assert process.communicate(timeout=15) == ("", "") and process.returncode == 0


@pytest.mark.slow
def test_time_in_which_the_process_was_stopped_does_not_count():
    code = """
with Watchdog(DeadlineConfig(step_minutes=4 / 60)) as watchdog:
    watchdog.expect("step", "step_minutes")
    print("there", flush=True)
    stuck(1.5)
    watchdog.expect_nothing()
"""
    process = start(code)
    assert process.stdout.readline() == "there\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(6)
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=10) == ("", "") and process.returncode == 0


@pytest.mark.parametrize("field, value", [("step_minutes", -1.0), ("step_minutes", float("nan")),
                                          ("save_minutes", float("inf")), ("silence_seconds", 4.0)])  # fmt: skip
def test_bad_deadlines(field, value):
    with pytest.raises(SpiralError, match=f"^deadlines.{field} is {value}; allowed: "):
        DeadlineConfig(**{field: value})
