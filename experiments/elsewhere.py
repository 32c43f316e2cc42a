"""Runs that `launch` hands to TPU slices: what may be said about them, their names, and whether they have ended."""

import hashlib
import re
from collections.abc import Sequence

from etils import epath

from experiments.child import Killed
from experiments.design import HOW, PLACES, Run, Study, first_difference, run_config, shaping
from spiral_jax.data.config import DataConfig
from spiral_jax.errors import SpiralError, require
from spiral_jax.run.reading import reading


def check_overrides(study: Study, overrides: Sequence[str], trains: bool) -> None:
    """Whether flags change nothing of what comes of the runs, and say where the data is if the study does not.

    Args:
      study: whose runs they are for.
      overrides: `--config.FIELD=VALUE`.
      trains: whether data is needed.

    Raises:
      SpiralError: one does, or no data is named.
    """
    for flag in overrides:
        field = flag.partition("=")[0].removeprefix("--config.")
        if not field.startswith((*PLACES, *HOW)):
            raise SpiralError(f"--config.{field} changes what comes of the runs; allowed: another study, or flags that "
                              f"say where data is and how runs run")  # fmt: skip
    named = study.arms[0].config.data != DataConfig() or any(flag.startswith("--config.data.") for flag in overrides)
    require(named or not trains, "data.stores", (), "--config.data.stores=..., as the study names no data")


def check_trained(run: Run, workdir: epath.Path) -> None:
    """Raises Killed if a run that was trained elsewhere has not ended, or is not the one that the study declares."""
    steps = run.arm.config.train.steps
    try:
        with reading(workdir, steps) as saved:
            found = shaping(saved.config())
    except SpiralError as error:
        raise Killed(f"it is not trained to the end ({error})") from None
    if differs := first_difference(found, shaping(run_config(run))):
        field, was, now = differs
        raise Killed(f"{workdir} was trained with {field} {was}, which is {now} in the study")


def job_name(study: Study, run: Run) -> str:
    """A run's name as Google Cloud takes names: at most 28 lower-case letters, digits and dashes, a letter first."""
    name, short = (re.sub(r"[^a-z0-9]+", "-", f"{of}-{run.name}").strip("-") for of in (study.name, study.name[:1]))
    digest = hashlib.sha256(name.encode()).hexdigest()[:6]
    return name if len(name) <= 28 else f"{short[:21].rstrip('-')}-{digest}"
