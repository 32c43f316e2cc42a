import pathlib
import random

import numpy as np
import pytest

import spiral_jax
from spiral_jax.corpus import pieces
from spiral_jax.corpus.pieces import text_cut
from spiral_jax.corpus.sources import character_cut
from spiral_jax.data.tokenizers import HuggingFaceTokenizer, train_bpe

SHARED = pathlib.Path(spiral_jax.__file__).parents[1] / "../shared/data"
NEOX = SHARED / "tokenizer/20B_tokenizer.json"
needs_neox = pytest.mark.skipif(not NEOX.exists(), reason=f"no {NEOX}")
WORDS = ["a", "it's", "42", "  ", "\n", "\r\n", "\n\n", "\t", " ", ".", "...", "Ü", "e\u0301", "\u3000", "\u00a0",
         "日本", "\u2028", "\U0001f600", "<|endoftext|>", "\u0085", "x", "yz"]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "position", "cut"),
    [
        ("aa bb\ncc\ndd", 2, 6),  # a newline is better than a space
        ("aa bb\ncc\ndd", 6, 6),  # right where it is wanted
        ("aa bb\ncc\ndd", 7, 9),
        ("aa bb\n\ncc dd", 4, 9),  # not in a run of white space: the space behind it
        ("aa\r\nbb cc", 2, 6),
        ("aa\n\n\nbb", 2, 3),  # nothing better
        ("aaaa\n\n", 2, 5),
        ("aaaaaa", 2, 2),
        ("aa\n\u3000b c", 1, 7),  # wide white space is white space: after it
        ("ab\u00a0\nb c", 1, 6),
        ("\u00e9\u00e9\u00e9", 1, 2),  # not within a character
        ("\U0001f600\U0001f600", 1, 4),
    ],
)
def test_where_text_is_cut(text, position, cut):
    assert text_cut(text.encode(), position) == cut


def test_a_cut_is_not_looked_for_too_far_ahead(monkeypatch):
    monkeypatch.setattr(pieces, "LOOKAHEAD", 10)
    assert text_cut(b"a" * 30 + b"\nb", 5) == 5
    assert text_cut(b"a" * 12 + b" b" + b"a" * 30, 5) == 12


def test_what_is_no_utf8_is_cut_anywhere():
    assert character_cut(b"\x80" * 10, 2) == 5 and character_cut(b"\x80" * 4, 3) == 4


def test_what_lies_farther_away_makes_no_difference():
    """The window of `text_cut` is enough: a worker that sees more of the file cuts at the same place."""
    rng = random.Random(1)
    for _ in range(2000):
        content = "".join(rng.choices(WORDS, k=30)).encode()
        position = rng.randrange(len(content))
        start = max(position - pieces.MARGIN, 0)
        assert start + text_cut(content[start:], position - start) == text_cut(content, position)


def good_cut(content, position):
    """Whether a cut is one of the two kinds that may not change the tokens."""
    before, after = content[:position].decode(), content[position:].decode()
    newline = before[-1:] == "\n" and not before[-2:-1].isspace() and not after[:1].isspace() and len(before) > 1
    space = after[:1] == " " and not after[1:2].isspace() and not before[-1:].isspace() and len(after) > 1
    return (newline or space) and before and after


@pytest.mark.parametrize("tokenizer", [pytest.param("neox", marks=needs_neox), "trained"])
def test_parts_have_the_tokens_of_the_whole(tokenizer):
    rng = random.Random(0)
    if tokenizer == "neox":
        tokenizer = HuggingFaceTokenizer.from_file(NEOX)
    else:
        tokenizer = train_bpe(["".join(rng.choices(WORDS, k=2000)) for _ in range(20)], 600)
    checked = 0
    for _ in range(3000):
        text = "".join(rng.choices(WORDS, k=rng.randrange(4, 30)))
        content = text.encode()
        cut = text_cut(content, rng.randrange(len(content)))
        if not good_cut(content, cut):
            continue
        checked += 1
        parts = np.concatenate(tokenizer.encode_batch([content[:cut].decode(), content[cut:].decode()]))
        assert parts.tolist() == tokenizer.encode(text).tolist(), (text, cut)
    assert checked > 400


@needs_neox
def test_real_text_is_cut_well_everywhere():
    tokenizer = HuggingFaceTokenizer.from_file(NEOX)
    for name in ("wikitext-2/valid.txt", "prose/carroll-alice.txt", "prose/melville-piazza.txt"):
        whole = (SHARED / name).read_bytes()[:400_000]
        whole = whole[: whole.rindex(b"\n") + 1]
        positions = [
            0,
            *(text_cut(whole, position) for position in range(5_000, len(whole) - 5_000, 5_003)),
            len(whole),
        ]
        texts = [whole[a:b].decode() for a, b in zip(positions[:-1], positions[1:], strict=True)]
        ids = np.concatenate(tokenizer.encode_batch(texts))
        assert np.array_equal(ids, tokenizer.encode(whole.decode())), name
