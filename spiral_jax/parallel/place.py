"""Where flags and the environment say that this process stands among those of its run."""

import dataclasses
import os
import sys

from absl import flags

from spiral_jax.errors import SpiralError, require


@dataclasses.dataclass(frozen=True)
class Place:
    """What a user said; None for what is left to a cluster that jax knows.

    Attributes:
      coordinator_address: HOST:PORT of process 0.
      num_processes: how many there are.
      process_id: which one this is, from 0.
      seconds: to wait for the others.
    """

    coordinator_address: str | None
    num_processes: int | None
    process_id: int | None
    seconds: int


def define_processes(values: flags.FlagValues) -> None:
    """The flags of verbs that run on several processes."""
    flags.DEFINE_string(
        "coordinator_address", None, "HOST:PORT of process 0; or JAX_COORDINATOR_ADDRESS", flag_values=values
    )
    flags.DEFINE_integer("num_processes", None, "how many there are; or JAX_NUM_PROCESSES", flag_values=values)
    flags.DEFINE_integer("process_id", None, "which one this is, from 0; or JAX_PROCESS_ID", flag_values=values)
    flags.DEFINE_integer("initialization_timeout", 300, "seconds to wait for the others", flag_values=values)


def place_of(values: flags.FlagValues) -> Place:
    """The place that the flags of `define_processes` give, and the environment where they are silent.

    jax itself reads only the address from the environment.

    Raises:
      SpiralError: a value that is not allowed.
    """
    address = values.coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS") or None
    count, count_name = _number(values.num_processes, "num_processes")
    number, number_name = _number(values.process_id, "process_id")
    if address is not None:
        _, colon, port = address.rpartition(":")
        is_port = port.isascii() and port.isdigit() and 0 < int(port) < 1 << 16
        require(bool(colon) and is_port, "--coordinator_address", address, "HOST:PORT of process 0")
    if count is not None:
        require(count >= 1, count_name, count, "1 or more")
    if number is not None:
        allowed = "0 or more" if count is None else f"0 to {count - 1}, with {count} processes"
        require(0 <= number < (count or sys.maxsize), number_name, number, allowed)
    seconds = values.initialization_timeout
    require(seconds >= 1, "--initialization_timeout", seconds, "1 or more seconds")
    return Place(address, count, 0 if count == 1 else number, seconds)


def _number(flag: int | None, name: str) -> tuple[int | None, str]:
    """The value of a flag, or of the environment in its place, and what it was given as."""
    variable = f"JAX_{name.upper()}"
    text = os.environ.get(variable)
    if flag is not None or not text:
        return flag, f"--{name}"
    try:
        return int(text), variable
    except ValueError:
        raise SpiralError(f"{variable} is {text!r}; allowed: a whole number") from None
