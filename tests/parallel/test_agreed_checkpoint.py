"""A checkpoint that one of two processes cannot read: both go on from the one before."""

import pytest
from pairs import flags_of, run_pair, write_inputs

# Process 1 cannot read the arrays of step 4, whatever is on the disk.
SABOTAGE = """

if os.environ.get("JAX_PROCESS_ID") == "1":
    import orbax.checkpoint as ocp

    restore = ocp.Checkpointer.restore

    def refuse(self, directory, *args, **kwargs):
        if directory.name == "4" and "params" in kwargs["args"].keys():
            raise OSError(5, "Input/output error", str(directory))
        return restore(self, directory, *args, **kwargs)

    ocp.Checkpointer.restore = refuse
"""


@pytest.mark.slow
def test_what_one_process_cannot_read_no_process_resumes(tmp_path):
    write_inputs(tmp_path)
    flags = (*flags_of(tmp_path, "two"), "--config.summary.sample_tokens=0", "--config.checkpoint.every_steps=2",
             "--config.evaluation.every_steps=0")  # fmt: skip
    stopped = run_pair(tmp_path, "train", *flags, sabotage=f"{tmp_path}/two:SIGTERM:1:3")
    assert sorted(path.name for path in (tmp_path / "two/checkpoints").iterdir()) == ["2", "4"], stopped[0].stderr
    with (tmp_path / "config.py").open("a") as file:
        file.write(SABOTAGE)
    main, other = run_pair(tmp_path, "train", *flags)
    assert (main.returncode, other.returncode) == (0, 0), main.stderr + other.stderr
    (line,) = (line for line in main.stdout.splitlines() if "is damaged" in line)
    assert line == (
        f"{tmp_path}/two/checkpoints/4 is damaged (cannot be restored: [Errno 5] Input/output error: "
        f"'{tmp_path}/two/checkpoints/4'); it is now {tmp_path}/two/damaged/4.0, and the run goes on from step 2"
    )
    assert "resuming after step 2 of 6" in main.stdout
    assert (other.stdout, other.stderr) == ("", "")
