"""The code that hosts run: the tree as it lies here, in one archive whose name says what is in it."""

import dataclasses
import fnmatch
import gzip
import hashlib
import io
import os
import subprocess
import tarfile
from pathlib import Path

from spiral_jax.errors import SpiralError

LARGEST_FILE, LARGEST_TREE = 10_000_000, 100_000_000  # bytes; code is small, and what is not would travel to every host
_SECRET = (
    ".env", ".env.*", ".netrc", "*.pem", "*.key", "*.p12", "id_rsa*", "id_ed25519*", "*credentials*.json",
    "*service*account*.json",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Code:
    """The archive.

    Attributes:
      name: the commit, and a hash of everything in the archive: it tells changes apart that are not committed.
      data: a .tar.gz. Equal trees give equal bytes.
      sha256: of `data`.
      files: in it, relative to the tree.
    """

    name: str
    data: bytes
    sha256: str
    files: tuple[str, ...]


def pack(root: Path) -> Code:
    """Packs a git checkout: what is tracked as it lies there, and what is new and not ignored.

    Raises:
      SpiralError: no checkout, a link out of it, something large, or a file whose name says that it is secret.
    """
    commit = _git(root, "rev-parse", "HEAD").decode().strip()
    listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split(b"\0")
    plain, names = io.BytesIO(), sorted({os.fsdecode(name) for name in listed if name})
    present = [name for name in names if os.path.lexists(root / name)]
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in present:
            _add(archive, root, name)
            if plain.tell() > LARGEST_TREE:
                raise SpiralError(
                    f"{root} is larger than {LARGEST_TREE:,} bytes; allowed: code; ignore the rest for git"
                )
    content = plain.getvalue()
    data = gzip.compress(content, mtime=0)
    name = f"{commit[:12]}-{hashlib.sha256(content).hexdigest()[:12]}"
    return Code(name, data, hashlib.sha256(data).hexdigest(), tuple(present))


def _add(archive: tarfile.TarFile, root: Path, name: str) -> None:
    """Adds a file with nothing of this machine in its entry: no owner, no time."""
    path = root / name
    if any(fnmatch.fnmatch(path.name.lower(), pattern) for pattern in _SECRET):
        raise SpiralError(f"{name} looks like a secret, which would go to the bucket; allowed: keep it ignored by git")
    entry = tarfile.TarInfo(name)
    if path.is_symlink():
        target = os.readlink(path)
        if os.path.isabs(target) or not path.resolve().is_relative_to(root.resolve()):
            raise SpiralError(f"{name} is a link to {target!r}; allowed: links that stay in the tree")
        entry.type, entry.linkname = tarfile.SYMTYPE, target
        archive.addfile(entry)
    elif path.is_file():
        entry.size = path.stat().st_size
        if entry.size > LARGEST_FILE:
            raise SpiralError(f"{name} has {entry.size:,} bytes; allowed: {LARGEST_FILE:,}; ignore it for git")
        entry.mode = 0o755 if os.access(path, os.X_OK) else 0o644
        archive.addfile(entry, io.BytesIO(path.read_bytes()))
    else:
        raise SpiralError(f"{name} is a submodule or no plain file; allowed: files, and links within the tree")


def _git(root: Path, *arguments: str) -> bytes:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, timeout=60)
    except FileNotFoundError:
        raise SpiralError("git is missing; allowed: git on PATH, as it says which files are the code") from None
    if done.returncode:
        why = " ".join(done.stderr.decode(errors="replace").split())[:300]
        raise SpiralError(f"{root} is no git checkout with a commit ({why}); allowed: a clone of this repository")
    return done.stdout
