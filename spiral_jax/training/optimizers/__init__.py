"""Optimizers by name: a file and a decorator each. docs/topologies.md shows one in a file of one's own."""

from spiral_jax.training.optimizers.adamw import adamw
from spiral_jax.training.optimizers.muon import muon
from spiral_jax.training.optimizers.optimizer import check_optimizer, make_optimizer, optimizers, state_shardings

__all__ = ["adamw", "check_optimizer", "make_optimizer", "muon", "optimizers", "state_shardings"]
