"""spiral_jax: pretrain looped transformers whose shared core runs at several sequence resolutions."""

__version__ = "0.1.0"
