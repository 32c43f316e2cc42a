"""A checkpoint to the run's storage and back, bit for bit, and how fast that was."""

import time
import uuid

import jax
import numpy as np

from spiral_jax.data.storage import writable_path
from spiral_jax.parallel.mesh import make_mesh
from spiral_jax.run.checkpoint import Checkpoints
from spiral_jax.training.step import make_program
from tpu.first_hour.findings import Findings
from tpu.first_hour.points import step_config


def run(findings: Findings, size: str, workdir: str, argument: str) -> None:
    """Saves the state of a 160m model (1.9 GB; `tiny`: a small one), restores it in place, and compares."""
    config = step_config("160m-vanilla", size)
    program = make_program(config, make_mesh(config.mesh, jax.devices()[:1]))
    state = program.init(jax.random.key(1))
    # Moments that are not all zero, so that they can be mistaken for nothing.
    state = state.replace(opt_state=jax.tree.map(_numbered, state.opt_state))
    size_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    folder = writable_path("--workdir", workdir) / f"first_hour-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    try:
        findings.say(f"saving {size_bytes / 1e6:,.0f} MB to {folder}")
        began = time.perf_counter()
        checkpoints = Checkpoints(folder)
        checkpoints.save(0, state, {})
        checkpoints.wait()
        saved = time.perf_counter()
        checkpoints.close()
        findings.say("restoring")
        reader = Checkpoints(folder, read_only=True)
        reading = time.perf_counter()
        restored = jax.block_until_ready(reader.restore(0, program.abstract_state))
        read = time.perf_counter()
        reader.close()
    finally:
        folder.rmtree()
    findings.at_most("arrays that came back otherwise", sum(map(_differ, *map(jax.tree.leaves, (state, restored)))), 0)
    findings.measured |= {
        "bytes": size_bytes,
        "kind": "bucket" if "://" in str(workdir) else "folder",
        "save_seconds": saved - began,
        "save_mb_per_second": size_bytes / 1e6 / (saved - began),
        "restore_seconds": read - reading,
        "restore_mb_per_second": size_bytes / 1e6 / (read - reading),
    }


def _numbered(x: jax.Array) -> jax.Array:
    """The same shape and dtype, elements counted; numbers alone stay what they are."""
    return x if x.ndim == 0 else jax.lax.iota(x.dtype, x.size).reshape(x.shape)


def _differ(a: jax.Array, b: jax.Array) -> bool:
    ours, theirs = np.asarray(a), np.asarray(b)
    return ours.dtype != theirs.dtype or ours.shape != theirs.shape or ours.tobytes() != theirs.tobytes()
