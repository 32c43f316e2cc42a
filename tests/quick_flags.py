"""XLA's flags of tests: most time goes into compiling programs that run once, so code is generated quickly."""

QUICKLY = ("--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true")


def quick_flags(devices: int) -> str:
    """XLA_FLAGS of a process with so many CPU devices. The operations are those of any other process."""
    return " ".join((f"--xla_force_host_platform_device_count={devices}", *QUICKLY))
