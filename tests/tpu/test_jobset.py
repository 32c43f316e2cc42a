"""Manifests of GKE against a schema of what its API takes."""

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from spiral_jax.errors import SpiralError
from spiral_jax.hardware import GENERATIONS, Slice, parse_slice
from tests.tpu.documents import put_at
from tpu.job import PRICINGS, Job
from tpu.providers.gke import commands, manifest

Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
SCHEMA = json.loads((Path(__file__).parents[2] / "tpu/templates/jobset.schema.json").read_text())

JOB = ["spec", "replicatedJobs", 0, "template", "spec"]  # where the Job stands in the manifest


def job(tpu: Slice, **given) -> Job:
    zone = tpu.generation.zones[0]
    config = "experiments/pile.py:1.4b"
    return Job(name="pile", zone=zone, slice=tpu, bucket="gs://my-bucket", provider="gke", config=config, **given)


def pods(tpu: Slice, **given) -> dict:
    text = yaml.load(manifest(job(tpu, **given), "docker.io/me/spiral:1"), Loader)
    jsonschema.Draft202012Validator(SCHEMA).validate(text)
    return text["spec"]["replicatedJobs"][0]


@pytest.mark.parametrize("generation", GENERATIONS, ids=lambda generation: generation.name)
@pytest.mark.parametrize("pricing", PRICINGS)
def test_a_manifest_asks_for_all_chips_of_each_slice(generation, pricing):
    for shape in generation.shapes[::3]:
        tpu = Slice(generation, shape)
        found = pods(tpu, pricing=pricing, num_slices=3)
        spec = found["template"]["spec"]
        pod = spec["template"]["spec"]
        chips = sum(container["resources"]["limits"]["google.com/tpu"] for container in pod["containers"])
        assert chips * spec["parallelism"] == tpu.chips and spec["completions"] == spec["parallelism"]
        assert found["replicas"] == 3
        assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "x".join(map(str, shape))
        assert ("cloud.google.com/gke-spot" in pod["nodeSelector"]) == (pricing == "spot")


def test_a_host_of_tpu7x_has_two_containers_of_two_chips():
    containers = pods(parse_slice("tpu7x-128"))["template"]["spec"]["template"]["spec"]["containers"]
    assert [c["resources"]["limits"] for c in containers] == [{"google.com/tpu": 2}] * 2
    ports = [port["containerPort"] for c in containers for port in c["ports"]]
    assert len(set(ports)) == len(ports) and len({c["name"] for c in containers}) == 2


def test_sigterm_reaches_python_which_has_the_environment_of_other_hosts():
    (container,) = pods(parse_slice("v5p-128"))["template"]["spec"]["template"]["spec"]["containers"]
    arguments = ["--config=experiments/pile.py:1.4b", "--workdir=gs://my-bucket/pile/run"]
    assert container["command"] == ["python3", "-u", "-m", "spiral_jax.train", *arguments]
    assert "--xla_tpu_enable_latency_hiding_scheduler=true" in json.dumps(container["env"])


def test_what_starting_again_mends_does_not_fail_the_job():
    spec = pods(parse_slice("v5p-128"))["template"]["spec"]
    (rule,) = spec["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["operator"] == "NotIn"
    again = rule["onExitCodes"]["values"]
    assert {42, 43, 127, 137, 143, 255} <= set(again) and not {1, 2, 44} & set(again)
    assert spec["backoffLimit"] == 0 and spec["template"]["spec"]["terminationGracePeriodSeconds"] == 300


@pytest.mark.parametrize(
    "path, value",
    [
        ([*JOB, "backOffLimit"], 0),
        ([*JOB, "backoffLimit"], 3),
        ([*JOB, "template", "spec", "nodeSelectors"], {}),
        ([*JOB, "template", "spec", "containers", 0, "resources", "limits"], {"tpu": 4}),
        ([*JOB, "parallelism"], "16"),
        (["spec", "failurePolicy", "rules", 0, "action"], "FailJob"),
        (["metadata", "name"], "Pile; rm -rf /"),
    ],
)  # fmt: skip
def test_a_wrong_field_does_not_pass(path, value):
    text = yaml.load(manifest(job(parse_slice("v5p-128")), "docker.io/me/spiral:1"), Loader)
    put_at(text, path, value)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(text, SCHEMA)


def test_values_cannot_become_yaml():
    text = yaml.safe_load(manifest(job(parse_slice("v5p-8")), 'x"\n    privileged: true #'))
    pod = text["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["image"] == 'x"\n    privileged: true #'


def test_there_is_no_manifest_without_an_image():
    with pytest.raises(SpiralError, match="--image is missing; allowed: "):
        manifest(job(parse_slice("v5p-8")), "")


def test_the_commands_are_argument_lists_that_name_the_manifest():
    listed = commands(job(parse_slice("v5p-8"), project="my-project"), "pile.jobset.yaml")
    assert ["kubectl", "apply", "--server-side", "--filename=pile.jobset.yaml"] in listed
    assert listed[0][-1] == "--project=my-project"
