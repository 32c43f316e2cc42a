"""The smoke test and a training of two processes, under supervisors, for real."""

import os
import re
import signal

import pytest
from loopback import wait_for
from pairs import flags_of, free_port, run_pair, write_inputs

from spiral_jax.parallel.xla_flags import quick_flags
from spiral_jax.run.metrics import read_rows

pytestmark = pytest.mark.slow
SMOKE = ["-m", "tpu.host.smoke", "--hosts=2", "--devices=4"]
STEPS = ("--config.train.steps=100", "--config.checkpoint.every_steps=10", "--config.evaluation.every_steps=100",
         "--config.summary.sample_tokens=0")  # fmt: skip


@pytest.fixture
def pair(slice_of):
    """Two hosts of four devices each that find each other, and (attempt, program, ...) that starts them."""
    two = slice_of()
    for host in two.hosts:
        host.variables |= {"JAX_PROCESS_ID": str(host.number), "JAX_PLATFORMS": "cpu",
                           "XLA_FLAGS": f"--xla_force_host_platform_device_count=4 {quick_flags()}"}  # fmt: skip

    def start(attempt, argv, **changed):
        variables = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
        for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
            variables[name] = os.environ[name]
        two.start(attempt, argv, env=variables, smoke=SMOKE, grace=30.0, stop_seconds=60.0, **changed)

    two.begin = start
    return two


def test_a_missing_device_is_named(pair):
    pair.hosts[1].variables["XLA_FLAGS"] = "--xla_force_host_platform_device_count=3"
    pair.begin(1, ["-c", "print('trains')"])
    pair.wait(1, seconds=120)
    first = pair.bucket.read("attempts/0001/first_exit.json")
    assert (first["status"], first["phase"]) == (43, "testing")
    assert first["line"] == "smoke test: error: host 1 has 3 of 4 devices"
    assert "trains" not in pair.log(1, 0) + pair.log(1, 1)


def test_killed_stopped_lost_and_finished(pair, tmp_path):
    """SIGKILL of one job, SIGTERM of one supervisor, a lost host: the run ends as if nothing had happened."""
    write_inputs(tmp_path)
    config, workdir = flags_of(tmp_path, "run")
    train = ["-m", "spiral_jax.train", config, workdir, *STEPS]

    attempts = []

    def begin_and_reach(file: str) -> int:
        """Attempts until there is such a file in the run; the number of the one that reached it."""
        while True:
            attempts.append(len(attempts) + 1)
            pair.begin(attempts[-1], train)
            ended = f"attempts/{attempts[-1]:04d}/first_exit.json"
            wait_for(lambda ended=ended: (tmp_path / "run" / file).exists() or pair.bucket.get(ended),
                     lambda: pair.log(attempts[-1], 0), 300)  # fmt: skip
            if (tmp_path / "run" / file).exists():
                return attempts[-1]
            pair.wait(attempts[-1], seconds=120)
            # On a busy machine jax's CPU devices may not find each other within the 30 seconds that they have.
            assert any("Gloo context initialization failed" in pair.log(attempts[-1], host) for host in (0, 1))

    attempt = begin_and_reach("checkpoints/10")
    os.kill(pair.hosts[1].pid("spiral_jax.train"), signal.SIGKILL)
    survivor, killed = pair.wait(attempt, seconds=120)
    assert (killed["status"], killed["signal"]) == (137, True) and killed["kernel"]
    assert survivor["status"] == 43, survivor  # it has met a lost peer
    assert pair.bucket.read(f"attempts/{attempt:04d}/first_exit.json")["host"] == 1
    assert "smoke test: 2 x 4 x cpu" in pair.log(attempt, 0)

    attempt = begin_and_reach("checkpoints/40")
    os.kill(pair.hosts[0].pid("tpu.host.supervisor"), signal.SIGTERM)
    assert [state["status"] for state in pair.wait(attempt, seconds=120)] == [42, 42]  # one was asked, both saved

    attempt = begin_and_reach("checkpoints/70")
    pair.hosts[0].kill()
    (other,) = pair.wait(attempt, hosts=[1], seconds=120)
    assert other["status"] == 43

    attempt = begin_and_reach("checkpoints/100")
    assert [state["status"] for state in pair.wait(attempt, seconds=300)] == [0, 0]
    logs = "".join(pair.log(number, 0) for number in attempts)
    assert len(re.findall("^resuming after step", logs, re.M)) >= 3, logs
    for host in (0, 1):
        places = [int(part.name[-16:-4]) for part in pair.bucket.list(f"attempts/{attempt:04d}/logs/host-{host}/")]
        assert places == sorted(places) and places[:1] == [0]

    done = run_pair(tmp_path, "train", config, flags_of(tmp_path, "undisturbed")[1], *STEPS, timeout=300)
    assert [process.returncode for process in done] == [0, 0], done
    rows, expected = (read_rows(tmp_path / name / "metrics.jsonl") for name in ("run", "undisturbed"))
    losses = [[(row["step"], row["loss"]) for row in found if "loss" in row] for found in (rows, expected)]
    assert losses[0] == losses[1] and len(losses[0]) >= 10
