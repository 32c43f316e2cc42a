"""What holds for every file of the package, whatever it is about."""

import ast
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from spiral_jax.errors import escape_unprintable

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


# What comes with the extra `test`; other packages are for `pytest.importorskip`.
INSTALLED = {"absl", "etils", "experiments", "flax", "fsspec", "hypothesis", "jax", "jsonschema",
             "ml_dtypes", "numpy", "optax", "packaging", "pytest", "safetensors", "scipy", "spiral_jax",
             "tests", "tokenizers", "tpu", "yaml"}  # fmt: skip


def test_the_suite_is_collected_without_the_extras():
    """`make test` of a fresh clone, whatever is installed here and in CI."""
    ours = {path.stem for path in files("tests")} | INSTALLED | sys.stdlib_module_names
    found = set()
    for path in files("tests"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found |= {(path.name, name) for name in names if name.partition(".")[0] not in ours}
    assert not found


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


def in_the_encoding_of_the_locale(path: Path) -> list[str]:
    """Calls in a file that read or write text and leave its encoding to the locale.

    Ruff's rule (PLW1514) sees `open` and the paths whose type it can tell: none of `etils.epath`, and no processes.
    """
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        name = ast.unparse(node.func)
        method = name.rpartition(".")[2] if "." in name else ""
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        first, second = ([*node.args, None, None])[:2]
        mode = given.get("mode", first if method == "open" or "TemporaryFile" in name else second)
        mode = mode.value if isinstance(mode, ast.Constant) and isinstance(mode.value, str) else ""
        if (
            (method == "read_text" or (method == "write_text" and name != "atomic.write_text"))
            or (name in ("open", "os.fdopen", "io.open") and "b" not in mode)
            or (
                method == "open"
                and name != "tarfile.open"
                and ((mode and "b" not in mode) or not (node.args or node.keywords))
            )
            or ("TemporaryFile" in name and mode and "b" not in mode)
            or name == "io.TextIOWrapper"
            or any(getattr(given.get(key), "value", False) for key in ("text", "universal_newlines"))
        ):
            found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)[:80]}")
    return found


def test_text_is_in_utf8_whatever_the_locale_is():
    assert not [
        call for path in files("spiral_jax", "experiments", "tpu") for call in in_the_encoding_of_the_locale(path)
    ]


def test_other_encodings_are_looked_for(tmp_path):
    wrong = (
        "open(x)", "open(x, 'w')", "os.fdopen(1, 'w')", "p.read_text()", "p.write_text('é')", "p.open()", "p.open('a')",
        "subprocess.run(c, text=True)", "NamedTemporaryFile('w')", "NamedTemporaryFile(mode='w')",
    )  # fmt: skip
    right = (
        "open(x, 'rb')", "open(x, encoding='utf-8')", "p.open('rb')", "atomic.write_text(p, t)", "write_text(p, t)",
        "Store.open(place)", "os.open(p, 0)", "subprocess.run(c)", "NamedTemporaryFile()",
        "p.read_text(encoding='utf-8')", "tarfile.open(mode='w')",
    )  # fmt: skip
    (tmp_path / "x.py").write_text("\n".join([*wrong, *right]), encoding="utf-8")
    assert len(in_the_encoding_of_the_locale(tmp_path / "x.py")) == len(wrong)


@pytest.mark.parametrize("encoding", ["ascii", "iso8859-1"])
def test_streams_show_an_escape_for_what_they_lack(monkeypatch, encoding):
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2))
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr("sys.stderr", err)
    escape_unprintable()
    for stream in (out, err):
        print("日本", file=stream, flush=True)
        assert stream.buffer.getvalue() == b"\\u65e5\\u672c\n"
