"""Named choices that a file of the user's own can add to: topologies, poolings, allocations, optimizers, schedules.

A registry is filled when the modules that register are imported, and read when a configuration is checked. What the
package did not register itself is code of the user's own: the hash of its file is kept with the run, and whatever it
raises is reported in one line that names the file.
"""

import dataclasses
import difflib
import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from spiral_jax.errors import SpiralError, require

T = TypeVar("T")
PACKAGE = Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class Code:
    """Where a registered thing was defined.

    Attributes:
      file: the absolute path of the file; for a cell of a notebook what Python calls it.
      line: the line of the registration.
      sha256: the file's, in hexadecimal; empty where there is no file, and for files of the package.
    """

    file: str
    line: int
    sha256: str

    @property
    def is_ours(self) -> bool:
        """Whether the package itself registered it."""
        return PACKAGE in Path(self.file).parents


class Registry(Generic[T]):
    """The things that one field of the configuration can name, in the order in which they were registered."""

    def __init__(self, field: str, base: type | None = None):
        """An empty registry.

        Args:
          field: the field of the configuration, `room.field`, as errors name it.
          base: what registered classes are subclasses of; None for anything callable.
        """
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
        is_name = isinstance(name, str) and name != ""
        require(is_name, f"{self.field}: the name to register", name, 'a name, as in @register("mine")')
        caller = sys._getframe(1)
        code = _code_of(caller.f_code.co_filename, caller.f_lineno)

        def add(value: T) -> T:
            where = f"{self.field}: {name!r}, registered in {code.file}:{code.line},"
            if self._base is not None and not (isinstance(value, type) and issubclass(value, self._base)):
                raise SpiralError(f"{where} is no {self._base.__name__}; allowed: its subclasses")
            require(callable(value), where, value, "a function")
            before = self._entries.get(name)
            if before is not None and not _is_same_file_again(before[1], code):
                raise SpiralError(
                    f"{where} has that name already from {before[1].file}:{before[1].line}; allowed: another name"
                )
            self._entries[name] = value, code
            return value

        return add

    def __getitem__(self, name: str) -> T:
        """What is registered under a name; raises SpiralError if nothing is."""
        self.check(name)
        return self._entries[name][0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def check(self, name: str) -> None:
        """Raises SpiralError if nothing is registered under a name."""
        if name not in self._entries:
            near = difflib.get_close_matches(str(name), self._entries, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise SpiralError(
                f"{self.field} is {name!r}; {hint}allowed: {', '.join(self._entries)}, or one of your own with "
                "--import=FILE, the file that registers it"
            )

    def chosen(self, config: Mapping[str, Any]) -> Any:
        """What the field holds in a run's configuration, given as nested mappings; None if it is missing."""
        room, field = self.field.split(".")
        fields = config.get(room)
        return fields.get(field) if isinstance(fields, Mapping) else None

    def code(self, name: str) -> Code:
        """Where what has a name was registered; raises SpiralError if nothing is."""
        self.check(name)
        return self._entries[name][1]


def _is_same_file_again(before: Code, now: Code) -> bool:
    """Whether `now` is `before` executed again, perhaps changed or as a copy; in notebooks it always is."""
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
