"""Several processes as one run: they find each other, take process 0's word, and end together.

Process 0 alone prints and writes; `from_main` hands its findings to the others. A process that fails says so through
the coordinator before it ends, and a thread of each of the others waits for just that: nobody is left in a collective.
`jax.distributed` is joined by a single process as well, over a port of its own on the loopback interface.
"""

import collections
import contextlib
import dataclasses
import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
from absl import flags

# The coordinator's keys and barriers have no public door; orbax goes through this one, too.
from jax._src import distributed as jax_distributed
from jax._src import xla_bridge

from spiral_jax.errors import SpiralError

_FAILURE = "spiral_jax/failure"  # the key of the first process that failed; "{}" when all have finished
_LONG_MS = 7 * 24 * 3600 * 1000  # a process that dies ends such a wait: the coordinator misses its heartbeats
_SECONDS_FOR_OTHERS = 5.0  # that process 0, which is the coordinator, outlives a failure
_SECONDS_TO_END = 1.0
_SECONDS_FOR_THE_CAUSE = 2.0
_SECONDS_TO_SEE_A_FILE = 10.0  # network file systems cache directories
_SECONDS_BETWEEN_LINES = 60.0

_calls = itertools.count()  # all processes make the same calls in the same order
_ending = threading.Lock()  # taken by whichever thread ends this process, and never given back
_watcher: threading.Thread | None = None
_is_joining = False


@dataclasses.dataclass(frozen=True)
class _Place:
    """What flags or the environment say about this process among the others; None for what they leave out."""

    coordinator_address: str | None
    num_processes: int | None
    process_id: int | None


def define(values: flags.FlagValues) -> None:
    """The flags of verbs that run on several processes."""
    flags.DEFINE_string(
        "coordinator_address", None, "HOST:PORT of process 0; or JAX_COORDINATOR_ADDRESS", flag_values=values
    )
    flags.DEFINE_integer("num_processes", None, "how many there are; or JAX_NUM_PROCESSES", flag_values=values)
    flags.DEFINE_integer("process_id", None, "which one this is, from 0; or JAX_PROCESS_ID", flag_values=values)
    flags.DEFINE_integer("initialization_timeout", 300, "seconds to wait for the others", flag_values=values)


def initialize(values: flags.FlagValues) -> None:
    """Joins the other processes, before anything is computed.

    Flags come before the environment; on a cluster that jax knows (TPU pods, Slurm, Open MPI, Kubernetes) neither is
    needed. Where nothing is given or found, this is the only process. Later calls do nothing.

    Args:
      values: with the flags of `define`.

    Raises:
      SpiralError: flags that contradict each other, or processes that did not arrive in time.
    """
    place, seconds = _place(values), values.initialization_timeout
    if seconds < 1:
        raise SpiralError(f"--initialization_timeout: found {seconds}; allowed: 1 or more seconds")
    # A program that has used jax before it calls a verb is one process, and it is too late to tell jax so.
    if jax.distributed.is_initialized() or xla_bridge.backends_are_initialized():
        if place.num_processes not in (None, num_processes()):
            raise SpiralError(
                f"--num_processes: found {place.num_processes}; allowed: {num_processes()}, as jax has started here"
            )
        return
    _join(place, seconds)
    handler = signal.getsignal(signal.SIGTERM)
    if handler is not None and threading.current_thread() is threading.main_thread():
        # jax took SIGTERM as a notice that nobody here reads: a process that is not training would outlive it.
        signal.signal(signal.SIGTERM, handler)
    global _watcher
    if is_several():
        _keep_stdout()
        _watcher = threading.Thread(target=_watch, name="failures of other processes", daemon=True)
        _watcher.start()
    else:
        # CPU devices of one process exchange data in memory; jax would now have them do it over sockets.
        jax.config.update("jax_cpu_collectives_implementation", None)


def num_processes() -> int:
    return jax_distributed.global_state.num_processes


def process_id() -> int:
    return jax_distributed.global_state.process_id


def is_several() -> bool:
    return num_processes() > 1


def is_main() -> bool:
    """Whether this is the process that prints and writes."""
    return process_id() == 0


def say(line: str, file: TextIO | None = None) -> None:
    """Prints on process 0 alone, on stdout unless told otherwise."""
    if is_main():
        print(line, file=file, flush=True)


def from_main(what: str, make: Callable[[], Any]) -> Any:
    """What `make` returns on process 0, on every process; the others wait for it as long as it takes.

    Every process has to make the same calls in the same order.

    Args:
      what: what is waited for, in a word or two.
      make: called on process 0 alone; returns JSON values.
    """
    if not is_several():
        return make()
    key = f"spiral_jax/{next(_calls)}/{what}"
    if is_main():
        value = make()
        _client().key_value_set(key, json.dumps(value))
        return value
    start = last = time.monotonic()
    while (text := _get(key, seconds=1.0)) is None:
        if time.monotonic() - last > _SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            print(f"process {process_id()}: waiting for process 0: {what} ({last - start:.0f} s)",
                  file=sys.stderr, flush=True)  # fmt: skip
    return json.loads(text)


def check_same_config(config: Mapping[str, Any]) -> None:
    """Whether every process was given the configuration of process 0: others would hang in their first collective.

    Raises:
      SpiralError: naming the field that differs.
    """
    mine = json.loads(json.dumps(config))  # tuples as lists
    for field, theirs, ours in _differences(from_main("configuration", lambda: mine), mine):
        raise SpiralError(
            f"{field}: found {ours!r} on process {process_id()}; allowed: the same on every process ({theirs!r})"
        )


def check_shared(folder: Path, flag: str) -> None:
    """Whether all processes see the same folder.

    Raises:
      SpiralError: naming `flag`.
    """
    if not is_several():
        return
    file = folder / ".shared"
    content = from_main(flag, lambda: _leave_word(file))
    deadline = time.monotonic() + _SECONDS_TO_SEE_A_FILE
    while not (file.exists() and file.read_text() == content):
        if time.monotonic() > deadline:
            raise SpiralError(
                f"{flag}: found {folder}, which process {process_id()} does not share with process 0; "
                "allowed: the same folder on a file system that all processes see"
            )
        time.sleep(0.1)
    barrier("folder seen")
    if is_main():
        file.unlink()


def barrier(what: str) -> None:
    """Returns when every process has come here."""
    if is_several():
        _client().wait_at_barrier(f"spiral_jax/{next(_calls)}/{what}", _LONG_MS)


def rows_of_process(sharding: jax.sharding.Sharding, batch_size: int) -> tuple[int, int]:
    """Which part of a batch this process has on its devices.

    Processes that differ only along an axis which does not cut the batch (`tensor`) have the same part.

    Args:
      sharding: of arrays [B, ..].
      batch_size: B.

    Returns:
      The index of the part and how many there are; parts are of one size.

    Raises:
      SpiralError: some processes have some of their rows in common.
    """
    spans = collections.defaultdict(set)
    for device, index in sharding.devices_indices_map((batch_size, 1)).items():
        spans[device.process_index].add(index[0].indices(batch_size)[:2])
    parts = sorted({tuple(sorted(part)) for part in spans.values()})
    if sum(len(part) for part in parts) != len(set().union(*parts)) or len({len(part) for part in parts}) > 1:
        raise SpiralError(
            f"mesh: cuts a batch so that its parts on the {len(spans)} processes overlap; allowed: mesh.tensor that "
            "divides a process's devices, or is a multiple of them"
        )
    return parts.index(tuple(sorted(spans[jax.process_index()]))), len(parts)


def finish() -> None:
    """Waits until every process has done its work; until then the failure of any of them still ends all."""
    if not is_several():
        return
    barrier("finished")
    if is_main():
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _client().key_value_set(_FAILURE, "{}")
    _watcher.join(_SECONDS_FOR_OTHERS)


def wait_for_the_cause() -> None:
    """Before an unexpected error is reported: where another process failed first, its failure ends this one, too."""
    if is_several():
        time.sleep(_SECONDS_FOR_THE_CAUSE)


def leave(status: int, text: str) -> None:
    """Ends one of several processes and, with its last words, the others; returns where it is the only one.

    Args:
      status: the exit status, of all of them.
      text: for stderr; its last line is what the others print.
    """
    if not (is_several() or _is_joining):
        return
    _ending.acquire()
    _print_error(text)
    if _watcher is not None:
        failure = {"process": process_id(), "status": status, "line": text.strip().splitlines()[-1]}
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one was first
            _client().key_value_set(_FAILURE, json.dumps(failure))
    _exit(status)


def _place(values: flags.FlagValues) -> _Place:
    address = values.coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS") or None
    count, count_name = _number(values.num_processes, "num_processes")
    number, number_name = _number(values.process_id, "process_id")
    if address is not None:
        port = address.rpartition(":")[2]
        if ":" not in address or not (port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16):
            raise SpiralError(f"--coordinator_address: found {address!r}; allowed: HOST:PORT of process 0")
    if count is not None and count < 1:
        raise SpiralError(f"{count_name}: found {count}; allowed: 1 or more")
    if number is not None and not 0 <= number < (count or sys.maxsize):
        allowed = "0 or more" if count is None else f"0 to {count - 1}, with {count} processes"
        raise SpiralError(f"{number_name}: found {number}; allowed: {allowed}")
    return _Place(address, count, 0 if count == 1 else number)


def _number(flag: int | None, name: str) -> tuple[int | None, str]:
    """The value of a flag, or of the environment in its place, and what it was given as."""
    variable = f"JAX_{name.upper()}"
    text = os.environ.get(variable)
    if flag is not None or not text:
        return flag, f"--{name}"
    try:
        return int(text), variable
    except ValueError:
        raise SpiralError(f"{variable}: found {text!r}; allowed: a whole number") from None


def _join(place: _Place, seconds: int) -> None:
    """`jax.distributed.initialize`, with an error where that would end the process without a word of sense."""
    failures = []

    def join() -> None:
        try:
            _join_without_deadline(place, seconds)
        except Exception as error:
            failures.append(error)

    global _is_joining
    _is_joining = True
    thread = threading.Thread(target=join, name="jax.distributed.initialize", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise SpiralError(_timed_out(place, seconds))
    _is_joining = False
    if not failures:
        return
    (error,) = failures
    if isinstance(error, SpiralError):
        raise error
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    at = _address(place)
    raise SpiralError(f"--coordinator_address: found {at or 'none'}; process cannot join there: {reason}") from error


def _join_without_deadline(place: _Place, seconds: int) -> None:
    given = dataclasses.asdict(place)
    # jax's own deadline aborts the process: ours comes first.
    patience = {"initialization_timeout": 2 * seconds + 60}
    alone = place.coordinator_address is None and (
        place.num_processes == 1 or place.num_processes is place.process_id is None
    )
    if not (alone and place.num_processes == 1):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Kubernetes without its package
                jax.distributed.initialize(
                    place.coordinator_address, place.num_processes, place.process_id,
                    coordinator_bind_address=_bind_address(place.coordinator_address), **patience
                )  # fmt: skip
            return
        except ValueError as error:
            if "must be defined" not in str(error) and "should be defined" not in str(error):
                raise
    if not alone:
        missing = ", ".join(f"--{name}" for name, value in given.items() if value is None)
        raise SpiralError(f"{missing}: found nothing, and no cluster that says it; allowed: all three of "
                          "--coordinator_address, --num_processes and --process_id, or none of them")  # fmt: skip
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    jax.distributed.initialize(
        address, 1, 0, coordinator_bind_address=address, cluster_detection_method="deactivate", **patience
    )


def _bind_address(address: str | None) -> str | None:
    """Where process 0 listens: not on every interface if the others come by the loopback one; None for jax's choice."""
    if address is None or "JAX_COORDINATOR_BIND_ADDRESS" in os.environ:
        return None
    host, _, port = address.rpartition(":")
    return f"127.0.0.1:{port}" if host == "localhost" or host.startswith("127.") else None


def _address(place: _Place) -> str | None:
    return place.coordinator_address or jax_distributed.global_state.coordinator_address


def _timed_out(place: _Place, seconds: int) -> str:
    """What was waited for, in a line."""
    state, address = jax_distributed.global_state, _address(place)
    if address is None:
        return f"--coordinator_address: found none, and the cluster did not say it within {seconds} s"
    me = state.process_id if place.process_id is None else place.process_id
    count = place.num_processes
    others = [] if count is None else [i for i in range(count) if i != me]
    named = ", ".join(map(str, others[:8])) + (", ..." if len(others) > 8 else "")
    named = f"process{'es' if len(others) > 1 else ''} {named}" if others else "the other processes"
    if me == 0:
        waited = f"{named}: not all arrived"
    elif _answers(address):
        waited = f"{named}: process 0 is there, but not all others arrived"
    else:
        waited = "process 0, and nothing answers there"
    return (f"--coordinator_address: found {address}, where process {me} waited {seconds} s for {waited}; "
            "allowed: all processes started within --initialization_timeout")  # fmt: skip


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
        return True
    except OSError:
        return False


def _keep_stdout() -> None:
    """Leaves stdout to Python: gloo, which is the collectives of CPUs, greets every peer of every group on it."""
    sys.stdout.flush()
    own = os.dup(1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    sys.stdout = os.fdopen(own, "w", buffering=1)


def _client():
    return jax_distributed.global_state.client


def _get(key: str, seconds: float) -> str | None:
    """A key's value once it has one; None if it has none for so long."""
    try:
        return _client().blocking_key_value_get(key, int(1000 * seconds))
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        return None


def _watch() -> None:
    """Ends this process when another one has failed; this one may be in a collective that never returns."""
    try:
        while (text := _get(_FAILURE, seconds=3600)) is None:
            pass
    except jax.errors.JaxRuntimeError:
        return  # the coordinator is gone, and jax ends the process
    if failure := json.loads(text):
        _ending.acquire()
        _print_error(f"error: process {failure['process']}: {failure['line'].removeprefix('error: ')}")
        _exit(failure["status"])


def _exit(status: int) -> None:
    """Ends the process at once: on its usual way out it would wait for the others, who wait for it."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    if _watcher is not None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            _client().key_value_set(f"spiral_jax/left/{process_id()}", "")
            deadline = time.monotonic() + _SECONDS_FOR_OTHERS
            for other in range(1, num_processes()) if is_main() else ():
                _get(f"spiral_jax/left/{other}", max(0.01, deadline - time.monotonic()))
            if is_main():
                # They have said so, and now end: a process that outlives the coordinator is aborted by jax.
                time.sleep(_SECONDS_TO_END)
    os._exit(status)


def _print_error(text: str) -> None:
    with contextlib.suppress(Exception):
        print(text.rstrip(), file=sys.stderr, flush=True)


def _leave_word(file: Path) -> str:
    word = uuid.uuid4().hex
    file.write_text(word)
    return word


def _differences(theirs: Any, ours: Any, field: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        for name in sorted(theirs.keys() | ours.keys()):
            yield from _differences(theirs.get(name), ours.get(name), f"{field}.{name}" if field else name)
    elif theirs != ours:
        yield field, theirs, ours
