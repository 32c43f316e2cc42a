"""Log-probabilities of continuations against the NumPy reference, one request at a time; and generated texts."""

import math

import jax
import numpy as np
import pytest
import reference
from cases import slow
from jaxprs import shapes_in

from spiral_jax.data.tokenizers import ByteTokenizer
from spiral_jax.decoding.state import bucket_of
from spiral_jax.errors import SpiralError
from spiral_jax.evaluation import shared_prompts
from spiral_jax.evaluation.encoding import encode_documents, encode_pairs, encode_prompts
from spiral_jax.evaluation.generation import Generator
from spiral_jax.evaluation.generation_settings import GenerationSettings
from spiral_jax.evaluation.scoring import Request, Scorer, _score, windows
from spiral_jax.evaluation.shared_prompts import Shape, choices_of
from spiral_jax.kernels.choose import backend_for
from spiral_jax.model.config import ModelConfig
from spiral_jax.parallel.mesh import MeshConfig, make_mesh
from spiral_jax.parallel.placed_model import place

L = 48  # not a power of two
V = 20
MODEL = ModelConfig(vocab_size=V, d_model=16, num_heads=2, prelude_layers=0, core_layers=1, coda_layers=1,
                    chunks=(4, 1), rotary_fraction=0.5, dtype="float32")  # fmt: skip
BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def weights(random_model):
    """(hf_config, float64 tensors, params), large enough that some tokens stand out."""
    return random_model(MODEL, scale=3.0)


def on_mesh(weights, mesh=MeshConfig(4, 2, 1)):  # noqa: B008
    """(the placed model, params on its devices)."""
    devices = make_mesh(mesh)
    placed = place(MODEL, devices, backend_for(devices, MODEL))
    return placed, jax.device_put(weights[2], placed.param_shardings)


def requests_of(count=40, seed=0) -> list[Request]:
    """Of all kinds: within a bucket and at its edge, truncated, longer than the model's context."""
    rng = np.random.default_rng(seed)
    sizes = [(1, 1), (31, 1), (32, 1), (33, 1), (31, 2), (20, 16), (20, 17), (47, 1), (48, 1), (49, 1), (100, 3),
             (10, 48), (1, 49), (5, 96), (70, 130)]  # fmt: skip
    sizes += [tuple(rng.integers(1, 60, 2)) for _ in range(count - len(sizes))]
    return [Request(*(rng.integers(V, size=size).astype(np.int32) for size in pair)) for pair in sizes]


@pytest.fixture(scope="module")
def logp_of(weights):
    """Tokens to log-probabilities [L, V] of what follows each, in float64."""
    hf_config, tensors, _ = weights

    def logp_of(tokens):
        logits_LxV = reference.logits(hf_config, tensors, np.array([tokens]))[0]
        return logits_LxV - np.logaddexp.reduce(logits_LxV, axis=-1, keepdims=True)

    return logp_of


def expected(logp_of, request: Request) -> tuple[float, bool]:
    """One token after the other, from the definition."""
    context, continuation = request.context.tolist(), request.continuation.tolist()
    total, greedy = 0.0, True
    for i, token in enumerate(continuation):
        if len(continuation) <= L:
            # The last L + 1 tokens of the whole, of which the last only is a target.
            seen = (context + continuation)[-(L + 1) :]
            seen = seen[: len(seen) - len(continuation) + i]
        else:
            # Pieces of L tokens; each sees what comes before its end, L + 1 tokens back.
            end = min((i // L + 1) * L, len(continuation))
            whole = context[-1:] + continuation
            seen = whole[max(end - L, 0) : i + 1]
        logp_V = logp_of(seen)[-1]
        total += logp_V[token]
        greedy &= bool(logp_V.argmax() == token)
    return total, greedy


@pytest.fixture(scope="module")
def requests(logp_of):
    """Requests, half of the short ones greedy, and what they should give."""
    requests = requests_of()
    for i, (context, continuation) in enumerate(requests):
        if i % 2 and len(continuation) < 8:
            tokens = context.tolist()[-L:]
            for _ in continuation:
                tokens.append(int(logp_of(tokens[-L:])[-1].argmax()))
            requests[i] = Request(context, np.array(tokens[-len(continuation) :], np.int32))
    return requests, [expected(logp_of, request) for request in requests]


@pytest.mark.parametrize("mesh, batch_size", [((4, 2, 1), 3), slow((2, 2, 2), 1)])
def test_requests_against_the_reference(weights, requests, mesh, batch_size):
    """On meshes that the batch does not divide over, and whatever the order."""
    placed, params = on_mesh(weights, MeshConfig(*mesh))
    scorer = Scorer(placed, max_length=L, batch_size=batch_size, block=7)
    given, wanted = requests
    order = np.random.default_rng(batch_size).permutation(len(given))
    results = scorer(params, [given[i] for i in order])
    for i, (logp, greedy) in zip(order, results, strict=True):
        assert logp == pytest.approx(wanted[i][0], abs=1e-3), given[i]
        assert greedy == wanted[i][1], given[i]
    assert {greedy for _, greedy in wanted} == {True, False}


def multiple_choices():
    """Four answers to each of some questions: of one token, of several, of different lengths; and a lone one."""
    rng = np.random.default_rng(11)
    requests = []
    sizes = [(31, (1, 1, 1, 1)), (33, (3, 1, 4)), (5, (1, 2)), (44, (4, 4, 5, 4)), (20, (20, 20)), (9, (2,)),
             (40, (1, 9)), (48, (1, 1)), (49, (1, 1)), (1, (1,) * 5)]  # fmt: skip
    for context, lengths in sizes:
        shared = rng.integers(V, size=context).astype(np.int32)
        requests += [Request(shared.copy(), rng.integers(V, size=n).astype(np.int32)) for n in lengths]
    return [requests[i] for i in rng.permutation(len(requests))]


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True])
def test_contexts_are_read_once_where_they_are_shared(weights, logp_of, monkeypatch, broken):
    given = multiple_choices()
    groups = [group for _, group in choices_of(given, L, 8 * L)]
    shared = sorted(number for group in groups for number in group.numbers)
    lengths = {len(given[number].context) for number in shared}
    assert lengths == {1, 5, 31, 33, 48}  # not where long answers would be read step by step, or a context is cut
    assert all(np.array_equal(given[number].context, group.context) for group in groups for number in group.numbers)

    placed, params = on_mesh(weights)
    scorer = Scorer(placed, max_length=L, batch_size=3, block=7)
    if broken:
        # Every answer goes on from its neighbour's context.
        repeat = shared_prompts.repeat_rows

        def shifted(state, times):
            rows = repeat(state, times)
            roll = lambda x: jax.numpy.roll(x, times, axis=1 if x.ndim == 5 else 0)  # noqa: E731
            return jax.tree.map(roll, rows._replace(work=()))._replace(work=state.work)

        monkeypatch.setattr(shared_prompts, "repeat_rows", shifted)
    wrong = 0
    for request, (logp, greedy) in zip(given, scorer(params, given), strict=True):
        wanted, is_greedy = expected(logp_of, request)
        wrong += abs(logp - wanted) > 1e-3 or greedy != is_greedy
    assert bool(wrong) == broken


def groups(context, lengths, room=1 << 20):
    requests = [Request(np.zeros(context, np.int32), np.zeros(n, np.int32)) for n in lengths]
    return [(shape, group.numbers) for shape, group in choices_of(requests, 512, room)]


def test_a_question_with_many_labels_takes_no_more_memory_than_others():
    """77 labels, and room for 5 contexts: 19 fours and one that is read by itself."""
    found = groups(100, [1] * 77, room=5 * 129)
    assert found == [(Shape(128, 1, 4), tuple(range(first, first + 4))) for first in range(0, 76, 4)]
    assert groups(100, [1] * 77, room=129) == [] != groups(100, [1] * 77, room=2 * 129)
    ((shape, numbers),) = groups(100, [1] * 77)
    assert shape == Shape(128, 1, 128) and len(numbers) == 77


def test_what_costs_more_together_stays_apart():

    assert groups(400, [1, 1, 1]) == [(Shape(512, 1, 4), (0, 1, 2))]
    assert groups(500, [9, 12]) == [(Shape(512, 16, 2), (0, 1))]
    assert groups(60, [30, 30]) == [] == groups(400, [1])
    assert groups(512, [1, 1]) and not groups(513, [1, 1]) and not groups(512, [2, 2])


def test_nothing_to_score(weights):
    placed, params = on_mesh(weights)
    scorer = Scorer(placed, max_length=L, batch_size=8, block=L)
    assert scorer(params, []) == []
    empty = Request(np.array([1], np.int32), np.array([], np.int32))
    assert scorer(params, [empty]) == [(0.0, True)]


def test_windows_predict_every_token_once():
    for C in (1, 2, 7, 8, 9, 20):
        for N in (1, 2, 7, 8, 9, 15, 16, 17, 40):
            request = Request(np.arange(-C, 0), np.arange(N))
            found = []
            for tokens, predicted in windows(request, 8):
                assert 1 <= predicted < len(tokens) <= 9
                found += tokens[-predicted:].tolist()
                assert tokens.tolist() == list(range(tokens[0], tokens[-1] + 1))
                # No room is left while there is context that could fill it.
                assert len(tokens) == 9 or tokens[0] == (-C if N <= 8 else -1)
            assert found == list(range(N))


def test_shapes_are_few():
    assert [bucket_of(n, 1000) for n in (1, 32, 33, 64, 65, 512, 513, 1000)] == [
        32,
        32,
        64,
        64,
        128,
        512,
        1000,
        1000,
    ]


def test_short_inputs_come_in_larger_batches(weights):
    """As many tokens at a time whatever the length; and never more rows than there are inputs for."""
    placed, _ = on_mesh(weights)
    scorer = Scorer(placed, max_length=256, batch_size=8, block=256)

    def of_length(length, count):
        return [Request(np.zeros(length, np.int32), np.zeros(1, np.int32))] * count

    shapes = [batch[:2] for batch in scorer._batches(of_length(32, 100) + of_length(100, 5) + of_length(300, 9))]
    assert shapes == [(8, 256), (8, 256), (8, 128), (64, 32), (64, 32)]


def test_logits_never_exist_for_all_positions(weights):
    """The largest array with a vocabulary axis is a block's."""
    placed, params = on_mesh(weights)
    B, block = 8, 4
    arrays = [np.zeros((B, length), np.int32) for length in (L, L, L)]
    jaxpr = jax.make_jaxpr(lambda *xs: _score(placed.model, block * B, params, *xs))(*arrays)
    sizes = [math.prod(shape) for shape in shapes_in(jaxpr.jaxpr) if len(shape) == 3 and shape[-1] == V]
    assert max(sizes) == B * block * V


# Texts to tokens.


@pytest.mark.parametrize(
    "context, continuation, expected",
    [
        ("ab", " c", ("ab", " c")),
        ("ab ", "c", ("ab", " c")),  # white space at the end belongs to the continuation
        ("ab\n ", "c", ("ab", "\n c")),
        ("", "c", (None, "c")),
        ("  ", "c", (None, "  c")),
        ("naïve", "é", ("naïve", "é")),
    ],
)
def test_where_a_continuation_begins(context, continuation, expected):
    (request,) = encode_pairs(BYTES, [(context, continuation)])
    first = [BYTES.separator_id] if expected[0] is None else BYTES.encode(expected[0]).tolist()
    assert request.context.tolist() == first
    assert request.continuation.tolist() == BYTES.encode(expected[1]).tolist()


def test_a_continuation_of_no_token_is_refused():
    with pytest.raises(SpiralError, match=r"^--tasks has the continuation ''.*allowed: .*at least one token$"):
        encode_pairs(BYTES, [("a", " b"), ("ab", "")])


def test_documents_and_prompts():
    (request,) = encode_documents(BYTES, ["ab"])
    assert request.context.tolist() == [BYTES.separator_id]
    assert request.continuation.tolist() == [97, 98]
    assert [prompt.tolist() for prompt in encode_prompts(BYTES, ["a ", ""])] == [[97, 32], [BYTES.separator_id]]


# Generated texts.


@pytest.mark.slow
def test_generation_against_the_reference(weights, logp_of):
    placed, params = on_mesh(weights)
    generator = Generator(placed, max_length=L, batch_size=3, num_ids=V - 2)
    prompts = [request.context for request in requests_of(20, seed=3)]
    ends = [lambda ids, i=i: len(ids) == 1 + i % 5 for i in range(len(prompts))]
    found = generator(params, prompts, max_new_tokens=4, is_done=ends)
    for i, prompt in enumerate(prompts):
        tokens = prompt.tolist()[-(L - 4) :]
        for _ in range(min(4, 1 + i % 5)):
            tokens.append(int(logp_of(tokens)[-1][: V - 2].argmax()))
        assert found[i] == tokens[-len(found[i]) :]
        assert len(found[i]) == min(4, 1 + i % 5)


def test_where_a_text_ends():
    settings = GenerationSettings.of({"until": ["\n\n", "Q:"], "max_gen_toks": 20, "do_sample": False}, 64)
    assert (settings.max_new_tokens, settings.until) == (20, ("\n\n", "Q:"))
    is_done = settings.is_done(BYTES)
    ids = BYTES.encode("a\nb Q: c").tolist()
    assert [is_done(ids[:n]) for n in range(1, len(ids) + 1)] == [False] * 5 + [True] * 3
    assert settings.text(BYTES, ids) == "a\nb "
    assert is_done([97, BYTES.separator_id])
    assert settings.text(BYTES, [97, BYTES.separator_id, 98]) == "a"
    assert GenerationSettings.of({"until": "x"}, 1000) == GenerationSettings(256, ("x",))
    assert GenerationSettings.of({"max_new_tokens": 5, "temperature": 0.0, "top_p": 1}, 64).max_new_tokens == 5


@pytest.mark.parametrize(
    "values, found",
    [
        ({"do_sample": True, "max_gen_toks": 3}, "do_sample is True"),
        ({"temperature": 0.7, "max_gen_toks": 3}, "do_sample is None with temperature 0.7"),
        ({"max_gen_toks": 64}, "max_gen_toks is 64"),
        ({}, "max_gen_toks is 256"),
        ({"num_beams": 4, "max_gen_toks": 3}, "has num_beams"),
    ],
)
def test_what_cannot_be_generated_is_refused(values, found):
    with pytest.raises(SpiralError, match=rf"^generation_kwargs:? {found}.*; allowed: "):
        GenerationSettings.of(values, 64)
