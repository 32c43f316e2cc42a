"""No token sees the future: bitwise at one length, to rounding when the input is cut; and s < g - 1 would leak."""

import dataclasses

import numpy as np
import pytest
import reference
from cases import slow

from spiral_jax.errors import SpiralError
from spiral_jax.model.config import ModelConfig

TINY = ModelConfig(vocab_size=29, d_model=16, num_heads=2, prelude_layers=1, core_layers=1, coda_layers=1,
                   rotary_fraction=0.5, chunks=(1,), dtype="float32")  # fmt: skip
MODELS = {
    "spiral_b": dict(chunks=(8, 4, 2, 1), topology="mesh"),
    "odd_far_shift": dict(chunks=(3, 5, 2), offsets=(2, 1, 1), shifts=(2, 6, 1), topology="mesh"),
    "scanned": dict(chunks=(4, 4, 1, 1), topology="residual", scan_iterations_from=2),
    "injection": dict(chunks=(4, 2, 1), topology="injection"),
    "no_offset_mean_uniform": dict(chunks=(6, 3), offsets=(0, 0), topology="anchor", pooling="mean",
                                   allocation="uniform"),
}  # fmt: skip
LENGTH = 20


def model_of(name: str, dtype: str = "float32") -> ModelConfig:
    return dataclasses.replace(TINY, dtype=dtype, **MODELS[name])


def tokens_1xL(length: int = LENGTH) -> np.ndarray:
    return np.random.default_rng(5).integers(TINY.vocab_size, size=(1, length)).astype(np.int32)


def with_other_future(tokens_1xL: np.ndarray, cut: int) -> np.ndarray:
    """Every token from `cut` on replaced by another one."""
    changed_1xL = tokens_1xL.copy()
    step = np.random.default_rng(cut).integers(1, TINY.vocab_size, size=changed_1xL[:, cut:].shape)
    changed_1xL[:, cut:] = (changed_1xL[:, cut:] + step) % TINY.vocab_size
    return changed_1xL


@pytest.mark.parametrize("name", [*MODELS][:3] + [slow(name) for name in [*MODELS][3:]])
def test_future_leaves_the_past_bitwise_unchanged(name, forward, random_model):
    config = model_of(name)
    _, _, params = random_model(config)
    logits_LxV = forward(config, params, tokens_1xL(), optimize=True)[0]
    for cut in range(1, LENGTH):
        changed_LxV = forward(config, params, with_other_future(tokens_1xL(), cut), optimize=True)[0]
        np.testing.assert_array_equal(changed_LxV[:cut], logits_LxV[:cut], err_msg=f"tokens from {cut} on changed")
        assert (changed_LxV[cut] != logits_LxV[cut]).any(), "the change itself must show"


def check_prefixes(forward, random_model, config, lengths, tolerance):
    _, _, params = random_model(config)
    optimize = config.dtype == "float32"
    logits_LxV = forward(config, params, tokens_1xL(), optimize)[0]
    for length in lengths:
        shorter_LxV = forward(config, params, tokens_1xL()[:, :length], optimize)[0]
        np.testing.assert_allclose(shorter_LxV, logits_LxV[:length], rtol=0, atol=tolerance, err_msg=f"{length}")


@pytest.mark.parametrize("name, lengths", [("spiral_b", (11,)), ("odd_far_shift", (4,))])
def test_shorter_input_agrees_float64(name, lengths, forward, random_model):
    check_prefixes(forward, random_model, model_of(name, "float64"), lengths, 1e-9)


@pytest.mark.parametrize("name, lengths", [slow("spiral_b", (13,)), ("scanned", (7,))])
def test_shorter_input_agrees_float32(name, lengths, forward, random_model):
    check_prefixes(forward, random_model, model_of(name), lengths, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_shorter_input_agrees(name, forward, random_model):
    check_prefixes(forward, random_model, model_of(name, "float64"), range(1, LENGTH), 1e-9)


@pytest.mark.parametrize("chunk", [2, 3, 8])
@pytest.mark.parametrize("missing", [1, 2])
def test_leaking_shift_is_refused(chunk, missing):
    with pytest.raises(SpiralError, match=r"model\.shifts\[1\].*leak") as error:
        ModelConfig(chunks=(16, chunk, 1), shifts=(15, chunk - 1 - missing, 0))
    assert "\n" not in str(error.value)
    ModelConfig(chunks=(16, chunk, 1), shifts=(15, chunk - 1, 0))


@pytest.mark.parametrize("offset", [slow(0), 1])
def test_refused_shift_would_leak(offset, forward, random_model):
    """With s = g - 2 the first place of a chunk is read one token before the chunk closes, and nowhere else."""
    g, length = 4, 15
    config = dataclasses.replace(TINY, dtype="float64", chunks=(g,), offsets=(offset,), topology="mesh")
    assert cuts_that_leak(config, length, forward, random_model) == (set(), set())
    leaky = dataclasses.replace(config)
    object.__setattr__(leaky, "shifts", (g - 2,))  # past the validation
    first = 0 if offset == 0 else 1  # a first chunk that is short lacks place 0
    closes = {j * g - offset + g - 1 for j in range(first, (length + offset) // g)}
    assert len(closes) >= 3
    assert cuts_that_leak(leaky, length, forward, random_model) == (closes, closes)


def cuts_that_leak(config, length, forward, random_model) -> tuple[set[int], set[int]]:
    """The cuts whose future changes their past, in our model and in the reference."""
    hf_config, tensors, params = random_model(config, seed=1)
    models = (
        lambda tokens: forward(config, params, tokens)[0],
        lambda tokens: reference.logits(hf_config, tensors, tokens)[0],
    )
    leaks = []
    for logits in models:
        before_LxV = logits(tokens_1xL(length))
        change = {
            cut: np.abs(logits(with_other_future(tokens_1xL(length), cut))[:cut] - before_LxV[:cut]).max()
            for cut in range(1, length)
        }
        leaks.append({cut for cut, difference in change.items() if difference > 1e-6})
    return tuple(leaks)
