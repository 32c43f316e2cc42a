"""A record to make others of."""

import pytest

from experiments.record import Code, Flops, Parameters, Record, Seconds


@pytest.fixture(scope="session")
def record() -> Record:
    return Record(
        study="s", edition="small", run="a-seed1", arm="a", factors={}, seed=1, stage="seed", learning_rate=1e-3,
        status="finished", reason="", command="python", code=Code("", "", "p"), data={}, config_hash="h", config={},
        machine="m", versions={}, parameters=Parameters(10, 20), flops=Flops(1.5, 3.0), tokens=64,
        seconds=Seconds(1.0, {}), curve=(), evaluation={},
    )  # fmt: skip
