"""What several processes train and evaluate is what one does."""

import json
import shutil

import numpy as np
import pytest
from pairs import BATCH, STEPS, STOPPED, WINDOW, flags_of, run_alone
from verbs import call

from spiral_jax import evaluate, train
from spiral_jax.run.metrics import read_rows


@pytest.fixture(scope="module")
def alone(folder):
    """The run in one process of 8 devices, and the batches it read: step to tokens [B, W]."""
    return run_alone(folder, "alone")


@pytest.fixture(scope="module")
def stopped(folder, start):
    """Two processes, of which the second is asked to stop in step 4."""
    return start("train", *flags_of(folder, "two"), sabotage=f"{folder}/two:SIGTERM:1:4")


@pytest.fixture(scope="module")
def resumed(folder, stopped):
    """Their run, finished in one process on another mesh."""
    flags = ("--config.mesh.data=1", "--config.mesh.fsdp=8", "--config.summary.sample_tokens=0")
    assert call(train, *flags_of(folder, "two"), *flags) == (0, "")
    return read_rows(folder / "two/metrics.jsonl")


def assert_same_run(rows, expected):
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        for name in ("loss", "gradient_norm", "learning_rate", "router_entropy", "tokens", "epoch"):
            np.testing.assert_allclose(row[name], other[name], rtol=0, atol=1e-5, err_msg=f"{name} {row['step']}")
        assert ("validation_loss" in row) == ("validation_loss" in other)
        if "validation_loss" in row:
            assert row["validation_loss"] == pytest.approx(other["validation_loss"], abs=1e-5)


def test_two_processes_compute_what_one_does(folder, alone, stopped):
    rows = read_rows(folder / "two/metrics.jsonl")[:STOPPED]
    assert_same_run(rows, alone.rows[:STOPPED])
    assert any("validation_loss" in row for row in rows)


def test_the_rows_they_read_are_those_of_one_process(folder, alone, stopped):
    for step in range(1, STOPPED + 1):
        parts = [np.load(folder / f"two-{process}-{step}.npy") for process in (0, 1)]
        assert [part.shape for part in parts] == [(BATCH // 2, WINDOW)] * 2
        # Every second row is a process's: shuffled first, sliced afterwards.
        together_BxW = np.stack(parts, axis=1).reshape(BATCH, WINDOW)
        np.testing.assert_array_equal(together_BxW, alone.batches[step])


def test_a_signal_to_one_process_stops_all_after_the_same_step(folder, stopped):
    main, other = stopped
    assert (main.returncode, other.returncode) == (42, 42), main.stderr + other.stderr
    assert f"stopped after step {STOPPED} of {STEPS}, saved; the same command resumes" in main.stderr
    assert (folder / f"two/checkpoints/{STOPPED}").is_dir()


@pytest.mark.slow
def test_process_0_alone_prints_and_writes(folder, alone, stopped, resumed):
    main, other = stopped
    assert "on 8 x cpu in 2 processes" in main.stdout and f"step 3/{STEPS}" in main.stdout
    assert main.stdout.count("data: wrote") == 1
    assert (other.stdout, other.stderr) == ("", "")
    assert "Gloo" not in main.stdout
    assert {path.name for path in (folder / "two").iterdir()} == {path.name for path in (folder / "alone").iterdir()}
    first, second = json.loads((folder / "two/environment.json").read_text())
    assert (first["processes"], first["mesh"]) == (2, {"data": 2, "fsdp": 4, "tensor": 1})
    assert (second["processes"], second["mesh"]) == (1, {"data": 1, "fsdp": 8, "tensor": 1})


@pytest.mark.slow
def test_the_run_goes_on_in_one_process_on_another_mesh(alone, resumed):
    assert_same_run(resumed, alone.rows)


@pytest.mark.slow
def test_two_processes_evaluate_as_one_does(folder, start, resumed, capsys):
    capsys.readouterr()
    flags = (f"--workdir={folder}/two", "--stride=5", "--json")
    assert call(evaluate, *flags) == (0, "")
    expected = json.loads(capsys.readouterr().out)
    main, other = start("evaluate", *flags)
    assert (main.returncode, other.returncode) == (0, 0), main.stderr + other.stderr
    found = json.loads(main.stdout)
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    assert {**found, "loss": 0, "perplexity": 0, "bits_per_byte": 0} == {
        **expected, "loss": 0, "perplexity": 0, "bits_per_byte": 0
    }  # fmt: skip
    assert other.stdout == ""


@pytest.mark.slow
def test_two_processes_go_on_with_a_run_on_other_meshes(folder, start, alone, resumed):
    """Among them one whose tensor axis crosses the processes: both then read the same rows."""
    for mesh in ({"data": 1, "fsdp": 8}, {"data": 1, "fsdp": 1, "tensor": 8}):
        name = f"on{mesh['fsdp']}"
        assert call(train, *flags_of(folder, name), "--config.checkpoint.keep=9",
                    "--config.summary.sample_tokens=0") == (0, "")  # fmt: skip
        shutil.rmtree(folder / name / "checkpoints" / str(STEPS))
        meshes = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
        done = start("train", *flags_of(folder, name), *meshes, sabotage=f"{folder}/{name}:none:none:0")
        assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
        assert "resuming after step 3 of 6" in done[0].stdout
        assert "no sample: " in done[0].stdout
        assert_same_run(read_rows(folder / name / "metrics.jsonl"), alone.rows)
        for step in (4, 5, 6):
            parts = [np.load(folder / f"{name}-{process}-{step}.npy") for process in (0, 1)]
            if "tensor" in mesh:
                assert all(np.array_equal(part, alone.batches[step]) for part in parts)
            else:
                np.testing.assert_array_equal(np.stack(parts, 1).reshape(BATCH, WINDOW), alone.batches[step])
