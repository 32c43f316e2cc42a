"""Scores against brute force: every token predicted once, each from the context that its window gives it."""

import dataclasses
import itertools
import math

import jax
import numpy as np
import pytest
import reference

from spiral_jax.data.windows import TokensInMemory
from spiral_jax.errors import SpiralError
from spiral_jax.evaluation.perplexity import (
    Score,
    WindowScorer,
    nats_of_documents,
    num_scoring_windows,
    score,
    scoring_batches,
)
from spiral_jax.kernels.choose import backend_for
from spiral_jax.model.config import ModelConfig
from spiral_jax.parallel.mesh import MeshConfig, make_mesh
from spiral_jax.parallel.placed_model import place
from spiral_jax.run.config import RunConfig
from spiral_jax.training.config import TrainConfig

SEPARATOR = 19


def source_of(num_tokens: int, seed=0) -> TokensInMemory:
    tokens_N = np.random.default_rng(seed).integers(SEPARATOR, size=num_tokens).astype(np.int32)
    return TokensInMemory("text", tokens_N)


def contexts(source, L: int, stride: int):
    """(tokens to predict from, target) of every token in order, straight from the definition."""
    stream = [SEPARATOR, *source.tokens_N.tolist()]
    for position in range(1, len(stream)):
        # Window k starts at position k * stride and predicts up to position k * stride + L; the first that can, does.
        k = 0
        while position > k * stride + L:
            k += 1
        yield stream[k * stride : position], stream[position]


def nats_after(context, target) -> float:
    """A model of nothing but arithmetic: it depends on every token of the context and its place."""
    value = 0.0
    for i, token in enumerate(context):
        value = math.sin(value + 0.37 * token + 0.11 * i)
    return 2 + value + 0.01 * target


def eval_step(params, windows_BxW, weights_BxL):
    """`nats_after` in the interface of a compiled step; rows are processed whatever their weights."""
    nats_BxL = np.array(
        [[nats_after(row[: i + 1], row[i + 1]) for i in range(len(row) - 1)] for row in windows_BxW.tolist()]
    )
    return nats_BxL * weights_BxL


def scored(source, L, stride=None, batch_size=3, **kwargs) -> Score:
    return score(
        eval_step, None, source, utf8_bytes=1000, separator_id=SEPARATOR, sequence_length=L, batch_size=batch_size,
        stride=stride, **kwargs,
    )  # fmt: skip


GRID = [
    (N, L, stride)
    for N in (1, 2, 3, 6, 7, 8, 9, 13, 14, 15, 16, 40, 41)
    for L in (1, 2, 7, 8)
    for stride in range(1, L + 1)
]


def test_every_token_is_predicted_once_from_the_right_context():
    """For many lengths: which stream position every weight of 1 stands for, and that its context is the stream's."""
    for N, L, stride in GRID:
        source = source_of(N)
        expected = [(tuple(context), target) for context, target in contexts(source, L, stride)]
        found = []
        for windows_BxW, weights_BxL in scoring_batches(source, SEPARATOR, L, stride, 3):
            assert windows_BxW.shape == (3, L + 1) and weights_BxL.shape == (3, L)
            assert windows_BxW.dtype == np.int32
            assert set(np.unique(weights_BxL)) <= {0.0, 1.0}
            for row, column in zip(*np.nonzero(weights_BxL), strict=True):
                window = windows_BxW[row].tolist()
                found.append((tuple(window[: column + 1]), window[column + 1]))
        assert found == expected, (N, L, stride)


def test_a_batch_is_one_read():
    """Of a bucket each takes as long as all of them."""
    source = source_of(41)
    asked, read_many = [], source.read_many
    source.read_many = lambda ranges: asked.append(len(ranges)) or read_many(ranges)
    batches = list(scoring_batches(source, SEPARATOR, 8, 4, 3))
    assert asked == [3, 3, 3, 1] and len(batches) == 4


def test_windows_are_no_more_than_needed():
    for N, L, stride in GRID:
        count = num_scoring_windows(N, L, stride)
        assert count == 1 or (count - 2) * stride + L < N <= (count - 1) * stride + L, (N, L, stride)


@pytest.mark.parametrize("N, L, stride", [(1, 8, None), (5, 8, None), (8, 8, None), (41, 8, None), (41, 8, 3),
                                          (40, 7, 1), (9, 8, 8)])  # fmt: skip
def test_score_is_the_sum_over_tokens(N, L, stride):
    source = source_of(N)
    expected = sum(nats_after(*pair) for pair in contexts(source, L, stride or L))
    for batch_size in (1, 3, 64):
        result = scored(source, L, stride, batch_size)
        assert result.tokens == N
        assert result.nats == pytest.approx(expected, rel=1e-9)
        assert result.utf8_bytes == pytest.approx(1000)


@pytest.mark.parametrize("stride", [8, 3])
def test_nats_come_token_by_token_and_are_cut_at_documents(stride):
    source, taken = source_of(41), []
    result = scored(source, 8, stride, take=taken.append)
    nats_N = np.concatenate(taken)
    expected = [nats_after(*pair) for pair in contexts(source, 8, stride)]
    np.testing.assert_allclose(nats_N, expected, rtol=1e-12)
    nats_D, tokens_D = nats_of_documents(nats_N, np.array([0, 1, 17, 41], np.uint64))
    np.testing.assert_allclose(nats_D, [sum(expected[:1]), sum(expected[1:17]), sum(expected[17:])])
    assert tokens_D.tolist() == [1, 16, 24] and nats_D.sum() == pytest.approx(result.nats)


def test_formulas():
    result = Score(nats=6.0, tokens=4, utf8_bytes=10)
    assert result.loss == 1.5
    assert result.perplexity == pytest.approx(math.e**1.5)
    assert result.bits_per_byte == pytest.approx(6.0 / math.log(2) / 10)
    # One bit for each of 8 bytes.
    assert Score(8 * math.log(2), tokens=3, utf8_bytes=8).bits_per_byte == pytest.approx(1.0)


@pytest.mark.parametrize("stride", [0, -1, 9])
def test_a_stride_out_of_range_is_refused(stride):
    with pytest.raises(SpiralError, match=rf"^--stride is {stride}; allowed: 1 to the sequence length, 8$"):
        scored(source_of(20), 8, stride)


def test_nothing_to_score_is_refused():
    with pytest.raises(SpiralError, match=r"^text: no tokens"):
        scored(source_of(0), 8)


def test_the_first_batches_alone():
    """`max_batches` scores the start of the stream, its bytes counted by the mean of the whole."""
    source = source_of(100)
    result = scored(source, 8, max_batches=2)
    pairs = list(contexts(source, 8, 8))[: 2 * 3 * 8]
    assert result.tokens == len(pairs)
    assert result.nats == pytest.approx(sum(nats_after(*pair) for pair in pairs))
    assert result.utf8_bytes == pytest.approx(1000 * len(pairs) / 100)
    assert scored(source, 8, max_batches=1000) == scored(source, 8)


def test_progress_counts_to_the_end(monkeypatch):
    seen = []
    monkeypatch.setattr("spiral_jax.progress.time.monotonic", itertools.count(0, 10).__next__)
    scored(source_of(100), 8, report=seen.append)
    shares = [f"scoring: {n} of 5 batches ({n / 5:.0%}), " for n in range(1, 6)]  # 13 windows, 3 at a time
    assert [line.startswith(share) for line, share in zip(seen, shares, strict=True)] == [True] * 5


# A real model, against logits of the NumPy reference, one window at a time.

CONFIG = RunConfig(
    model=ModelConfig(vocab_size=20, d_model=16, num_heads=2, prelude_layers=0, core_layers=1, coda_layers=1,
                      chunks=(2, 1), rotary_fraction=0.5, dtype="float32"),
    train=TrainConfig(steps=10, batch_size=4, sequence_length=8, loss_block=3),
)  # fmt: skip


@pytest.fixture(scope="module")
def real(random_model):
    """(hf_config, tensors) for the reference; params on their devices, and the compiled scorer of windows."""
    hf_config, tensors, params = random_model(CONFIG.model)
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(2, 2, 1))
    devices = make_mesh(config.mesh, jax.devices()[:4])
    placed = place(config.model, devices, backend_for(devices, config.model))
    nats_of = WindowScorer(config, placed)
    nats_of.step = nats_of.lowered().compile()
    params = jax.device_put(params, placed.param_shardings)
    return hf_config, tensors, params, nats_of


@pytest.mark.parametrize("N, stride", [(5, None), (35, None), (21, 3)])
def test_a_model_against_the_reference(real, N, stride):
    """Padding rows, padded windows and the loss's blocks leave no trace in the sum."""
    hf_config, tensors, params, nats_of = real
    source = source_of(N, seed=1)
    result = score(
        nats_of, params, source, utf8_bytes=77, separator_id=SEPARATOR, sequence_length=8, batch_size=4, stride=stride,
    )  # fmt: skip
    expected = []
    for context, target in contexts(source, 8, stride or 8):
        logits_V = reference.logits(hf_config, tensors, np.array([context]))[0, -1]
        expected.append(math.log(np.exp(logits_V - logits_V.max()).sum()) + logits_V.max() - logits_V[target])
    assert result.tokens == N
    assert result.nats == pytest.approx(sum(expected), rel=1e-5)
    assert result.bits_per_byte == pytest.approx(sum(expected) / math.log(2) / 77, rel=1e-5)


def test_rows_of_no_weight_do_not_count(real):
    """Whatever stands in them."""
    _, _, params, nats_of = real
    rng = np.random.default_rng(2)
    windows_BxW = rng.integers(20, size=(4, 9)).astype(np.int32)
    weights_BxL = np.float32([[1] * 8, [1] * 3 + [0] * 5, [0] * 5 + [1] * 3, [0] * 8])
    nats_BxL = np.asarray(nats_of(params, windows_BxW, weights_BxL))
    other_BxW = windows_BxW.copy()
    other_BxW[1, 4:], other_BxW[3] = rng.integers(20, size=5), rng.integers(20, size=9)
    np.testing.assert_array_equal(np.asarray(nats_of(params, other_BxW, weights_BxL)), nats_BxL)
    assert not nats_BxL[3].any()
