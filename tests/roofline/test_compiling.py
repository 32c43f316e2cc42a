"""Text of programs for TPUs that are not there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from spiral_jax.hardware import parse_slice
from spiral_jax.roofline import hlo, work
from spiral_jax.roofline.compiling import compile_described
from spiral_jax.roofline.slices import describe_devices, no_compilation_cache


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


def test_the_cache_is_off_only_meanwhile(tmp_path):
    """Though jax has compiled before, and with it looked at the setting."""
    names = {"jax_compilation_cache_dir": str(tmp_path), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in (*names, "jax_enable_compilation_cache")}

    def entries(number: float) -> int:
        """Compiles a program of its own and counts what the cache has then."""
        jax.jit(lambda x: x * number).lower(np.float32(1)).compile()
        return len(list(tmp_path.glob("*-cache")))

    try:
        with no_compilation_cache():
            for name, value in names.items():
                jax.config.update(name, value)
        assert entries(2.5) == 1
        with pytest.raises(KeyError), no_compilation_cache():
            assert entries(3.5) == 1
            raise KeyError
        assert entries(4.5) == 2
    finally:
        with no_compilation_cache():
            for name, value in before.items():
                jax.config.update(name, value)
