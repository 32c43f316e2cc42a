"""Live memory of compiled programs: snippets worked out by hand, and the TPU compiler's own peak."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import slow
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spiral_jax.roofline.hlo import parse
from spiral_jax.roofline.memory import Buffer, categories, category, peak

# Arrays of 1,024 bytes. Argument 0 is overwritten with the result.
STEP = """HloModule m, is_scheduled=true, input_output_alias={ {}: (0, {}, may-alias) }

%condition (t: (s32[], f32[256], f32[256])) -> pred[] {
  %t = (s32[]{:S(6)}, f32[256], f32[256]) parameter(0)
  %i = s32[]{:S(6)} get-tuple-element(%t), index=0
  %n = s32[]{:S(6)} constant(6)
  ROOT %less = pred[]{:S(6)} compare(%i, %n), direction=LT
}

%body (s: (s32[], f32[256], f32[256])) -> (s32[], f32[256], f32[256]) {
  %s = (s32[]{:S(6)}, f32[256], f32[256]) parameter(0)
  %c = s32[]{:S(6)} get-tuple-element(%s), index=0
  %x = f32[256] get-tuple-element(%s), index=1
  %w = f32[256] get-tuple-element(%s), index=2
  %one = s32[]{:S(6)} constant(1)
  %next = s32[]{:S(6)} add(%c, %one)
  %wide = f32[512] concatenate(%x, %w), dimensions={0}, metadata={op_name="jit(f)/transpose(jvp(M))/core/wide"}
  %vmem = f32[512]{0:S(1)} negate(%wide)
  %half = f32[256] slice(%wide), slice={[0:256]}, metadata={op_name="jit(f)/jvp(M)/head/half"}
  ROOT %again = (s32[]{:S(6)}, f32[256], f32[256]) tuple(%next, %half, %w)
}

ENTRY %main (p: f32[256], q: f32[256]) -> f32[256] {
  %p = f32[256] parameter(0)
  %q = f32[256] parameter(1)
  %zero = s32[]{:S(6)} constant(0)
  %a = f32[256] exponential(%p)
  %dead = f32[256] negate(%a)
  %init = (s32[]{:S(6)}, f32[256], f32[256]) tuple(%zero, %a, %q)
  %loop = (s32[]{:S(6)}, f32[256], f32[256]) while(%init), condition=%condition, body=%body
  %y = f32[256] get-tuple-element(%loop), index=1
  ROOT %r = f32[256] add(%y, %p)
}
"""


def test_a_loop_and_a_donated_argument():
    found = peak(parse(STEP))
    # p and q; a, which the loop carries but which holds nothing between `wide` and `half`; `wide` (2,048);
    # and `half`, written into a's memory.
    assert found.bytes == 5 * 1024
    assert sum(buffer.bytes for buffer in found.buffers) == found.bytes
    assert found.buffers[0] == Buffer(2048, (512,), "f32", "jit(f)/transpose(jvp(M))/core/wide")
    assert sorted(b.argument for b in found.buffers if b.argument is not None) == [0, 1]
    assert categories(found.buffers, ("parameters", "batch").__getitem__) == {
        **{"core backward": 2048, "parameters": 1024, "batch": 1024, "other": 1024},
    }


def test_a_result_that_is_no_argument_is_there_from_the_start():
    assert peak(parse(STEP.replace("input_output_alias={ {}: (0, {}, may-alias) }", ""))).bytes == 6 * 1024


def test_updates_in_place_and_what_is_fetched_to_vmem_cost_nothing():
    text = """HloModule m, is_scheduled=true

%fused (b: f32[1024], u: f32[256], i: s32[]) -> f32[1024] {
  %b = f32[1024] parameter(0)
  %u = f32[256] parameter(1)
  %i = s32[] parameter(2)
  ROOT %d = f32[1024] dynamic-update-slice(%b, %u, %i)
}

ENTRY %main (p: f32[256], i: s32[]) -> f32[256] {
  %p = f32[256] parameter(0)
  %i2 = s32[]{:S(6)} parameter(1)
  %buffer = f32[1024] broadcast(%i2), dimensions={}
  %once = f32[1024] dynamic-update-slice(%buffer, %p, %i2)
  %twice = f32[1024] fusion(%once, %p, %i2), kind=kLoop, calls=%fused
  %start = (f32[1024]{0:S(1)}, f32[1024], u32[]{:S(2)}) copy-start(%twice)
  %vmem = f32[1024]{0:S(1)} copy-done(%start)
  ROOT %r = f32[256] slice(%vmem), slice={[0:256]}
}
"""
    # The argument, the buffer, the result.
    assert peak(parse(text)).bytes == 1024 + 4096 + 1024


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("jit(step)/jvp(M)/core/while/body/layers/dot_general", "core forward"),
        ("jit(step)/transpose(jvp(M))/coda/checkpoint/layers/dot_general", "coda backward"),
        ("jit(step)/transpose(jvp(M))/core/checkpoint/rematted_computation/mul", "core recomputed"),
        ("jit(step)/adam/mul", "other"),
    ],
)
def test_categories(source, name):
    assert category(source) == name


@pytest.mark.parametrize("donate", [slow(False), True])
def test_the_tpu_compilers_peak(donate, described):
    """Within 2% of what the compiler says, with gradients that are results of their own or overwrite the weights."""
    devices = described("v5e:2x2")
    sharding = NamedSharding(Mesh(np.array(devices[:1]), ("data",)), PartitionSpec())
    w_NxDxD, x_BxD = (
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding) for shape in ((12, 1024, 1024), (4096, 1024))
    )

    def loss(w_NxDxD, x_BxD):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x_BxD, w_NxDxD)[0].sum()

    step = jax.jit(jax.grad(loss), donate_argnums=0 if donate else ())
    compiled = step.lower(w_NxDxD, x_BxD).compile()
    expected = compiled.memory_analysis().peak_memory_in_bytes
    assert peak(parse(compiled.as_text())).bytes == pytest.approx(expected, rel=0.02)
