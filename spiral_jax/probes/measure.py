"""Probes a model on sequences of a text, a batch at a time: memory does not grow with their number."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from spiral_jax.data.windows import TokenSource, num_windows, read_windows
from spiral_jax.model.config import ModelConfig
from spiral_jax.parallel.placed_model import PlacedModel
from spiral_jax.probes.heads import dynamic_heads, uniform_statistics, window
from spiral_jax.probes.passes import look
from spiral_jax.probes.states import centred_alignment, linear_kernel, rbf_kernel, singular_values
from spiral_jax.progress import Progress, Report

# Tokens whose states are compared.
TOKENS = 2048


class Batch(NamedTuple):
    """Sequences that are looked at together.

    Attributes:
      tokens_BxL: the sequences.
      real_B: 1 for a sequence, 0 for a row that fills the batch.
      chosen_BxK: positions of the tokens whose states are compared.
      is_chosen_BxK: False where a row has fewer of them than another one.
    """

    tokens_BxL: np.ndarray
    real_B: np.ndarray
    chosen_BxK: np.ndarray
    is_chosen_BxK: np.ndarray


def batches(source: TokenSource, length: int, samples: int, batch_size: int, seed: int) -> Iterator[Batch]:
    """Chooses sequences of a text, and `TOKENS` of their tokens, or all if they have fewer.

    Which ones depends on the seed, and not on the size of the batches; all have the same shapes.
    """
    random = np.random.default_rng(seed)
    windows_N = np.sort(random.choice(num_windows(source, length), samples, replace=False))
    tokens_M = np.sort(random.choice(samples * length, min(TOKENS, samples * length), replace=False))
    most = int(np.max(np.bincount(tokens_M // length)))
    for first in range(0, samples, batch_size):
        windows_B = windows_N[first : first + batch_size]
        batch = Batch(
            np.zeros((batch_size, length), np.int32),
            (np.arange(batch_size) < len(windows_B)).astype(np.int32),
            np.zeros((batch_size, most), np.int32),
            np.zeros((batch_size, most), bool),
        )
        batch.tokens_BxL[: len(windows_B)] = read_windows(source, windows_B, length)[:, :-1]
        begin, end = np.searchsorted(tokens_M, [first * length, (first + batch_size) * length])
        row_M, position_M = np.divmod(tokens_M[begin:end] - first * length, length)
        place_M = np.arange(len(row_M)) - np.searchsorted(row_M, row_M)  # in its row, from 0 on
        batch.chosen_BxK[row_M, place_M], batch.is_chosen_BxK[row_M, place_M] = position_M, True
        yield batch


@dataclasses.dataclass(frozen=True)
class Findings:
    """What a model's probes have found. NumPy, float64; T iterations, C core layers, H heads.

    Attributes:
      config: the model's.
      length: L, tokens of each sequence.
      samples: sequences.
      entropy_TxCxH: key-marginal entropy of each head, 0 to 1.
      local_mass_TxCxH: attention to the near keys before the query, 0 to 1.
      update_R: relative update of each of `blocks`, 0 to 2.
      weights: by `name.where`: the mean weight of each slot (`write.entry`, `write.0`) or place (`pooling.0`).
      cka_rbf_SxS: how alike each two of `states` are, kernel exp(- |x - y|^2 / (2 s^2)).
      cka_linear_SxS: the same, kernel x . y.
      singular_values_SxR: of each of `states`, over the largest.
    """

    config: ModelConfig
    length: int
    samples: int
    entropy_TxCxH: np.ndarray
    local_mass_TxCxH: np.ndarray
    update_R: np.ndarray
    weights: Mapping[str, np.ndarray]
    cka_rbf_SxS: np.ndarray
    cka_linear_SxS: np.ndarray
    singular_values_SxR: np.ndarray

    @property
    def metrics(self) -> dict[str, np.ndarray]:
        """What is known of each head, by name."""
        return {"entropy": self.entropy_TxCxH, "local_mass": self.local_mass_TxCxH}

    @property
    def uniform(self) -> dict[str, np.ndarray]:
        """By metric, what heads that weigh all of the past equally would have in each iteration, [T]."""
        levels = self.config.schedule
        of_levels = [uniform_statistics(level.num_chunks(self.length), window(level)) for level in levels]
        return dict(zip(self.metrics, np.array(of_levels).T, strict=True))

    @property
    def dynamic(self) -> dict[str, np.ndarray]:
        """By metric, which heads [C, H] range furthest across iterations."""
        return {name: dynamic_heads(value_TxCxH) for name, value_TxCxH in self.metrics.items()}

    @property
    def blocks(self) -> list[str]:
        """Of `update_R`."""
        return ["prelude", *(f"core {t}" for t in range(self.config.num_iterations)), "coda"]

    @property
    def states(self) -> list[str]:
        """Of the CKA and the singular values."""
        return ["h_emb", *(f"h({t})" for t in range(self.config.num_iterations + 1)), "h_out"]

    @property
    def resolutions(self) -> list[str]:
        """Of the iterations."""
        return ["1" if g == 1 else f"1/{g}" for g in self.config.chunks]


def measure(
    placed: PlacedModel,
    params: Any,
    source: TokenSource,
    *,
    length: int,
    samples: int,
    batch_size: int,
    seed: int,
    report: Report = lambda line: None,
) -> Findings:
    """Probes a model.

    Args:
      placed: the model on its mesh; it has a core, and every iteration has a chunk in `length` tokens.
      params: its parameters, there.
      source: the text.
      length: L, tokens of a sequence.
      samples: sequences; `source` has at least so many windows of L + 1 tokens.
      batch_size: sequences at a time, a multiple of the mesh's parts of a batch.
      seed: of the choice of sequences, and of the tokens whose states are compared. The findings depend on it, and but
        for rounding on nothing else in how they are computed.
      report: takes a line about the progress every few seconds.
    """
    # Replicated, so that every process has the results.
    step = jax.jit(functools.partial(look, placed.model), out_shardings=placed.everywhere)
    total: Any = None
    states: list[np.ndarray] = []
    progress = Progress("probing", samples, unit="sequences", report=report, seconds=5)
    for batch in batches(source, length, samples, batch_size, seed):
        sums, states_SxBxKxD = step(params, *map(placed.put, (batch.tokens_BxL, batch.real_B, batch.chosen_BxK)))
        sums = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
        total = sums if total is None else jax.tree.map(np.add, total, sums)
        states.append(np.asarray(states_SxBxKxD)[:, batch.is_chosen_BxK])
        progress.advance(int(batch.real_B.sum()))

    mean = jax.tree.map(lambda x: x / samples, total)
    states_SxMxD = np.concatenate(states, axis=1)
    return Findings(
        placed.model.config,
        length,
        samples,
        mean.entropy_TxCxH,
        mean.local_mass_TxCxH,
        mean.update_R,
        {name: mean.weights[name] for name in sorted(mean.weights, key=_place)},
        centred_alignment(states_SxMxD, rbf_kernel),
        centred_alignment(states_SxMxD, linear_kernel),
        np.stack([singular_values(x_MxD) for x_MxD in states_SxMxD]),
    )


def _place(name: str) -> tuple[str, int]:
    """The entry before the iterations, and these in order."""
    kind, where = name.rsplit(".", 1)
    return kind, -1 if where == "entry" else int(where)
