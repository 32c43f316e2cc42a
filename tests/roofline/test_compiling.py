"""Text of programs for TPUs that are not there."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from spiral_jax.roofline import hlo, work
from spiral_jax.roofline.compiling import compile_described
from spiral_jax.roofline.slices import describe_devices, no_compilation_cache, parse_slice


# as_text() of the last one's compiled program fails.
@pytest.mark.parametrize("text", ["v5e-1", "v4-8", "tpu7x-2"])
def test_the_text_is_the_program(text, libtpu):
    mesh = jax.make_mesh((parse_slice(text).devices,), ("x",), devices=describe_devices(parse_slice(text)))
    left, right = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec()))
        for shape in ((512, 1024), (1024, 256))
    )
    compiled, program = compile_described(jax.jit(jnp.matmul).lower(left, right))
    assert compiled.memory_analysis().output_size_in_bytes == 512 * 256 * 2
    operations = work.operations(hlo.parse(program))
    assert work.dense_flops(operations) == 2 * 512 * 256 * 1024


def test_the_cache_is_off_only_meanwhile():
    before = jax.config.jax_enable_compilation_cache
    with pytest.raises(KeyError), no_compilation_cache():
        assert not jax.config.jax_enable_compilation_cache
        raise KeyError
    assert jax.config.jax_enable_compilation_cache == before
