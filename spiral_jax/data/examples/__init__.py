"""Sequences with targets and weights of their own: a file and a decorator each. docs/own_targets.md shows one."""

from spiral_jax.data.examples.cfg3b import Cfg3b
from spiral_jax.data.examples.listops import ListOps
from spiral_jax.data.examples.source import Example, ExampleSource, check_examples, example_sources
from spiral_jax.data.examples.stream import Examples, ExampleStream, stacked

__all__ = ["Cfg3b", "Example", "ExampleSource", "ExampleStream", "Examples", "ListOps", "check_examples",
           "example_sources", "stacked"]  # fmt: skip
