"""What a section has found: checks with what was allowed, and numbers."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from spiral_jax.hardware import GENERATIONS, Generation


class Findings:
    """Filled by a section, and sent back whatever becomes of it.

    Attributes:
      checks: one entry each: `what`, `found`, `allowed`, `ok`, and of a case that broke down, `why`.
      measured: JSON values.
    """

    def __init__(self, say: Callable[[str], None]):
        """Finds nothing yet.

        Args:
          say: told in a line what is going on.
        """
        self.say = say
        self.checks: list[dict[str, Any]] = []
        self.measured: dict[str, Any] = {}

    def at_most(self, what: str, found: float, allowed: float) -> None:
        """A check that a number is no more than allowed. NaN and infinity are more."""
        found = float(found)
        is_number = math.isfinite(found)
        ok = is_number and found <= allowed
        self.checks.append({"what": what, "found": found if is_number else None, "allowed": allowed, "ok": ok})
        if not ok:
            self.say(f"NOT OK: {what} is {found:.3g}; allowed: {allowed:.3g}")

    @contextlib.contextmanager
    def case(self, what: str) -> Iterator[None]:
        """One of several cases: if it raises, that is a failed check, and the others go on."""
        self.say(what)
        try:
            yield
        except Exception as error:  # of any kind: compilers raise many
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
            self.checks.append({"what": what, "found": None, "allowed": None, "ok": False, "why": why})
            self.say(f"NOT OK: {what}: {why}")


def relative_error(found: Any, truth: Any) -> float:
    """Norm of the difference over that of the truth, of one array or a tree of arrays."""
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(truth), strict=True))
    difference = sum(float(np.sum((_float64(a) - _float64(b)) ** 2)) for a, b in pairs)
    return math.sqrt(difference / sum(float(np.sum(_float64(b) ** 2)) for _, b in pairs))


def worst_element(found: Any, truth: Any) -> float:
    """Largest difference of an element, relative to the size of those in its row and in the whole array.

    It sees what is wrong in a few rows, or in one of many. A row is what lies along the last axis.
    """
    found, truth = _float64(found), _float64(truth)
    rows = np.sqrt(np.mean(truth**2, axis=-1, keepdims=True))
    return float(np.max(np.abs(found - truth) / (rows + np.sqrt(np.mean(truth**2)))))


def _float64(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def generation_of(device: jax.Device) -> Generation | None:
    """The TPU generation of a device; None of one that is not in the table, or no TPU."""
    kind = device.device_kind
    return next((g for g in GENERATIONS if kind in (g.device_kind, f"TPU {g.name}")), None)
