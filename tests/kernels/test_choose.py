"""Which attention a mesh gets: by the platform of its devices, whatever jax runs on here."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from spiral_jax.errors import SpiralError
from spiral_jax.evaluate import on_these_devices
from spiral_jax.kernels import cudnn
from spiral_jax.kernels.choose import backend_for, per_device
from spiral_jax.model import attention as plain
from spiral_jax.model.backend import Backend
from spiral_jax.model.config import ModelConfig
from spiral_jax.parallel.mesh import MeshConfig, make_mesh
from spiral_jax.run.config import RunConfig
from spiral_jax.training.config import Attention, TrainConfig
from spiral_jax.training.step import make_program


@dataclasses.dataclass(frozen=True)
class Device:
    """What is known of a device that is not there."""

    platform: str
    device_kind: str
    compute_capability: str | None = None
    id: int = 0
    process_index: int = 0


CPU = Device("cpu", "cpu")
V5E, V9 = Device("tpu", "TPU v5 lite"), Device("tpu", "TPU v9")
H100, A100 = Device("gpu", "NVIDIA H100", "9.0"), Device("gpu", "NVIDIA A100", "8.0")
V100, MI300 = Device("gpu", "Tesla V100", "7.0"), Device("gpu", "AMD Instinct MI300X", "gfx942")
UNDESCRIBED = Device("cuda", "NVIDIA B9000")


def mesh_of(device) -> Mesh:
    return Mesh(np.array([[[device]]]), ("data", "fsdp", "tensor"))


def model_of(dtype="bfloat16", head_width=64) -> ModelConfig:
    return ModelConfig(vocab_size=64, d_model=2 * head_width, num_heads=2, dtype=dtype)


def chosen(monkeypatch, device, model, choice="auto") -> str:
    """Name of the attention; a kernel's runs on each device of the mesh, and splash is told what they are."""
    meshes = []

    def per_device(mesh, attention, manual):
        assert manual == ()
        meshes.append(mesh)
        return attention

    monkeypatch.setattr("spiral_jax.kernels.choose.per_device", per_device)
    mesh = mesh_of(device)
    attention = backend_for(mesh, model, choice).attention
    if isinstance(attention, functools.partial):
        assert attention.keywords == {"device_kind": device.device_kind}
        attention = attention.func
    assert attention.__name__ == "causal_attention"
    module = attention.__module__.rpartition(".")[2]
    name = "xla" if module == "attention" else module
    assert meshes == ([] if name == "xla" else [mesh])
    return name


@pytest.mark.parametrize(
    "device, dtype, head_width, expected",
    [
        (CPU, "float32", 64, "blocks"),
        (CPU, "bfloat16", 64, "blocks"),
        (V5E, "float32", 64, "splash"),
        (V5E, "bfloat16", 256, "splash"),
        (V5E, "bfloat16", 34, "splash"),
        (V9, "bfloat16", 128, "splash"),
        (V5E, "bfloat16", 512, "xla"),
        (V5E, "float64", 64, "xla"),
        (H100, "bfloat16", 64, "cudnn"),
        (H100, "bfloat16", 256, "cudnn"),
        (H100, "float32", 64, "xla"),
        (H100, "bfloat16", 34, "xla"),
        (A100, "bfloat16", 128, "cudnn"),
        (A100, "bfloat16", 256, "xla"),
        (V100, "bfloat16", 64, "xla"),
        (MI300, "bfloat16", 64, "xla"),
        (UNDESCRIBED, "bfloat16", 64, "xla"),
    ],
)
def test_auto_follows_the_mesh(device, dtype, head_width, expected, monkeypatch):
    assert jax.default_backend() == "cpu"
    assert chosen(monkeypatch, device, model_of(dtype, head_width)) == expected


@pytest.mark.parametrize(
    "device, choice", [(CPU, "xla"), (CPU, "blocks"), (V5E, "xla"), (V5E, "splash"), (H100, "xla"), (H100, "cudnn")]
)
def test_a_name_decides(device, choice, monkeypatch):
    assert chosen(monkeypatch, device, model_of(), choice) == choice


@pytest.mark.parametrize(
    "device, dtype, choice, allowed",
    [
        (CPU, "bfloat16", "splash", "auto, blocks, xla"),
        (CPU, "bfloat16", "cudnn", "auto, blocks, xla"),
        (H100, "bfloat16", "splash", "auto, cudnn, xla"),
        (H100, "float32", "cudnn", "auto, xla"),
        (V5E, "bfloat16", "cudnn", "auto, splash, xla"),
        (V5E, "bfloat16", "blocks", "auto, splash, xla"),
        (V5E, "float64", "splash", "auto, xla"),
    ],
)
def test_what_the_mesh_does_not_have_is_refused(device, dtype, choice, allowed):
    with pytest.raises(SpiralError) as error:
        backend_for(mesh_of(device), model_of(dtype), choice)
    message = str(error.value)
    assert message.startswith(f"train.attention is '{choice}'; allowed: {allowed} on {device.device_kind} with")
    assert dtype in message and "\n" not in message


@pytest.mark.parametrize("choice", Attention.__args__)
def test_a_program_is_built_with_it_or_not_at_all(choice):
    """`make_program` refuses before anything is compiled, and otherwise hands the choice to the model."""
    config = RunConfig(model=model_of(), train=TrainConfig(batch_size=8, sequence_length=16, attention=choice))
    mesh = make_mesh(MeshConfig())
    if choice in ("auto", "blocks", "xla"):
        attention = make_program(config, mesh).placed.model.backend.attention
        assert (attention is plain.causal_attention) == (choice == "xla")
        return
    with pytest.raises(SpiralError, match=f"train.attention is '{choice}'"):
        make_program(config, mesh)


def test_a_program_for_another_platform_gets_its_attention(monkeypatch):
    """`make_program` asks for the attention of its mesh and its configuration, and uses the answer."""
    asked = []

    def answer(*arguments, **more):
        asked.append((*arguments, *more.values()))
        return Backend(attention=answer)

    monkeypatch.setattr("spiral_jax.training.step.backend_for", answer)
    monkeypatch.setattr("spiral_jax.training.fsdp.backend_for", answer)
    config = RunConfig(model=model_of(), train=TrainConfig(batch_size=8, sequence_length=16, attention="splash"))
    mesh = make_mesh(MeshConfig())
    assert make_program(config, mesh).placed.model.backend.attention is answer
    # For the whole mesh, and for what is left of it within a device's rows.
    assert asked == [(mesh, config.model, "splash"), (mesh, config.model, "splash", ("data", "fsdp"))]


def test_cudnn_is_asked_for_causal_attention(monkeypatch):
    """No GPU here: the same call, its implementation changed to XLA's, on a mesh, against the reference."""
    asked = []
    attend = jax.nn.dot_product_attention

    def on_cpu(*qkv, implementation, **options):
        asked.append((implementation, qkv[0].shape))
        return attend(*qkv, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", on_cpu)
    rng = np.random.default_rng(0)
    q, k, v, gradient = (jnp.asarray(rng.normal(size=(4, 21, 4, 32)), jnp.bfloat16) for _ in range(4))

    def both(attention, *qkv):
        out, backward = jax.vjp(attention, *qkv)
        return out, *backward(gradient.astype(out.dtype))

    attention = per_device(make_mesh(MeshConfig(2, 2, 2)), cudnn.causal_attention)
    found = jax.jit(lambda *qkv: both(attention, *qkv))(q, k, v)
    assert asked == [("cudnn", (1, 22, 2, 32))]
    truth = both(plain.causal_attention, *(x.astype(jnp.float32) for x in (q, k, v)))
    for a, b in zip(found, truth, strict=True):
        assert a.dtype == jnp.bfloat16
        assert float(jnp.abs(a - b).max()) < 0.02 * float(jnp.abs(b).max())


@pytest.mark.parametrize("L", [1, 101, 128])
def test_the_cuda_program_calls_cudnn(L, monkeypatch):
    """Lowered without a GPU, so what jax asks of the one that is not there is answered here; not compiled."""
    checks = "jax._src.cudnn.fused_attention_stablehlo."
    monkeypatch.setattr(checks + "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(checks + "check_compute_capability", lambda capability: True)
    attention = per_device(make_mesh(MeshConfig(2, 2, 2)), cudnn.causal_attention)
    gradient = jax.grad(lambda *qkv: attention(*qkv).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    x = jax.ShapeDtypeStruct((4, L, 4, 64), jnp.bfloat16)
    text = jax.jit(gradient).trace(x, x, x).lower(lowering_platforms=("cuda",)).as_text()
    # An odd length would not have got here.
    shape = f"tensor<1x{L + L % 2}x2x64xbf16>"
    calls = re.findall(r"custom_call @(__cudnn\S+?)\(.*? : \((tensor<.*?>),", text)
    assert calls == [("__cudnn$fmhaSoftmax", shape), ("__cudnn$fmhaSoftmaxBackward", shape)]
    assert text.count("CAUSAL") == 2 and "dot_general" not in text


def test_a_run_of_another_machine_is_evaluated_with_what_is_here():
    config = RunConfig(train=TrainConfig(attention="splash", batch_size=8))
    assert on_these_devices(config, None).train.attention == "auto"
