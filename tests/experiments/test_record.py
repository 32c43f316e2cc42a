"""Records: what is written is read, and what is damaged is named."""

import dataclasses
import json
import math

import numpy as np
import pytest

from experiments.record import Code, Evaluation, Flops, Parameters, Record, Seconds, read, read_all, thinned, write
from spiral_jax.errors import SpiralError

RECORD = Record(
    study="tiny", edition="small", run="a-seed1", arm="a", factors={"size": "410m", "ratio": 0.5}, seed=1, stage="seed",
    learning_rate=4e-3, status="finished", reason="", command="python", code=Code("c" * 40, "", "p"),
    data={"train": "t"}, config_hash="h", config={"model.chunks": [8, 4], "data.weights": [[0.5, 0.5]]},
    machine="m", versions={"jax": "1"}, parameters=Parameters(10, 20), flops=Flops(1.5, 3.0), tokens=64,
    seconds=Seconds(1.0, {"v5e:4x4": None, "v5p:4x4x4": 2.0}), curve=((1, 32, 5.0), (2, 64, 4.5)),
    evaluation={"validation": Evaluation(3.123456789, (3.14159265, 2.0), (5, 6))},
    by_depth={"listops": {"1": (3, 4)}}, tasks={"0": {"piqa/acc_norm": 0.5}},
)  # fmt: skip


def test_what_is_written_is_read(tmp_path):
    path = write(RECORD, tmp_path)
    found = read(path)
    half = dataclasses.replace(RECORD.evaluation["validation"], documents=(float(str(np.float16(3.14159265))), 2.0))
    assert found == dataclasses.replace(RECORD, evaluation={"validation": half}, config=found.config)
    assert json.loads(json.dumps(found.config)) == RECORD.config
    assert np.float16(found.evaluation["validation"].documents[0]) == np.float16(3.14159265)
    assert read_all(tmp_path) == ([found], [])
    first = path.read_bytes()
    assert write(found, tmp_path).read_bytes() == first


@pytest.mark.parametrize("change, expected", [
    ({"seed": 1.5}, "seed is 1.5; allowed: int"),
    ({"seed": True}, "seed is True; allowed: int"),
    ({"status": "good"}, "status is 'good'; allowed: finished, diverged, failed"),
    ({"seconds": {"train": "1", "predicted": {}}}, "seconds.train is '1'; allowed: float"),
    ({"seconds": {"train": 1.0}}, "seconds.predicted is missing; allowed: all of train, predicted"),
    ({"curve": [[1, 2]]}, r"curve\[0\] is \[1, 2\]; allowed: 3 entries"),
    ({"curve": [[1, 2, 3.0]] * 201}, "curve is '201 rows'; allowed: up to 200"),
    ({"evaluation": {"v": {"nats": 1.0, "documents": [1.0], "tokens": []}}}, "evaluation.v.documents is 1; allowed: "),
    ({"evaluation": []}, r"evaluation is \[\]; allowed: a JSON object"),
    ({"run": "b"}, "run is 'b'; allowed: 'a-seed1', as the file is named"),
    ({"format": 2}, "format is 2; allowed: 1"),
    ({"more": 1}, "more is unknown; allowed: all of study"),
])  # fmt: skip
def test_damage_is_named(tmp_path, change, expected):
    path = write(RECORD, tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SpiralError, match=rf"a-seed1\.json: {expected}"):
        read(path)
    assert len(read_all(tmp_path)[1]) == 1


def test_a_record_is_small(tmp_path):
    many = Evaluation(3.0, tuple(np.random.default_rng(0).normal(3, 1, 4000)), (12345,) * 4000)
    rows = [(n, n * 2_000_000, 3.0 + math.sin(n)) for n in range(120_000)]
    record = dataclasses.replace(RECORD, evaluation={"validation": many}, curve=thinned(rows))
    assert write(record, tmp_path).stat().st_size < 100_000
    twice = {"a": many, "b": many}
    with pytest.raises(SpiralError, match=r"a-seed1\.json is '\d+ bytes'; allowed: under 100000"):
        write(dataclasses.replace(record, evaluation=twice), tmp_path)


def test_thinned_rows_keep_the_ends_and_the_mean():
    rows = [(n, 10 * n, float(n)) for n in range(1, 1001)]
    curve = thinned(rows, 200)
    assert len(curve) == 200 and curve[-1][:2] == (1000, 10_000) and curve[0] == (5, 50, 3.0)
    assert np.mean([nats for _, _, nats in curve]) == pytest.approx(500.5)
    assert thinned(rows[:3]) == tuple(rows[:3]) and thinned([]) == ()
    assert thinned([(1, 10, math.nan), (2, 20, 1.0)]) == ((2, 20, 1.0),)
