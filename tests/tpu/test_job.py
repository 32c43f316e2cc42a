"""A launch as its flags give it, and what of it is refused."""

import dataclasses
import subprocess
import sys

import pytest

from spiral_jax.errors import SpiralError
from tests.tpu.launches import BAD, GOOD, changed
from tpu.job import Job, Parser, define, job_of


def parse(*arguments: str) -> Job:
    parser = Parser(prog="python -m tpu.launch")
    define(parser)
    return job_of(*parser.parse_known_args(arguments))


def test_what_follows_from_the_flags():
    job = parse(*GOOD, "--num_slices=2", "--config=experiments/pile.py:1.4b,spiral_b", "--config.train.steps=5")
    assert (job.chips, job.hosts, job.region) == (128, 32, "us-east5")
    assert job.root == "gs://runs-of-ours/spiral/night-1"
    assert job.arguments == (
        "spiral_jax.train",
        "--config=experiments/pile.py:1.4b,spiral_b",
        "--config.train.steps=5",
        "--workdir=gs://runs-of-ours/spiral/night-1/run",
    )
    assert (job.provider, job.pricing, parse(*GOOD, "--reserved").pricing) == ("qr", "spot", "reserved")
    assert not parse(*GOOD, "--no-delete_at_success").delete_at_success


def test_verbs_that_start_nothing_need_no_configuration():
    with pytest.raises(SpiralError, match="--config is missing"):
        _ = parse(*GOOD).arguments


def test_whoever_makes_one_is_checked():
    """Not the flags alone: a job read from a file is the same value."""
    with pytest.raises(SpiralError, match="NAME is 'x; rm -rf /'"):
        dataclasses.replace(parse(*GOOD), name="x; rm -rf /")


@pytest.mark.parametrize("arguments, words", BAD.values(), ids=BAD)
def test_refused_in_one_line(arguments, words):
    with pytest.raises(SpiralError) as error:
        parse(*changed(*arguments))
    assert words in str(error.value) and "; allowed" in str(error.value) and "\n" not in str(error.value)


def test_an_override_given_twice():
    with pytest.raises(SpiralError, match=r"--config\.train\.steps is given 2 times; allowed: once"):
        parse(*GOOD, "--config.train.steps=5", "--config.train.steps=6")


def test_flags_are_not_guessed():
    """`--con` is no `--config`, which argparse would have taken it for."""
    with pytest.raises(SpiralError, match="--con=x"):
        parse(*GOOD, "--con=x")


def test_jax_is_not_imported():
    """The launcher runs where none is installed."""
    code = "import sys, tpu.job; sys.exit(any(m.partition('.')[0] in ('jax', 'numpy', 'absl') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-S", "-c", code]).returncode == 0
