"""The SkyPilot task file: keys that SkyPilot knows, a slice that exists, and exit statuses that are ours."""

import copy
import json
from pathlib import Path

import pytest
import yaml

from spiral_jax.hardware import GENERATIONS
from tests.tpu.documents import put_at

jsonschema = pytest.importorskip("jsonschema")
ROOT = Path(__file__).parents[2]
FILE = ROOT / "tpu" / "templates" / "skypilot.yaml"
SCHEMA = json.loads(Path(__file__).with_name("skypilot.schema.json").read_text())


@pytest.fixture
def task():
    return yaml.safe_load(FILE.read_text())


def test_it_is_short_and_valid(task):
    assert len(FILE.read_text().splitlines()) <= 32
    jsonschema.validate(task, SCHEMA)


@pytest.mark.parametrize(
    "path, value",
    [
        (("resources", "acelerators"), "tpu-v6e-64"),
        (("resources", "accelerators"), "v6e-64"),
        (("resources", "infra"), "gcp"),
        (("resources", "accelerator_args", "queued_resource"), True),
        (("resources", "job_recovery", "recover_on_exit_codes"), [42, 300]),
        (("resources", "use_spot"), "yes"),
        (("script",), "true"),
        (("envs", "BUCKET"), 3),
    ],
)
def test_a_wrong_field_is_refused(task, path, value):
    wrong = copy.deepcopy(task)
    put_at(wrong, path, value)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, SCHEMA)


def test_its_slice_exists_where_it_asks_for_it(task):
    resources = task["resources"]
    name, chips = resources["accelerators"].removeprefix("tpu-").split("-")
    (generation,) = (g for g in GENERATIONS if name in (g.name, *g.aliases))
    assert int(chips) / generation.counted_cores in [_product(shape) for shape in generation.shapes]
    assert resources["infra"].split("/")[2] in generation.zones
    assert resources["accelerator_args"]["runtime_version"] == generation.runtime
    assert resources["infra"].split("/")[1] == resources["infra"].split("/")[2].rpartition("-")[0]


def test_statuses_that_go_on_are_started_again(task):
    recovery = task["resources"]["job_recovery"]
    assert set(recovery["recover_on_exit_codes"]) == {42, 43} and recovery["max_restarts_on_errors"] >= 1


def test_the_job_is_what_train_takes(task):
    """Its flags are those of the verb, and the configuration is there."""
    assert (ROOT / task["envs"]["CONFIG"].partition(":")[0]).is_file()
    assert "exec " in task["run"] and "-m spiral_jax.train" in task["run"]


def _product(shape):
    product = 1
    for size in shape:
        product *= size
    return product
