"""A verb with a fault put in: `python -m tests.faults POINT[@STEP]:ACTION ... -- VERB --flag=value ...`.

    python -m tests.faults step@5:kill -- train --config=experiments/quickstart.py --workdir=runs/trial

A fault replaces a function of ours by one that acts and then goes on, before the verb runs; the product knows nothing
of it. Where orbax acts, an audit hook hears the system call. Each fault acts once: at its step, or the first time.
"""

import importlib
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

POINTS = {
    "start": ("spiral_jax.train", "make_workdir"),
    "compile": ("jax.stages", "Lowered.compile"),
    "step": ("spiral_jax.training.tracer", "Tracer.__call__"),  # before it is dispatched
    "evaluation": ("spiral_jax.evaluation.perplexity", "WindowScorer.__call__"),  # before a batch
    "save": ("spiral_jax.run.checkpoint", "Checkpoints._save"),
    "exit": ("spiral_jax.train", "finish"),
}
EVENTS = {"commit": "os.rename", "rotate": "shutil.rmtree"}  # of a checkpoint's folder
SIGNALS = {"term": signal.SIGTERM, "int": signal.SIGINT, "hup": signal.SIGHUP, "usr1": signal.SIGUSR1,
           "kill": signal.SIGKILL}  # fmt: skip
SECONDS_STOPPED = 2
SECONDS_INTO_COMPILING = 0.1


def install(fault: str, argv: list[str]) -> None:
    """Puts one fault in.

    Args:
      fault: POINT[@STEP]:ACTION.
      argv: of the verb.
    """
    parsed = re.fullmatch(r"(\w+)(?:@(\d+))?:(\w+)", fault)
    if parsed is None or parsed[1] not in POINTS | EVENTS or not (parsed[3] in SIGNALS or parsed[3] in ACTIONS):
        points, actions = ", ".join(POINTS | EVENTS), ", ".join([*SIGNALS, *ACTIONS])
        refuse(f"the fault is {fault!r}; allowed: POINT[@STEP]:ACTION, points {points}, actions {actions}")
    point, step, action = parsed[1], int(parsed[2]) if parsed[2] else None, parsed[3]
    workdir = next((Path(arg.partition("=")[2]) for arg in argv if arg.startswith("--workdir=")), Path())
    left = [True]

    def act() -> None:
        if left and left.pop():
            if action in SIGNALS:
                os.kill(os.getpid(), SIGNALS[action])
            else:
                ACTIONS[action](workdir)

    if action == "nan":
        _poison(step or 1, left)
    elif point in EVENTS:
        _hear(EVENTS[point], workdir / "checkpoints", step, act)
    else:
        _wrap(*POINTS[point], step, act, in_a_thread=point == "compile")


def _wrap(module: str, name: str, step: int | None, act: Callable[[], None], *, in_a_thread: bool) -> None:
    """Replaces a function, or a method, by one that acts first if one of its arguments is the step."""
    holder = importlib.import_module(module)
    *classes, name = name.split(".")
    for part in classes:
        holder = getattr(holder, part)
    original = getattr(holder, name)

    def replacement(*args, **kwargs):
        if step is None or step in [arg for arg in args if type(arg) is int]:
            if in_a_thread:  # while C code has the main thread
                threading.Timer(SECONDS_INTO_COMPILING, act).start()
            else:
                act()
        return original(*args, **kwargs)

    setattr(holder, name, replacement)


def _hear(event: str, folder: Path, step: int | None, act: Callable[[], None]) -> None:
    """Acts when a checkpoint gets its final name (`os.rename`), or is removed (`shutil.rmtree`)."""

    def hook(name: str, args: tuple) -> None:
        if name == event:
            path = Path(os.fsdecode(args[1 if event == "os.rename" else 0]))
            if path.parent == folder and path.name.isdigit() and step in (None, int(path.name)):
                act()

    sys.addaudithook(hook)


def _poison(step: int, left: list[bool]) -> None:
    """Makes one parameter NaN before a step."""
    import jax

    train = importlib.import_module("spiral_jax.train")
    fit = train.fit

    def poisoned_fit(state, steps, *, train_step, **rest):
        numbers = iter(steps)

        def poisoned(state, *batch):
            if next(numbers, None) == step and left and left.pop():
                leaves, tree = jax.tree.flatten(state.params)
                leaves[0] = jax.device_put(leaves[0] * float("nan"), leaves[0].sharding)
                state = state.replace(params=jax.tree.unflatten(tree, leaves))
            return train_step(state, *batch)

        return fit(state, steps, train_step=poisoned, **rest)

    train.fit = poisoned_fit


def _twice(_: Path) -> None:
    """Two SIGTERMs, as some schedulers send them."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGTERM)


def _stop(_: Path) -> None:
    """Stopped, and continued a little later."""
    command = ["sh", "-c", f"sleep {SECONDS_STOPPED}; kill -CONT {os.getpid()}"]
    subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.kill(os.getpid(), signal.SIGSTOP)


def _full(_: Path) -> None:
    """From now on no file can grow, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))


def _flip(workdir: Path) -> None:
    """One bit of the newest checkpoint's largest file flips, and the process dies."""
    while sum(path.name.isdigit() for path in (workdir / "checkpoints").iterdir()) < 2:
        time.sleep(0.01)  # the run is to have another one
    flip(workdir)
    os.kill(os.getpid(), signal.SIGKILL)


def flip(workdir: Path) -> None:
    """Flips one bit in the middle of the largest file of a run's newest checkpoint."""
    newest = max((p for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    file = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 8
    file.write_bytes(content)


ACTIONS = {"twice": _twice, "stop": _stop, "full": _full, "flip": _flip, "nan": lambda _: None}


def run(faults: list[str], argv: list[str]) -> None:
    """Runs a verb with its arguments, after putting the faults in; ends as the verb ends."""
    for fault in faults:
        install(fault, argv)
    verb, sys.argv = argv[0], argv
    # Not by runpy, which would make a second module of it, without the faults.
    module = importlib.import_module(f"spiral_jax.{verb}")
    importlib.import_module("spiral_jax.command").run(verb, module.__doc__, module.define, module.main)


def refuse(line: str) -> NoReturn:
    """Ends as a verb does that is given something else than is allowed."""
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    if "--" not in sys.argv:
        refuse("-- is missing; allowed: FAULT ... -- VERB FLAGS, as in step@5:kill -- train --workdir=runs/mine")
    at = sys.argv.index("--")
    run(sys.argv[1:at], sys.argv[at + 1 :])


if __name__ == "__main__":
    main()
