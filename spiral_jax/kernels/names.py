"""Names that attention gives to what it computes."""

# Under which `jax.checkpoint` policies find attention's output and what its backward pass needs with it.
ATTENTION = "attention"
