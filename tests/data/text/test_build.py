"""The engine: any number of workers and any number of kills give the same bytes."""

import gzip
import hashlib
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import spiral_jax
from spiral_jax.data.config import DataConfig
from spiral_jax.data.prepared import open_folder
from spiral_jax.data.text import build, parts, units
from spiral_jax.data.text.prepare import prepare_folder
from spiral_jax.data.tokenizers import HuggingFaceTokenizer
from spiral_jax.errors import SpiralError

REPOSITORY = pathlib.Path(spiral_jax.__file__).parents[1]
SHARED = REPOSITORY / "../shared/data"
NEOX = SHARED / "tokenizer/20B_tokenizer.json"
needs_shared = pytest.mark.skipif(not NEOX.exists(), reason=f"no {NEOX}")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(REPOSITORY)}

# Read from standard input, without `if __name__ == "__main__"`: what a user may type into a shell.
PROGRAM = """
import sys, json
from spiral_jax.data.text import units, prepare
from spiral_jax.data.config import DataConfig
unit, output, fields = json.loads(sys.argv[1])
units._SMALLEST_UNIT = unit
fields = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
prepare.prepare_folder(DataConfig(**fields), output, report=lambda line: print(line, flush=True))
"""


@pytest.fixture(autouse=True)
def small_units(monkeypatch):
    monkeypatch.setattr(units, "_SMALLEST_UNIT", 5_000)


@pytest.fixture
def corpus(tmp_path):
    """Texts, short and long, and records, some of them packed."""
    rng = random.Random(0)
    folder = tmp_path / "corpus"
    folder.mkdir()

    def text(size):
        words = ["word", "naïve", "日本", "x", "\n", "\r\n", "it's", "<|endoftext|>", "\U0001f600"]
        return " ".join(rng.choices(words, k=size))

    for i in range(12):
        (folder / f"{i}.txt").write_bytes(text(rng.randrange(1, 300)).encode())
    (folder / "long.txt").write_bytes(text(9_000).encode())
    (folder / "empty.txt").write_bytes(b"")
    lines = [json.dumps({"text": text(rng.randrange(0, 200))}) for _ in range(350)]
    (folder / "records.jsonl").write_text("\n".join(lines[:200]))
    (folder / "more.json.gz").write_bytes(gzip.compress("\n".join(lines[200:]).encode(), mtime=0))
    return folder


def silent(line):
    del line


def make(corpus, output, **fields):
    fields = {"paths": (str(corpus),), "validation_fraction": 0.2, "workers": 1} | fields
    report = fields.pop("report", silent)
    prepare_folder(DataConfig(**fields), output, report=report)
    return output


def digests(folder):
    """Names and content of all files."""
    files = (path for path in pathlib.Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def texts_of(store, tokenizer):
    offsets = store.document_offsets_M.tolist()
    return [tokenizer.decode(store.read(start, end - 1)) for start, end in zip(offsets[:-1], offsets[1:], strict=True)]


def expected_texts(corpus):
    """What is in the files, read the simplest way."""
    texts = [path.read_bytes().decode() for path in sorted(corpus.glob("*.txt"))]
    for content in ((corpus / "records.jsonl").read_bytes(), gzip.decompress((corpus / "more.json.gz").read_bytes())):
        texts += [json.loads(line)["text"] for line in content.split(b"\n")]
    return [text for text in texts if text]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_the_stores_do_not_depend_on_the_number_of_workers(corpus, tmp_path, tokenizer):
    one = make(corpus, tmp_path / "one", tokenizer=tokenizer, bpe_vocab_size=300)
    for workers in (2, 3):
        other = make(corpus, tmp_path / str(workers), tokenizer=tokenizer, bpe_vocab_size=300, workers=workers)
        assert digests(other) == digests(one)
    prepared = open_folder(one)
    found = []
    for store in (*prepared.train, prepared.validation):
        store.verify()
        found += texts_of(store, prepared.tokenizer)
    assert sorted(found) == sorted(expected_texts(corpus))
    assert sorted(os.listdir(tmp_path)) == [".2.lock", ".3.lock", ".one.lock", "2", "3", "corpus", "one"]


def test_the_size_of_a_batch_makes_no_difference(corpus, tmp_path, monkeypatch):
    one = make(corpus, tmp_path / "one", tokenizer="bpe", bpe_vocab_size=300)
    monkeypatch.setattr(parts, "_BATCH_BYTES", 700)
    assert digests(make(corpus, tmp_path / "other", tokenizer="bpe", bpe_vocab_size=300)) == digests(one)


def test_equal_records_are_on_one_side_and_texts_go_by_their_names(corpus, tmp_path):
    (corpus / "again.jsonl").write_bytes((corpus / "records.jsonl").read_bytes())
    prepared = open_folder(make(corpus, tmp_path / "out"))
    train, validation = (set(texts_of(store, prepared.tokenizer)) for store in (*prepared.train, prepared.validation))
    assert len(train) > len(validation) > 20 and not train & validation
    for text in validation | train:
        share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32
        if text not in {path.read_bytes().decode() for path in corpus.glob("*.txt")}:
            assert (text in validation) == (share < 0.2)


def test_parts_are_in_the_order_of_the_input(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} " * 200}) + "\n" for i in range(300)))
    prepared = open_folder(make(path, tmp_path / "out", validation_fraction=0.0, workers=2))
    assert [int(text.split()[0]) for text in texts_of(prepared.train[0], prepared.tokenizer)] == list(range(300))


def test_a_long_text_has_one_separator_and_its_own_tokens(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one line of text\n" * 20_000)
    prepared = open_folder(make(path, tmp_path / "out", validation_fraction=0.0, workers=2))
    [store] = prepared.train
    assert store.num_documents == 1 and store.num_tokens == len(path.read_bytes()) + 1
    assert texts_of(store, prepared.tokenizer) == [path.read_text()]


def test_a_second_call_says_that_all_is_there(corpus, tmp_path):
    before = digests(make(corpus, tmp_path / "out"))
    lines = []
    make(corpus, tmp_path / "out", report=lines.append)
    assert len(lines) == 1 and "is complete" in lines[0] and digests(tmp_path / "out") == before


@pytest.mark.parametrize("there", ["other store", "other files", "file", "damaged"])
def test_what_is_there_is_not_overwritten(corpus, tmp_path, there):
    corpus, output = corpus, tmp_path / "out"
    if there == "other files":
        output.mkdir()
        (output / "mine.txt").write_text("x")
    elif there == "file":
        output.write_text("x")
    else:
        make(corpus, output, validation_fraction=0.3 if there == "other store" else 0.2)
        if there == "damaged":
            os.truncate(output / "train/tokens.bin", 10)
    before = digests(tmp_path)
    message = "has 10 bytes" if there == "damaged" else "allowed: a new or an empty folder"
    with pytest.raises(SpiralError, match=rf"out.*{message}"):
        make(corpus, output)
    after = digests(tmp_path)
    assert after == before | {".out.lock": after[".out.lock"]}


def start(unit, output, **fields):
    argument = json.dumps([unit, str(output), fields])
    return subprocess.Popen(
        [sys.executable, "-", argument],
        env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def run_until_killed(unit, output, seconds, **fields):
    """Runs the program and kills it after a while; whether it ended by itself, and what it said."""
    process = start(unit, output, **fields)
    process.stdin.write(PROGRAM)
    process.stdin.close()
    try:
        status = process.wait(seconds)
        assert status == 0
    except subprocess.TimeoutExpired:
        process.kill()
        status = process.wait()
    with process.stdout:
        return status == 0, process.stdout.read()


def workers_of(output):
    """Processes that are workers writing next to an output."""
    found = []
    for folder in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if b"spiral_jax.data.text.worker" in (folder / "cmdline").read_bytes() and any(
                str(output) in os.readlink(file) for file in (folder / "fd").iterdir()
            ):
                found.append(folder.name)
        except OSError:
            continue
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_killed_at_any_moment_the_next_run_goes_on_to_the_same_bytes(corpus, tmp_path, workers):
    fields = {"paths": [str(corpus)], "validation_fraction": 0.2, "tokenizer": "bpe", "bpe_vocab_size": 400}
    begin = time.monotonic()
    done, _ = run_until_killed(2_000, tmp_path / "straight", 120, **fields, workers=workers)
    whole_time = time.monotonic() - begin
    assert done
    rng, output = random.Random(workers), tmp_path / "out"
    for _ in range(30):
        done, _ = run_until_killed(2_000, output, rng.uniform(0.4, 1.0) * whole_time, **fields, workers=workers)
        if done:
            break
        assert not (output / "train").exists() or (output / "prepared.json").exists()
    else:
        done, _ = run_until_killed(2_000, output, 120, **fields, workers=workers)
    assert done and digests(output) == digests(tmp_path / "straight")
    assert not build.partial_of(output).exists()


class Killed(BaseException):
    """Stands for SIGKILL at a chosen place: nothing but `finally` runs."""


@pytest.mark.parametrize("moment", ["unlink", "fsync", "replace", "rename", "rmtree"])
def test_killed_at_every_step_of_the_way_the_next_run_goes_on(corpus, tmp_path, monkeypatch, moment):
    """Stops at the n-th deletion, n-th flush to disk..., for all n, each time continuing what was left."""
    corpus, output = corpus, tmp_path / "out"
    straight = digests(make(corpus, tmp_path / "straight"))
    place = {"unlink": pathlib.Path, "rmtree": shutil}.get(moment, os)
    original = getattr(place, moment)
    for after in (False, True):
        for stop_at in (1, 2, 3, 5, 8, 13, 21, 34, 55):
            calls = 0

            def killing(*args, stop_at=stop_at, after=after, **kwargs):
                nonlocal calls
                calls += 1
                if calls == stop_at and not after:
                    raise Killed
                result = original(*args, **kwargs)
                if calls == stop_at:
                    raise Killed
                return result

            monkeypatch.setattr(place, moment, killing)
            try:
                make(corpus, output)
            except Killed:
                assert not (output / "train").exists() or (output / "prepared.json").exists()
            monkeypatch.setattr(place, moment, original)
        make(corpus, output)
        assert digests(output) == straight
        shutil.rmtree(output)


def killed_in_the_middle(corpus, output, monkeypatch, *, units_done):
    """Leaves a partial folder with some finished parts."""
    calls, original = 0, parts.encode_unit

    def killing(*args):
        nonlocal calls
        calls += 1
        if calls > units_done:
            raise Killed
        return original(*args)

    monkeypatch.setattr("spiral_jax.data.text.pool.encode_unit", killing)
    with pytest.raises(Killed):
        make(corpus, output)
    monkeypatch.setattr("spiral_jax.data.text.pool.encode_unit", original)


def test_finished_parts_are_not_made_again(corpus, tmp_path, monkeypatch):
    corpus, output, made = corpus, tmp_path / "out", []
    killed_in_the_middle(corpus, output, monkeypatch, units_done=7)
    original = parts.encode_unit
    monkeypatch.setattr(
        "spiral_jax.data.text.pool.encode_unit", lambda unit, *a: made.append(unit.name) or original(unit, *a)
    )
    lines = []
    make(corpus, output, report=lines.append)
    total = len({*made}) + 7
    assert any("going on with 7 finished parts" in line for line in lines)
    straight = make(corpus, tmp_path / "straight")
    assert len(made) == 2 * total - 7 and digests(output) == digests(straight)


@pytest.mark.parametrize("damage", ["part cut off", "part removed", "counts cut off", "counts of another part"])
def test_a_damaged_part_is_made_again(corpus, tmp_path, monkeypatch, damage):
    corpus, output = corpus, tmp_path / "out"
    killed_in_the_middle(corpus, output, monkeypatch, units_done=7)
    folder = build.partial_of(output) / "parts"
    victim = max((path for path in folder.glob("*.train")), key=lambda path: path.stat().st_size)
    counts = victim.with_suffix(".json")
    if damage == "part cut off":
        os.truncate(victim, victim.stat().st_size - 2)
    elif damage == "part removed":
        victim.unlink()
    elif damage == "counts cut off":
        os.truncate(counts, 20)
    else:
        shutil.copy(next(path for path in folder.glob("*.json") if path != counts), counts)
    make(corpus, output)
    assert digests(output) == digests(make(corpus, tmp_path / "straight"))


def test_parts_that_vanish_before_they_are_put_together_are_made_again(corpus, tmp_path, monkeypatch):
    corpus, output = corpus, tmp_path / "out"
    for keep in (3, 8):
        monkeypatch.setattr(build, "_merge", lambda *args: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            make(corpus, output)
        monkeypatch.undo()
        monkeypatch.setattr(units, "_SMALLEST_UNIT", 5_000)
        found = sorted((build.partial_of(output) / "parts").glob("*.train"))
        found[keep].unlink()
        lines = []
        make(corpus, output, report=lines.append)
        assert any("starting anew" in line for line in lines)
        assert digests(output) == digests(make(corpus, tmp_path / f"straight{keep}"))
        shutil.rmtree(output)


@pytest.mark.parametrize("change", ["file", "option", "tokenizer"])
def test_parts_of_other_input_are_not_used(corpus, tmp_path, monkeypatch, change):
    corpus, output = corpus, tmp_path / "out"
    killed_in_the_middle(corpus, output, monkeypatch, units_done=7)
    fields = {"option": {"validation_fraction": 0.4}, "tokenizer": {"tokenizer": "bpe"}}.get(change, {})
    if change == "file":
        victim = corpus / "long.txt"
        victim.write_bytes(victim.read_bytes().swapcase())
    lines = []
    make(corpus, output, report=lines.append, **fields)
    assert not any("going on" in line for line in lines)
    assert digests(output) == digests(make(corpus, tmp_path / "straight", **fields))


@pytest.mark.parametrize("change", ["grown", "touched", "removed", "cut short"])
@pytest.mark.parametrize("workers", [1, 2])
def test_input_that_changes_while_it_is_read_is_an_error(corpus, tmp_path, monkeypatch, change, workers):
    corpus, output = corpus, tmp_path / "out"
    victim, original = corpus / "long.txt", build.run_units

    def changing(*args):
        for number, unit in enumerate(original(*args)):
            if number == 2:
                if change == "grown":
                    victim.write_bytes(victim.read_bytes() + b"more")
                elif change == "touched":
                    os.utime(victim, ns=(1, 1))
                elif change == "removed":
                    victim.unlink()
                else:
                    os.truncate(victim, 100)
            yield unit

    monkeypatch.setattr(build, "run_units", changing)
    message = {"removed": "cannot be read", "cut short": "while it was read"}.get(
        change, "has changed while it was read"
    )
    with pytest.raises(SpiralError, match=rf"long\.txt: .*{message}"):
        make(corpus, output, workers=workers)
    assert not output.exists()
    monkeypatch.setattr(build, "run_units", original)
    make(corpus, output, workers=workers)
    assert digests(output) == digests(make(corpus, tmp_path / "straight"))


def test_an_error_of_a_worker_is_the_error_of_the_call(corpus, tmp_path):
    lines = (corpus / "records.jsonl").read_bytes().split(b"\n")
    lines[150] = b"{broken"
    (corpus / "records.jsonl").write_bytes(b"\n".join(lines))
    for workers in (1, 2):
        with pytest.raises(SpiralError, match=r'records\.jsonl:151: not JSON .*; allowed: .*data\.invalid="skip"'):
            make(corpus, tmp_path / "out", workers=workers)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_no_text_is_skipped_counted_and_named(corpus, tmp_path, workers):
    before = expected_texts(corpus)
    lines = (corpus / "records.jsonl").read_bytes().split(b"\n")
    lines[20:20] = [b"{broken"]
    lines[150:150] = [b'{"text": 1}', b"\xff"]
    (corpus / "records.jsonl").write_bytes(b"\n".join(lines))
    third = (corpus / "3.txt").read_bytes().decode()
    (corpus / "3.txt").write_bytes(b"caf\xe9")  # shares a unit with others
    long = (corpus / "long.txt").read_bytes()
    (corpus / "long.txt").write_bytes(long[:-1] + b"\xff")  # in the last of several units
    said = []
    output = make(corpus, tmp_path / "out", invalid="skip", report=said.append, workers=workers)
    assert any("skipped 3 record(s) and 2 file(s)" in line for line in said)
    named = "\n".join(said)
    for place in ("records.jsonl:21: not JSON", "records.jsonl:151: field", "long.txt: byte", "3.txt: byte 3"):
        assert place in named, place
    prepared = open_folder(output)
    found = [text for store in (*prepared.train, prepared.validation) for text in texts_of(store, prepared.tokenizer)]
    good = list(before)
    for text in (long.decode(), third):
        good.remove(text)
    assert sorted(found) == sorted(good)


def test_a_tail_of_a_file_that_is_not_utf8_takes_the_rest_with_it(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"line\n" * 1000 + b"\xff\n" * 10)
    (tmp_path / "good.txt").write_bytes(b"line\n" * 1000)
    said = []
    output = make(tmp_path / "*.txt", tmp_path / "out", invalid="skip", validation_fraction=0.001, report=said.append)
    prepared = open_folder(output)
    assert prepared.train[0].num_documents == prepared.validation.num_documents == 1
    assert any("skipped 1 file(s)" in line for line in said)


def test_records_that_give_no_validation_are_reported(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    said = []
    output = make(tmp_path / "a.jsonl", tmp_path / "out", validation_fraction=1e-9, report=said.append)
    assert open_folder(output).validation is None and any("no document was held out" in line for line in said)
    with pytest.raises(SpiralError, match=r"data\.paths: no text for train"):
        make(tmp_path / "a.jsonl", tmp_path / "other", validation_fraction=0.999999)


def test_validation_paths_take_all_their_records(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n{"text": ""}\n')
    output = make(tmp_path / "a.jsonl", tmp_path / "out", validation_paths=(str(tmp_path / "b.jsonl"),))
    prepared = open_folder(output)
    assert texts_of(prepared.train[0], prepared.tokenizer) == ["one", "two"]
    assert texts_of(prepared.validation, prepared.tokenizer) == ["three"]


def test_output_within_the_input_is_no_input(tmp_path):
    (tmp_path / "a.txt").write_text("some text\n" * 100)
    make(tmp_path, tmp_path / "out")
    said = []
    make(tmp_path, tmp_path / "out", report=said.append)
    assert "is complete" in said[-1]


def test_a_full_disk_is_an_error_and_the_next_run_goes_on(tmp_path):
    """A limit on the size of a file stands for a full disk; the first one is hit by parts, the second by the store."""
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} " * 100}) + "\n" for i in range(400)))
    straight = digests(make(path, tmp_path / "straight"))
    for limit in (4_000, 60_000):
        for workers in (1, 2):
            fields = {"paths": [str(path)], "validation_fraction": 0.2, "workers": workers}
            output = tmp_path / f"out{limit}{workers}"
            process = subprocess.run(
                [sys.executable, "-", json.dumps([5_000, str(output), fields])],
                env=ENVIRONMENT, input=PROGRAM, capture_output=True, text=True,
                preexec_fn=lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
            )  # fmt: skip
            assert process.returncode == 1, process.stderr
            assert "SpiralError" in process.stderr and "cannot be written (File too large)" in process.stderr
            assert not output.exists()
            said = []
            make(path, output, report=said.append)
            assert digests(output) == straight
            if limit == 60_000:
                assert any("going on" in line for line in said)


def test_workers_die_with_their_parent(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("some words of text \n" * 1_500_000)
    fields = {"paths": [str(path)], "tokenizer": "bpe", "workers": 2}
    process = start(10_000_000, tmp_path / "out", **fields)
    process.stdin.write(PROGRAM)
    process.stdin.close()
    deadline = time.monotonic() + 60
    while len(found := workers_of(tmp_path / ".out.partial")) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    for name in found:
        maps = pathlib.Path(f"/proc/{name}/maps").read_text()
        assert "jaxlib" not in maps and "tokenizers" in maps
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 5
    while any(pathlib.Path(f"/proc/{name}").exists() for name in found):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_worker_that_is_killed_is_an_error_of_one_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("some words of text \n" * 1_500_000)
    fields = {"paths": [str(path)], "tokenizer": "bpe", "workers": 2}
    process = start(10_000_000, tmp_path / "out", **fields)
    process.stdin.write(PROGRAM.replace("prepare.prepare_folder", "import os; os.dup2(1, 2); prepare.prepare_folder"))
    process.stdin.close()
    while not (found := workers_of(tmp_path / ".out.partial")):
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(int(found[0]), signal.SIGKILL)
    said = process.stdout.read()
    process.stdout.close()
    assert process.wait() == 1 and not workers_of(tmp_path / ".out.partial")
    assert "a worker ended with signal SIGKILL (the machine may be out of memory" in said.splitlines()[-1]


@needs_shared
def test_the_tokens_are_those_the_library_gives(tmp_path):
    """WikiText-2 and Alice with the NeoX tokenizer, cut into many pieces, against one call of the library."""
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for name in ("wikitext-2/valid.txt", "prose/carroll-alice.txt"):
        (corpus / pathlib.Path(name).name).write_bytes((SHARED / name).read_bytes())
    output = make(corpus, tmp_path / "out", tokenizer=str(NEOX), validation_fraction=0.0, workers=2)
    [store] = open_folder(output).train
    tokenizer = HuggingFaceTokenizer.from_file(NEOX)
    expected = [tokenizer.encode(path.read_bytes().decode()) for path in sorted(corpus.iterdir())]
    for document, ids in enumerate(expected):
        begin, end = store.document_offsets_M[document : document + 2].astype(int)
        assert np.array_equal(store.read(begin, end - 1), ids)


@needs_shared
@pytest.mark.slow
def test_books_and_wikitext_with_the_neox_tokenizer_killed_and_resumed(tmp_path):
    fields = {
        "paths": [str(SHARED / "wikitext-2/train.txt"), str(SHARED / "prose")],
        "tokenizer": str(NEOX), "validation_fraction": 0.1,
    }  # fmt: skip
    for workers in (1, 2):
        assert run_until_killed(2**20, tmp_path / f"straight{workers}", 600, **fields, workers=workers)[0]
    straight = digests(tmp_path / "straight1")
    assert digests(tmp_path / "straight2") == straight
    prepared = open_folder(tmp_path / "straight1")
    found = [text for store in (*prepared.train, prepared.validation) for text in texts_of(store, prepared.tokenizer)]
    files = [SHARED / "wikitext-2/train.txt", *(SHARED / "prose").glob("*.txt")]
    assert sorted(found) == sorted(path.read_bytes().decode() for path in files)
    rng = random.Random(0)
    for kills in range(100):  # noqa: B007
        done, _ = run_until_killed(2**20, tmp_path / "out", rng.uniform(0.5, 6), **fields, workers=2)
        if done:
            break
    assert done and kills >= 3 and digests(tmp_path / "out") == straight
