"""A study of real runs, killed half-way, ends as one that nobody interrupts."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments.design import comparable_hash, load
from experiments.record import read_all

ROOT = Path(__file__).parents[2]
SAME = ("code", "machine", "seconds")  # what two runs of one thing need not share

STUDY = """
from experiments.design import Arm, Contrast, Study
from spiral_jax.run.config import default_config


def get_study(edition):
    arms = []
    for name, chunks, rate in (("vanilla", (), 3e-3), ("spiral", (4, 2), 3e-3), ("wild", (4, 2), 1e30)):
        values = default_config()
        values.model.vocab_size, values.model.d_model, values.model.num_heads = 260, 16, 2
        values.model.prelude_layers, values.model.core_layers, values.model.coda_layers = 1, int(bool(chunks)), 0
        values.model.chunks, values.model.topology = chunks, "mesh" if chunks else "base"
        values.model.dtype = "float32"
        values.train.steps, values.train.batch_size, values.train.sequence_length = 60, 2, 128
        values.optimizer.peak_learning_rate = rate
        values.checkpoint.every_steps = 10
        values.data.paths, values.data.validation_fraction = ("TEXTS",), 0.3
        arms.append(Arm(name, values))
    return Study("real", edition, "?", tuple(arms), Contrast("spiral", "vanilla", matched="flops", tolerance=1),
                 seeds=(1,), slices=("v5e:1x1",))
"""


@pytest.fixture
def command(tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number, page in enumerate(sorted((ROOT / "docs").glob("*.md"))):
        (texts / f"{number}.txt").write_bytes(page.read_bytes()[:6000])
    study = tmp_path / "real.py"
    study.write_text(STUDY.replace("TEXTS", str(texts)))

    def start(name: str) -> subprocess.Popen[str]:
        environment = {
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": "",
            "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        }
        folders = [f"--work={tmp_path / name / 'work'}", f"--results={tmp_path / name / 'results'}"]
        return subprocess.Popen(
            [sys.executable, "-m", "experiments.study", "run", str(study), *folders], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=os.environ | environment,
        )  # fmt: skip

    return start


def records(folder: Path) -> dict[str, dict]:
    found, damaged = read_all(folder / "results" / "real" / "small" / "records")
    assert not damaged
    return {r.run: {n: v for n, v in dataclasses.asdict(r).items() if n not in SAME} for r in found}


@pytest.mark.slow
def test_killed_half_way(tmp_path, command):
    whole = command("whole")
    said, _ = whole.communicate(timeout=400)
    assert whole.returncode == 44, said
    assert "real small: 2 of 3 runs finished" in said and "wild-seed1: diverged ('diverged: " in said
    expected = records(tmp_path / "whole")
    assert expected["wild-seed1"]["status"] == "diverged" and expected["spiral-seed1"]["status"] == "finished"
    texts = expected["spiral-seed1"]["evaluation"]["validation"]
    assert len(texts["documents"]) > 1 and sum(texts["tokens"]) > 1000 and 1 < texts["nats"] < 5.6
    assert expected["spiral-seed1"]["data"] == expected["vanilla-seed1"]["data"]
    study = load(str(tmp_path / "real.py"), "small")
    assert {r["config_hash"] for r in expected.values()} == {comparable_hash(study.arms[0].config)}
    assert not list((tmp_path / "whole/work/real/small").glob("*-seed1"))  # nothing is left but the data

    # The runner is killed while the second run is at work.
    part = tmp_path / "part"
    first = command("part")
    saved = part / "work/real/small/spiral-seed1/run/checkpoints"
    end = time.monotonic() + 300
    while not (saved.is_dir() and any(path.name.isdigit() and int(path.name) >= 10 for path in saved.iterdir())):
        assert time.monotonic() < end and first.poll() is None
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert list(records(part)) == ["vanilla-seed1"]
    again = command("part")
    said, _ = again.communicate(timeout=400)
    assert again.returncode == 44, said
    assert records(part) == expected
