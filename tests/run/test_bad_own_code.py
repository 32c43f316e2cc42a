"""Files of one's own that are wrong, each in its way: one line, status 2, before anything is compiled."""

from pathlib import Path

import pytest
from verbs import call

from spiral_jax import describe
from spiral_jax.run.own_code import REGISTRIES

EXAMPLE = Path(__file__).parents[2] / "experiments" / "own_topology.py"
HEAD = """
from spiral_jax.model.operators import Linear
from spiral_jax.model.pooling import Pooling, poolings
from spiral_jax.model.topology import Topology, Update, topologies
from spiral_jax.training.optimizers import optimizers
"""
KEEPS = """
@topologies.register("bad")
class Bad(Topology):
    def update(self, states, e_BxLxD, linears):
        return Update(e_BxLxD, {kept})
"""
BAD_FILES = {
    "a kept array without its comma": (
        KEEPS.replace("{kept}", "kept=(e_BxLxD)"),
        "bad",
        "bad.py): Update.kept is 'array'; allowed: a tuple",
    ),
    "a metric that a row has already": (
        KEEPS.replace("{kept}", "metrics={'loss': e_BxLxD.mean()}"),
        "bad",
        "metrics is ['loss']; allowed: other names",
    ),
    "metrics that differ from level to level": (
        KEEPS.replace("{kept}", "metrics={'x': e_BxLxD[0, :, 0]}"),
        "bad",
        "allowed: the same from every iteration",
    ),
    "no Update": (
        """
@topologies.register("bad")
class Bad(Topology):
    def update(self, states, e_BxLxD, linears):
        return e_BxLxD
""",
        "bad",
        "allowed: an Update",
    ),
    "a register without a name": (
        """
@topologies.register
class Bad(Topology): pass
""",
        "bad",
        "allowed: a name, as in @register",
    ),
    "a Linear named as layers are": (
        """
@topologies.register("bad")
class Bad(Topology):
    def linears(self, level):
        return {"layers": Linear(self.config.d_model, 1)}
""",
        "bad",
        "linears is 'layers'; allowed: another name",
    ),
    "two registrations of one name": (
        """
@topologies.register("twice")
class One(Topology): pass
@topologies.register("twice")
class Two(Topology): pass
""",
        "twice",
        r"model.topology: 'twice', registered in {file}:9, has that name already from {file}:7",
    ),
    "a name of the package's": (
        """
@topologies.register("mesh")
class Mine(Topology): pass
""",
        "mesh",
        r"model.topology: 'mesh', registered in {file}:7, has that name already from",
    ),
    "no class of the kind": (
        """
@topologies.register("pooled")
class Mine(Pooling): pass
""",
        "pooled",
        "is no Topology; allowed: its subclasses",
    ),
    "a near name": ("", "gatd", "model.topology is 'gatd'; did you mean 'gated'? allowed: base, "),
    "a file without what the configuration names": ("", "mine", "--import=FILE, the file that registers it"),
    "a file that raises": ("raise RuntimeError('no such thing')", "mesh", "line 6: RuntimeError: no such thing"),
    "no Linear": (
        """
@topologies.register("bad")
class Bad(Topology):
    def linears(self, level):
        return {"gate": 3}
""",
        "bad",
        "linears 'gate' is 3; allowed: a Linear",
    ),
    "features that do not fit": (
        """
@topologies.register("bad")
class Bad(Topology):
    def linears(self, level):
        return {"gate": Linear(self.config.d_model, 5)}
    def next_state(self, states, e_BxLxD, linears):
        return linears["gate"](e_BxLxD) * e_BxLxD
""",
        "bad",
        "next_state, line 12: TypeError: mul got incompatible shapes",
    ),
    "inputs that do not fit": (
        """
@topologies.register("bad")
class Bad(Topology):
    def linears(self, level):
        return {"gate": Linear(7, 1)}
    def next_state(self, states, e_BxLxD, linears):
        return linears["gate"](e_BxLxD) * e_BxLxD
""",
        "bad",
        "next_state, line 12: TypeError",
    ),
    "a shape that is not due": (
        """
@topologies.register("bad")
class Bad(Topology):
    def next_state(self, states, e_BxLxD, linears):
        return e_BxLxD[:, :1]
""",
        "bad",
        r"what next_state gives is (3, 1, 128); allowed: an array of shape (3, 8, 128)",
    ),
    "a Linear that is not declared": (
        """
@topologies.register("bad")
class Bad(Topology):
    def next_state(self, states, e_BxLxD, linears):
        return linears["gate"](e_BxLxD)
""",
        "bad",
        "next_state, line 10: KeyError: 'gate'",
    ),
    "two Linears of one name": (
        """
@topologies.register("bad")
class Bad(Topology):
    def linears(self, level):
        return {"scorer": Linear(self.config.d_model, 1)}
    def next_state(self, states, e_BxLxD, linears):
        return e_BxLxD
""",
        "bad",
        "names of Linears is ['scorer', 'scorer', 'allocator']; allowed: every name once",
    ),
    "an axis without a rule": (
        """
@topologies.register("bad")
class Bad(Topology):
    def linears(self, level):
        return {"gate": Linear(self.config.d_model, 1, out_axes=("colour",))}
    def next_state(self, states, e_BxLxD, linears):
        return e_BxLxD
""",
        "bad",
        "model.topology 'bad': Linear 'gate': axis is 'colour'; allowed: None, batch",
    ),
}


@pytest.fixture(autouse=True)
def names(monkeypatch):
    """What a test registers goes with it."""
    for registry in REGISTRIES:
        monkeypatch.setattr(registry, "_entries", dict(registry._entries))


def described(*flags: str) -> tuple[int, str]:
    """Status and stderr of `describe` with the example's configuration."""
    return call(describe, f"--config={EXAMPLE}", *flags)


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_one_line_before_anything_is_compiled(name, tmp_path, compilations):
    content, topology, expected = BAD_FILES[name]
    file = tmp_path / "bad.py"
    file.write_text(HEAD + content)
    status, errors = described(f"--import={file}", f"--config.model.topology={topology}")
    assert status == 2 and errors.count("\n") == 1, errors
    assert expected.replace("{file}", str(file)) in errors
    assert not compilations


@pytest.mark.parametrize(
    "body, named",
    [
        ("def get_config():\n    return undefined", r"config.py, line 2: NameError: name 'undefined' is not defined"),
        ("import jax\njax.nothing\ndef get_config():\n    pass", "line 2: AttributeError"),
        ("1 / 0", "line 1: ZeroDivisionError"),
    ],
)
def test_a_config_file_that_raises_is_one_line(tmp_path, body, named):
    (tmp_path / "config.py").write_text(body)
    status, errors = call(describe, f"--config={tmp_path}/config.py")
    assert status == 2 and errors.count("\n") == 1, errors
    assert named in errors


BAD_TRAINING = {
    "no transformation": ("return None", "allowed: an optax.GradientTransformation"),
    "an update that raises": (
        "return optax.GradientTransformation(lambda p: (), lambda u, s, p: (1 / 0, s))", "line 7: ZeroDivisionError"
    ),
    "updates of other shapes": (
        "return optax.stateless(lambda u, p: jax.tree.map(lambda x: x.sum(), u))", "shapes of updates"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TRAINING)
def test_bad_optimizers_are_one_line(name, tmp_path):
    body, named = BAD_TRAINING[name]
    file = tmp_path / "bad.py"
    file.write_text(
        "import jax\nimport optax\nfrom spiral_jax.training.optimizers import optimizers\n\n"
        f'@optimizers.register("bad")\ndef bad(config, rate, model):\n    {body}\n'
    )
    status, errors = described(f"--import={file}", "--config.optimizer.name=bad")
    assert status == 2 and errors.count("\n") == 1, errors
    assert "optimizer.name 'bad'" in errors and named in errors


def test_a_schedule_that_gives_no_number(tmp_path):
    file = tmp_path / "bad.py"
    file.write_text(
        "import jax.numpy as jnp\nfrom spiral_jax.training.schedules import Schedule, schedules\n"
        '@schedules.register("bad")\nclass Bad(Schedule):\n    def factor(self, k):\n        return jnp.ones(2)\n'
    )
    status, errors = described(f"--import={file}", "--config.optimizer.schedule=bad")
    assert status == 2 and "what factor gives" in errors and errors.count("\n") == 1, errors


def test_a_pooling_whose_sum_is_not_what_it_began_with(tmp_path):
    """In bfloat16 the gate's float32 makes the sum another array than `open` gave: found before the first token."""
    file = tmp_path / "bad.py"
    file.write_text(
        "import jax.numpy as jnp\nfrom spiral_jax.model.pooling import Mean, poolings\n"
        '@poolings.register("bad")\nclass Bad(Mean):\n'
        "    def open(self, level, batch):\n"
        "        return jnp.zeros((batch, self.config.d_model), self.config.dtype)\n"
        "    def add(self, chunk, place_B, h_BxD, level, linears):\n"
        "        return chunk + h_BxD.astype(jnp.float32)\n"
    )
    flags = (f"--import={file}", "--config.model.pooling=bad")
    assert described(*flags) == (0, "")
    status, errors = described(*flags, "--config.model.dtype=bfloat16")
    assert status == 2 and "what add gives" in errors and errors.count("\n") == 1, errors


def test_import_of_no_file(tmp_path):
    (tmp_path / "text.txt").write_text("no code")
    for path in ("/no/such.py", str(tmp_path)):
        status, errors = described(f"--import={path}")
        assert status == 2 and errors == f"error: --import={path} does not exist; allowed: a Python file\n"
    status, errors = described(f"--import={tmp_path}/text.txt")
    assert status == 2 and "is no Python file" in errors and errors.count("\n") == 1
