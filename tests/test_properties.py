"""What holds for any input that hypothesis thinks of: geometry, schedules, windows, stores, the configuration."""

import dataclasses
import json
import math
import zlib

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from spiral_jax.data import checksums
from spiral_jax.data.config import DataConfig
from spiral_jax.data.pipeline import WindowOrder
from spiral_jax.data.store import OFFSET_DTYPE, TokenStore
from spiral_jax.data.store_writer import Counts, StoreWriter
from spiral_jax.data.tokenizers import ByteTokenizer
from spiral_jax.data.windows import TokensInMemory, num_windows, read_windows
from spiral_jax.errors import SpiralError
from spiral_jax.model.chunks import Level, to_chunks, to_tokens
from spiral_jax.model.config import ModelConfig
from spiral_jax.run.config import RunConfig
from spiral_jax.training.config import OptimizerConfig, TrainConfig
from spiral_jax.training.schedules import learning_rate, schedules

# The same examples every time: a failure is not a matter of luck.
few = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
many = settings(few, max_examples=200)
# A fixture that is shared by the examples of a test is one that they do not change.
shared = settings(few, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def levels(draw) -> Level:
    chunk = draw(st.integers(1, 6))
    shift = 0 if chunk == 1 else chunk - 1 + draw(st.integers(0, 4))
    return Level(chunk, draw(st.integers(0, chunk - 1)), shift)


@many
@given(levels(), st.integers(0, 40))
def test_chunks_are_as_docs_spec_has_them(level, length):
    g, w, _ = level
    chunks = [(i + w) // g for i in range(length)]
    assert [level.chunk_of(i) for i in range(length)] == chunks
    assert [level.place_of(i) for i in range(length)] == [(i + w) % g for i in range(length)]
    ends = [i for i in range(length) if level.closes(i)]
    assert ends == [i for i in range(length) if (i + w + 1) % g == 0]
    assert level.num_chunks(length) == len(ends)  # every complete chunk closes once


@few
@given(levels(), st.integers(1, 12))
def test_to_chunks_and_back_moves_each_token_by_the_shift(level, length):
    N = level.num_chunks(length)
    assume(N > 0)
    h_BxLxD = np.arange(1, 2 * length + 1, dtype=np.float32).reshape(1, length, 2)
    h_BxNxGxD, is_token_NxG = to_chunks(h_BxLxD, level)
    e_BxLxD = np.asarray(to_tokens(h_BxNxGxD, level, length))
    expected = np.zeros_like(h_BxLxD)
    for i in range(length):
        source = i - level.shift
        if source >= 0 and level.chunk_of(source) < N:
            expected[0, i] = h_BxLxD[0, source]
    np.testing.assert_array_equal(e_BxLxD, expected)
    assert is_token_NxG.sum() == N * level.chunk - level.offset


fractions = st.floats(0, 1)


@few
@given(
    st.sampled_from(list(schedules)),
    st.integers(1, 64),
    st.none() | st.integers(0, 80),
    fractions,
    fractions,
    fractions,
)
def test_a_learning_rate_is_refused_or_between_0_and_its_peak(name, steps, warmup, warmup_part, decay_part, final):
    config = OptimizerConfig(
        schedule=name, peak_learning_rate=0.5, warmup_steps=warmup, warmup_fraction=warmup_part,
        decay_fraction=decay_part, final_fraction=final,
    )  # fmt: skip
    try:
        schedules[name](config, steps).check()
    except SpiralError:
        return
    rates = np.asarray(learning_rate(config, steps)(np.arange(64)))[:steps]
    assert np.isfinite(rates).all() and (rates >= 0).all() and rates.max() <= 0.5 * (1 + 1e-6)
    W = config.resolved_warmup(steps)
    np.testing.assert_allclose(rates[:W], 0.5 * np.arange(1, W + 1)[:steps] / max(W, 1), rtol=1e-5)
    assert (np.diff(rates[W:]) <= 1e-6).all()


@many
@given(st.integers(0, 200), st.integers(1, 40))
def test_windows_predict_every_token_but_the_first_once(tokens, length):
    source = TokensInMemory("tokens", np.arange(tokens))
    if tokens < length + 1:
        with pytest.raises(SpiralError, match=r"train\.sequence_length is "):
            num_windows(source, length)
        return
    count = num_windows(source, length)
    windows_NxW = read_windows(source, range(count), length)
    assert windows_NxW[:, 1:].ravel().tolist() == list(range(1, count * length + 1))
    assert tokens - (count * length + 1) < length


@few
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_an_epoch_has_every_window_once(windows, batch_size, seed):
    order = WindowOrder(windows, batch_size=batch_size, seed=seed)
    every = sorted((source, index) for source, count in enumerate(windows) for index in range(count))
    for epoch in range(2):
        assert sorted(order[epoch * len(every) + n] for n in range(len(every))) == every


documents = st.lists(st.binary(max_size=30), min_size=1, max_size=12)


@shared
@given(documents, st.integers(0, 12), st.data())
def test_a_store_is_what_was_written_and_every_flipped_bit_is_noticed(tmp_path_factory, texts, stopped, data):
    folder = tmp_path_factory.mktemp("store") / "store"
    tokenizer = ByteTokenizer()
    writer = StoreWriter(folder, tokenizer)
    for number, text in enumerate(texts):
        if number == stopped:  # killed after what is on disk, with some more that was not secured
            writer.sync()
            kept = writer.counts
            writer.extend(np.array([1, 2], "<u2"), np.zeros(0, OFFSET_DTYPE), Counts(2))
            writer.close()
            writer = StoreWriter(folder, tokenizer, resume=kept)
        writer.add(np.frombuffer(text, np.uint8), utf8_bytes=max(len(text), 1))
    store = writer.finish()
    expected = [token for text in texts for token in [*text, 256]]
    assert store.read(0, store.num_tokens).tolist() == expected
    assert np.diff(store.document_offsets_M.astype(int)).tolist() == [len(text) + 1 for text in texts]
    store.verify()
    for name, _, blocks in store.manifest.checksums:
        path = folder / name
        content = path.read_bytes()
        assert blocks == f"{zlib.crc32(content):08x}"
        bit = data.draw(st.integers(0, 8 * len(content) - 1))
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(SpiralError, match="is damaged"):
            TokenStore.open(folder)
        path.write_bytes(content)


@few
@given(st.binary(max_size=200), st.integers(1, 20), st.lists(st.integers(0, 200), max_size=4))
def test_checksums_do_not_depend_on_how_the_content_comes(content, block_bytes, cuts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checksums, "BLOCK_BYTES", block_bytes)
        found, edges = checksums.Checksums(), [0, *sorted(cuts), len(content)]
        for start, stop in zip(edges, edges[1:], strict=False):
            found.update(content[start:stop])
        blocks = [content[at : at + block_bytes] for at in range(0, len(content), block_bytes)]
        assert found.blocks == "".join(f"{zlib.crc32(block):08x}" for block in blocks)
        assert checksums.are_blocks(found.blocks, len(content))
        sample = checksums.sampled(found.blocks, "seed")
        assert sample == sorted(set(sample)) and len(sample) == len(set(sample)) <= max(8, 0)
        assert {0, len(blocks) - 1} <= set(sample) or not blocks
        assert len(blocks) > 8 or len(sample) == len(blocks)


def values(hint):
    """Any value of a field's type, most of them small."""
    small = st.integers(-1, 40) | st.integers()
    return {
        int: small,
        int | None: st.none() | small,
        float: st.floats() | st.floats(0, 1),
        float | None: st.none() | st.floats(),
        bool: st.booleans(),
        str: st.text(max_size=5),
    }.get(hint, st.lists(small, max_size=4) | st.none())


ROOMS = {"model": ModelConfig, "train": TrainConfig, "optimizer": OptimizerConfig, "data": DataConfig}


@st.composite
def configurations(draw):
    found = {}
    for room, kind in ROOMS.items():
        fields = {field.name: field for field in dataclasses.fields(kind)}
        names = draw(st.lists(st.sampled_from(sorted(fields)), max_size=3, unique=True))
        found[room] = {name: draw(values(kind.__annotations__[name])) for name in names}
    return found


@settings(many, max_examples=400)
@given(configurations())
def test_a_configuration_is_refused_in_a_line_or_comes_back_from_json(fields):
    try:
        config = RunConfig.from_dict(fields)
    except SpiralError as error:
        assert "; " in str(error) or " are " in str(error) or " overlap" in str(error)
        return
    saved = config.to_dict()
    assert RunConfig.from_dict(json.loads(json.dumps(saved, allow_nan=False))) == config
    assert all(math.isfinite(value) for room in saved.values() if isinstance(room, dict)
               for value in room.values() if isinstance(value, float))  # fmt: skip
