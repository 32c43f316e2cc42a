"""What holds for every file of the package, whatever it is about."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "spiral_jax"
# The PyTorch twin is one file because transformers copies one file.
LONG = {"modeling_spiralformer.py"}
LINES = 400


def files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def test_no_file_is_long():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files("spiral_jax", "tests", "tpu")}
    assert not {path.name: n for path, n in lengths.items() if n > LINES and path.name not in LONG}


def messages(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of everything that a SpiralError is made of in a file; values in it as `{}`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "SpiralError" and node.args:
            yield node.lineno, _text(node.args[0])


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    return "{}"


# "FIELD is FOUND; allowed: ...", not the other ways in which the same can be said.
OTHER_GRAMMARS = r": found\b|, allowed\b|\bmust\b|[^;] allowed:|\. |\}: (cannot|is|are|has|does|holds)\b"


@pytest.mark.parametrize("path", files("spiral_jax"), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_errors_have_one_grammar(path):
    wrong = [f"{line}: {text}" for line, text in messages(path) if re.search(OTHER_GRAMMARS, text)]
    assert not wrong


def test_the_grammar_is_looked_for(tmp_path):
    (tmp_path / "x.py").write_text('raise SpiralError(f"{field}: found {x}, " "allowed: " + more)\n', encoding="utf-8")
    ((line, text),) = messages(tmp_path / "x.py")
    assert (line, text) == (1, "{}: found {}, allowed: {}") and re.search(OTHER_GRAMMARS, text)
    assert re.search(OTHER_GRAMMARS, "{}: cannot be written ({})")


def test_files_of_a_run_are_opened_through_their_path():
    """`etils.epath` paths, which can be of a bucket: no `open`, no `pathlib`, no `os.path` in the room of runs."""
    for path in files("spiral_jax/run"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not imported & {"pathlib", "shutil", "glob", "io"}, path
        called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert not {name for name in called if name == "open" or name.startswith("os.path.")}, path
