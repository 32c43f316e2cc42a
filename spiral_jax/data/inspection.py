"""Looks at token data: what it is, what is in it, and whether it is whole."""

from collections.abc import Sequence

import numpy as np

from spiral_jax.data.blob import spread
from spiral_jax.data.megatron.tokens import MegatronTokens
from spiral_jax.data.prepared import open_source, stores_in, tokenizer_beside
from spiral_jax.data.storage import LOCAL, absolute, expanded, is_url, join
from spiral_jax.data.store import DOCUMENTS, TOKENS, TokenStore
from spiral_jax.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer, Tokenizer
from spiral_jax.progress import Progress, Report

Source = TokenStore | MegatronTokens

_WINDOW = 64  # tokens shown of a window
_WIDTH = 160  # and characters


def inspect(
    place: str,
    *,
    show: int,
    verify: bool,
    tokenizer_file: str = "",
    separator: str = "",
    report: Report = print,
) -> None:
    """Says what token data is, shows some of it, and reads all of it to see that it is whole.

    Args:
      place: a folder with train/ and perhaps validation/, a token store or a Megatron dataset; a path or a URL.
      show: how many windows to show of each, evenly spaced over its tokens.
      verify: whether to read everything: checksums, document boundaries, separators, range of the ids.
      tokenizer_file: a tokenizer.json, or "bytes"; "" for the one beside the data.
      separator: text of the separator token; "" as `load_tokenizer` does.
      report: takes the lines.

    Raises:
      SpiralError: there is no such data, it is damaged, or it is not of this tokenizer.
    """
    place = absolute(place)
    # What is trained on, of whichever kind it is, and the store beside it.
    sources: Sequence[Source] = [
        open_source(place, field="--inspect"),
        *stores_in([join(place, "validation")], LOCAL),
    ]
    tokenizer = _find_tokenizer(place, sources[0], tokenizer_file, separator)
    for source in sources:
        report(f"{source.name}: {'token store' if isinstance(source, TokenStore) else 'Megatron dataset'}")
        for name, text in [*_documents(source), *_content(source, tokenizer)]:
            report(f"  {name:<12} {text}")
        if isinstance(source, TokenStore) and tokenizer is not None:
            source.check_tokenizer(tokenizer)
        _show(source, tokenizer, show, report)
    if tokenizer is None:
        report("tokenizer: none beside the data; ids are shown as they are")
    else:
        kind = "bytes" if isinstance(tokenizer, ByteTokenizer) else "Hugging Face tokenizer.json"
        report(f"tokenizer: {kind}, fingerprint {_short(tokenizer.fingerprint)}")
        report(f"  {'ids':<12} {tokenizer.vocab_size:,}")
        report(f"  {'separator':<12} {_separator(tokenizer, tokenizer.separator_id)}")
    if verify:
        for source in sources:
            _verify(source, tokenizer, report)


def _find_tokenizer(place: str, source: Source, tokenizer_file: str, separator: str) -> Tokenizer | None:
    if tokenizer_file == "bytes":
        return ByteTokenizer()
    if tokenizer_file:
        return HuggingFaceTokenizer.from_file(expanded("data.tokenizer", tokenizer_file), separator=separator)
    above, _, name = source.name.rpartition("/")
    # What `prepare` writes has the tokenizer above its stores.
    beside = above if name in ("train", "validation") else place
    return tokenizer_beside([beside], [source], separator=separator)


def _documents(source: Source) -> list[tuple[str, str]]:
    lengths_D, sampled = _document_lengths(source)
    mean = source.num_tokens / source.num_documents
    known = isinstance(source, TokenStore) or source.index.has_documents
    lengths = f"min {lengths_D.min():,}, median {np.median(lengths_D):,.0f}, mean {mean:,.1f}, max {lengths_D.max():,}"
    if sampled:
        lengths += f" (all but the mean: of {len(lengths_D):,} of them)"
    count = f"{source.num_documents:,}{'' if known else ' (documents are not known)'}"
    return [("documents" if known else "sequences", count), ("  of tokens", lengths)]


def _content(source: Source, tokenizer: Tokenizer | None) -> list[tuple[str, str]]:
    if isinstance(source, TokenStore):
        manifest = source.manifest
        size = _size(manifest.file_sizes[TOKENS])
        return [
            ("tokens", f"{source.num_tokens:,}, {np.dtype(manifest.dtype).name}, {size}"),
            ("text", f"{source.utf8_bytes:,} bytes, {source.utf8_bytes / source.num_tokens:.3f} bytes per token"),
            ("ids", f"largest {manifest.max_token_id:,} of a vocabulary of {manifest.vocab_size:,}"),
            ("separator", _separator(tokenizer, manifest.separator_id)),
            ("tokenizer", f"fingerprint {_short(manifest.tokenizer_fingerprint)}"),
            (TOKENS, f"SHA-256 {_short(manifest.tokens_sha256)}"),
            (DOCUMENTS, f"SHA-256 {_short(manifest.documents_sha256)}"),
        ]
    size = _size(source.num_tokens * source.dtype.itemsize)
    sample = source.read_many(spread(source.num_tokens, 64, 1024))
    count, largest = sum(map(len, sample)), max(int(tokens_N.max()) for tokens_N in sample)
    lines = [
        ("tokens", f"{source.num_tokens:,}, {source.dtype.name}, {size} in {len(source.parts)} file(s)"),
        ("ids", f"largest {largest:,}" + ("" if count == source.num_tokens else f" of {count:,} looked at")),
    ]
    if tokenizer is not None:
        lines.append(("separator", f"{_separator(tokenizer, tokenizer.separator_id)}, {_separated(source, tokenizer)}"))
    return [*lines, ("fingerprint", _short(source.fingerprint))]


def _document_lengths(source: Source) -> tuple[np.ndarray, bool]:
    """Tokens of the documents, int64 [D], and whether these are only some."""
    if isinstance(source, TokenStore):
        return np.diff(source.document_offsets_M.astype(np.int64)), False
    ranges = spread(source.num_documents, 16, 2**10 if is_url(source.name) else 2**17)
    lengths = [np.diff(source.document_offsets(start, stop + 1)) for start, stop in ranges]
    return np.concatenate(lengths), len(ranges) > 1


def _separated(source: MegatronTokens, tokenizer: Tokenizer) -> str:
    """How many documents end with the separator: the tool that wrote them may not have added any."""
    ranges = spread(source.num_documents, 16, 4)
    ends = {int(end) for start, stop in ranges for end in source.document_offsets(start + 1, stop + 1)} - {0}
    lasts = source.read_many([(end - 1, end) for end in sorted(ends)])
    return f"at the end of {sum(int(last[0]) == tokenizer.separator_id for last in lasts)} of {len(lasts)} looked at"


def _show(source: Source, tokenizer: Tokenizer | None, show: int, report: Report) -> None:
    length = min(_WINDOW, source.num_tokens)
    last = source.num_tokens - length
    starts = [last * index // max(show - 1, 1) for index in range(show)]
    windows = source.read_many([(start, start + length) for start in starts])
    for start, tokens_N in zip(starts, windows, strict=True):
        text = " ".join(map(str, tokens_N)) if tokenizer is None else _visible(tokenizer.decode(tokens_N))
        report(f"  token {start:,}, {source.locate(start)}")
        report(f"    {text[:_WIDTH]}{'…' if len(text) > _WIDTH else ''}")


def _verify(source: Source, tokenizer: Tokenizer | None, report: Report) -> None:
    total = sum(source.manifest.file_sizes.values()) if isinstance(source, TokenStore) else source.num_bytes
    progress = Progress(f"{source.name}: read", total, unit="MB", scale=1e6, report=report).advance
    if isinstance(source, TokenStore):
        source.verify(progress)
        held = f"checksums, {source.num_documents:,} documents, separators, ids 0 to {source.manifest.max_token_id:,}"
    else:
        smallest, largest = source.verify(None if tokenizer is None else tokenizer.vocab_size, progress)
        held = f"index, {source.num_documents:,} documents, ids {smallest:,} to {largest:,}"
        held += " (which no tokenizer was there to compare with)" if tokenizer is None else ""
    report(f"ok: {source.name}: {held}")


def _separator(tokenizer: Tokenizer | None, separator_id: int) -> str:
    return f"{separator_id}" + (f" {_visible(tokenizer.decode([separator_id]))}" if tokenizer is not None else "")


def _visible(text: str) -> str:
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def _short(digest: str) -> str:
    return digest[:12]


def _size(num_bytes: float) -> str:
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes:.0f} bytes"
