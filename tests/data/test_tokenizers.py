import hashlib
import json
import os
import pathlib
import random
import subprocess
import sys
import time

import numpy as np
import pytest
import tokenizers

import spiral_jax
from spiral_jax.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer, load_tokenizer, train_bpe
from spiral_jax.errors import SpiralError

REPOSITORY = pathlib.Path(spiral_jax.__file__).parents[1]
NEOX = REPOSITORY / "../shared/data/tokenizer/20B_tokenizer.json"
needs_neox = pytest.mark.skipif(not NEOX.exists(), reason=f"{NEOX} is not there")

AWKWARD = [
    "plain text\n",
    "tabs\tand  spaces   \r\n\r\n\r mixed line ends\n\n\n",
    "def f(x):\n        return x  # comment\n",
    "é ü ñ 漢字 \U0001f600 \u202e \ufeff",
    "\x00\x01\x7f",
    " leading and trailing ",
    "<|endoftext|>",
    "a<|endoftext|>b <|endoftext|> </s> <|padding|>",
    "",
]


def training_texts():
    return [path.read_text(encoding="utf-8") for path in sorted((REPOSITORY / "spiral_jax/data").glob("*.py"))]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(training_texts(), 600)


@pytest.fixture
def tokenizer(request):
    if request.param == "bytes":
        return ByteTokenizer()
    if request.param == "bpe":
        return request.getfixturevalue("bpe")
    return HuggingFaceTokenizer.from_file(NEOX)


every_tokenizer = pytest.mark.parametrize(
    "tokenizer", ["bytes", "bpe", pytest.param("neox", marks=needs_neox)], indirect=True
)


@every_tokenizer
def test_round_trip_is_lossless_and_never_yields_the_separator(tokenizer):
    for text in AWKWARD + training_texts():
        ids_N = tokenizer.encode(text)
        assert ids_N.dtype == np.int32 and ids_N.ndim == 1
        assert tokenizer.decode(ids_N) == text
        assert tokenizer.separator_id not in ids_N
        assert len(ids_N) == 0 or (ids_N.min() >= 0 and ids_N.max() < tokenizer.vocab_size)


def test_bpe_is_lossless_for_every_byte_and_for_text_that_is_not_normalised(bpe):
    text = "e\u0301 \u00e9 \ufb01 \u212b" + "".join(map(chr, range(0x800))) + "\uffff\U0010ffff"
    assert bpe.decode(bpe.encode(text)) == text


@every_tokenizer
def test_a_batch_gives_the_ids_of_its_texts(tokenizer):
    texts = AWKWARD * 3
    for batch_ids_N, text in zip(tokenizer.encode_batch(texts), texts, strict=True):
        np.testing.assert_array_equal(batch_ids_N, tokenizer.encode(text))


@every_tokenizer
def test_the_separator_shows_as_text(tokenizer):
    ids_N = np.concatenate([tokenizer.encode("a"), [tokenizer.separator_id], tokenizer.encode("b")])
    assert tokenizer.decode(ids_N) == "a<|endoftext|>b"


@every_tokenizer
def test_saved_and_loaded_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert type(loaded) is type(tokenizer)
    for attribute in ("vocab_size", "separator_id", "fingerprint"):
        assert getattr(loaded, attribute) == getattr(tokenizer, attribute)
    for text in AWKWARD:
        np.testing.assert_array_equal(loaded.encode(text), tokenizer.encode(text))


@needs_neox
def test_neox_is_what_it_is_known_to_be(tmp_path):
    neox = HuggingFaceTokenizer.from_file(NEOX)
    assert (neox.vocab_size, neox.separator_id) == (50277, 0)
    assert neox.encode("Hello world").tolist() == [12092, 1533]
    neox.save(tmp_path)
    saved = (tmp_path / "tokenizer.json").read_bytes()
    assert hashlib.sha256(saved).digest() == hashlib.sha256(NEOX.read_bytes()).digest()
    (tmp_path / "tokenizer_info.json").unlink()  # a Hugging Face folder
    assert load_tokenizer(tmp_path).fingerprint == neox.fingerprint


def test_bytes_are_utf8():
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.separator_id) == (257, 256)
    assert tokenizer.encode("aé").tolist() == [0x61, 0xC3, 0xA9]
    assert tokenizer.decode([0x61, 0xC3, 300, 256]) == "a\ufffd<|endoftext|>"  # half a character, a padded id


def test_training_is_deterministic_across_processes(bpe):
    program = (
        "import sys; from spiral_jax.data.tokenizers import train_bpe; from pathlib import Path\n"
        "texts = [p.read_text(encoding='utf-8') for p in sorted(Path(sys.argv[1], 'spiral_jax/data').glob('*.py'))]\n"
        "print(train_bpe(iter(texts), 600).fingerprint)"
    )
    for hash_seed, threads in (("1", "true"), ("2", "false")):
        environment = os.environ | {
            "PYTHONPATH": str(REPOSITORY),
            "PYTHONHASHSEED": hash_seed,
            "TOKENIZERS_PARALLELISM": threads,
        }
        command = [sys.executable, "-c", program, str(REPOSITORY)]
        assert subprocess.check_output(command, env=environment, text=True).strip() == bpe.fingerprint


@pytest.mark.parametrize("alphabet", ["a", "ACGT", "().;", " ", "日本語"])
def test_very_long_words_are_no_more_work_than_others(alphabet):
    """Uncut, 200,000 characters of DNA took half a minute, and twice as many four times that."""
    rng = random.Random(0)
    text = "".join(rng.choices(alphabet, k=200_000))
    begin = time.process_time()
    trained = train_bpe([text], 600)
    assert time.process_time() - begin < 10  # 0.3 on an idle machine
    assert trained.decode(trained.encode(text[:5000])) == text[:5000]
    assert len(trained.encode(text)) < len(text.encode())


def test_words_of_usual_length_make_the_tokenizer_that_they_would_make_uncut(bpe, monkeypatch):
    monkeypatch.setattr("spiral_jax.data.tokenizers._LONGEST_WORD", 10**4)
    assert train_bpe(training_texts(), 600).fingerprint == bpe.fingerprint


def test_trained_vocabulary_has_the_separator_first_and_the_size_asked_for(bpe):
    assert bpe.separator_id == 0 and bpe.vocab_size == 600
    assert 257 <= train_bpe(["little"], 600).vocab_size < 600
    assert train_bpe(training_texts(), 601).fingerprint != bpe.fingerprint


def spec_of(bpe, tmp_path):
    bpe.save(tmp_path)
    return json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))


def test_a_separator_that_the_file_does_not_call_special_is_not_made_from_text_either(bpe, tmp_path):
    spec = spec_of(bpe, tmp_path)
    spec["added_tokens"][0]["special"] = False
    library = tokenizers.Tokenizer.from_str(json.dumps(spec))
    library.encode_special_tokens = True
    assert 0 in library.encode("a<|endoftext|>b").ids  # why it takes more than that flag
    ours = HuggingFaceTokenizer(json.dumps(spec))
    ids_N = ours.encode("a<|endoftext|>b")
    assert 0 not in ids_N and ours.decode(ids_N) == "a<|endoftext|>b"


def test_separator_is_found_or_asked_for(bpe, tmp_path):
    text = json.dumps(spec_of(bpe, tmp_path))
    assert HuggingFaceTokenizer(text.replace("<|endoftext|>", "</s>")).separator_id == 0
    other = text.replace("<|endoftext|>", "<end>")
    with pytest.raises(SpiralError, match=r"other\.json has no token <\|endoftext\|> or </s>; allowed: data"):
        HuggingFaceTokenizer(other, name="other.json")
    with pytest.raises(SpiralError, match=r"has no token <stop>; allowed: data\.separator"):
        HuggingFaceTokenizer(other, separator="<stop>")
    with_separator = HuggingFaceTokenizer(other, separator="<end>")
    assert with_separator.separator_id == 0
    with_separator.save(tmp_path)
    assert load_tokenizer(tmp_path).fingerprint == with_separator.fingerprint


def test_padding_truncation_and_added_tokens_of_the_file_do_not_reach_the_ids(bpe, tmp_path):
    spec = spec_of(bpe, tmp_path)
    library = tokenizers.Tokenizer.from_str(json.dumps(spec))
    library.enable_truncation(4)
    library.enable_padding(length=64)
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    ours = HuggingFaceTokenizer(library.to_str())
    text = "a text of more than four tokens"
    np.testing.assert_array_equal(ours.encode(text), bpe.encode(text))
    assert ours.fingerprint == bpe.fingerprint


def test_a_byte_order_mark_in_front_of_the_file_goes(bpe, tmp_path):
    bpe.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert HuggingFaceTokenizer.from_file(path).fingerprint == bpe.fingerprint


@pytest.mark.parametrize("content", ["", "not json", "[]", '{"version": "1.0"}'])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, content):
    path = tmp_path / "mine.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(SpiralError, match=r"mine\.json is damaged \(.*; allowed: a Hugging Face tok") as error:
        HuggingFaceTokenizer.from_file(path)
    assert "\n" not in str(error.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(SpiralError, match=r"none\.json does not exist"):
        HuggingFaceTokenizer.from_file(tmp_path / "none.json")
    with pytest.raises(SpiralError, match=r"tokenizer_info\.json does not exist"):
        load_tokenizer(tmp_path)
    with pytest.raises(SpiralError, match="cannot be written"):
        ByteTokenizer().save(tmp_path / "nowhere")


def test_a_saved_tokenizer_that_was_changed_is_refused(bpe, tmp_path):
    spec = spec_of(bpe, tmp_path)
    spec["model"]["merges"].pop()
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    with pytest.raises(SpiralError, match="its files were changed"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("info", ["{", "[]", "{}", '{"format": "spiral_jax.tokenizer", "version": 9}'])
def test_damaged_tokenizer_info_is_named(tmp_path, info):
    (tmp_path / "tokenizer_info.json").write_text(info, encoding="utf-8")
    with pytest.raises(
        SpiralError, match=r"tokenizer_info\.json is damaged .*; allowed: spiral_jax\.tokenizer, version 1"
    ):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"], indirect=True)
def test_text_without_utf8_form_is_an_error_of_the_user(tokenizer):
    with pytest.raises(SpiralError, match=r"character 2 is '\\udce9'"):  # what Python makes of a bad argument byte
        tokenizer.encode("ab\udce9")
