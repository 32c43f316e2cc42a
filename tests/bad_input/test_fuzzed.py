"""Files with random damage: what reads them either succeeds or raises SpiralError, soon and in little memory."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from megatron_writer import write as write_megatron
from refusals import peak_bytes, reset_peak

from spiral_jax.convert.folder import read_config, read_params
from spiral_jax.corpus.parts import Part, encode_piece
from spiral_jax.corpus.pieces import Piece
from spiral_jax.corpus.prepare import prepare_folder
from spiral_jax.corpus.sources import Source
from spiral_jax.data.config import DataConfig
from spiral_jax.data.json_files import MAX_CONFIG_BYTES, read_json_object
from spiral_jax.data.megatron.tokens import MegatronTokens
from spiral_jax.data.store import TokenStore
from spiral_jax.data.tokenizers import ByteTokenizer, load_tokenizer
from spiral_jax.errors import SpiralError
from spiral_jax.run.config import RunConfig

TIMES = 250
WORDS = (b"null", b"-1", b"1e400", b"99999999999999999999", b"[]", b"{}", b'"x"', b"NaN", b"true", b"0", b"\x00")


def damaged(content: bytes, generator: random.Random) -> bytes:
    """One to three of: a flipped bit, bytes replaced, taken out or put in, a word of JSON put in, the end cut off."""
    found = bytearray(content)
    for _ in range(generator.randint(1, 3)):
        at = generator.randrange(len(found) + 1)
        length = generator.choice((1, 1, 2, 4, 8, 30))
        match generator.randrange(6):
            case 0 if at < len(found):
                found[at] ^= 1 << generator.randrange(8)
            case 1:
                found[at : at + length] = generator.randbytes(min(length, len(found) - at))
            case 2:
                del found[at : at + length]
            case 3:
                found[at:at] = generator.randbytes(length)
            case 4:
                found[at : at + generator.choice((0, 1, 2, 5))] = generator.choice(WORDS)
            case _:
                del found[at if generator.random() < 0.2 else len(found) :]
    return bytes(found)


def read_store(folder: Path) -> None:
    store = TokenStore.open(folder)
    store.read(0, min(store.num_tokens, 5))
    assert store.utf8_bytes > 0 and store.locate(0)


def read_megatron(folder: Path) -> None:
    tokens = MegatronTokens.open(folder)
    tokens.read(0, min(tokens.num_tokens, 5))
    tokens.locate(0)
    tokens.verify()


def read_folder(folder: Path) -> None:
    config, _ = read_config(folder)
    read_params(folder, config)


def read_tokenizer(folder: Path) -> None:
    load_tokenizer(folder).encode("a b")


def read_prepared(folder: Path) -> None:
    """As `prepare` when it is called again: what is damaged is other files to it."""
    data = DataConfig(paths=(f"{folder.parent}/text.txt",), validation_fraction=0.2, workers=1)
    prepare_folder(data, folder, report=lambda line: None)


def read_parts(folder: Path) -> None:
    found = Part.find("00000000", folder, np.dtype("<u2"))
    if found is None:
        raise SpiralError("it is made again")


def read_run(folder: Path) -> None:
    RunConfig.from_dict(read_json_object(folder / "config.json", MAX_CONFIG_BYTES))


@pytest.fixture(scope="module")
def folder(good, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("fuzzed")
    shutil.copytree(good / "store/train", folder / "store")
    shutil.copytree(good / "hf", folder / "hf")
    shutil.copytree(good / "run", folder / "run")
    write_megatron(folder / "megatron")
    shutil.copy(good / "text.txt", folder / "text.txt")
    read_prepared(folder / "prepared")
    (folder / "parts").mkdir()
    record = Source("r", str(good / "records.jsonl"), (good / "records.jsonl").stat().st_size, 0, "jsonl", "", "hash")
    piece = Piece((record,), record.size, name="00000000")
    encode_piece(piece, ByteTokenizer(), DataConfig(validation_fraction=0.2), folder / "parts")
    return folder


@pytest.mark.parametrize(
    "name, read",
    [
        ("store/manifest.json", read_store),
        ("store/documents.bin", read_store),
        ("megatron/data.idx", read_megatron),
        ("hf/model.safetensors", read_folder),
        ("hf/config.json", read_folder),
        ("run/config.json", read_run),
        ("run/tokenizer/tokenizer.json", read_tokenizer),
        ("run/tokenizer/tokenizer_info.json", read_tokenizer),
        ("prepared/prepared.json", read_prepared),
        ("parts/00000000.json", read_parts),
    ],
)
def test_every_damage_is_refused_or_does_not_matter(folder, name, read):
    path = folder / name
    content, generator, refusals = path.read_bytes(), random.Random(name), 0
    # Of weights the header is damaged: the numbers may be any.
    header = 8 + int.from_bytes(content[:8], "little") if path.suffix == ".safetensors" else len(content)
    read(path.parent)
    floor = reset_peak()
    try:
        for _ in range(TIMES):
            path.write_bytes(damaged(content[:header], generator) + content[header:])
            try:
                read(path.parent)
            except SpiralError as error:
                assert str(error)
                refusals += 1
    finally:
        path.write_bytes(content)
    assert refusals > TIMES // 3
    assert peak_bytes() - floor < 200e6
