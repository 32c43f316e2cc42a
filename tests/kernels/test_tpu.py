"""The TPU program: lowered without a TPU, and, where libtpu is installed, compiled for slices that are not there."""

import dataclasses
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding

from spiral_jax.kernels import splash
from spiral_jax.kernels.choose import backend_for, per_device
from spiral_jax.model.backend import Backend
from spiral_jax.model.config import ModelConfig
from spiral_jax.model.spiralformer import SpiralFormer
from spiral_jax.parallel.mesh import MeshConfig, constrain, make_mesh, partition_spec
from spiral_jax.run.config import RunConfig
from spiral_jax.training.config import TrainConfig
from spiral_jax.training.step import make_program

# No width is one of the levels' lengths, so that scores can be told by their shape.
MODEL = ModelConfig(vocab_size=64, d_model=384, num_heads=6, prelude_layers=1, core_layers=2, coda_layers=1,
                    chunks=(16, 8, 7, 4, 2, 1))  # fmt: skip
LENGTH = 1024
LEVELS = {64, 128, 146, 256, 512, 1024}
# The first is below 128, and 146 is padded.
KERNELS = {128, 256, 512, 1024}

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def score_lengths(text: str) -> set[int]:
    """Lengths L of the levels for which a program multiplies two batches of matrices to [.., L, L]."""
    return {n for n in LEVELS if re.search(rf"dot_general .*batching_dims.*-> tensor<(\d+x)*{n}x{n}x[a-z]", text)}


def kernel_calls(text: str) -> set[tuple[str, int]]:
    """(fwd, dq or dkv, length) of the splash kernels in a program."""
    found = set()
    for line in text.splitlines():
        if "@tpu_custom_call" in line:
            name = re.search(r"splash_mha_(fwd|dq|dkv)", line)
            length = re.search(r"tensor<(?:\d+x)+(\d+)x\d+x(?:bf16|f32)>", line)
            found.add((name[1], int(length[1])))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["keep_products", "keep_all", "keep_inputs"])
def test_every_level_from_128_chunks_calls_the_kernel(remat):
    """Forward and backward; and nothing of that length has scores, which the XLA program has at every level."""
    config = dataclasses.replace(MODEL, remat=remat)
    assert {level.num_chunks(LENGTH) for level in config.schedule} == LEVELS
    mesh = make_mesh(MeshConfig(2, 2, 2))
    tokens_BxL = jax.ShapeDtypeStruct((4, LENGTH), jnp.int32)
    params = nn.unbox(jax.eval_shape(SpiralFormer(config).init, jax.random.key(0), tokens_BxL)["params"])

    def text(attention) -> str:
        model = SpiralFormer(config, Backend(attention, constrain=functools.partial(constrain, mesh)))
        gradient = jax.grad(lambda params, tokens_BxL: model.apply({"params": params}, tokens_BxL).sum())
        return jax.jit(gradient).trace(params, tokens_BxL).lower(lowering_platforms=("tpu",)).as_text()

    found = text(per_device(mesh, functools.partial(splash.causal_attention, device_kind="TPU v5 lite")))
    assert kernel_calls(found) == {(kind, length) for kind in ("fwd", "dq", "dkv") for length in KERNELS}
    assert score_lengths(found) == {64}
    assert score_lengths(text(Backend().attention)) == LEVELS


@pytest.fixture
def devices(described):
    """(generation) to the devices of a slice, which are only described."""
    return lambda generation: described(TOPOLOGIES[generation])


def compile_attention(devices, L, K, dtype) -> str:
    """Compiles attention and its gradients, as `backend_for` chooses it, and returns the program it was given."""
    mesh = make_mesh(MeshConfig(), devices)
    model = ModelConfig(d_model=2 * K, num_heads=2, dtype=dtype)
    attention = backend_for(mesh, model).attention
    sharding = NamedSharding(mesh, partition_spec(("batch", "length", "heads", "head_width")))
    # Eight rows a device: a batch takes more VMEM than a single row.
    x = jax.ShapeDtypeStruct((8 * len(devices), L, 2, K), dtype, sharding=sharding)
    gradient = jax.grad(lambda *qkv: attention(*qkv).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    lowered = jax.jit(gradient).lower(x, x, x)
    lowered.compile()
    return lowered.as_text()  # the compiled program's text cannot be had for tpu7x


@pytest.mark.parametrize("generation", TOPOLOGIES)
def test_the_table_knows_the_generation(generation, devices):
    assert devices(generation)[0].device_kind in splash.LARGEST_BLOCK


def test_a_run_on_a_slice_gets_splash(devices):
    """`make_program` by itself, though jax's default backend is the CPU."""
    mesh = make_mesh(MeshConfig(2, 2, 1), devices("v5e"))
    model = dataclasses.replace(MODEL, chunks=(2, 1), core_layers=1)
    config = RunConfig(model=model, train=TrainConfig(batch_size=4, sequence_length=256))
    program = make_program(config, mesh)
    text = program.lowered().as_text()
    assert kernel_calls(text) == {(kind, length) for kind in ("fwd", "dq", "dkv") for length in (128, 256)}


def test_blocks_fit(devices):
    """The largest block, for the generation that people rent most."""
    assert splash.block_size(4096, 128, jnp.bfloat16, "TPU v5 lite") == 1024
    assert len(kernel_calls(compile_attention(devices("v5e"), 4096, 128, "bfloat16"))) == 3


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("K", splash.HEAD_WIDTHS)
@pytest.mark.parametrize("generation", TOPOLOGIES)
def test_all_blocks_fit(generation, K, dtype, devices):
    """Every generation, head width, dtype and level length, those with blocks of 640, 768 and 896 too."""
    for L in (128, 256, 512, 1024, 2048, 2560, 3072, 3584, 4096):
        text = compile_attention(devices(generation), L, K, dtype)
        assert kernel_calls(text) == {("fwd", L), ("dq", L), ("dkv", L)}
        assert not re.search(rf"dot_general .*-> tensor<(\d+x)*{L}x{L}x", text), L
