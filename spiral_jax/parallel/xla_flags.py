"""XLA's flags for CPU programs that run once: most of their time goes into compiling, so code is generated quickly."""

import importlib.util
import mmap
from collections.abc import Iterable
from pathlib import Path

QUICKLY = {
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": "true",
    # The older of two generators of fusions: a tiny model compiles in a third of the time.
    "xla_cpu_use_fusion_emitters": "false",
    # Not in parts, each on a thread of its own: several processes have the cores already.
    "xla_cpu_parallel_codegen_split_count": "1",
}


def quick_flags() -> str:
    """For XLA_FLAGS, before a process touches its first device; the operations stay what they are."""
    return " ".join(f"--{name}={QUICKLY[name]}" for name in known(QUICKLY))


def known(names: Iterable[str]) -> list[str]:
    """Those that the installed jaxlib takes: XLA ends a process that is given another."""
    spec = importlib.util.find_spec("jaxlib")
    assert spec is not None and spec.origin is not None
    return named_in(Path(spec.origin).parent.glob("*.so"), names)


def named_in(libraries: Iterable[Path], names: Iterable[str]) -> list[str]:
    """Those that stand in a library as texts of their own, as the names of flags do.

    Between zeros: what has been a flag goes on as a reserved name in the middle of a description.
    """
    found: set[str] = set()
    names = list(names)
    for path in libraries:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            found.update(name for name in names if content.find(b"\0" + name.encode() + b"\0") >= 0)
    return [name for name in names if name in found]
