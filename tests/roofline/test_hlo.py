"""Reading HLO text: grammar, device groups, loop counts. Every expected number is worked out by hand."""

import jax
import jax.numpy as jnp
import pytest

from spiral_jax.roofline.groups import cross, parse_groups
from spiral_jax.roofline.hlo import Array, UnreadableProgram, leaves, parse, parse_shape
from spiral_jax.roofline.loops import Scope, UnknownTripCount, trip_count
from spiral_jax.roofline.work import operations

PROGRAM = """HloModule jit_f, is_scheduled=true, input_output_alias={ {0}: (1, {}, may-alias), {2}: (0, {}, \
must-alias) }, entry_computation_layout={(f32[8]{0})->f32[8]{0}}, num_partitions=16, replica_count=2

FileNames
1 "f.py"

%add.1 (a.1: f32[], b.1: f32[]) -> f32[] {
  %a.1 = f32[]{:T(128)} parameter(0)
  %b.1 = f32[]{:T(128)} parameter(1)
  ROOT %sum.1 = f32[]{:T(128)} add(%a.1, %b.1)
}

ENTRY %main (p0: f32[8], p1: f32[8]) -> (f32[8], f32[], f32[8]) {
  %p0 = f32[8]{0:T(128)} parameter(0), metadata={op_name="args[\\'x\\']"}
  %p1 = f32[8]{0:T(128)S(1)} parameter(1)
  %zero = f32[] constant(0)
  %big = s32[2,2]{1,0} constant({{1, 2}, {3, 4}})
  %kernel = ((f32[8]{0}), bf16[2,8]{1,0:T(8,128)(2,1)S(1)}, /*index=2*/u32[]{:S(2)}) custom-call(%p0, /*index=1*/%p1), \
custom_call_target="k", frontend_attributes={kernel_metadata={
"text":"{\\"a\\": 1}, } ) = x"
}}, metadata={op_name="jit(f)/a,b->c/\\"q\\"" stack_frame_id=3}, backend_config={"a":[{"b":"}"}]}
  %total = f32[] reduce(%p0, %zero), dimensions={0}, to_apply=%add.1
  ROOT %out = (f32[8]{0}, f32[], f32[8]{0}) tuple(%p1, %total, %p0)
}
"""


def test_program():
    module = parse(PROGRAM)
    assert module.num_devices == 32
    assert module.donated == {(0,): 1, (2,): 0}
    assert list(module.computations) == ["add.1", "main"]
    assert module.entry.name == "main" and module.entry.root.name == "out"
    by_name = {instruction.name: instruction for instruction in module.entry.instructions}
    kernel = by_name["kernel"]
    assert kernel.opcode == "custom-call" and kernel.target == "k"
    assert kernel.operands == (by_name["p0"], by_name["p1"]) and by_name["p0"].users[0] is kernel
    # The line breaks, quotes and brackets in a kernel's description end nothing.
    assert kernel.source == 'jit(f)/a,b->c/\\"q\\"'
    assert kernel.attributes["backend_config"] == '{"a":[{"b":"}"}]}'
    assert [(path, array.dtype, array.dims, array.space) for path, array in leaves(kernel.shape)] == [
        ((0, 0), "f32", (8,), 0),
        ((1,), "bf16", (2, 8), 1),
        ((2,), "u32", (), 2),
    ]
    total = by_name["total"]
    assert total.called("body", "to_apply") == [module.computations["add.1"]] and total.numbers("dimensions") == (0,)
    assert by_name["big"].literal == "{{1, 2}, {3, 4}}" and by_name["big"].operands == ()
    assert by_name["p0"].source == "args[\\'x\\']"


@pytest.mark.parametrize(
    ("text", "size", "stored"),
    [
        ("f32[5,7]{1,0}", 140, 140),
        # 5 rows to 8, 7 columns to 128.
        ("f32[5,7]{1,0:T(8,128)}", 140, 4 * 8 * 128),
        # The 5 varies fastest, then the 300: 128 and 304.
        ("bf16[300,3,5]{2,0,1:T(8,128)(2,1)}", 9000, 2 * 3 * 304 * 128),
        ("bf16[768]{0:T(1024)(128)(2,1)S(1)}", 1536, 2048),
        ("s32[]{:T(128)S(6)}", 4, 512),
        ("f8e4m3fn[3]{0}", 3, 3),
        ("s4[6]{0:E(4)}", 3, 3),
        ("pred[2,2]", 4, 4),
        ("token[]", 0, 0),
    ],
)
def test_bytes_of_arrays(text, size, stored):
    array = parse_shape(text)
    assert isinstance(array, Array)
    assert (array.bytes, array.stored_bytes) == (size, stored)


def test_what_is_not_understood_is_an_error():
    with pytest.raises(UnreadableProgram, match="no ENTRY"):
        parse("HloModule nothing\n")
    with pytest.raises(UnreadableProgram, match="strange"):
        parse("HloModule m\n\nENTRY %main () -> f32[] {\n  ROOT %strange = f32[] !!\n}\n")
    with pytest.raises(UnreadableProgram, match="strange has an operand p that no line before it makes"):
        parse("HloModule m\n\nENTRY %main () -> f32[] {\n  ROOT %strange = f32[] negate(%p)\n}\n")
    with pytest.raises(UnreadableProgram, match="x9"):
        _ = parse_shape("x9[4]").bytes
    with pytest.raises(UnreadableProgram, match="replica_groups 'all'"):
        parse_groups("all", 4)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("{}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
        # [4,2] transposed: 0 2 4 6 1 3 5 7.
        ("[2,4]<=[4,2]T(1,0)", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("[4,2]<=[2,2,2]T(1,0,2)", ((0, 1), (4, 5), (2, 3), (6, 7))),
        ("mesh['a'=8] {'a'}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("mesh['a'=2,'b'=4] {'b'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("mesh['a'=2,'b'=4] {'a'}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("mesh[a=2,b=2,c=2] {a,c}", ((0, 1, 4, 5), (2, 3, 6, 7))),
        # The axes' order is the order in the group.
        ("mesh['a'=2,'b'=4] {'b','a'}", ((0, 4, 1, 5, 2, 6, 3, 7),)),
        # b is 2 x 2; the outer 2 groups 0 with 2, the inner one 0 with 1.
        ("mesh['a'=2,'b'=4] {'b':(1)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['a'=2,'b'=4] {'a','b':(2)2}", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("mesh['a'=8] {'a':(1)2,'a':(4)2}", ((0, 1, 4, 5), (2, 3, 6, 7))),
        # The mesh's devices are 0 2 4 6 / 1 3 5 7.
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("mesh['a'=2,'b'=2], device_ids=(3,2,1,0) {'a'}", ((3, 1), (2, 0))),
    ],
)
def test_groups(text, groups):
    assert parse_groups(text, 8) == groups


def test_groups_of_several_slices():
    slices = (0, 0, 0, 0, 1, 1, 1, 1)
    assert not cross(parse_groups("[2,4]<=[8]", 8), slices)
    assert cross(parse_groups("[4,2]<=[2,4]T(1,0)", 8), slices)
    assert cross(parse_groups("{}", 8), slices)


def test_the_device_order_of_a_mesh_belongs_to_its_groups():
    text = """HloModule m, num_partitions=4

ENTRY %main (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %r = f32[4]{0} all-reduce(%p), replica_groups=mesh['a'=2,'b'=2], device_ids=(3,2,1,0) {'a'}, to_apply=%add
}
"""
    (operation,) = operations(parse(text))
    assert operation.collective.groups == ((3, 1), (2, 0))


def loop(condition: str, step: str = "add(%c, %one)", first: str = "constant(0)", extra: str = "") -> str:
    """A program with one loop, whose body may read `%bound`, which it carries, and `%one`."""
    return f"""HloModule m

%compare (x: s32[], y: s32[]) -> pred[] {{
  %x = s32[] parameter(0)
  %y = s32[] parameter(1)
  ROOT %less = pred[] compare(%x, %y), direction=LT
}}

%condition (t: (s32[], s32[], f32[8])) -> pred[] {{
  %t = (s32[], s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] get-tuple-element(%t), index=1
  %five = s32[] constant(5)
  ROOT %test = pred[] {condition}
}}

%body (s: (s32[], s32[], f32[8])) -> (s32[], s32[], f32[8]) {{
  %s = (s32[], s32[], f32[8]) parameter(0)
  %c = s32[] get-tuple-element(%s), index=0
  %bound = s32[] get-tuple-element(%s), index=1
  %x = f32[8] get-tuple-element(%s), index=2
  %one = s32[] constant(1)
  %two = s32[] constant(2)
  %y = f32[8] add(%x, %x)
  %next = s32[] {step}
  ROOT %again = (s32[], s32[], f32[8]) tuple(%next, %bound, %y)
}}

ENTRY %main (p: f32[8]) -> f32[8] {{
  %p = f32[8] parameter(0)
  %first = s32[] {first}
  %bound.0 = s32[] constant(12)
  %start = (s32[], s32[], f32[8]) tuple(%first, %bound.0, %p)
  %loop.7 = (s32[], s32[], f32[8]) while(%start), condition=%condition, body=%body{extra}
  ROOT %r = f32[8] get-tuple-element(%loop.7), index=2
}}
"""


def count(text: str) -> int:
    module = parse(text)
    (loop,) = (instruction for instruction in module.entry.instructions if instruction.name == "loop.7")
    return trip_count(loop, Scope(module.entry))


@pytest.mark.parametrize(
    ("text", "times"),
    [
        (loop("compare(%i, %five), direction=LT"), 5),
        (loop("compare(%i, %five), direction=LE"), 6),
        (loop("compare(%i, %five), direction=NE"), 5),
        (loop("compare(%five, %i), direction=GT"), 5),
        # 0 2 4.
        (loop("compare(%i, %five), direction=LT", "add(%two, %c)"), 3),
        # The bound is carried by the loop.
        (loop("compare(%i, %n), direction=LT"), 12),
        (loop("fusion(%i, %n), kind=kLoop, calls=%compare"), 12),
        # 20 19 ... 6.
        (loop("compare(%i, %five), direction=GT", "subtract(%c, %one)", "constant(20)"), 15),
        (loop("compare(%i, %five), direction=GE", "subtract(%c, %two)", "constant(20)"), 8),
        (loop("compare(%i, %five), direction=LT", first="constant(9)"), 0),
        # What the compiler knows comes first.
        (loop("custom-call(%i)", extra=', backend_config={"known_trip_count":{"n":"3"},"x":{}}'), 3),
    ],
)
def test_trip_counts(text, times):
    assert count(text) == times


@pytest.mark.parametrize(
    "text",
    [
        loop("custom-call(%i)"),
        loop("compare(%n, %five), direction=LT"),
        loop("compare(%i, %five), direction=LT", "multiply(%c, %two)"),
        loop("compare(%i, %five), direction=LT", "subtract(%c, %one)"),
        loop("compare(%i, %five), direction=LT", first="custom-call()"),
        loop("compare(%i, %five), direction=NE", "add(%c, %two)"),
    ],
)
def test_a_loop_without_a_readable_count_is_an_error_that_names_it(text):
    with pytest.raises(UnknownTripCount, match=r"loop loop\.7"):
        count(text)


NESTED = """HloModule m

%inner_condition (t: (s32[], s32[], f32[8])) -> pred[] {
  %t = (s32[], s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] get-tuple-element(%t), index=1
  ROOT %test = pred[] compare(%i, %n), direction=LT
}

%inner (s: (s32[], s32[], f32[8])) -> (s32[], s32[], f32[8]) {
  %s = (s32[], s32[], f32[8]) parameter(0)
  %c = s32[] get-tuple-element(%s), index=0
  %bound = s32[] get-tuple-element(%s), index=1
  %x = f32[8] get-tuple-element(%s), index=2
  %one = s32[] constant(1)
  %y = f32[8] add(%x, %x)
  %next = s32[] add(%c, %one)
  ROOT %again = (s32[], s32[], f32[8]) tuple(%next, %bound, %y)
}

%outer_condition (t: (s32[], f32[8], s32[], s32[])) -> pred[] {
  %t2 = (s32[], f32[8], s32[], s32[]) parameter(0)
  %i2 = s32[] get-tuple-element(%t2), index=0
  %three = s32[] constant(3)
  ROOT %test2 = pred[] compare(%i2, %three), direction=LT
}

%outer (s: (s32[], f32[8], s32[], s32[])) -> (s32[], f32[8], s32[], s32[]) {
  %s2 = (s32[], f32[8], s32[], s32[]) parameter(0)
  %c2 = s32[] get-tuple-element(%s2), index=0
  %x2 = f32[8] get-tuple-element(%s2), index=1
  %start = s32[] get-tuple-element(%s2), index=2
  %bound2 = s32[] get-tuple-element(%s2), index=3
  %moved = (s32[], s32[], u32[]) copy-start(%start)
  %start.copy = s32[] copy-done(%moved)
  %in = (s32[], s32[], f32[8]) tuple(%start.copy, %bound2, %x2)
  %loop = (s32[], s32[], f32[8]) while(%in), condition=%inner_condition, body=%inner
  %x3 = f32[8] get-tuple-element(%loop), index=2
  %one2 = s32[] constant(1)
  %next2 = s32[] add(%c2, %one2)
  ROOT %again2 = (s32[], f32[8], s32[], s32[]) tuple(%next2, %x3, %start, %bound2)
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8] parameter(0)
  %zero = s32[] constant(0)
  %two = s32[] constant(2)
  %nine = s32[] constant(9)
  %init = (s32[], f32[8], s32[], s32[]) tuple(%zero, %p, %two, %nine)
  %loop2 = (s32[], f32[8], s32[], s32[]) while(%init), condition=%outer_condition, body=%outer
  ROOT %r = f32[8] get-tuple-element(%loop2), index=1
}
"""


def test_bounds_that_come_through_an_outer_loop():
    """3 rounds of 2, 3, ... 8: the inner loop's first and last numbers stand in the entry computation."""
    times = {operation.name: operation.times for operation in operations(parse(NESTED))}
    assert times["y"] == 3 * 7
    assert times["next2"] == 3
    assert "loop" not in times and "test" not in times


@pytest.mark.parametrize("platform_notes", [True, False])
def test_trip_counts_of_compiled_scans(platform_notes):
    """A scan of 7 in a scan of 5, as the CPU compiler writes it, with and without its note of the count."""

    def f(x):
        def inner(x, _):
            return jnp.sin(x) @ x, None

        def outer(x, _):
            return jax.lax.scan(inner, x, length=7)[0], None

        return jax.lax.scan(outer, x, length=5)[0]

    text = jax.jit(f).lower(jnp.zeros((16, 16))).compile().as_text()
    if not platform_notes:
        assert "known_trip_count" in text
        text = text.replace("known_trip_count", "forgotten")
    assert sum(len(operation.matmuls) * operation.times for operation in operations(parse(text))) == 35
