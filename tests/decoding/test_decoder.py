"""Many texts at a time, against full forward passes of the NumPy reference, one text after the other."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
import reference
from cases import slow

from spiral_jax.decoding.decoder import Decoder, Request, bytes_per_row
from spiral_jax.decoding.sampling import SamplingSettings
from spiral_jax.errors import SpiralError
from spiral_jax.model.backend import Backend
from spiral_jax.model.config import ModelConfig
from spiral_jax.model.spiralformer import SpiralFormer
from spiral_jax.parallel.mesh import MeshConfig, make_mesh
from spiral_jax.parallel.placed_model import place

V, NUM_IDS, CAPACITY = 20, 18, 44
STOP = 9
CONFIG = ModelConfig(vocab_size=V, d_model=16, num_heads=2, prelude_layers=1, core_layers=1, coda_layers=1,
                     chunks=(8, 4, 2, 1), topology="mesh", rotary_fraction=0.5, dtype="float32")  # fmt: skip
# (prompt length, new tokens): 1, shorter than chunks, at a chunk's end, two buckets of prompts.
SIZES = [(1, 13), (5, 9), (11, 16), (3, 1), (2, 10), (33, 11), (4, 2), (7, 8)]


@pytest.fixture(scope="module")
def weights(random_model):
    return random_model(CONFIG, scale=2.0)


@pytest.fixture(scope="module")
def requests():
    rng = np.random.default_rng(5)
    return [Request(rng.integers(0, NUM_IDS, length), new) for length, new in SIZES]


@functools.cache
def decoder_of(rows, shape=(1, 1, 1)):
    mesh = make_mesh(MeshConfig(*shape), jax.devices()[: np.prod(shape)])
    placed = place(CONFIG, mesh, Backend())
    made = Decoder(placed.model, mesh, rows=rows, capacity=CAPACITY, num_ids=NUM_IDS, stop_ids=(STOP,))
    return made, placed.param_shardings


def texts(weights, requests, *args):
    """(new ids and end of every request, the decoder)."""
    decoder, shardings = decoder_of(*args)
    out = [[] for _ in requests]
    ends = [""] * len(requests)
    for token in decoder.run(jax.device_put(weights[2], shardings), requests):
        assert ends[token.request] == "", "a token after the end"
        out[token.request].append(token.id)
        ends[token.request] = token.end
    return list(zip(out, ends, strict=True)), decoder


@pytest.fixture(scope="module")
def greedy(weights, requests):
    """The most likely ids among those allowed, one full pass of the reference each; up to a stop token."""
    hf_config, tensors, _ = weights
    found = []
    for request in requests:
        ids = request.prompt.tolist()
        for _ in range(request.max_new_tokens):
            ids.append(int(np.argmax(reference.logits(hf_config, tensors, np.array([ids]))[0, -1, :NUM_IDS])))
            if ids[-1] == STOP:
                break
        found.append(ids[len(request.prompt) :])
    return found


def with_ends(greedy):
    return [(ids, "stop" if ids[-1] == STOP else "length") for ids in greedy]


@pytest.mark.parametrize("rows", [slow(1), 3])
def test_greedy_texts_are_the_argmax_of_full_passes(weights, requests, greedy, rows, monkeypatch):
    """With layers by themselves, as steps of large models have them on a CPU; other tests have them stacked."""
    monkeypatch.setattr("spiral_jax.decoding.decoder._SEPARATE_FROM", 0)
    found, decoder = texts(weights, requests, rows)
    assert found == with_ends(greedy)
    assert isinstance(decoder._newest[1]["core"]["layers"], list)
    assert {end for _, end in found} == {"stop", "length"}
    # Replacing rows compiled nothing: a step, a prefill for each bucket and each of the two widths.
    assert decoder._step._cache_size() == 1
    assert decoder._admit._cache_size() <= 2 * (1 if rows == 1 else 2)


@pytest.mark.slow
def test_rows_on_a_mesh(weights, requests, greedy):
    chosen = [i for i, (length, _) in enumerate(SIZES) if length <= 32]
    found, decoder = texts(weights, [requests[i] for i in chosen], 3, (2, 2, 2))
    assert decoder.rows == 4
    assert found == with_ends([greedy[i] for i in chosen])
    rows = decoder._make()
    shards = {x.addressable_shards[0].data.shape for x in rows.state.coda}
    assert shards == {(1, 1, CAPACITY, 1, CONFIG.head_width)}
    assert all(x.addressable_shards[0].data.shape[0] == 1 for x in jax.tree.leaves(rows.state.iterations[0].open))


@pytest.mark.parametrize("rows", [slow(1), 3])
def test_work_is_that_of_the_closed_form(weights, requests, greedy, rows):
    """A step reads the new tokens but the last one, at positions P and on; a core runs where one closes a chunk."""
    _, decoder = texts(weights, requests, rows)
    counts = decoder.counts()
    positions = [
        p for (length, _), ids in zip(SIZES, greedy, strict=True) for p in range(length, length + len(ids) - 1)
    ]
    assert counts.tokens == len(positions)
    closings = [
        sum((p + level.offset) % level.chunk == level.chunk - 1 for p in positions) for level in CONFIG.schedule
    ]
    assert counts.runs == tuple(closings)
    if rows == 1:
        # Steps are one ahead of what is known here: after a stop token one more runs, with no row, and the core at
        # full resolution with it.
        idle = counts.steps - len(positions)
        assert 0 <= idle <= sum(ids[-1] == STOP for ids in greedy)
        assert counts.core_calls == sum(closings) + idle
    else:
        # Never more than one call for all coarse levels together, beside the one at full resolution.
        assert counts.steps < counts.core_calls <= 2 * counts.steps


@pytest.mark.parametrize("rows", [3])
def test_a_text_is_what_it_is_alone(weights, requests, rows):
    """Sampled, with settings of each row's own, together and one by one, in the same program: equal to the bit."""
    kinds = [SamplingSettings(1.0, seed=3), SamplingSettings(0.7, 5, 0.9, 8), SamplingSettings(), SamplingSettings(2.0)]
    drawn = [dataclasses.replace(x, sampling=kinds[i % 4]) for i, x in enumerate(requests)]
    together, _ = texts(weights, drawn, rows)
    assert [texts(weights, [request], rows)[0][0] for request in drawn] == together
    again, _ = texts(weights, drawn[::-1], rows)
    assert again[::-1] == together
    other = [dataclasses.replace(x, sampling=dataclasses.replace(x.sampling, seed=99)) for x in drawn]
    assert texts(weights, other, rows)[0] != together


@pytest.mark.slow
def test_where_texts_end(weights, requests, greedy):
    """Where `is_done` says so, on the host, while the devices are a step ahead."""
    done = [dataclasses.replace(x, is_done=lambda ids, n=i % 4 + 1: len(ids) == n) for i, x in enumerate(requests)]
    for rows in (1, 3):
        found, _ = texts(weights, done, rows)
        assert [ids for ids, _ in found] == [ids[: i % 4 + 1] for i, ids in enumerate(greedy)]
        for i, (ids, end) in enumerate(found):
            assert end == ("stop" if len(ids) == i % 4 + 1 or ids[-1] == STOP else "length")


def test_the_comparison_sees_a_row_put_in_the_wrong_place(weights, requests, greedy, monkeypatch):
    decoder, _ = decoder_of(3)
    admit = decoder._admit
    monkeypatch.setattr(decoder, "_admit", lambda params, rows, tokens_WxP, lengths_W, rows_W, *rest: admit(
        params, rows, tokens_WxP, lengths_W, (rows_W + 1) % 3, *rest))  # fmt: skip
    assert texts(weights, requests, 3)[0] != with_ends(greedy)


def test_requests_that_do_not_fit(weights):
    decoder, _ = decoder_of(3)

    def refused(prompt, new, match):
        with pytest.raises(SpiralError, match=match):
            decoder.run(None, [Request(np.array([1, 2]), 3), Request(np.array(prompt, int), new)])

    refused([], 3, "^prompt 2 has no tokens; allowed: 1 or more")
    refused([1] * 40, 5, r"^prompt 2 has 40 tokens and 5 to add; allowed: 44 together")
    refused([1, V], 5, "^prompt 2 has ids from 1 to 20; allowed: 0 to 19")
    refused([1], 0, "^max_new_tokens is 0; allowed: 1 or more")
    model, mesh = SpiralFormer(CONFIG), make_mesh(MeshConfig())
    for rows, capacity, field in ((0, 8, "batch_size"), (1, 1, "max_length")):
        with pytest.raises(SpiralError, match=f"^{field} is "):
            Decoder(model, mesh, rows=rows, capacity=capacity, num_ids=NUM_IDS)
    assert list(decoder.run(weights[2], [])) == []


def test_bytes_of_a_row():
    """Keys and values of 16 float32 each: prelude, coda, g = 1 and a half, a quarter, an eighth of them."""
    C = 1024
    found = bytes_per_row(CONFIG, C) / C
    assert found == pytest.approx(2 * 16 * 4 * (3 + 1 / 2 + 1 / 4 + 1 / 8), rel=0.01)
