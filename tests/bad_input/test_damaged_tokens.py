"""Token stores with a flipped bit, or made anew: noticed at the next open, by `--verify`, or by a run that resumes."""

import json
import shutil

import numpy as np
import pytest
from range_server import RangeServer

from spiral_jax.corpus.prepare import prepare_stores
from spiral_jax.data import checksums
from spiral_jax.data.config import DataConfig
from spiral_jax.data.prepared import open_stores
from spiral_jax.data.storage import Storage
from spiral_jax.data.store import TokenStore
from spiral_jax.data.store_writer import StoreWriter
from spiral_jax.data.tokenizers import ByteTokenizer
from spiral_jax.errors import SpiralError
from spiral_jax.run.directory import check_same_data, open_data, save_data

BLOCK = 64  # bytes, where the stores of these tests have many


@pytest.fixture
def blocks(monkeypatch):
    for module in ("spiral_jax.data.checksums", "spiral_jax.data.store", "spiral_jax.data.store_writer"):
        monkeypatch.setattr(f"{module}.BLOCK_BYTES", BLOCK)


def write(folder, seed=0) -> TokenStore:
    with StoreWriter(folder, ByteTokenizer()) as writer:
        for n in range(100):
            writer.add(np.random.default_rng(seed + n).integers(256, size=30), utf8_bytes=30)
    return TokenStore.open(folder)


def flip(path, byte):
    content = bytearray(path.read_bytes())
    content[byte] ^= 4
    path.write_bytes(content)


def test_a_sample_is_compared_at_open_and_all_by_verify(tmp_path, blocks):
    store = write(tmp_path / "store")
    path, count = tmp_path / "store/tokens.bin", -(-store.num_tokens * 2 // BLOCK)
    sample = checksums.sampled(store.manifest.tokens_blocks, store.manifest.tokens_sha256)
    assert {0, count - 1} < set(sample) and len(sample) <= 8 < count
    for block in range(count):
        flip(path, block * BLOCK + 3)
        if block in sample:
            with pytest.raises(SpiralError, match=rf"{path} is damaged \(bytes {block * BLOCK} to "):
                TokenStore.open(tmp_path / "store")
        else:
            opened = TokenStore.open(tmp_path / "store")
            if block % 20 == 1:
                with pytest.raises(SpiralError, match=rf"{path}: SHA-256 is "):
                    opened.verify()
        flip(path, block * BLOCK + 3)
    TokenStore.open(tmp_path / "store").verify()


def test_other_stores_are_sampled_elsewhere(tmp_path, blocks):
    stores = [write(tmp_path / str(seed), 1000 * seed) for seed in range(3)]
    samples = {tuple(checksums.sampled(s.manifest.tokens_blocks, s.manifest.tokens_sha256)) for s in stores}
    assert len(samples) == 3


def test_a_store_behind_a_url_is_sampled_by_a_few_ranges(tmp_path, blocks):
    pytest.importorskip("aiohttp")
    write(tmp_path / "store")
    with RangeServer(tmp_path) as server:
        TokenStore.open(f"{server.url}/store", Storage(retry_seconds=5))
        asked = [request for request, _ in server.log if request.method == "GET" and request.path.endswith(".bin")]
        assert len(asked) <= 2 * 8 and max(request.stop - request.start for request in asked) <= BLOCK
        flip(tmp_path / "store/tokens.bin", 0)
        with pytest.raises(SpiralError, match=r"/store/tokens\.bin is damaged \(bytes 0 to 63 "):
            TokenStore.open(f"{server.url}/store", Storage(retry_seconds=5))


def test_checksums_that_are_no_checksums(tmp_path):
    write(tmp_path / "store")
    path = tmp_path / "store/manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    for wrong in ("", "0" * 7, "0" * 16, "x" * 8, 3, None, [1]):
        manifest["files"]["tokens.bin"]["crc32_of_blocks"] = wrong
        path.write_text(json.dumps(manifest), encoding="utf-8")
        if wrong == "":  # as in a store of a version that had none
            TokenStore.open(tmp_path / "store")
            continue
        with pytest.raises(SpiralError, match=r"manifest\.json is damaged"):
            TokenStore.open(tmp_path / "store")


@pytest.fixture
def cached(tmp_path):
    """A run's directory with the stores made of its text."""
    (tmp_path / "text.txt").write_text("".join(f"line {n}\n" for n in range(200)), encoding="utf-8")
    config = DataConfig(paths=(str(tmp_path / "text.txt"),), validation_fraction=0.2, workers=1)
    (tmp_path / "run").mkdir()
    data = prepare_stores(config, tmp_path / "run/cache", report=lambda line: None)
    save_data(tmp_path / "run", data)
    return tmp_path / "run", config, data


@pytest.mark.parametrize("name", ["train/tokens.bin", "train/documents.bin", "validation/tokens.bin"])
def test_a_flipped_bit_in_the_cache_of_a_run_is_named_and_the_stores_are_made_again(cached, name, capsys):
    workdir, config, data = cached
    assert open_data(workdir, data.fingerprints) is not None
    (folder,) = {path.parent.parent for path in workdir.glob("cache/*/*/manifest.json")}
    flip(folder / name, 9)
    assert open_data(workdir, data.fingerprints) is None
    assert f"data: {folder / name} is damaged" in capsys.readouterr().out
    lines = []
    again = prepare_stores(config, workdir / "cache", report=lines.append)
    assert any(f"preparing again, the cache is damaged: {folder / name} is damaged" in line for line in lines)
    assert again.fingerprints == data.fingerprints
    assert open_data(workdir, data.fingerprints) is not None


def test_without_its_text_a_run_with_a_damaged_cache_does_not_go_on(cached, tmp_path):
    workdir, config, data = cached
    (path,) = workdir.glob("cache/*/train/tokens.bin")
    flip(path, 9)
    (tmp_path / "text.txt").unlink()
    assert open_data(workdir, data.fingerprints) is None
    with pytest.raises(SpiralError, match=r"data\.paths is .*text\.txt', which does not exist"):
        prepare_stores(config, workdir / "cache", report=lambda line: None)


def test_a_store_made_anew_is_another_one(tmp_path):
    before = write(tmp_path / "store")
    shutil.move(tmp_path / "store", tmp_path / "old")
    write(tmp_path / "store", seed=1)
    config = DataConfig(stores=(str(tmp_path / "store"),))
    with pytest.raises(SpiralError, match=r"store: its tokens are not those the run in .* began with"):
        check_same_data(config, open_stores(config), [before.fingerprint], tmp_path)
    # Its manifest beside the old tokens is noticed, too: they have the same size.
    shutil.copy(tmp_path / "store/manifest.json", tmp_path / "old/manifest.json")
    with pytest.raises(SpiralError, match=r"old/tokens\.bin is damaged"):
        TokenStore.open(tmp_path / "old")
