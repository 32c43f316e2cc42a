"""The models that benchmarks compare: one width and depth, cut as in the papers."""

from spiral_jax.model.config import Dtype, ModelConfig

FAMILIES = ("vanilla", "loop", "spiral_b", "spiral_l")


def models(
    *, width: int, heads: int, layers: int, vocab_size: int, dtype: Dtype = "float32", unroll: bool = False
) -> dict[str, ModelConfig]:
    """A transformer, a full-resolution loop and two spirals, cut as docs/spec.md section 5 cuts them.

    Args:
      width: d of every model.
      heads: of its attention.
      layers: of the transformer, a multiple of 6.
      vocab_size: ids.
      dtype: to compute in.
      unroll: `model.unroll`.
    """
    part = layers // 6

    def cut(prelude_layers: int, core_layers: int, coda_layers: int, chunks: tuple[int, ...]) -> ModelConfig:
        return ModelConfig(
            vocab_size=vocab_size,
            d_model=width,
            num_heads=heads,
            dtype=dtype,
            unroll=unroll,
            prelude_layers=prelude_layers,
            core_layers=core_layers,
            coda_layers=coda_layers,
            chunks=chunks,
            topology="mesh" if chunks else "base",
        )

    return {
        "vanilla": cut(layers, 0, 0, ()),
        "loop": cut(part, 2 * part, part, (1, 1)),
        "spiral_b": cut(part, 2 * part, part, (8, 4, 2, 1)),
        "spiral_l": cut(2 * part, 2 * part, 2 * part, (16, 8, 4, 2)),
    }
