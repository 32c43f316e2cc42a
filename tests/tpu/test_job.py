"""A launch as its flags give it, and what of it is refused."""

import dataclasses
import subprocess
import sys

import pytest

from spiral_jax.errors import SpiralError
from tpu.job import Job, Parser, define, job_of

GOOD = ("night-1", "--accelerator=v5p-128", "--zone=us-east5-a", "--bucket=gs://runs-of-ours/spiral/")


def parse(*arguments: str) -> Job:
    parser = Parser(prog="python -m tpu.launch")
    define(parser)
    return job_of(*parser.parse_known_args(arguments))


def changed(*arguments: str) -> tuple[str, ...]:
    """Good flags, some of them others."""
    named = {flag.partition("=")[0]: flag for flag in (*GOOD[1:], *arguments) if flag.startswith("--")}
    names = [argument for argument in arguments if not argument.startswith("--")]
    return (*(names or GOOD[:1]), *named.values())


def test_what_follows_from_the_flags():
    job = parse(*GOOD, "--num_slices=2", "--config=experiments/pile.py:1.4b,spiral_b", "--config.train.steps=5")
    assert (job.chips, job.hosts, job.region) == (128, 32, "us-east5")
    assert job.root == "gs://runs-of-ours/spiral/night-1" and job.workdir == f"{job.root}/run"
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


BAD = {
    "name with shell characters": (("a;reboot",), "NAME is 'a;reboot'"),
    "name with a blank": (("a b",), "NAME is 'a b'"),
    "name of two lines": (("a\nb",), r"NAME is 'a\nb'"),
    "name too long": (("a" * 29,), "at most 28"),
    "name that ends in a dash": (("a-",), "NAME is 'a-'"),
    "unknown accelerator": (("--accelerator=v9-8",), "there is no generation 'v9'"),
    "slice that does not exist": (("--accelerator=v5p-127",), "no v5p slice has 127"),
    "shape that nobody rents out": (("--accelerator=v5p:4x4x5",), "v5p:4x4x4 (v5p-128)"),
    "zone without that generation": (("--zone=us-west4-a",), "--zone is 'us-west4-a'; allowed: for v5p: us-central1-a"),
    "no zone": (("--zone=",), "--zone is ''"),
    "bucket that is none": (("--bucket=/data/runs",), "--bucket is '/data/runs'"),
    "bucket with a way up": (("--bucket=gs://runs/../other",), "--bucket is"),
    "bucket with shell characters": (("--bucket=gs://runs/$(id)",), "--bucket is"),
    "project": (("--project=My Project",), "--project is 'My Project'"),
    "provider": (("--provider=aws",), "--provider is 'aws'; allowed: qr, vm, gke"),
    "tpu7x but not on GKE": (("--accelerator=tpu7x-128", "--zone=us-central1-c"), "--provider is 'qr'; allowed: gke"),
    "several slices created directly": (("--provider=vm", "--num_slices=2"), "--num_slices is 2; allowed: 1"),
    "flex-start created directly": (("--provider=vm", "--flex_start"), "--flex_start"),
    "no slice": (("--num_slices=0",), "--num_slices is 0"),
    "two pricings": (("--spot", "--reserved"), "--reserved: not allowed with argument --spot"),
    "network": (("--network=a b",), "--network is 'a b'"),
    "service account": (("--service_account=me@gmail.com",), "--service_account is 'me@gmail.com'"),
    "config outside the tree": (("--config=/etc/passwd",), "--config is '/etc/passwd'"),
    "config a level up": (("--config=a/../../x.py",), "--config is 'a/../../x.py'"),
    "override without a value": (("--config.train.steps",), "the argument is '--config.train.steps'"),
    "unknown flag": (("--max_hours=3",), "the argument is '--max_hours=3'"),
    "flag that does not end": (("--config.data.paths=a\nb",), "the argument is"),
    "import outside the tree": (("--import=../mine.py",), "--import is '../mine.py'"),
    "cap not above 0": (("--max_chip_hours=0",), "--max_chip_hours is 0.0; allowed: a number above 0"),
    "cap that is no number": (("--max_chip_hours=nan",), "--max_chip_hours is nan"),
    "price below 0": (("--price=-1",), "--price is -1.0"),
    "price that is a word": (("--price=cheap",), "--price: invalid float value: 'cheap'"),
    "failures": (("--max_failures=-1",), "--max_failures is -1"),
}


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
