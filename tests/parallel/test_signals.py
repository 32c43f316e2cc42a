"""What signals do to a process, wherever its main thread is. In programs of their own that import no jax."""

import signal
import subprocess
import sys
import time

import pytest
from pairs import ROOT

HEADER = """
import hashlib, os, signal, sys, time
from spiral_jax.parallel.signals import StopRequest

def busy(seconds):
    '''In C code that holds the main thread: Python's own handlers do not run.'''
    begin = time.monotonic()
    while time.monotonic() - begin < seconds:
        hashlib.pbkdf2_hmac("sha256", b"x", b"y", 5_000_000)

def say(word):
    print(word, flush=True)
"""


ALL = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def as_a_terminal_starts_it() -> None:
    """Whatever this process ignores, or has inherited."""
    for number in ALL:
        signal.signal(number, signal.SIG_DFL)


class Program:
    """A running program, which says where it is."""

    def __init__(self, code, before=as_a_terminal_starts_it):
        self.process = subprocess.Popen(
            [sys.executable, "-c", HEADER + code], cwd=ROOT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, preexec_fn=before,
        )  # fmt: skip

    def at(self, word):
        said = self.process.stdout.readline()
        if said != word + "\n":
            self.process.kill()
        assert said == word + "\n"
        return self

    def send(self, number):
        self.process.send_signal(number)
        return self

    def end(self, seconds=5.0):
        try:
            begin = time.monotonic()
            out, errors = self.process.stdout.read(), self.process.stderr.read()  # until it has ended
            assert time.monotonic() - begin < seconds
            return self.process.wait(), out, errors
        finally:
            self.process.kill()


END = "with StopRequest() as stop:\n    say('there'); busy(20)"
HOLD = """
with StopRequest() as stop:
    stop.hold()
    say("there")
    while stop.signal is None:
        time.sleep(0.01)
    say(stop.signal)
"""


@pytest.mark.parametrize("number", ALL)
def test_where_nothing_can_be_saved_it_ends_at_once(number):
    """Though the main thread is in C code."""
    assert Program(END).at("there").send(number).end(2) == (128 + number, "", "stopped with nothing to save\n")


@pytest.mark.parametrize("number", ALL)
def test_where_something_can_be_saved_it_is_a_request(number):
    code = HOLD + "    say('saved')"
    assert Program(code).at("there").send(number).at(str(int(number))).end() == (0, "saved\n", "")


def test_repeats_within_two_seconds_are_one_and_a_later_one_ends_at_once():
    program = Program(HOLD + "    busy(20)").at("there").send(signal.SIGTERM).at("15")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        time.sleep(0.3)
        program.send(number)
    time.sleep(1.6)
    assert program.process.poll() is None
    status, out, errors = program.send(signal.SIGINT).end(2)
    assert (status, out, errors.count("\n")) == (130, "", 1) and errors.startswith("stopped again, before it was saved")


def test_when_everything_is_saved_the_status_says_so():
    code = "with StopRequest() as stop:\n    stop.hold(); stop.saved(); say('there'); busy(20)"
    status, _, errors = Program(code).at("there").send(signal.SIGTERM).end(2)
    assert status == 42 and errors == "stopped, and everything is saved; the same command goes on\n"


def test_a_request_that_came_too_late_to_be_answered_ends_it_when_all_is_saved():
    code = HOLD + "    stop.saved(); busy(20)"
    assert Program(code).at("there").send(signal.SIGTERM).at("15").end(2)[0] == 42


def test_a_repeat_on_the_way_out_does_not_change_the_status():
    program = Program(HOLD + "say('out'); time.sleep(0.3); sys.exit(42)").at("there").send(signal.SIGTERM)
    assert program.at("15").at("out").send(signal.SIGTERM).end()[0] == 42


@pytest.mark.parametrize("number", ALL)
def test_a_signal_that_was_ignored_stays_ignored(number):
    """As under nohup."""
    code = "with StopRequest() as stop:\n    say('there'); time.sleep(0.3)\n"
    program = Program(code, before=lambda: signal.signal(number, signal.SIG_IGN)).at("there")
    assert program.send(number).end() == (0, "", "")


def test_handlers_are_put_back():
    code = """
before = [signal.getsignal(number) for number in (2, 10, 15, 18)]
with StopRequest():
    pass
assert [signal.getsignal(number) for number in (2, 10, 15, 18)] == before
assert signal.set_wakeup_fd(-1) == -1
"""
    assert Program(code).end() == (0, "", "")


def test_it_hears_that_it_goes_on_after_a_stop():
    code = "with StopRequest(continued=lambda: say('on')):\n    say('there'); busy(20)"
    program = Program(code).at("there").send(signal.SIGSTOP).send(signal.SIGCONT).at("on")
    assert program.send(signal.SIGTERM).end(2)[0] == 143


def test_children_inherit_no_signal_handling():
    """Workers that prepare data: nothing is blocked or ignored in them."""
    code = """
import subprocess
with StopRequest():
    child = subprocess.Popen([sys.executable, "-c", "print(open('/proc/self/status').read())"], stdout=subprocess.PIPE)
    status = dict(line.split(":", 1) for line in child.communicate()[0].decode().splitlines() if ":" in line)
    say(int(status["SigBlk"], 16) & sum(1 << n - 1 for n in (1, 2, 10, 15)))
    say(int(status["SigIgn"], 16) & sum(1 << n - 1 for n in (1, 2, 10, 15)))
"""
    assert Program(code).end() == (0, "0\n0\n", "")


@pytest.mark.parametrize("number", ALL)
def test_during_the_imports_of_train(number):
    """Before there is anything that could be told: one line at most, and no traceback."""
    code = """
import builtins, runpy
load = builtins.__import__
def slow(name, *rest, **more):
    if name.startswith("jax"):
        say("there"); time.sleep(20)
    return load(name, *rest, **more)
builtins.__import__ = slow
sys.argv = ["train", "--help"]
runpy.run_module("spiral_jax.train", run_name="__main__", alter_sys=True)
"""
    assert Program(code).at("there").send(number).end(2) == (128 + number, "", "stopped with nothing to save\n")
