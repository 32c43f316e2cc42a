"""spiral_jax: pretrain looped transformers whose shared core runs at several sequence resolutions."""

__version__ = "0.1.0"


def __getattr__(name: str):
    # `spiral_jax.load` without importing jax for those who only want the version.
    if name == "load":
        from spiral_jax.run.directory import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
