"""What a user can say about where a process stands."""

import jax
import pytest
from pairs import flags_of
from verbs import call

from spiral_jax import train


@pytest.mark.parametrize(
    "flags, environment, named",
    [
        (("--num_processes=2", "--process_id=2"), {}, "--process_id is 2; allowed: 0 to 1, with 2 processes"),
        (("--process_id=-1",), {}, "--process_id is -1; allowed: 0 or more"),
        (("--num_processes=0",), {}, "--num_processes is 0; allowed: 1 or more"),
        (("--num_processes=two",), {}, "--num_processes is 'two'; allowed: an integer"),
        (("--coordinator_address=localhost",), {}, "--coordinator_address is 'localhost'; allowed: HOST:PORT"),
        (("--coordinator_address=a:70000",), {}, "--coordinator_address is 'a:70000'"),
        (("--initialization_timeout=0",), {}, "--initialization_timeout is 0; allowed: 1 or more seconds"),
        ((), {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two'; allowed: a whole number"),
        (("--num_processes=2",), {"JAX_PROCESS_ID": "5"}, "JAX_PROCESS_ID is 5; allowed: 0 to 1"),
        # The tests' own process has computed already.
        (("--num_processes=2",), {"JAX_PROCESS_ID": "1"}, "--num_processes is 2; allowed: 1, as jax has started"),
    ],
)
def test_bad_flags(folder, monkeypatch, flags, environment, named):
    jax.devices()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    status, errors = call(train, *flags_of(folder, "bad"), *flags)
    assert status == 2 and errors.startswith("error: ") and errors.count("\n") == 1
    assert named in errors
