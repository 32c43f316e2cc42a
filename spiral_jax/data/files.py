"""Text files as documents: which ones, in which order, and what is in them."""

import dataclasses
import fnmatch
import glob
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from spiral_jax.errors import SpiralError


@dataclasses.dataclass(frozen=True)
class TextDocument:
    """A file, or the part of a file between two fractions of its length.

    Attributes:
      name: Path relative to the root it was found under, with forward slashes: the same on every machine.
      path: Where the file is on this machine.
      size: Bytes of the file when it was found.
      modified_ns: When the file was last modified.
      begin: Fraction of the text at which the document begins; the cut is moved to the end of a line.
      end: Fraction of the text at which the document ends, likewise.
    """

    name: str
    path: Path
    size: int
    modified_ns: int
    begin: float = 0.0
    end: float = 1.0


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
      documents: What there is.
      validation_fraction: Share of the documents to hold out; 0 holds out nothing.

    Returns:
      Training documents and validation documents.
    """
    if not validation_fraction:
        return list(documents), []
    held_out = [_uniform_hash(document.name) < validation_fraction for document in documents]
    if any(held_out) and not all(held_out):
        train = [document for document, held in zip(documents, held_out, strict=True) if not held]
        return train, [document for document, held in zip(documents, held_out, strict=True) if held]
    cut = 1.0 - validation_fraction
    train = [dataclasses.replace(document, end=cut) for document in documents]
    return train, [dataclasses.replace(document, begin=cut) for document in documents]


def _uniform_hash(name: str) -> float:
    """A number in [0, 1) that depends on nothing but the name."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:4], "big") / 2**32


def read_text(document: TextDocument) -> str:
    """Reads a document with its line ends as they are.

    Args:
      document: What to read.

    Returns:
      The text; encoded as UTF-8 it is the file's bytes (or a part of them).

    Raises:
      InvalidUtf8Error: The file is not UTF-8.
      SpiralError: The file cannot be read.
    """
    try:
        content = document.path.read_bytes()  # not open(newline=None), which would turn \r\n into \n
    except OSError as error:
        raise SpiralError(f"{document.path}: cannot be read ({error.strerror})") from error
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidUtf8Error(
            f"{document.path}: byte {error.start} is not UTF-8 ({error.reason}); "
            'allowed: UTF-8 text, data.invalid_utf8="skip", or a pattern in data.exclude'
        ) from error
    return text[_cut(text, document.begin) : _cut(text, document.end)]


class InvalidUtf8Error(SpiralError):
    """A file that is not UTF-8: its own type, because `data.invalid_utf8` may say to skip it."""


def _cut(text: str, fraction: float) -> int:
    if fraction <= 0:
        return 0
    if fraction >= 1:
        return len(text)
    position = int(len(text) * fraction)
    line_end = text.find("\n", position, len(text) - 1)  # not the last one: both parts are to hold something
    return position if line_end < 0 else line_end + 1
