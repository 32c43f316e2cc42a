"""What the processes of a run tell each other."""

import concurrent.futures
import time

import jax
import pytest
from pairs import both_end, flags_of

from spiral_jax.errors import SpiralError
from spiral_jax.parallel.processes import ALONE, Processes


def test_a_process_that_was_given_another_configuration_says_in_what(folder, start):
    done = start("train", *flags_of(folder, "other"), second=("--config.train.steps=7",), timeout=40)
    both_end(done, "train.steps is 7 on process 1; allowed: the same on every process (6)")


def test_a_process_with_another_file_of_ones_own_says_so(folder, start):
    """The same names, defined otherwise: the processes would compute different things."""
    for number, body in enumerate(("e_BxLxD", "2 * e_BxLxD")):
        (folder / f"own_{number}.py").write_text(
            "from spiral_jax.model.topology import Topology, topologies\n"
            '@topologies.register("own")\nclass Own(Topology):\n'
            f"    def next_state(self, states, e_BxLxD, linears):\n        return {body}\n"
        )
    flags = [*flags_of(folder, "files"), "--config.model.topology=own"]
    first, second = ([f"--import={folder}/own_{process}.py"] for process in (0, 1))
    main, other = start("train", *flags, first=first, second=second)
    assert main.returncode == other.returncode == 2
    assert "--import.model.topology is '" in other.stderr and "on process 1; allowed: the same" in other.stderr


@pytest.mark.slow
def test_a_folder_that_is_not_shared_is_refused(folder, start, tmp_path):
    config, mine = flags_of(folder, "mine")
    done = start("train", config, first=(mine,), second=(f"--workdir={tmp_path}",), timeout=120)
    both_end(done, "does not share with process 0")


class Store:
    """jax's key-value store, of which every value takes `seconds` to come."""

    def __init__(self, seconds: int, error: str = "DEADLINE_EXCEEDED: timed out"):
        self.numbers: dict[str, int] = {}
        self.values: dict[str, str] = {}
        self.seconds, self.error = seconds, error

    def key_value_increment(self, key: str, by: int) -> int:
        self.numbers[key] = self.numbers.get(key, 0) + by
        return self.numbers[key]

    def key_value_set(self, key: str, value: str) -> None:
        assert key not in self.values
        self.values[key] = value

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        if self.seconds > 0:
            self.seconds -= milliseconds / 1000
            raise jax.errors.JaxRuntimeError(self.error)
        return self.values[key]


def never():
    raise AssertionError


def test_a_process_that_waits_for_process_0_says_so_every_minute(capsys):
    store = Store(seconds=130)
    assert Processes(0, 2, store).from_main("a long word", lambda: {"is": [1, None]}) == {"is": [1, None]}
    assert Processes(1, 2, store).from_main("a long word", never) == {"is": [1, None]}
    assert capsys.readouterr().err.splitlines() == [
        f"process 1: waiting for process 0: a long word ({seconds} s)" for seconds in (60, 120)
    ]


class Waiting(Store):
    """A store in which a value may come later than who waits for it."""

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        if key not in self.values:
            time.sleep(0.001)
            raise jax.errors.JaxRuntimeError(self.error)
        return self.values[key]


@pytest.mark.parametrize("values, first", [((None, "b", "c"), "b"), (("a", None, None), "a"), ((None,) * 3, None)])
def test_the_first_value_is_that_of_every_process(values, first):
    store = Waiting(seconds=0)
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        found = pool.map(lambda process: Processes(process, 3, store).first_of("a word", values[process]), range(3))
    assert list(found) == [first] * 3
    assert ALONE.first_of("a word", values[0]) == values[0]


def test_a_process_does_not_wait_for_a_coordinator_that_is_gone():
    with pytest.raises(jax.errors.JaxRuntimeError, match="UNAVAILABLE"):
        Processes(1, 2, Store(seconds=130, error="UNAVAILABLE: gone")).from_main("a word", never)


def test_keys_are_new_and_the_same_on_every_process():
    store = Store(seconds=0)
    first, second = ([Processes(process, 2, store).key("word") for _ in range(3)] for process in (0, 1))
    assert first == second and len(set(first)) == 3


def test_only_process_0_prints(capsys):
    for process in (0, 1):
        Processes(process, 2).say(f"from process {process}")
    ALONE.say("from the only one")
    assert capsys.readouterr().out == "from process 0\nfrom the only one\n"


def test_one_process_has_its_own_word(tmp_path):
    word = object()
    assert ALONE.from_main("a word", lambda: word) is word
    ALONE.check_same_config({"train": {"steps": 6}})
    ALONE.check_shared(tmp_path, "--workdir")
    ALONE.barrier("nobody else")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "ours, named",
    [
        ({"train": {"steps": 7, "weights": (1, 2)}}, "train.steps is 7 on process 1; allowed: the same"),
        ({"train": {"steps": 6, "weights": (1, 3)}}, "train.weights is [1, 3] on process 1; "),
        ({"train": {"steps": 6}}, "train.weights is None on process 1; "),
        ({"train": {"steps": 6, "weights": (1, 2)}, "--import": {"model.topology": "a1"}},
         "--import.model.topology is 'a1' on process 1; "),
        ({"train": {"steps": 6, "weights": (1, 2)}, "--import": {}}, ""),
    ],
)  # fmt: skip
def test_the_first_field_that_differs_is_named(ours, named):
    store = Store(seconds=0)
    Processes(0, 2, store).check_same_config({"train": {"steps": 6, "weights": (1, 2)}, "--import": {}})
    if not named:
        return Processes(1, 2, store).check_same_config(ours)
    with pytest.raises(SpiralError) as raised:
        Processes(1, 2, store).check_same_config(ours)
    assert str(raised.value).startswith(named)
