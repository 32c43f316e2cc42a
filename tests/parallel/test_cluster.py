"""What launchers say about a process: pure functions of an environment, and of how many GPUs there are."""

import pytest

from spiral_jax.errors import SpiralError
from spiral_jax.parallel.cluster import Launched, gpus_of_process, is_alone, launched, visible_gpus

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-4]", "SLURM_NTASKS": "8", "SLURM_PROCID": "5",
         "SLURM_LOCALID": "1"}  # fmt: skip
OPEN_MPI = {f"OMPI_COMM_WORLD_{name}": value
            for name, value in (("SIZE", "8"), ("RANK", "5"), ("LOCAL_RANK", "1"), ("LOCAL_SIZE", "2"))}  # fmt: skip


def slurm(**variables):
    return SLURM | {f"SLURM_{name}": value for name, value in variables.items()}


def test_what_launchers_say():
    assert launched({}) is None and launched({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}) is None  # a batch script
    assert launched(OPEN_MPI) == Launched("Open MPI", 8, 5, 1, 2)
    for variables, expected in (
        ({}, (8, 5, 1, 0)),
        ({"STEP_TASKS_PER_NODE": "2(x4)", "NODEID": "2"}, (8, 5, 1, 2)),
        ({"STEP_TASKS_PER_NODE": "1(x2),5,1", "NODEID": "2"}, (8, 5, 1, 5)),
        ({"STEP_TASKS_PER_NODE": "8", "NODEID": "9"}, (8, 5, 1, 0)),
        ({"STEP_NUM_NODES": "1"}, (8, 5, 1, 8)),
        ({"NTASKS": "1", "PROCID": "0", "LOCALID": "0"}, (1, 0, 0, 1)),
        # `srun --pty bash` within an allocation of eight tasks.
        ({"STEP_NUM_TASKS": "1", "PROCID": "0", "LOCALID": "0"}, (1, 0, 0, 1)),
    ):
        assert launched(slurm(**variables)) == Launched("Slurm", *expected)
    assert launched(slurm(GPUS_PER_TASK="2")).bound and launched(slurm(TRES_PER_TASK="cpu=4,gres/gpu=1")).bound
    with pytest.raises(SpiralError, match=r"^SLURM_PROCID is 'x'; allowed: a whole number"):
        launched(slurm(PROCID="x"))


@pytest.mark.parametrize(
    ("on_node", "local_id", "visible", "chosen", "said"),
    [
        (1, 0, 8, [], ""),  # alone on its node: all of them
        (8, 3, 8, [3], ""),
        (2, 1, 8, [1], "note: 1 of 8 GPUs used by each of 2 processes on this node"),
        (0, 3, 8, [3], ""),  # how many share the node is not known: as jax does
        (4, 3, 1, [], ""),  # each sees its own alone
        (4, 3, 2, [], ""),
        (4, 3, 0, [], ""),
    ],
)
def test_which_gpus_a_process_takes(on_node, local_id, visible, chosen, said):
    gpus, note = gpus_of_process(Launched("Slurm", 16, 11, local_id, on_node), visible)
    assert gpus == chosen and note.startswith(said) and bool(note) == bool(said)


def test_who_takes_all_that_it_sees():
    assert gpus_of_process(None, 8) == ([], "")
    assert gpus_of_process(Launched("Slurm", 1, 0, 0, 1), 8) == ([], "")
    assert gpus_of_process(Launched("Slurm", 4, 1, 1, 2, bound=True), 4) == ([], "")


def test_how_many_gpus_are_seen(tmp_path):
    for name in ("nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm", "null"):
        (tmp_path / name).touch()
    assert visible_gpus({}, tmp_path) == 3 and visible_gpus({}, tmp_path / "nothing") == 0
    for chosen, count in (("0,1", 2), ("GPU-a", 1), ("", 0), ("-1", 0), ("2, 3,-1,4", 2), ("NoDevFiles", 0)):
        assert visible_gpus({"CUDA_VISIBLE_DEVICES": chosen}, tmp_path) == count
    assert visible_gpus({"ROCR_VISIBLE_DEVICES": "0,1,2"}, tmp_path) == 3


def test_hosts_with_one_tpu_that_are_alone():
    """Kaggle's notebooks name their one host, and have nobody that says where process 0 listens."""
    assert is_alone({"TPU_PROCESS_ADDRESSES": "local"}) and is_alone({"TPU_WORKER_HOSTNAMES": "localhost"})
    assert not is_alone({"TPU_WORKER_HOSTNAMES": "a,b"}) and not is_alone({"TPU_WORKER_HOSTNAMES": ""})
    assert not is_alone({"TPU_PROCESS_ADDRESSES": "local", "MEGASCALE_NUM_SLICES": "2"})
    assert not is_alone({"TPU_PROCESS_ADDRESSES": "a:1,a:2", "TPU_WORKER_HOSTNAMES": "a"})


def test_pods_that_are_alone():
    pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    assert is_alone(pod) and not is_alone({})
    assert not is_alone(pod | {"JOB_COMPLETION_INDEX": "0"}) and not is_alone(pod | {"TPU_WORKER_HOSTNAMES": "a,b"})
