"""What a run says when it is finished."""

import shlex
from types import SimpleNamespace

from etils.epath import Path

from spiral_jax.parallel.processes import ALONE
from spiral_jax.run.config import RunConfig
from spiral_jax.run.finish import finish


def test_a_command_that_is_printed_can_be_pasted_into_a_shell(tmp_path, capsys):
    workdir = Path(tmp_path / "lr=1e-3 #2; it's $HOME")
    finish(RunConfig(), workdir, SimpleNamespace(validation=None, examples=None), ALONE)
    line = capsys.readouterr().out.splitlines()[-1]
    command = ["python", "-m", "spiral_jax.evaluate", f"--workdir={workdir}", "--input=FILE"]
    assert shlex.split(line.removeprefix("evaluate it ")) == command
