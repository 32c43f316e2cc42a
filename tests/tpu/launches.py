"""Launches that are good and launches that are not, and what the framework says of a good one."""

import json
from pathlib import Path

from spiral_jax.hardware import parse_slice
from tpu.job import Job

ROOT = Path(__file__).parents[2]
GOOD = ("night-1", "--accelerator=v5p-128", "--zone=us-east5-a", "--bucket=gs://runs-of-ours/spiral/")
JOB = Job(
    name="night-1",
    zone="us-east5-a",
    slice=parse_slice("v5p:4x4x4"),
    bucket="gs://runs-of-ours",
    config="experiments/pile.py:1.4b,spiral_b",
)
POINT = json.loads((ROOT / "tpu/predictions/1.4b-v5p-4x4x4-spiral_b.json").read_text())
# Of `describe --json --data` what matters here.
DESCRIBED = {
    "model": {"notation": "4+8x{1/8,1/4,1/2,1}+4", "topology": "mesh", "head_width": 128},
    "parameters": {"total": POINT["model"]["parameters"]},
    "flops": {"train_per_token_causal": 8e9},
    "train": {
        "steps": 1000, "batch_size": 512, "sequence_length": 4096, "tokens": 1000 * 2**21, "evaluations": 4,
        "tokens_per_evaluation": 20 * 2**21,
    },
    "reads": {"data.stores": ["gs://pile/tokens"]},
    "extras": {"logging.tensorboard": "tensorboardx"},
    "data": {"tokens": 10**11, "epochs": 0.02, "validation_tokens": 10**6},
    "memory": dict.fromkeys(
        ("parameters", "optimizer", "gradients", "core", "gathered_rest", "activations_kept", "logits_block"), 10**9
    ),
}  # fmt: skip


def changed(*arguments: str) -> tuple[str, ...]:
    """Good flags, some of them others."""
    named = {flag.partition("=")[0]: flag for flag in (*GOOD[1:], *arguments) if flag.startswith("--")}
    names = [argument for argument in arguments if not argument.startswith("--")]
    return (*(names or GOOD[:1]), *named.values())


# Flags that are refused, and what the line says.
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


def fake(path: Path, script: str) -> None:
    """A program that runs a few lines of shell."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
