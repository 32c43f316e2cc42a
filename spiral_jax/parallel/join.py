"""`jax.distributed.initialize`, with an error where that would end the process without a word of sense."""

import concurrent.futures
import dataclasses
import functools
import math
import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Sequence

import jax
from absl import flags

# These say what jax says in public only once it has touched the devices, and hold the key-value store that has no
# public door; orbax goes through them, too.
from jax._src.distributed import global_state
from jax._src.xla_bridge import backends_are_initialized

from spiral_jax.errors import SpiralError, require
from spiral_jax.parallel.cluster import (
    Launched,
    address_of_process_0,
    gpus_of_process,
    is_alone,
    launched,
    visible_gpus,
)
from spiral_jax.parallel.coordinator import CoordinatorLost, check_port, connections_to
from spiral_jax.parallel.process_flags import Place, place_of
from spiral_jax.parallel.processes import ALONE, Processes
from spiral_jax.progress import duration, in_thread

_SECONDS_TO_FIRST_LINE, _SECONDS_BETWEEN_LINES = 15.0, 60.0
_ALL_THREE = "all three of --coordinator_address, --num_processes and --process_id"


class Unjoined(Exception):
    """Its cause ended the wait for the others, but jax waits on in a thread: the process has to end by `os._exit`."""


def join(values: flags.FlagValues, silence: float = 60.0) -> Processes:
    """Joins the other processes, before anything is computed.

    Flags come before the environment; on a cluster that jax knows (TPU pods, Slurm, Open MPI, indexed jobs of
    Kubernetes) neither is needed. Where nothing is given or found, this is the only process, and joins itself: orbax
    asks jax.distributed about SIGTERM. Where jax has started before, its processes are what there is.

    Args:
      values: with the flags of `process_flags.define_processes`.
      silence: seconds after which `Ending` takes a process that says nothing for gone; jax waits longer.

    Raises:
      SpiralError: flags that contradict each other or what jax has started with, or by which jax cannot join.
      Unjoined: processes that did not arrive in time, or Ctrl-C before they did.
    """
    started, lost = launched(os.environ), CoordinatorLost()
    place = _completed(place_of(values), started)
    if jax.distributed.is_initialized() or backends_are_initialized():
        count = global_state.num_processes
        require(
            place.num_processes in (None, count), "--num_processes", place.num_processes, f"{count}, as jax has started"
        )
    else:
        gpus, note = gpus_of_process(None if place.num_processes == 1 else started, visible_gpus(os.environ))
        _initialize_in_time(place, started, gpus, silence, lost)
        if note and global_state.process_id == 0:
            print(note, file=sys.stderr, flush=True)
        handler = signal.getsignal(signal.SIGTERM)
        if handler is not None and threading.current_thread() is threading.main_thread():
            # jax took SIGTERM as a notice that nobody here reads: a process that is not training would outlive it.
            signal.signal(signal.SIGTERM, handler)
        if global_state.num_processes == 1:
            # CPU devices of one process exchange data in memory; jax would now have them do it over sockets.
            jax.config.update("jax_cpu_collectives_implementation", None)
    if global_state.num_processes == 1:
        return ALONE
    return Processes(global_state.process_id, global_state.num_processes, global_state.client, lost)


def _completed(place: Place, started: Launched | None) -> Place:
    """The place with what the launcher says where the user said nothing; a process that is one of one is alone."""
    given = (place.coordinator_address, place.num_processes, place.process_id)
    if given == (None, None, None) and is_alone(os.environ) and started is None:
        return dataclasses.replace(place, num_processes=1, process_id=0)
    if started is None:
        return place
    count = started.count if place.num_processes is None else place.num_processes
    number = started.id if place.process_id is None else place.process_id
    require(number < count, f"{started.launcher}'s number of this process", number, f"0 to {count - 1}, of {count}")
    return dataclasses.replace(place, num_processes=count, process_id=number)


def _initialize_in_time(
    place: Place, started: Launched | None, gpus: Sequence[int], silence: float, lost: CoordinatorLost
) -> None:
    """Initializes in a thread: jax hears no Ctrl-C while it waits, and aborts the process at its own deadline."""
    done = in_thread("jax.distributed.initialize", lambda: _initialize(place, started, gpus, silence, lost))
    begin, wait = time.monotonic(), _SECONDS_TO_FIRST_LINE
    try:
        while (left := begin + place.seconds - time.monotonic()) > 0:
            if concurrent.futures.wait([done], min(wait, left)).done:
                break
            if wait < left and global_state.process_id == 0 and global_state.coordinator_address is not None:
                print(f"waiting for the other processes: {_arrived()} ({duration(time.monotonic() - begin)} of "
                      f"{duration(place.seconds)})", file=sys.stderr, flush=True)  # fmt: skip
            wait = _SECONDS_BETWEEN_LINES
    except KeyboardInterrupt as interrupt:
        raise Unjoined from interrupt
    if not done.done():
        raise Unjoined from _timed_out(place)
    try:
        done.result()
    except SpiralError:
        raise
    except Exception as error:
        reason = " ".join((str(error).strip() or type(error).__name__).split())[:300]
        address = place.coordinator_address or global_state.coordinator_address
        if address is None:
            raise SpiralError(
                f"--coordinator_address: not given, and the cluster does not say it ({reason}); allowed: {_ALL_THREE}, "
                "or --num_processes=1 for a process alone"
            ) from error
        raise SpiralError(
            f"--coordinator_address is {address!r}; allowed: one where this process can join the others ({reason})"
        ) from error


def _initialize(
    place: Place, started: Launched | None, gpus: Sequence[int], silence: float, lost: CoordinatorLost
) -> None:
    """Joins those that the user or a cluster names, and itself where neither does."""
    # Our own deadlines come first.
    initialize = functools.partial(
        jax.distributed.initialize,
        # None lets the environment say it.
        local_device_ids=None if os.environ.get("JAX_LOCAL_DEVICE_IDS") else gpus,
        initialization_timeout=2 * place.seconds + 60,
        heartbeat_timeout_seconds=math.ceil(2 * silence) + 60,
    )
    given = (place.coordinator_address, place.num_processes, place.process_id)
    if given != (None, 1, 0):
        bind_address = _bind_address(place.coordinator_address)
        address = place.coordinator_address or (address_of_process_0(started) if started else None)
        if address is not None and place.process_id == 0:
            check_port(address, bind_address or os.environ.get("JAX_COORDINATOR_BIND_ADDRESS"))
        try:
            with warnings.catch_warnings(), lost.installed():
                warnings.simplefilter("ignore")  # Kubernetes without its package
                initialize(*given, coordinator_bind_address=bind_address)
            return
        except ValueError as error:
            if "be defined" not in str(error):
                raise
        if given != (None, None, None):
            names = ("--coordinator_address", "--num_processes", "--process_id")
            missing = " and ".join(name for name, value in zip(names, given, strict=True) if value is None)
            raise SpiralError(
                f"{missing}: not given by a flag or a cluster; allowed: {_ALL_THREE}, or --num_processes=1 for a "
                "process alone"
            )
        if "JOB_COMPLETION_INDEX" in os.environ:
            print("note: this pod of an indexed job is alone; with the package kubernetes jax would find the others",
                  file=sys.stderr, flush=True)  # fmt: skip
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    initialize(address, 1, 0, coordinator_bind_address=address, cluster_detection_method="deactivate")


def _bind_address(address: str | None) -> str | None:
    """Where process 0 listens: not on every interface if the others come by the loopback one; None for jax's choice."""
    if address is None or "JAX_COORDINATOR_BIND_ADDRESS" in os.environ:
        return None
    host, _, port = address.rpartition(":")
    return f"127.0.0.1:{port}" if host == "localhost" or host.startswith("127.") else None


def _arrived() -> str:
    """How many processes have come to this one, process 0."""
    assert global_state.coordinator_address is not None
    arrived, count = connections_to(global_state.coordinator_address), global_state.num_processes
    if arrived is None:
        return "not all arrived"
    return f"{arrived} of {count} arrived, {max(count - arrived, 0)} missing"


def _timed_out(place: Place) -> SpiralError:
    """Says what was waited for."""
    address, me = global_state.coordinator_address, global_state.process_id
    if address is None:
        given = place.coordinator_address
        return SpiralError(
            f"--coordinator_address is {given!r}, and no cluster said the rest in {place.seconds} s; "
            f"allowed: {_ALL_THREE}"
        )
    count = global_state.num_processes
    waited = f"processes 0 to {count - 1}: {_arrived() if me == 0 else 'not all arrived'}"
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
    except OSError:
        waited = "process 0, and nothing answers there"
    return SpiralError(
        f"--coordinator_address is {address!r}, where process {me} waited {place.seconds} s for {waited}; allowed: all "
        f"{count} started within --initialization_timeout (srun and mpirun start them all), or --num_processes=1 for a "
        "process alone"
    )
