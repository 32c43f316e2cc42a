"""Named choices that a file of the user's own can add to: topologies, poolings, allocations, optimizers, schedules.

A registry is filled when the modules that register are imported, and is read when a configuration is checked. What the
package did not register itself is somebody's own file: its hash is kept with the run.
"""

import contextlib
import dataclasses
import difflib
import hashlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from spiral_jax.errors import SpiralError

T = TypeVar("T")
PACKAGE = Path(__file__).resolve().parents[1]


@dataclasses.dataclass(frozen=True)
class Code:
    """Where a registered thing was defined.

    Attributes:
      file: absolute path; of a notebook's cell whatever Python calls it.
      line: of the registration.
      sha256: of the file, in hexadecimal; empty where it is no file, or is the package's own.
    """

    file: str
    line: int
    sha256: str

    @property
    def is_ours(self) -> bool:
        """Whether the package itself registered it."""
        return PACKAGE in Path(self.file).parents


class Registry(Generic[T]):
    """The things that one field of the configuration can name."""

    def __init__(self, field: str, base: type | None = None):
        """`field` is named in errors; registered classes are subclasses of `base`, or with None anything callable."""
        self.field = field
        self._base = base
        self._entries: dict[str, tuple[T, Code]] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """A decorator that registers a class or function under a name.

        The same file may be executed again, as experiment files are, or a copy of it; a file that has changed replaces
        what it registered before.

        Raises:
          SpiralError: something else has the name, or what is registered is not of the kind.
        """
        if not isinstance(name, str) or not name:
            raise SpiralError(f'{self.field}: register is given {name!r}; allowed: a name, as in @register("mine")')
        caller = sys._getframe(1)
        code = _code_of(caller.f_code.co_filename, caller.f_lineno)

        def add(value: T) -> T:
            where = f"{self.field}: {name!r}, registered in {code.file}:{code.line},"
            if self._base is not None and not (isinstance(value, type) and issubclass(value, self._base)):
                raise SpiralError(f"{where} is no {self._base.__name__}; allowed: its subclasses")
            if not callable(value):
                raise SpiralError(f"{where} is {value!r}; allowed: a function")
            before = self._entries.get(name)
            if before is not None and not _is_same_file_again(before[1], code):
                raise SpiralError(
                    f"{where} has that name already from {before[1].file}:{before[1].line}; allowed: another name"
                )
            self._entries[name] = value, code
            return value

        return add

    def __getitem__(self, name: str) -> T:
        """What is registered under a name.

        Raises:
          SpiralError: nothing is.
        """
        self.check(name)
        return self._entries[name][0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def check(self, name: str) -> None:
        """Raises SpiralError if nothing is registered under `name`."""
        if name not in self._entries:
            near = difflib.get_close_matches(str(name), self._entries, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise SpiralError(
                f"{self.field} is {name!r}; {hint}allowed: {', '.join(self._entries)}, or one of your own with "
                "--import=FILE, the file that registers it"
            )

    def chosen(self, config: Mapping[str, Any]) -> Any:
        """What a run's configuration, as nested mappings, has in the field; None if it lacks it."""
        room, field = self.field.split(".")
        return (config.get(room) or {}).get(field)

    def code(self, name: str) -> Code:
        """Where `name` was registered."""
        self.check(name)
        return self._entries[name][1]


@contextlib.contextmanager
def guarded(where: str, file: str) -> Iterator[None]:
    """Whatever somebody's own code raises becomes one line: what it is for, the last line of its file, the reason.

    Args:
      where: how errors begin.
      file: its code's.

    Raises:
      SpiralError: the block raised something.
    """
    try:
        yield
    except SpiralError:
        raise
    except Exception as error:
        raise blamed(error, where, file) from error


def blamed(error: Exception, where: str, file: str) -> SpiralError:
    """The line that `guarded` makes of what somebody's own code raised."""
    lines = lines_in(error, file)
    place = f", line {lines[-1]}" if lines else ""
    return SpiralError(f"{where}{place}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


def lines_in(error: Exception, file: str) -> list[int]:
    """Lines of a file (its real path) that an exception came through, the outermost first."""
    frames = traceback.extract_tb(error.__traceback__)
    return [frame.lineno for frame in frames if os.path.realpath(frame.filename) == file]


def _is_same_file_again(before: Code, now: Code) -> bool:
    """Whether a registration is one of before, executed again, perhaps changed or as a copy; notebooks' always are."""
    if not now.sha256 and not before.sha256 and not before.is_ours:
        return True
    if before.sha256 == now.sha256:
        return before.line == now.line
    return before.file == now.file


def _code_of(file: str, line: int) -> Code:
    path = Path(file).resolve()
    if PACKAGE in path.parents:
        return Code(str(path), line, "")
    try:
        return Code(str(path), line, hashlib.sha256(path.read_bytes()).hexdigest())
    except OSError:
        return Code(file, line, "")
