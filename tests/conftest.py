"""The environment jax reads when imported (8 CPU devices, a compilation cache), and what tests of models share."""

import functools
import gc
import importlib.util
import json
import os
import signal
from pathlib import Path
from typing import NamedTuple

from spiral_jax.parallel.xla_flags import QUICKLY, known, quick_flags

TESTS = Path(__file__).parent

os.environ["JAX_PLATFORMS"] = "cpu"
# Code is generated quickly, unless `make test-slow`, or whoever sets one of the flags, says otherwise.
given = os.environ.get("XLA_FLAGS", "")
more = [] if any(name in given for name in QUICKLY) else [quick_flags()]
more += [] if "device_count" in given else ["--xla_force_host_platform_device_count=8"]
os.environ["XLA_FLAGS"] = " ".join(filter(None, [given, *more]))
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(TESTS.parent / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# In the background of a script, and under nohup, signals are ignored, and would be by every process that a test starts.
for number, handler in {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}.items():
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

# ruff: isort: split
import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import reference  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from spiral_jax.convert.architecture import config_to_huggingface  # noqa: E402
from spiral_jax.convert.tensors import params_from_tensors  # noqa: E402
from spiral_jax.hardware import parse_slice, usable_cores  # noqa: E402
from spiral_jax.model.spiralformer import SpiralFormer  # noqa: E402
from spiral_jax.roofline.slices import describe_devices, no_compilation_cache  # noqa: E402

# What XLA does where nothing is said.
OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False} | dict.fromkeys(
    known(("xla_cpu_use_fusion_emitters",)), True
)


class Golden(NamedTuple):
    """One folder of tests/golden."""

    config: dict
    tensors: dict[str, np.ndarray]
    tokens_BxL: np.ndarray
    logits_BxLxV: np.ndarray


def pytest_generate_tests(metafunc):
    """Runs a test that asks for `golden` once for every folder of tests/golden, if it does not say of which."""
    says = any("golden" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "golden" in metafunc.fixturenames and not says:
        names = sorted(path.parent.name for path in TESTS.glob("golden/*/config.json"))
        metafunc.parametrize("golden", names, indirect=True)


# Files whose fixtures take longest, to begin with: at the end one worker would wait for the other.
FIRST = (
    "test_several_as_one.py", "test_punish.py", "test_resume.py", "test_own_code.py", "test_trouble.py",
    "test_costs.py", "test_commands.py", "test_sharded_step.py", "test_decoder.py", "test_diverged.py",
    "test_cached.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in FIRST)


def pytest_xdist_auto_num_workers():
    """One more than cores: some tests wait for processes of theirs."""
    return usable_cores() + 1


def pytest_collection_finish():
    """Tracing makes objects by the million, and looking for garbage among those that all imports have made takes a
    tenth of a test's time."""
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


@pytest.fixture
def golden(request) -> Golden:
    folder = TESTS / "golden" / request.param
    config = json.loads((folder / "config.json").read_text())
    arrays = [np.load(folder / f"{name}.npy") for name in ("tokens", "logits")]
    return Golden(config, load_file(folder / "model.safetensors"), *arrays)


@pytest.fixture
def libtpu():
    """Skips where the TPU compiler is not installed; what describing a slice puts into the environment is undone."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed")
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def described(libtpu):
    """(topology) to the devices of a slice that is not there, while programs do not go to the compilation cache."""
    with no_compilation_cache():
        yield lambda topology: describe_devices(parse_slice(topology))


@pytest.fixture(scope="session")
def x64():
    """The context manager that computes in 64 bits, under whichever name this jax has it."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64
    from jax.experimental import enable_x64

    return enable_x64


@pytest.fixture(scope="session")
def forward(x64):
    """(config, params, tokens_BxL) to logits [B, L, V], compiled once per config and shape.

    Generated quickly, unless `optimize` asks for the program that a user runs.
    """

    @functools.cache
    def compiled(config, optimize):
        model = SpiralFormer(config)
        return jax.jit(
            lambda params, tokens_BxL: model.apply({"params": params}, tokens_BxL),
            compiler_options=OPTIMIZED if optimize else None,
        )

    def run(config, params, tokens_BxL, optimize=False) -> np.ndarray:
        with x64(config.dtype == "float64"):
            return np.asarray(compiled(config, optimize)(params, tokens_BxL))

    return run


@pytest.fixture(scope="session")
def random_model():
    """(config, seed) to random weights: the reference's config, its float64 tensors, and our params in config.dtype."""

    def make(config, seed=0, scale=1.0):
        hf_config = config_to_huggingface(config, max_position_embeddings=64)
        tensors = reference.random_tensors(hf_config, np.random.default_rng(seed), scale)
        dtype = np.float64 if config.dtype == "float64" else np.float32
        params = params_from_tensors(config, {name: tensor.astype(dtype) for name, tensor in tensors.items()})
        return hf_config, tensors, params

    return make


@pytest.fixture
def compilations():
    """Durations of XLA compilations since the test began."""
    seen, control = [], []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    # The listener does hear of compilations: an empty list means that there were none.
    control, seen[:] = list(seen), []
    jax.jit(lambda x: x + len(control))(1.0)
    jax.monitoring.clear_event_listeners()
    assert seen
