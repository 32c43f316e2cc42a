"""Input files: which ones, in which order, and which of them are held out."""

import dataclasses
import fnmatch
import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from spiral_jax.data.text.cuts import character_cut
from spiral_jax.data.text.unpack import compression_of, unpack
from spiral_jax.errors import SpiralError


@dataclasses.dataclass(frozen=True)
class TextDocument:
    """A file, or a part of a text file.

    Attributes:
      name: Path relative to the root it was found under, with forward slashes: the same on every machine.
      path: Where the file is on this machine.
      size: Bytes of the file when it was found.
      modified_ns: When the file was last modified.
      begin: Byte of the text (unpacked) at which the document begins.
      end: Byte of the text at which it ends; None for the end of the file.
    """

    name: str
    path: Path
    size: int
    modified_ns: int
    begin: int = 0
    end: int | None = None


def find_documents(
    paths: Sequence[str], exclude: Sequence[str] = (), *, field: str = "data.paths"
) -> list[TextDocument]:
    """Lists the text files that `paths` name.

    The order depends on the order of `paths` and the names below each of them, never on the file system or the
    machine. A file reached twice (overlapping patterns, links) is listed once, an empty file not at all. Hidden
    files, hidden folders and `__pycache__` are passed over in folders and patterns; a hidden file named outright is
    taken.

    Args:
      paths: Files, folders or glob patterns.
      exclude: `fnmatch` patterns against the absolute path.
      field: Config field to name in errors.

    Returns:
      Documents, at least one.

    Raises:
      SpiralError: A path does not exist, a pattern or folder holds no file, or everything is excluded or empty.
    """
    documents: dict[str, TextDocument] = {}
    num_found = 0
    for given in paths:
        found = _find_one(given, field)
        num_found += len(found)
        for document in found:
            if not any(fnmatch.fnmatchcase(document.path.as_posix(), pattern) for pattern in exclude):
                documents.setdefault(os.path.realpath(document.path), document)
    if not documents:
        reason = f"data.exclude leaves out all {num_found} files" if num_found else "no files given"
        raise SpiralError(f"{field}: {reason}; allowed: paths that leave at least one text file")
    with_text = [document for document in documents.values() if document.size]
    if not with_text:
        raise SpiralError(f"{field}: no text in {', '.join(paths)}; allowed: files that are not all empty")
    return with_text


def _find_one(given: str, field: str) -> list[TextDocument]:
    path = Path(os.path.abspath(os.path.expanduser(given)))
    if path.is_dir():
        root, found = path, _walk(path, field)
    elif path.is_file():
        root, found = path.parent, [path]
    elif path.exists():
        raise SpiralError(f"{field}: {given} is neither a file nor a folder; allowed: files, folders, glob patterns")
    elif glob.has_magic(given):
        root = _fixed_part(path)
        matches = (Path(match) for match in glob.glob(str(path), recursive=True))
        found = [match for match in matches if match.is_file() and "__pycache__" not in match.relative_to(root).parts]
    else:
        raise SpiralError(f"{field}: {given} does not exist; allowed: files, folders, glob patterns")
    if not found:
        kind = "folder holds" if path.is_dir() else "pattern matches"
        raise SpiralError(f"{field}: {given}: the {kind} no file; allowed: paths with at least one text file")
    documents = []
    for file in found:
        status = file.stat()
        name = file.relative_to(root).as_posix()
        documents.append(TextDocument(name, file, status.st_size, status.st_mtime_ns))
    return sorted(documents, key=lambda document: document.name)


def _walk(root: Path, field: str) -> list[Path]:
    def stop(error: OSError) -> None:  # os.walk would pass over the folder without a word
        raise SpiralError(f"{field}: {error.filename}: cannot be read ({error.strerror})") from error

    found = []
    for folder, subfolders, names in os.walk(root, onerror=stop):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name != "__pycache__"]
        files = (Path(folder, name) for name in names if not name.startswith("."))
        found += [file for file in files if file.is_file()]  # no sockets, pipes or dangling links
    return found


def _fixed_part(pattern: Path) -> Path:
    fixed = Path(pattern.anchor)
    for part in pattern.parts[1:]:
        if glob.has_magic(part):
            break
        fixed /= part
    return fixed


def split_documents(
    documents: Sequence[TextDocument], validation_fraction: float
) -> tuple[list[TextDocument], list[TextDocument]]:
    """Holds out documents for validation by a hash of their names, so that adding a file moves no other.

    A few files may all fall on one side, and a single file always does. Then the end of every file is held out
    instead, because a user's one book should have a validation loss, too.

    Args:
      documents: What there is, all of it text.
      validation_fraction: Share of the documents to hold out; 0 holds out nothing.

    Returns:
      Training documents and validation documents.
    """
    train, validation = hold_out(documents, validation_fraction)
    if not validation_fraction or (train and validation):
        return train, validation
    train, validation = [], []
    for document in documents:
        cut = _tail_cut(document, validation_fraction)
        train.append(dataclasses.replace(document, end=cut))
        validation.append(dataclasses.replace(document, begin=cut))
    return train, validation


def hold_out(
    documents: Sequence[TextDocument], validation_fraction: float
) -> tuple[list[TextDocument], list[TextDocument]]:
    """Training and validation documents by a hash of their names, be it that all fall on one side."""
    held_out = [
        uniform_hash(document.name.encode("utf-8", "surrogateescape")) < validation_fraction for document in documents
    ]
    train = [document for document, held in zip(documents, held_out, strict=True) if not held]
    return train, [document for document, held in zip(documents, held_out, strict=True) if held]


def uniform_hash(content: bytes) -> float:
    """A number in [0, 1) that depends on nothing but the content."""
    return int.from_bytes(hashlib.sha256(content).digest()[:4], "big") / 2**32


def _tail_cut(document: TextDocument, validation_fraction: float) -> int:
    """Where the held-out end of a text begins: after the end of a line if there is one, but not after the last."""
    size = sum(map(len, _blocks(document))) if compression_of(document.name) else document.size
    position = int(size * (1.0 - validation_fraction))
    begin, following = 0, b""
    for block in _blocks(document):
        first = max(position - begin, 0)
        newline = block.find(b"\n", first, max(size - 1 - begin, 0))
        if newline >= 0:
            return begin + newline + 1
        following += block[first : first + 4 - len(following)]
        begin += len(block)
    return position + character_cut(following, 0)


def _blocks(document: TextDocument) -> Iterator[bytes]:
    return (block for block, _ in unpack(str(document.path), compression_of(document.name)))


def read_text(document: TextDocument) -> str:
    """Reads a text document with its line ends as they are.

    Args:
      document: What to read; unpacked if its name says so.

    Returns:
      The text; encoded as UTF-8 it is the file's bytes (or a part of them).

    Raises:
      SpiralError: The file is not UTF-8, or cannot be read.
    """
    content = b"".join(_blocks(document))
    try:
        content.decode("utf-8")  # all of it, whichever part is asked for
        return content[document.begin : document.end].decode("utf-8")
    except UnicodeDecodeError as error:
        raise SpiralError(
            f"{document.path}: byte {error.start} is not UTF-8 ({error.reason}); allowed: UTF-8 text"
        ) from error
