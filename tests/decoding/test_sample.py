"""Sampling against repeated full forward passes of the NumPy reference."""

import numpy as np
import pytest
import reference

from spiral_jax.decoding.sample import sample
from spiral_jax.model.config import ModelConfig
from spiral_jax.model.spiralformer import SpiralFormer

V, NUM_IDS = 20, 12
CONFIG = ModelConfig(vocab_size=V, d_model=16, num_heads=2, prelude_layers=0, core_layers=1, coda_layers=1,
                     chunks=(2, 1), rotary_fraction=0.5, dtype="float32")  # fmt: skip
PROMPT = np.array([3, 1, 4, 1, 5])
NEW = 6


@pytest.fixture(scope="module")
def model(random_model):
    """(reference logits at the last position of a prefix, keyword arguments of `sample`'s model and parameters)."""
    hf_config, tensors, params = random_model(CONFIG)

    def last_logits(prefix) -> np.ndarray:
        return reference.logits(hf_config, tensors, np.array([prefix]))[0, -1]

    return last_logits, SpiralFormer(CONFIG), params


def draw(model, prompt=PROMPT, new_tokens=NEW, num_ids=NUM_IDS, separator_id=-1, temperature=0.0, seed=0):
    _, module, params = model
    return sample(
        module, params, prompt, new_tokens=new_tokens, num_ids=num_ids, separator_id=separator_id,
        temperature=temperature, seed=seed,
    )  # fmt: skip


@pytest.fixture(scope="module")
def greedy(model):
    """The most likely ids among those allowed, one full forward pass each."""
    last_logits, *_ = model
    prefix = PROMPT.tolist()
    for _ in range(NEW):
        prefix.append(int(np.argmax(last_logits(prefix)[:NUM_IDS])))
    return prefix[len(PROMPT) :]


def test_greedy_is_the_argmax_of_full_passes(model, greedy):
    found = draw(model)
    assert found.shape == (NEW,)
    assert found.tolist() == greedy
    assert draw(model, seed=7).tolist() == greedy


def test_ids_without_a_token_are_never_sampled(model):
    """At this temperature 8 of 20 draws would fall into the padding of the vocabulary."""
    for seed in range(100):
        found = draw(model, temperature=50.0, seed=seed)
        assert np.all((found >= 0) & (found < NUM_IDS))


def test_a_separator_ends_the_text(model, greedy):
    for index, separator_id in enumerate(greedy):
        if separator_id in greedy[:index]:
            continue
        assert draw(model, separator_id=separator_id).tolist() == greedy[:index]


def test_a_separator_in_the_prompt_ends_nothing(model, greedy):
    separator_id = next(i for i in PROMPT.tolist() if i not in greedy)
    assert draw(model, separator_id=separator_id).tolist() == greedy


def test_the_seed_decides(model):
    first = [draw(model, temperature=1.0, seed=seed).tolist() for seed in range(8)]
    assert first == [draw(model, temperature=1.0, seed=seed).tolist() for seed in range(8)]
    assert len(set(map(tuple, first))) > 4


def test_frequencies_are_the_softmax_at_the_temperature(model):
    """The last token of a prompt one shorter than the buffer (the same program), over many seeds."""
    last_logits, *_ = model
    prompt = np.array([3, 1, 4, 1, 5, 9, 2, 6, 5, 3])
    temperature, draws = 2.0, 3000
    logits_V = last_logits(prompt.tolist())[:NUM_IDS] / temperature
    p_V = np.exp(logits_V - logits_V.max())
    p_V /= p_V.sum()
    found = np.array([draw(model, prompt, 1, temperature=temperature, seed=seed)[0] for seed in range(draws)])
    count_V = np.bincount(found, minlength=NUM_IDS)
    # Six standard deviations; the temperatures 1 and 4 are further away than that.
    assert np.all(np.abs(count_V - draws * p_V) < 6 * np.sqrt(draws * p_V * (1 - p_V)) + 1)
    for wrong in (1.0, 4.0):
        q_V = p_V ** (temperature / wrong) / np.sum(p_V ** (temperature / wrong))
        assert np.any(np.abs(count_V - draws * q_V) > 6 * np.sqrt(draws * q_V * (1 - q_V)) + 1)
