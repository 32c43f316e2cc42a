"""XLA's flags of tests: most time goes into compiling programs that run once, so code is generated quickly."""

import importlib.util
import mmap
from pathlib import Path

QUICKLY = {
    "xla_backend_optimization_level": "0",
    "xla_llvm_disable_expensive_passes": "true",
    # The older of two generators of fusions: a tiny model compiles in a third of the time.
    "xla_cpu_use_fusion_emitters": "false",
    # Not in parts, each on a thread of its own: pytest's workers have the cores already.
    "xla_cpu_parallel_codegen_split_count": "1",
}


def quick_flags(devices: int) -> str:
    """XLA_FLAGS of a process with so many CPU devices. The operations are those of any other process."""
    names = known(tuple(QUICKLY))
    return " ".join([f"--xla_force_host_platform_device_count={devices}", *(f"--{n}={QUICKLY[n]}" for n in names)])


def known(names: tuple[str, ...]) -> list[str]:
    """Those that jaxlib's library names: XLA ends a process that is given another."""
    found: list[str] = []
    spec = importlib.util.find_spec("jaxlib")
    for path in Path(spec.origin).parent.glob("*.so"):
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            found += [name for name in names if name not in found and content.find(name.encode()) >= 0]
    return [name for name in names if name in found]
