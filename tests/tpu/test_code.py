"""The archive of the tree: what is in it, that it is the same each time, and what is refused."""

import io
import os
import subprocess
import tarfile

import pytest

from spiral_jax.errors import SpiralError
from tpu import code
from tpu.code import pack


@pytest.fixture
def tree(tmp_path):
    """A checkout with one commit."""
    root = tmp_path / "tree"
    (root / "package").mkdir(parents=True)
    (root / "package" / "main.py").write_text("print(1)\n")
    (root / "run.sh").write_text("#!/bin/sh\n")
    (root / "run.sh").chmod(0o755)
    (root / ".gitignore").write_text("runs/\n*.log\n")
    (root / "same.py").symlink_to("package/main.py")
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "one"]):
        git(root, *command)
    return root


def git(root, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
    subprocess.run(["git", "-C", root, *identity, *arguments], check=True, capture_output=True)


def unpacked(packed, folder):
    with tarfile.open(fileobj=io.BytesIO(packed.data)) as archive:
        archive.extractall(folder, filter="data")
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def test_what_lies_there_and_git_does_not_ignore(tree, tmp_path):
    (tree / "package" / "main.py").write_text("print(2)\n")  # changed, not committed
    (tree / "new.py").write_text("")
    (tree / "runs").mkdir()
    (tree / "runs" / "big").write_text("x")
    (tree / "run.log").write_text("x")
    names = unpacked(pack(tree), tmp_path / "out")
    assert names == {"package/main.py", "run.sh", ".gitignore", "same.py", "new.py"} == set(pack(tree).files)
    assert (tmp_path / "out" / "same.py").read_text() == "print(2)\n" and (tmp_path / "out" / "same.py").is_symlink()
    assert os.access(tmp_path / "out" / "run.sh", os.X_OK) and not os.access(tmp_path / "out" / "new.py", os.X_OK)


def test_equal_trees_give_equal_bytes(tree, tmp_path):
    first = pack(tree)
    git(tmp_path, "clone", "-q", str(tree), "copy")
    os.utime(tmp_path / "copy" / "run.sh", (1, 1))
    (tmp_path / "copy" / "package" / "main.py").chmod(0o600)
    assert pack(tmp_path / "copy") == first
    assert first.data[4:8] == bytes(4)  # gzip's own time


def test_the_name_tells_changes_apart(tree):
    commit = subprocess.run(["git", "-C", tree, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    names = [pack(tree).name]
    for text in ("a", "b", "a"):
        (tree / "new.py").write_text(text)
        names.append(pack(tree).name)
    (tree / "new.py").chmod(0o755)
    names.append(pack(tree).name)
    assert len(set(names)) == 4 and names[1] == names[3]
    assert all(name.startswith(f"{commit[:12]}-") for name in names)


def test_a_file_deleted_and_not_committed_is_not_there(tree):
    (tree / "run.sh").unlink()
    assert "run.sh" not in pack(tree).files


@pytest.mark.parametrize(
    "name", [".env", ".env.local", "key.pem", "my-credentials.json", "service-account.json", "id_rsa"]
)
def test_secrets_stay(tree, name):
    (tree / "package" / name).write_text("secret")
    with pytest.raises(SpiralError, match=f"package/{name} looks like a secret") as error:
        pack(tree)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("target", ["/etc/passwd", "../outside", "package/../../outside"])
def test_links_out_of_the_tree(tree, target):
    (tree.parent / "outside").write_text("x")
    (tree / "link").symlink_to(target)
    with pytest.raises(SpiralError, match="link is a link to"):
        pack(tree)


def test_what_is_large(tree, monkeypatch):
    (tree / "weights.bin").write_bytes(bytes(1000))
    monkeypatch.setattr(code, "LARGEST_FILE", 999)
    with pytest.raises(SpiralError, match=r"weights\.bin has 1,000 bytes; allowed: 999"):
        pack(tree)
    monkeypatch.undo()
    monkeypatch.setattr(code, "LARGEST_TREE", 999)
    with pytest.raises(SpiralError, match="is larger than 999 bytes"):
        pack(tree)


def test_no_checkout(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(SpiralError, match="is no git checkout"):
        pack(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SpiralError, match="git is missing"):
        pack(tmp_path)


def test_a_submodule(tree, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "-q")
    git(other, "commit", "-qm", "x", "--allow-empty")
    git(tree, "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(other), "sub")
    with pytest.raises(SpiralError, match="sub is a submodule"):
        pack(tree)
