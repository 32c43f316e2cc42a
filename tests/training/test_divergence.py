"""Faults of single devices: skipped updates, and returns to checkpoints, against runs told which steps to skip.

Compiled for eight devices. The program `faulty` has a loss that looks at a device's first token: tokens of their own
stand for a NaN in the loss, in a gradient, in one of the copies of a gradient, and for a loss out of bounds, on one
device each. The program `listed` has `train.skip_steps`, and no faults.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow
from jax.sharding import PartitionSpec
from states import saves_of

from spiral_jax.errors import Diverged, SpiralError
from spiral_jax.model.config import ModelConfig
from spiral_jax.parallel.mesh import MeshConfig, make_mesh
from spiral_jax.parallel.processes import ALONE
from spiral_jax.run.checkpoint import CheckpointConfig, Checkpoints
from spiral_jax.run.config import RunConfig
from spiral_jax.run.resume import newest_whole
from spiral_jax.run.returns import Returns
from spiral_jax.training import step as steps_of_training
from spiral_jax.training.config import OptimizerConfig, TrainConfig
from spiral_jax.training.divergence import DivergenceConfig, Skips, reason
from spiral_jax.training.loop import Recorder, fit
from spiral_jax.training.step import make_program

LOSS, GRADIENT, COPY, SPIKE = 60, 61, 62, 63
STEPS = 13
CONFIG = RunConfig(
    model=ModelConfig(vocab_size=64, d_model=32, num_heads=4, prelude_layers=1, core_layers=0, coda_layers=0,
                      chunks=(), topology="base", dtype="float32"),
    train=TrainConfig(steps=STEPS, batch_size=8, sequence_length=8),
    optimizer=OptimizerConfig(peak_learning_rate=1e-2, warmup_steps=3),
    mesh=MeshConfig(2, 2, 2),
    divergence=DivergenceConfig(loss_above=20.0, skips_in_a_row=2, returns=1),
)  # fmt: skip
# Skipped by themselves: 3, 7, 8 and 11. Of 8 the loop hears when 9 has been dispatched; the checkpoint is that of 4.
FAULTS = {3: LOSS, 7: COPY, 8: GRADIENT, 11: SPIKE}
PASSED_OVER = (3, 5, 6, 7, 8, 9, 11)
EVERY_STEPS = 4
WINDOWS = np.random.default_rng(0).integers(60, size=(STEPS, 8, 9)).astype(np.int32)


@jax.custom_vjp
def poison(x, bad):
    """The same array, whose gradient is NaN on this device if `bad`, and on one of its copies if that is 2."""
    del bad
    return x


def _poison_backward(bad, gradient):
    def of_a_copy(gradient, bad):
        is_hit = (bad == 1) | ((bad == 2) & (jax.lax.axis_index("tensor") == 1))
        return jnp.where(is_hit, jnp.nan, gradient)

    run = jax.shard_map(of_a_copy, in_specs=PartitionSpec(), out_specs=PartitionSpec(), axis_names={"tensor"},
                        check_vma=False)  # fmt: skip
    return run(gradient, bad), None


poison.defvjp(lambda x, bad: (x, bad), _poison_backward)


def with_faults(loss_of):
    """`mean_window_nats` of a device that looks at its first token."""

    def faulty(model, params, windows_BxW, block):
        first = jnp.where(jax.lax.axis_index(("data", "fsdp")) == 2, windows_BxW[0, 0], 0)
        bad = (first == GRADIENT).astype(jnp.int32) + 2 * (first == COPY).astype(jnp.int32)
        norm = params["final_norm"]
        params = params | {"final_norm": norm | {"scale": poison(norm["scale"], bad)}}
        loss, metrics = loss_of(model, params, windows_BxW, block)
        return loss + jnp.where(first == LOSS, jnp.nan, jnp.where(first == SPIKE, 1000.0, 0.0)), metrics

    return faulty


def windows_of(step: int, faults) -> np.ndarray:
    windows_BxW = WINDOWS[step - 1].copy()
    if step in faults:
        windows_BxW[4, 0] = faults[step]  # the first row of the third device of four
    return windows_BxW


@pytest.fixture(scope="module")
def programs():
    """Name to (configuration, program, compiled step)."""

    def compiled(config):
        program = make_program(config, make_mesh(config.mesh))
        lowered = program.lowered()
        return config, program, lowered.compile()

    listed = dataclasses.replace(CONFIG.train, skip_steps=PASSED_OVER)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(steps_of_training, "mean_window_nats", with_faults(steps_of_training.mean_window_nats))
        faulty = compiled(CONFIG)
    return {"faulty": faulty, "listed": compiled(dataclasses.replace(CONFIG, train=listed))}


@pytest.fixture(scope="module")
def start(programs):
    """(program) to a new state of step 0."""
    _, program, _ = programs["listed"]
    first = jax.tree.map(np.asarray, program.init(jax.random.key(0)))
    return lambda program: jax.device_put(first, jax.tree.map(lambda x: x.sharding, program.abstract_state))


def stepped(programs, start, name, faults=(), steps=STEPS):
    """The state after all steps, and its rows, without a loop: each step's numbers are looked at."""
    _, program, train_step = programs[name]
    state, rows = start(program), []
    for step in range(1, steps + 1):
        before = jax.tree.map(bits, (state.params, state.opt_state))
        state, metrics = train_step(state, program.put_rows_of_process(windows_of(step, faults)))
        changed = before != jax.tree.map(bits, (state.params, state.opt_state))
        assert len({int(shard.data) for shard in metrics["skipped"].addressable_shards}) == 1
        rows.append({"step": step, **{name: np.asarray(x).tolist() for name, x in metrics.items()}})
        assert changed == (not rows[-1]["skipped"]), rows[-1]
        assert int(state.step) == step
    return state, rows


def bits(x) -> list[bytes]:
    """Of every copy that a device holds."""
    return [np.asarray(shard.data).tobytes() for shard in x.addressable_shards]


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert bits(x) == bits(y), jax.tree_util.keystr(path)


@pytest.fixture(scope="module")
def listed(programs, start):
    """The run that was told what to skip."""
    return stepped(programs, start, "listed")


def test_listed_steps_are_skipped_and_nothing_else_stands_still(listed):
    _, rows = listed
    assert [row["step"] for row in rows if row["skipped"]] == list(PASSED_OVER)
    # The rate is that of the step, not of the updates made.
    expected = [1e-2 * k / 3 for k in (1, 2, 3)]
    np.testing.assert_allclose([row["learning_rate"] for row in rows[:3]], expected, rtol=1e-6)
    assert rows[-1]["learning_rate"] == pytest.approx(1e-3)


def test_the_update_is_made_at_the_rate_of_its_step(programs, start):
    """After skips, by the formula of AdamW: moments are as old as the updates are many, the rate is the step's."""
    state, rows = stepped(programs, start, "listed", steps=10)
    after, (adam, *_) = state.params["head"]["kernel"], state.opt_state[1]
    first, second, updates = (np.asarray(x, np.float64) for x in (adam.mu["head"]["kernel"], adam.nu["head"]["kernel"],
                                                                  adam.count))  # fmt: skip
    before = np.asarray(stepped(programs, start, "listed", steps=9)[0].params["head"]["kernel"], np.float64)
    assert updates == 4  # 1, 2, 4, 10
    direction = first / (1 - 0.9**updates) / (np.sqrt(second / (1 - 0.95**updates)) + 1e-8) + 0.01 * before
    np.testing.assert_allclose(after - before, -rows[-1]["learning_rate"] * direction, rtol=1e-3, atol=1e-6)


def test_faults_of_one_device_are_skipped_like_listed_steps(programs, start, listed):
    kinds = (LOSS, GRADIENT, COPY, SPIKE, COPY, LOSS, SPIKE)
    state, rows = stepped(programs, start, "faulty", dict(zip(PASSED_OVER, kinds, strict=True)))
    assert [row["step"] for row in rows if row["skipped"]] == list(PASSED_OVER)
    assert_same(state, listed[0])
    said = {row["step"]: reason(row, CONFIG.divergence, ()) for row in rows if row["skipped"]}
    assert said[3] == said[9] == "its loss is nan"
    assert said[5] == "the norm of its gradients is nan"
    assert "is above divergence.loss_above 20.0" in said[7] and "is above divergence.loss_above 20.0" in said[11]
    assert "finite" in said[6] or "norm" in said[6]


class Run:
    """A run of the program `faulty` in a directory."""

    def __init__(self, programs, start, folder, **divergence):
        config, self.program, self.train_step = programs["faulty"]
        self.config = dataclasses.replace(config, divergence=dataclasses.replace(config.divergence, **divergence))
        self.folder, self.start = folder, start
        self.rows, self.dispatched = [], 0

    def __call__(self, faults, until=None, every_steps=EVERY_STEPS, keep=3):
        """Goes on from the newest checkpoint, and stops after the step `until`."""
        cadence = CheckpointConfig(every_steps, keep=keep)
        checkpoints = Checkpoints(self.folder, cadence)
        layout = self.program.abstract_state
        saved = newest_whole(self.config, self.folder, checkpoints, layout, ALONE)
        skips = Skips(self.config.divergence, (), saved.divergence if saved else None)
        first = saved.step + 1 if saved else 1
        self.rows = [row for row in self.rows if row["step"] < first]
        self.dispatched = first - 1

        def train_step(state, batch):
            self.dispatched += 1
            return self.train_step(state, batch)

        def take(row):
            skips(row)
            self.rows.append(row)

        try:
            return fit(
                saved.arrays if saved else self.start(self.program),
                range(first, STEPS + 1),
                train_step=train_step,
                batches=(
                    self.program.put_rows_of_process(windows_of(step, faults)) for step in range(first, STEPS + 1)
                ),
                recorder=Recorder(take),
                evaluations=[],
                saving=saves_of(checkpoints, dataclasses.replace(self.config, checkpoint=cadence), skips=skips),
                returning=Returns(self.config, self.folder, checkpoints, layout, skips, ALONE),
                should_stop=lambda: self.dispatched == until,
            )[0]
        finally:
            checkpoints.close()

    def meta(self, step):
        checkpoints = Checkpoints(self.folder, read_only=True)
        try:
            return checkpoints.load_meta(step)["divergence"]
        finally:
            checkpoints.close()


def test_after_a_return_it_is_the_run_that_skipped_all_that_was_passed_over(programs, start, listed, tmp_path, capsys):
    run = Run(programs, start, tmp_path)
    state = run(FAULTS)
    assert_same(state, listed[0])
    assert [row["step"] for row in run.rows] == list(range(1, STEPS + 1))
    assert [row["step"] for row in run.rows if row["skipped"]] == list(FAULTS)
    assert run.meta(STEPS) == {"in_a_row": 0, "good": STEPS, "passed_over": [[5, 9]]}
    assert capsys.readouterr().out == (
        "after 2 skipped updates in a row, the last one of step 8: training goes on after it with the parameters of "
        "step 4; steps 5 to 9 are passed over\n"
    )


@pytest.mark.parametrize("stops", [(8,), *(slow(stops) for stops in [(7, 9), (10,)])], ids=str)
def test_stopped_and_resumed_around_a_return_it_ends_the_same(programs, start, listed, tmp_path, stops):
    """Also where what is saved last was saved amid skips: it is not what is returned to."""
    run = Run(programs, start, tmp_path)
    for stop in stops:
        run(FAULTS, until=stop)
    if stops == (8,):
        assert run.meta(8) == {"in_a_row": 2, "good": 4, "passed_over": []}
    assert_same(run(FAULTS), listed[0])
    assert run.meta(STEPS)["passed_over"] == [[5, 9]]


def test_after_the_last_return_it_ends(programs, start, tmp_path):
    run = Run(programs, start, tmp_path)
    with pytest.raises(Diverged, match=r"^after 2 skipped updates in a row, the last one of step 12, and 1 returns to "
                       r"a checkpoint before that; the newest checkpoint is of step 12$"):  # fmt: skip
        run(FAULTS | {12: LOSS})
    checkpoints = Checkpoints(tmp_path, read_only=True)
    assert checkpoints.steps() == [4, 8, 12]
    checkpoints.close()


def test_with_nothing_to_return_to_it_ends(programs, start, tmp_path):
    with pytest.raises(Diverged, match=r"the last one of step 2, with no checkpoint from before them .* there is no"):
        Run(programs, start, tmp_path)({1: LOSS, 2: LOSS})


def test_steps_that_are_listed_or_passed_over_are_no_reason_to_return():
    skips = Skips(DivergenceConfig(skips_in_a_row=2), (2, 3))
    for step in (1, 2, 3):
        skips({"step": step, "skipped": 1})
    assert skips.in_a_row == 1 and not skips.too_many()
    skips({"step": 4, "skipped": 1})
    assert skips.too_many()
    skips.returned(0, 5)
    skips({"step": 5, "skipped": 1})
    assert skips.in_a_row == 0
    skips({"step": 6, "skipped": 1})
    skips({"step": 7, "skipped": 0})
    assert skips.in_a_row == 0


def with_skips(*steps, **fields):
    return dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, skip_steps=steps), **fields)


def test_steps_to_come_may_be_listed_when_a_run_is_resumed():
    with_skips(2, 6, 7).check_resume(with_skips(2, 9), 5)
    with_skips(divergence=DivergenceConfig()).check_resume(with_skips(), 5)
    with pytest.raises(SpiralError, match=r"^train.skip_steps names \[2\] of the 6 steps that are done; allowed: none"):
        with_skips(2).check_resume(with_skips(), 6)
    with pytest.raises(SpiralError, match=r"^train.skip_steps is \(0,\); allowed: numbers from 1 to train.steps, 13$"):
        with_skips(0)


@pytest.mark.parametrize(
    "fields", [dict(loss_above=float("nan")), dict(loss_above=0.0), dict(skips_in_a_row=0), dict(returns=-1)], ids=str
)
def test_fields_out_of_range_are_refused(fields):
    with pytest.raises(SpiralError, match=f"^divergence.{next(iter(fields))} is "):
        DivergenceConfig(**fields)
