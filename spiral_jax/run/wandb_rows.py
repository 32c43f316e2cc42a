"""Rows in Weights & Biases.

Its own step only counts what is logged: W&B drops a row whose step is not beyond the last one, as all are from where a
run goes back to a checkpoint. So a row's step is one more value, which the charts take for their axis. Steps that are
trained again then have two rows, as both were logged.
"""

import re
import time
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from etils.epath import Path

from spiral_jax.data import atomic
from spiral_jax.data.staging import Staging
from spiral_jax.run.side_files import WANDB_ID


class WandbRows:
    """A run's rows in W&B, and what the run is made of."""

    def __init__(self, wandb: ModuleType, workdir: Path, project: str, about: Mapping[str, Any]):
        """Opens the run of this directory in W&B, or makes one.

        Args:
          wandb: the package.
          workdir: the run's directory.
          project: of W&B.
          about: its configuration there.
        """
        self._files = Staging(workdir)  # which W&B sends away itself
        self._run = wandb.init(project=project, dir=str(self._files.folder), id=id_of(workdir), resume="allow")
        self._run.config.update(dict(about), allow_val_change=True)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        self._run.log({"step": step, **scalars})

    def close(self) -> None:
        self._run.finish()
        self._files.discard()


def id_of(workdir: Path) -> str:
    """The same run in W&B whenever the directory is resumed: its name, of the characters that W&B takes."""
    path = workdir / WANDB_ID
    if not path.exists():
        name = re.sub(r"[^A-Za-z0-9_.-]+", "-", workdir.name)[:64].strip("-.") or "run"
        atomic.write_text(path, f"{name}-{int(time.time())}")
    return path.read_text(encoding="utf-8")
