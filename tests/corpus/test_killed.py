"""Any number of kills gives the same bytes, and goes on from what is finished."""

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

import pytest
from corpora import (
    ENVIRONMENT,
    NEOX,
    PROGRAM,
    SHARED,
    digests,
    make,
    needs_shared,
    run_until_killed,
    start,
    texts_of,
    workers_of,
)

from spiral_jax.corpus import parts, pieces, prepare
from spiral_jax.data.prepared import open_folder

pytestmark = pytest.mark.usefixtures("small_pieces")


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
    assert not prepare.partial_of(output).exists()


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


def killed_in_the_middle(corpus, output, monkeypatch, *, pieces_done):
    """Leaves a partial folder with some finished parts."""
    calls, original = 0, parts.encode_piece

    def killing(*args):
        nonlocal calls
        calls += 1
        if calls > pieces_done:
            raise Killed
        return original(*args)

    monkeypatch.setattr("spiral_jax.corpus.workers.encode_piece", killing)
    with pytest.raises(Killed):
        make(corpus, output)
    monkeypatch.setattr("spiral_jax.corpus.workers.encode_piece", original)


def test_finished_parts_are_not_made_again(corpus, tmp_path, monkeypatch):
    corpus, output, made = corpus, tmp_path / "out", []
    killed_in_the_middle(corpus, output, monkeypatch, pieces_done=7)
    original = parts.encode_piece
    monkeypatch.setattr(
        "spiral_jax.corpus.workers.encode_piece", lambda piece, *a: made.append(piece.name) or original(piece, *a)
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
    killed_in_the_middle(corpus, output, monkeypatch, pieces_done=7)
    folder = prepare.partial_of(output) / "parts"
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
        monkeypatch.setattr(prepare, "_merge", lambda *args: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            make(corpus, output)
        monkeypatch.undo()
        monkeypatch.setattr(pieces, "_SMALLEST_PIECE", 5_000)
        found = sorted((prepare.partial_of(output) / "parts").glob("*.train"))
        found[keep].unlink()
        lines = []
        make(corpus, output, report=lines.append)
        assert any("starting anew" in line for line in lines)
        assert digests(output) == digests(make(corpus, tmp_path / f"straight{keep}"))
        shutil.rmtree(output)


@pytest.mark.parametrize("change", ["file", "option", "tokenizer"])
def test_parts_of_other_input_are_not_used(corpus, tmp_path, monkeypatch, change):
    corpus, output = corpus, tmp_path / "out"
    killed_in_the_middle(corpus, output, monkeypatch, pieces_done=7)
    fields = {"option": {"validation_fraction": 0.4}, "tokenizer": {"tokenizer": "bpe"}}.get(change, {})
    if change == "file":
        victim = corpus / "long.txt"
        victim.write_bytes(victim.read_bytes().swapcase())
    lines = []
    make(corpus, output, report=lines.append, **fields)
    assert not any("going on" in line for line in lines)
    assert digests(output) == digests(make(corpus, tmp_path / "straight", **fields))


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
    path.write_text("some words of text \n" * 300_000)
    fields = {"paths": [str(path)], "tokenizer": "bpe", "workers": 2}
    process = start(2_000_000, tmp_path / "out", **fields)
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
    path.write_text("some words of text \n" * 300_000)
    fields = {"paths": [str(path)], "tokenizer": "bpe", "workers": 2}
    process = start(2_000_000, tmp_path / "out", **fields)
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
    for kills in range(100):
        # Longer and longer: on a slow machine the first seconds go into the start alone.
        done, _ = run_until_killed(2**20, tmp_path / "out", rng.uniform(0.5, 6) * 1.05**kills, **fields, workers=2)
        if done:
            break
    assert done and kills >= 3 and digests(tmp_path / "out") == straight
