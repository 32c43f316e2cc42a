"""Work of compiled programs: snippets with numbers worked out by hand, and real programs against closed forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from spiral_jax.kernels import splash
from spiral_jax.roofline.hlo import UnreadableProgram, parse
from spiral_jax.roofline.matmul import Matmul
from spiral_jax.roofline.work import Kernel, Traffic, collectives, dense_flops, hbm_bytes, operations


def program(body: str, *computations: str, header: str = "num_partitions=8") -> list:
    """Operations of a program whose entry computation is `body`."""
    text = f"HloModule m, {header}\n\n" + "\n\n".join(computations)
    return operations(parse(f"{text}\n\nENTRY %main () -> f32[] {{\n{body}\n}}\n"))


DOT = """%fused (a: bf16[4,16,32], i: s32[], w: bf16[32,64]) -> bf16[16,64] {
  %a = bf16[4,16,32]{2,1,0} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  %w = bf16[32,64]{1,0} parameter(2)
  %o = s32[] constant(0)
  %s = bf16[1,16,32]{2,1,0} dynamic-slice(%a, %i, %o, %o), dynamic_slice_sizes={1,16,32}
  %b = bf16[16,32]{1,0} bitcast(%s)
  ROOT %d = bf16[16,64]{1,0} dot(%b, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}"""


def test_a_fusion_reads_the_slice_that_it_takes():
    (operation,) = program(
        """  %a = bf16[4,16,32]{2,1,0} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  %w = bf16[32,64]{1,0:S(1)} parameter(2)
  ROOT %f = bf16[16,64]{1,0} fusion(%a, %i, %w), kind=kOutput, calls=%fused, metadata={op_name="jit(f)/core/dot"}""",
        DOT,
    )
    assert operation.source == "jit(f)/core/dot" and operation.times == 1
    assert operation.matmuls == (Matmul(16, 64, 32, 1, 1),)
    # One of four layers and the result; the matrix is in VMEM already.
    assert operation.hbm_bytes == 2 * (16 * 32 + 16 * 64)


UPDATE = """%inner (b: f32[4,8], u: f32[1,8], i: s32[]) -> f32[4,8] {
  %b = f32[4,8] parameter(0)
  %u = f32[1,8] parameter(1)
  %i = s32[] parameter(2)
  %z = s32[] constant(0)
  ROOT %d = f32[4,8] dynamic-update-slice(%b, %u, %i, %z)
}

%outer (b2: f32[4,8], x: f32[1,8], i2: s32[], e: bf16[8]) -> (f32[4,8], f32[1,8]) {
  %b2 = f32[4,8] parameter(0)
  %x = f32[1,8] parameter(1)
  %i2 = s32[] parameter(2)
  %e = bf16[8] parameter(3)
  %wide = f32[8] convert(%e)
  %row = f32[1,8] bitcast(%wide)
  %sum = f32[1,8] add(%x, %row)
  %f = f32[4,8] fusion(%b2, %sum, %i2), kind=kLoop, calls=%inner
  ROOT %t = (f32[4,8], f32[1,8]) tuple(%f, %sum)
}

%elsewhere (b4: f32[4,8], u4: f32[1,8], i4: s32[]) -> f32[4,8] {
  %b4 = f32[4,8] parameter(0)
  %u4 = f32[1,8] parameter(1)
  %i4 = s32[] parameter(2)
  %z4 = s32[] constant(0)
  %d4 = f32[4,8] dynamic-update-slice(%b4, %u4, %i4, %z4)
  ROOT %n4 = f32[4,8] negate(%d4)
}"""


def test_an_update_in_place_writes_the_update():
    found = program(
        """  %b3 = f32[4,8] parameter(0)
  %x3 = f32[1,8] parameter(1)
  %i3 = s32[]{:S(6)} parameter(2)
  %e3 = bf16[8] parameter(3)
  %z3 = s32[]{:S(6)} constant(0)
  %f3 = (f32[4,8], f32[1,8]) fusion(%b3, %x3, %i3, %e3), kind=kLoop, calls=%outer
  %g3 = f32[4,8] get-tuple-element(%f3), index=0
  %d3 = f32[4,8] dynamic-update-slice(%g3, %x3, %i3, %z3)
  ROOT %n3 = f32[4,8] fusion(%d3, %x3, %i3), kind=kLoop, calls=%elsewhere""",
        UPDATE,
    )
    sizes = {operation.name: operation.hbm_bytes for operation in found}
    # A row of float32 and one of bfloat16 read; the row written to the buffer and as a result of its own.
    # A plain update reads and writes the row. The last reads the buffer and the row, and writes all anew.
    assert sizes == {"f3": 32 + 16 + 32 + 32, "d3": 64, "n3": 128 + 32 + 128}


def test_moves_between_memories():
    found = program(
        """  %a = f32[64,8] parameter(0)
  %s = ((f32[64,8]), f32[16,8]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:16], [0:8]}
  %sd = f32[16,8]{1,0:S(1)} slice-done(%s)
  %c = (f32[16,8]{1,0}, f32[16,8]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%sd)
  %cd = f32[16,8]{1,0} copy-done(%c)
  %b = f32[16,8]{1,0} bitcast(%cd)
  %m = f32[16,8]{1,0:S(1)} multiply(%b, %b)
  ROOT %k = f32[16,8]{1,0:S(1)} custom-call(%m), custom_call_target="ConcatBitcast"
"""
    )
    # Read 16 of 64 rows; written; read once though it is both operands.
    assert {operation.name: operation.hbm_bytes for operation in found} == {"s": 512, "c": 512, "m": 512}


LOOP = """%condition (t: (s32[], f32[8,8])) -> pred[] {
  %t = (s32[], f32[8,8]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] constant(6)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%called (q: f32[8,8]) -> f32[8,8] {
  %q = f32[8,8] parameter(0)
  ROOT %qq = f32[8,8] dot(%q, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%idle (w: f32[8,8]) -> f32[8,8] {
  %w = f32[8,8] parameter(0)
  ROOT %ww = f32[8,8] add(%w, %w)
}

%body (s: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %s = (s32[], f32[8,8]) parameter(0)
  %c = s32[] get-tuple-element(%s), index=0
  %x = f32[8,8] get-tuple-element(%s), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%c, %one)
  %y = f32[8,8] call(%x), to_apply=%called
  %v = f32[8,8] conditional(%c, %y, %y), branch_computations={%idle, %called}
  ROOT %again = (s32[], f32[8,8]) tuple(%next, %v)
}"""


def test_loops_calls_and_branches():
    found = program(
        """  %p = f32[8,8] parameter(0)
  %zero = s32[] constant(0)
  %init = (s32[], f32[8,8]) tuple(%zero, %p)
  %w = (s32[], f32[8,8]) while(%init), condition=%condition, body=%body
  ROOT %r = f32[8,8] get-tuple-element(%w), index=1""",
        LOOP,
    )
    # The branch with the product counts.
    assert dense_flops(found) == 6 * 2 * 2 * 8**3
    # Each product reads one matrix and writes one; the counter is read and written, its step is read.
    assert hbm_bytes(found) == 6 * (2 * 2 * 256) + 6 * (4 + 4 + 4)


ASYNC = """%start (a: bf16[2,8]) -> (bf16[2,8], bf16[16,8], u32[]) {
  %a = bf16[2,8] parameter(0)
  %g0 = bf16[16,8] all-gather(%a), channel_id=5, replica_groups=[1,8]<=[8], dimensions={0}, \
frontend_attributes={chain_id="3"}
  ROOT %k0 = (bf16[2,8], bf16[16,8], u32[]{:S(2)}) custom-call(%g0), custom_call_target="AsyncCollectiveStart"
}

%going (a1: bf16[2,8], b1: bf16[16,8], x1: f32[8,8]) -> (f32[8,8], bf16[2,8], bf16[16,8]) {
  %a1 = bf16[2,8] parameter(0)
  %b1 = bf16[16,8] parameter(1)
  %x1 = f32[8,8] parameter(2)
  %g1 = bf16[16,8] all-gather(%a1), channel_id=5, replica_groups=[1,8]<=[8], dimensions={0}, \
frontend_attributes={chain_id="3"}
  %m1 = f32[8,8] dot(%x1, %x1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t1 = (f32[8,8], bf16[2,8], bf16[16,8]) tuple(%m1, %a1, %g1)
}

%done (a2: bf16[2,8], b2: bf16[16,8]) -> bf16[16,8] {
  %a2 = bf16[2,8] parameter(0)
  %b2 = bf16[16,8] parameter(1)
  ROOT %g2 = bf16[16,8] all-gather(%a2), channel_id=5, replica_groups=[1,8]<=[8], dimensions={0}, \
frontend_attributes={chain_id="3"}
}

%scatter (c: f32[16,8], j: s32[]) -> f32[4,8] {
  %c = f32[16,8] parameter(0)
  %j = s32[] parameter(1)
  %z = s32[] constant(0)
  %ar = f32[16,8] all-reduce(%c), channel_id=6, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %ds = f32[4,8] dynamic-slice(%ar, %j, %z), dynamic_slice_sizes={4,8}
}"""


def test_collectives():
    found = program(
        """  %a3 = bf16[2,8] parameter(0)
  %c3 = f32[16,8] parameter(1)
  %j3 = s32[]{:S(6)} parameter(2)
  %x3 = f32[8,8] parameter(3)
  %s3 = (bf16[2,8], bf16[16,8], u32[]{:S(2)}) fusion(%a3), kind=kCustom, calls=%start
  %s30 = bf16[2,8] get-tuple-element(%s3), index=0
  %s31 = bf16[16,8] get-tuple-element(%s3), index=1
  %f3 = (f32[8,8], bf16[2,8], bf16[16,8]) fusion(%s30, %s31, %x3), kind=kOutput, calls=%going
  %f31 = bf16[2,8] get-tuple-element(%f3), index=1
  %f32 = bf16[16,8] get-tuple-element(%f3), index=2
  %d3 = bf16[16,8] fusion(%f31, %f32), kind=kCustom, calls=%done
  %rs = f32[4,8] fusion(%c3, %j3), kind=kCustom, calls=%scatter
  %gs = (bf16[2,8], bf16[4,8]) all-gather-start(%a3), channel_id=7, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  %gd = bf16[4,8] all-gather-done(%gs)
  %r2 = f32[8,8] reduce-scatter(%c3), channel_id=8, replica_groups=[4,2]<=[8], dimensions={0}, to_apply=%add
  %ps = (f32[8,8], f32[8,8], u32[]{:S(2)}, u32[]{:S(2)}) collective-permute-start(%r2), channel_id=9, \
source_target_pairs={{0,1},{1,0}}
  %pd = f32[8,8] collective-permute-done(%ps)
  %aa = f32[8,8] all-to-all(%pd), channel_id=10, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  ROOT %ar3 = (f32[8,8], f32[16,8]) all-reduce(%aa, %c3), channel_id=11, replica_groups={}, to_apply=%add""",
        ASYNC,
    )
    by_name = {operation.name: operation for operation in found}
    assert {name for name, operation in by_name.items() if operation.collective} == {
        *("s3", "rs", "gs", "r2", "ps", "aa", "ar3")
    }
    assert by_name["gs"].collective.groups == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert by_name["rs"].collective.groups == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert by_name["ar3"].collective.groups == (tuple(range(8)),) and by_name["ps"].collective.groups == (
        (0, 1),
        (1, 0),
    )
    assert by_name["s3"].collective.dtype == "bf16" and by_name["r2"].collective.dtype == "f32"
    assert collectives(found) == {
        "all-gather": Traffic(2, 256 + 64),
        "reduce-scatter": Traffic(2, 512 + 512),
        "collective-permute": Traffic(1, 256),
        "all-to-all": Traffic(1, 256),
        "all-reduce": Traffic(1, 256 + 512),
    }
    # A part of the gather is read and the whole written, once; the fusion that it goes on behind has its own work.
    assert [by_name[name].hbm_bytes for name in ("s3", "f3", "d3")] == [32 + 256, 512, 0]
    assert by_name["f3"].matmuls == (Matmul(8, 8, 8, 1, 1),)


def test_collectives_that_share_a_channel():
    """All that shard_map writes are in channel 1: chains tell one gather's repetitions from another gather."""
    first, second = (
        ASYNC.replace("channel_id=5", "channel_id=1").replace("channel_id=6", "channel_id=1"),
        ASYNC.replace("channel_id=5", "channel_id=1").replace("channel_id=6", "channel_id=1").replace('"3"', '"4"')
        .replace("%start", "%start.b").replace("%going", "%going.b").replace("%done", "%done.b")
        .replace("%scatter", "%scatter.b"),
    )  # fmt: skip
    calls = "\n".join(
        f"""  %s{tag} = (bf16[2,8], bf16[16,8], u32[]{{:S(2)}}) fusion(%a), kind=kCustom, calls=%start{tag}
  %s0{tag} = bf16[2,8] get-tuple-element(%s{tag}), index=0
  %s1{tag} = bf16[16,8] get-tuple-element(%s{tag}), index=1
  %d{tag} = bf16[16,8] fusion(%s0{tag}, %s1{tag}), kind=kCustom, calls=%done{tag}
  %rs{tag} = f32[4,8] fusion(%c, %j), kind=kCustom, calls=%scatter{tag}"""
        for tag in ("", ".b")
    )
    found = program(
        f"""  %a = bf16[2,8] parameter(0)
  %c = f32[16,8] parameter(1)
  %j = s32[]{{:S(6)}} parameter(2)
{calls}
  ROOT %g = bf16[16,8] all-gather(%a), channel_id=1, replica_groups=[1,8]<=[8], dimensions={{0}}""",
        first,
        second,
    )
    assert collectives(found) == {"all-gather": Traffic(3, 3 * 256), "reduce-scatter": Traffic(2, 2 * 512)}


def test_collectives_on_the_sparse_cores():
    """Those of tpu7x are behind a custom call of a computation."""
    (operation,) = program(
        """  %p = bf16[2,8] parameter(0)
  ROOT %a = bf16[16,8] custom-call(%p), custom_call_target="TODO", called_computations={%sparse}""",
        """%sparse (q: bf16[2,8]) -> bf16[16,8] {
  %q = bf16[2,8] parameter(0)
  ROOT %g = bf16[16,8] all-gather(%q), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
}""",
    )
    assert operation.collective.kind == "all-gather" and operation.collective.bytes == 256


def test_transfers_between_slices():
    """Counted once, where it is sent; what goes to the host alone is none."""
    found = program(
        """  %p = f32[8,8] parameter(0)
  %t = token[] after-all()
  %r = (f32[8,8], u32[], token[]) recv(%t), channel_id=1
  %rd = (f32[8,8], token[]) recv-done(%r), channel_id=1
  %s = (f32[8,8], u32[], token[]) send(%p, %t), channel_id=1
  %sd = token[] send-done(%s), channel_id=1
  %h = (f32[8,8], u32[], token[]) send(%p, %t), channel_id=2, is_host_transfer=true
  %hd = token[] send-done(%h), channel_id=2, is_host_transfer=true
  ROOT %g = f32[8,8] get-tuple-element(%rd), index=0"""
    )
    assert collectives(found) == {"dcn": Traffic(1, 256)}


def test_an_unknown_kernel_is_an_error():
    with pytest.raises(UnreadableProgram, match="mystery"):
        program(
            """  %p = f32[8,8,8] parameter(0)
  ROOT %mystery = f32[8,8,8] custom-call(%p), custom_call_target="tpu_custom_call\""""
        )


def test_products_of_a_compiled_program():
    """8 layers scanned, forward and backward: 1 product forward, 2 backward."""
    layers, rows, width = 8, 32, 48

    def loss(w_NxDxD, x_BxD):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x_BxD, w_NxDxD)[0].sum()

    arrays = (
        jax.ShapeDtypeStruct((layers, width, width), jnp.float32),
        jax.ShapeDtypeStruct((rows, width), jnp.float32),
    )
    found = operations(parse(jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*arrays).compile().as_text()))
    assert dense_flops(found) == 3 * layers * 2 * rows * width**2
    assert not collectives(found)


@pytest.fixture
def devices(described):
    return described("v5e:2x2")


def test_a_tpu_program_with_gathered_matrices(devices):
    """Layers gathered in a scan, gradients scattered back: products and bytes against the closed form."""
    mesh = Mesh(np.array(devices), ("fsdp",))
    layers, rows, width, hidden = 6, 512, 512, 1024

    def loss(w_NxDxF, v_NxFxD, x_BxD):
        def layer(x_BxD, matrices):
            w_DxF, v_FxD = (jax.lax.all_gather(w, "fsdp", tiled=True) for w in matrices)
            return x_BxD + jax.nn.gelu(x_BxD @ w_DxF) @ v_FxD, None

        return jax.lax.scan(layer, x_BxD, (w_NxDxF, v_NxFxD))[0].astype(jnp.float32).sum()

    spec = (PartitionSpec(None, "fsdp"), PartitionSpec(None, "fsdp"), PartitionSpec("fsdp"))
    step = jax.shard_map(jax.grad(loss, argnums=(0, 1)), mesh=mesh, in_specs=spec, out_specs=spec[:2], check_vma=False)
    shapes = ((layers, width, hidden), (layers, hidden, width), (4 * rows, width))
    arrays = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, part))
        for shape, part in zip(shapes, spec, strict=True)
    ]
    found = operations(parse(jax.jit(step).lower(*arrays).compile().as_text()))
    # Two products forward; backward two each but for the first layer's input, which XLA may or may not leave out.
    product = 2 * rows * width * hidden
    assert dense_flops(found) in (6 * layers * product, (6 * layers - 1) * product)
    matrix = 2 * width * hidden
    totals = collectives(found)
    # Gathered forward, and backward again unless the forward pass keeps them.
    assert totals["all-gather"] in (Traffic(2 * layers, 2 * layers * matrix), Traffic(4 * layers, 4 * layers * matrix))
    scattered = totals["reduce-scatter"]
    assert scattered.count == 2 * layers
    # In float32 where the compiler sums in float32.
    assert scattered.bytes in (2 * layers * matrix, 4 * layers * matrix)
    assert set(totals) == {"all-gather", "reduce-scatter"}
    assert all(op.collective.groups == ((0, 1, 2, 3),) for op in found if op.collective)


def test_a_tpu_program_with_attention_kernels(devices):
    """Forward and backward of the splash kernel in a scan of 3."""
    mesh = Mesh(np.array(devices[:1]), ("data",))
    attention = functools.partial(splash.causal_attention, device_kind="TPU v5 lite")

    def loss(x_BxLxHxK):
        return jax.lax.scan(lambda x, _: (attention(x, x, x), None), x_BxLxHxK, length=3)[0].astype(jnp.float32).sum()

    spec = PartitionSpec("data")
    step = jax.shard_map(jax.grad(loss), mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    array = jax.ShapeDtypeStruct((2, 512, 3, 64), jnp.bfloat16, sharding=NamedSharding(mesh, spec))
    found = operations(parse(jax.jit(step).lower(array).compile().as_text()))
    kernels = sorted((op.kernel, op.times) for op in found if op.kernel)
    assert kernels == [(Kernel(kind, 6, 512, 64, "bf16"), 3) for kind in ("dkv", "dq", "fwd")]


PADDED = """%pad (s: bf16[2,8]) -> bf16[16,8] {
  %s = bf16[2,8]{1,0} parameter(0)
  %zero = bf16[] constant(0)
  %z = bf16[16,8]{1,0} broadcast(%zero), dimensions={}
  %i = s32[] constant(2)
  %o = s32[] constant(0)
  ROOT %u = bf16[16,8]{1,0} dynamic-update-slice(%z, %s, %i, %o)
}"""
NAMED = ', metadata={op_name="jit(f)/psum"}'


@pytest.mark.parametrize("name, expected", [("", "all_gather, as a sum"), (NAMED, "jit(f)/psum")])
def test_a_sum_of_shards_and_zeros_without_a_name_is_a_gather(name, expected):
    """libtpu gathers so over a whole cube. Of several in one, the larger share says what it is."""
    found = program(
        f"""  %a = bf16[2,8]{{1,0}} parameter(0)
  %g = bf16[16,8]{{1,0}} parameter(1)
  %f = bf16[16,8]{{1,0}} fusion(%a), kind=kLoop, calls=%pad
  %cs = (bf16[16,8]{{1,0:S(1)}}, bf16[16,8]{{1,0}}, u32[]{{:S(2)}}) copy-start(%f)
  %cd = bf16[16,8]{{1,0:S(1)}} copy-done(%cs)
  %small = f32[4]{{0}} parameter(2)
  %ar = (bf16[16,8]{{1,0}}, f32[4]{{0}}) all-reduce(%cd, %small), channel_id=1, replica_groups={{}}, to_apply=%add{name}
  ROOT %ar2 = bf16[16,8]{{1,0}} all-reduce(%g), channel_id=2, replica_groups={{}}, to_apply=%add""",
        PADDED,
        "%add (x: bf16[]) -> bf16[] {\n  ROOT %x = bf16[] parameter(0)\n}",
    )
    assert [one.source for one in found if one.collective] == [expected, ""]
