"""A run punished in every way that can happen, and started again until it ends: `python -m tests.punish [CELL ...]`.

A cell is a kind of fault at a moment, as `SIGKILL/save`. Each prints a row: how every start ended, steps done twice,
seconds it took, and whether the last checkpoint is, bit by bit, that of the run that was left alone. Starts are forks
of one process that has imported everything, so that a cell takes seconds.
"""

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

STEPS, EVERY = 12, 4  # of the run, and between checkpoints
SECONDS_AT_MOST = 60.0  # for one start
CONFIG = """
from spiral_jax.run.config import default_config


def get_config():
    c = default_config()
    c.model.update(dict(vocab_size=264, d_model=16, num_heads=2, prelude_layers=1, core_layers=0, coda_layers=0,
                        chunks=(), rotary_fraction=0.5, dtype="float32"))
    c.train.update(dict(steps=STEPS, batch_size=4, sequence_length=32, loss_block=32))
    c.optimizer.update(dict(peak_learning_rate=1e-2, warmup_steps=3))
    c.data.update(dict(stores=("FOLDER/stores/train",), validation_store="FOLDER/stores/validation"))
    c.mesh.fsdp = 2
    c.deadlines.silence_seconds = 8.0
    c.checkpoint.update(dict(every_steps=EVERY, keep=2))
    c.evaluation.update(dict(every_steps=5, batches=4))
    c.summary.update(dict(sample_tokens=0, plot=False))
    return c
"""
TEXT = " ".join(f"{n} times {n} is {n * n}." for n in range(100, 215))

# Every kind with the moments at which it makes a difference, and where it is put in.
STEP, SAVED = 7, 8
LATE = "step@11"  # there are two checkpoints
MOMENTS = {
    "start": "start", "compile": "compile", "step": f"step@{STEP}", "evaluation": "evaluation",
    "save": f"save@{SAVED}", "commit": f"commit@{SAVED}", "rotate": f"rotate@{EVERY}", "exit": "exit",
}  # fmt: skip
KINDS = {
    "SIGKILL": ("kill", tuple(MOMENTS)),
    "SIGTERM": ("term", tuple(MOMENTS)),
    "twice": ("twice", ("compile", "step", "evaluation", "save")),
    "SIGSTOP": ("stop", ("compile", "step", "evaluation", "save")),
    "disk full": ("full", ("start", "step", "save", "exit")),
    "non-finite": ("nan", ("step",)),
    "flipped bit": ("flip", ("step", "exit")),
    "dead peer": ("kill", ("start", "compile", "step", "evaluation", "save")),
}
CELLS = {f"{kind}/{moment}": (action, moment) for kind, (action, moments) in KINDS.items() for moment in moments}


class Ended(NamedTuple):
    """One start: its exit status (negative: the signal that killed it), and what it printed."""

    status: int
    out: str
    err: str


class Row(NamedTuple):
    """What became of a punished run.

    Attributes:
      cell: its name.
      statuses: of the starts, in order; of two processes the one that was punished, then the other.
      steps_lost: done twice.
      seconds: of all starts.
      same: whether it ended bit by bit as the run that was left alone.
      lines: of stderr, of all starts.
    """

    cell: str
    statuses: tuple[tuple[int, ...], ...]
    steps_lost: int
    seconds: float
    same: bool
    lines: tuple[str, ...]


class Starter:
    """Starts verbs as forks of a process that has imported them."""

    def __init__(self, folder: Path):
        """`folder` takes what the starts print."""
        self._folder, self._count = folder, 0
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "jax"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        root = Path(__file__).parents[1]
        self._server = subprocess.Popen(
            [sys.executable, "-c", "from tests.punish import serve; serve()"], cwd=root, text=True, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        self._ask({})  # everything is imported

    def run(self, *starts: tuple[list[str], int, list[str]]) -> list[Ended]:
        """Runs verbs side by side until all have ended; those that do not are killed.

        Args:
          starts: faults, number of CPU devices, and the verb with its flags, of each.
        """
        files = []
        for faults, devices, argv in starts:
            self._count += 1
            out, err = (self._folder / f"{self._count}.{name}" for name in ("out", "err"))
            files.append((out, err))
            self._ask({"faults": faults, "devices": devices, "argv": argv, "out": str(out), "err": str(err)})
        statuses = self._ask({"wait": SECONDS_AT_MOST})
        texts = [[file.read_text(encoding="utf-8") for file in pair] for pair in files]
        return [Ended(status, *pair) for status, pair in zip(statuses, texts, strict=True)]

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait(10)

    def _ask(self, request: dict):
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        ready, _, _ = select.select([self._server.stdout], [], [], 2 * SECONDS_AT_MOST)
        assert ready, "the starter hangs"
        return json.loads(self._server.stdout.readline())


def serve() -> None:
    """What a `Starter` talks to: forks at every request, waits when asked to."""
    import spiral_jax.train  # noqa: F401  so that forks need not
    from tests import faults

    children: list[tuple[int, list[subprocess.Popen]]] = []
    for line in sys.stdin:
        request = json.loads(line)
        answer = None
        if "argv" in request:
            # By pipes: on a disk that is full a start still says what it has to say.
            pipes = [subprocess.Popen(["tee", request[name]], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
                     for name in ("out", "err")]  # fmt: skip
            pid = os.fork()
            if pid == 0:
                _become([pipe.stdin.fileno() for pipe in pipes], request, faults.run)
            for pipe in pipes:
                pipe.stdin.close()
            children.append((pid, pipes))
        elif "wait" in request:
            answer = [_wait(pid, request["wait"]) for pid, _ in children]
            for pipe in [pipe for _, pipes in children for pipe in pipes]:
                pipe.wait()
            children.clear()
        print(json.dumps(answer), flush=True)


def _become(streams: list[int], request: dict, run) -> None:
    """In a fork: the verb."""
    os.setsid()
    for number, stream in enumerate(streams, 1):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdout, sys.stderr = open(1, "w", encoding="utf-8"), open(2, "w", encoding="utf-8", buffering=1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={request['devices']}"
    status = 1
    try:
        run(request["faults"], request["argv"])
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        # As the interpreter ends: handlers registered with atexit, and threads that are waited for, may hang or speak.
        import atexit
        import threading

        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(pid: int, seconds: float) -> int:
    deadline = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.kill(pid, signal.SIGCONT)
            os.waitpid(pid, 0)
            return -signal.SIGALRM  # as if it had been: no start ends so by itself
        time.sleep(0.01)


class Punisher:
    """Runs cells in a folder."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        (folder / "text.txt").write_text(TEXT, encoding="utf-8")
        config = CONFIG.replace("STEPS", str(STEPS)).replace("EVERY", str(EVERY))
        (folder / "config.py").write_text(config.replace("FOLDER", str(folder)), encoding="utf-8")
        self._starter = Starter(folder)
        argv = ["prepare", f"--input={folder / 'text.txt'}", f"--output={folder / 'stores'}", "--tokenizer=bytes",
                "--validation_fraction=0.3"]  # fmt: skip
        (ended,) = self._starter.run(([], 1, argv))
        assert ended.status == 0, ended
        self._ports = iter(range(20000 + os.getpid() % 9000, 40000))
        self._ends: dict[bool, dict] = {}

    def close(self) -> None:
        self._starter.close()

    def straight(self, several: bool) -> dict:
        """Digests of the last checkpoint of the run that is left alone."""
        if several not in self._ends:
            workdir = self._folder / f"straight-{several}"
            ended = self._start(workdir, [], several)
            assert all(one.status == 0 for one in ended), ended
            self._ends[several] = _arrays(workdir)
        return self._ends[several]

    def row(self, cell: str) -> Row:
        """Punishes a run, and starts it until it ends."""
        action, moment = CELLS[cell]
        several = cell.startswith("dead peer")
        straight = self.straight(several)
        workdir = self._folder / cell.replace("/", "-").replace(" ", "-")
        shutil.rmtree(workdir, ignore_errors=True)
        begun = time.monotonic()
        statuses, lines, lost = [], [], 0
        faults = [f"{LATE if action == 'flip' and moment == 'step' else MOMENTS[moment]}:{action}"]
        for _ in range(4):
            done = _last_step(workdir)
            ended = self._start(workdir, faults, several)
            lost += max(done - _resumed_after(ended[-1].out), 0) if statuses else 0
            statuses.append(tuple(one.status for one in ended))
            lines += [line for one in ended for line in one.err.splitlines()]
            if all(one.status == 0 for one in ended):
                break
            faults = []
        seconds, same = time.monotonic() - begun, False
        with contextlib.suppress(OSError, ValueError, KeyError):
            same = _arrays(workdir) == straight
        return Row(cell, tuple(statuses), lost, seconds, same, tuple(lines))

    def _start(self, workdir: Path, faults: list[str], several: bool) -> list[Ended]:
        argv = ["train", f"--config={self._folder / 'config.py'}", f"--workdir={workdir}"]
        if not several:
            return self._starter.run((faults, 2, argv))
        argv += [f"--coordinator_address=127.0.0.1:{next(self._ports)}", "--num_processes=2"]
        pair = [[*argv, f"--process_id={i}"] for i in (0, 1)]
        # The one that is punished first, so that the last one's output says how the run went on.
        return self._starter.run((faults, 1, pair[1]), ([], 1, pair[0]))


def _last_step(workdir: Path) -> int:
    """The newest step in metrics.jsonl."""
    steps = [0]
    with contextlib.suppress(OSError):
        for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                steps.append(json.loads(line)["step"])
    return max(steps)


def _resumed_after(out: str) -> int:
    """The step a start went on from; as many as there are if it did not get so far."""
    found = [line.split()[3] for line in out.splitlines() if line.startswith("resuming after step ")]
    if found:
        return int(found[0])
    return 0 if "\nstep " in out else STEPS


def _arrays(workdir: Path) -> dict:
    """Digests of all arrays of the last checkpoint."""
    (file,) = (workdir / "checkpoints" / str(STEPS) / "meta").glob("metadata")
    meta = json.loads(file.read_text(encoding="utf-8"))
    return meta["arrays"]


@contextlib.contextmanager
def punisher(folder: Path) -> Iterator[Punisher]:
    made = Punisher(folder)
    try:
        yield made
    finally:
        made.close()


def main() -> None:
    cells = sys.argv[1:] or list(CELLS)
    unknown = [cell for cell in cells if cell not in CELLS]
    if unknown:
        from tests import faults

        faults.refuse(f"the cell is {unknown[0]!r}; allowed: {', '.join(CELLS)}")
    print(
        "| kind / moment | exit statuses | steps lost | seconds | ends bitwise | last line |\n|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder, punisher(Path(folder)) as made:
        for cell in cells:
            row = made.row(cell)
            ends = "; ".join(" ".join(map(str, start)) for start in row.statuses)
            last = row.lines[-1] if row.lines else ""
            same = "yes" if row.same else "NO"
            print(f"| {cell} | {ends} | {row.steps_lost} | {row.seconds:.1f} | {same} | {last[:160]} |", flush=True)


if __name__ == "__main__":
    main()
