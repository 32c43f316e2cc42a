"""Rows in W&B: with a double that drops steps as W&B does, and with W&B itself, offline."""

import json
import struct
import sys
import types

import pytest
from etils.epath import Path

from spiral_jax.errors import SpiralError
from spiral_jax.run import side_files
from spiral_jax.run.metrics import LoggingConfig, MetricsWriter, read_rows
from spiral_jax.run.wandb_rows import id_of

RESERVED = ":;,#?/'\\%"  # of W&B 0.31, and of others


class Double(types.ModuleType):
    """W&B: `runs` has the rows that each run has kept, by its id."""

    def __init__(self):
        super().__init__("wandb")
        self.runs, self.configs, self.axes, self.refuses = {}, {}, {}, False

    def init(self, *, project, dir, id, resume):
        if self.refuses:
            raise ConnectionError("no route to api.wandb.ai\nand more")
        if not id or set(id) & set(RESERVED):
            raise ValueError(f"Run ID cannot contain the characters: {RESERVED}")
        rows, config = self.runs.setdefault(id, []), self.configs.setdefault(id, {})

        def log(row, step=None):
            if step is None or step > max((row["_step"] for row in rows), default=-1):
                rows.append(row | {"_step": len(rows) if step is None else step})

        update = types.SimpleNamespace(update=lambda values, allow_val_change=False: config.update(values))
        return types.SimpleNamespace(log=log, config=update, finish=lambda: None, define_metric=self._define)

    def _define(self, name, step_metric=None):
        self.axes[name] = step_metric


@pytest.fixture
def wandb(monkeypatch):
    double = Double()
    monkeypatch.setitem(sys.modules, "wandb", double)
    return double


def write(workdir, steps, last_step=0, **about):
    writer = MetricsWriter(workdir, LoggingConfig(wandb="project"), last_step=last_step, about=about)
    for step in steps:
        writer.write({"step": step, "loss": 4 / step, "depths": [step, 0.5]})
    writer.close()


def test_no_row_is_lost_where_a_run_goes_back(tmp_path, wandb):
    """In one start, to a checkpoint before a divergence; and in the next start, to the last checkpoint."""
    write(Path(tmp_path), [1, 2, 3, 2, 3])
    write(Path(tmp_path), [3, 4], last_step=2)
    [rows] = wandb.runs.values()
    assert [row["step"] for row in rows] == [1, 2, 3, 2, 3, 3, 4]
    assert rows[-1] == {"step": 4, "loss": 1.0, "depths/0": 4, "depths/1": 0.5, "_step": 6}
    assert wandb.axes == {"step": None, "*": "step"}


def test_what_a_run_is_stands_in_its_configuration(tmp_path, wandb):
    write(Path(tmp_path), [1], train={"steps": 5}, parameters=7)
    write(Path(tmp_path), [2], last_step=1, train={"steps": 9}, parameters=7)
    assert list(wandb.configs.values()) == [{"train": {"steps": 9}, "parameters": 7}]


@pytest.mark.parametrize(
    "name", ["lr:1e-3", "run#1", "1.4b,spiral_b", "it's", "ünï", "日本", "with space", ".", "a" * 200]
)
def test_every_name_of_a_directory_makes_an_id(tmp_path, name):
    workdir = Path(tmp_path / name)
    workdir.mkdir(exist_ok=True)
    made = id_of(workdir)
    assert not set(made) & set(RESERVED) and made == id_of(workdir) and len(made) <= 128
    assert side_files.is_wandb_id(made) and not any(side_files.is_wandb_id(f"a{mark}b") for mark in RESERVED)


def test_a_new_run_that_is_refused_is_one_line_and_one_that_goes_on_goes_on(tmp_path, wandb, capsys):
    wandb.refuses = True
    with pytest.raises(
        SpiralError, match=r"^logging\.wandb is 'project', where W&B takes no run \(no route to api.wand"
    ):
        write(Path(tmp_path), [1])
    assert not (tmp_path / "wandb_id").exists()
    wandb.refuses = False
    write(Path(tmp_path), [1])
    wandb.refuses = True
    write(Path(tmp_path), [2], last_step=1)
    assert "note: W&B takes no rows now (no route to api.wandb.ai); metrics.jsonl has them" in capsys.readouterr().err
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]


def records(path):
    """What a .wandb file holds: records in blocks of 32 KiB, as in LevelDB's logs."""
    from wandb.proto import wandb_internal_pb2

    content, begin, whole = path.read_bytes(), 7, b""
    while begin + 7 <= len(content):
        if 2**15 - begin % 2**15 < 7:
            begin += 2**15 - begin % 2**15
        _, length, kind = struct.unpack("<IHB", content[begin : begin + 7])
        whole += content[begin + 7 : begin + 7 + length]
        begin += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


@pytest.mark.slow
def test_what_wandb_itself_keeps(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name, value in (("MODE", "offline"), ("SILENT", "true"), ("DISABLE_CODE", "true")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    workdir = Path(tmp_path / "lr:1e-3,wd=0.1 #2")
    workdir.mkdir()
    write(workdir, [1, 2, 3, 2, 3, 4], train={"steps": 4, "names": ("a",)}, parameters=7)
    [file] = (tmp_path / workdir.name).glob("wandb/offline-run-*/run-*.wandb")
    found = list(records(file))
    rows = [{item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for record in found if record.WhichOneof("record_type") == "history"]  # fmt: skip
    assert [row["step"] for row in rows] == [1, 2, 3, 2, 3, 4] and rows[-1]["depths/1"] == 0.5
    config = {item.key: json.loads(item.value_json) for record in found for item in record.config.update}
    assert config["train"] == {"steps": 4, "names": ["a"]} and config["parameters"] == 7
