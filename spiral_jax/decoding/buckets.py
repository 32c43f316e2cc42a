"""Sizes that arrays are padded to: few, as every size is a program to compile."""


def bucket_of(length: int, longest: int | None = None, *, shortest: int = 32, factor: int = 2) -> int:
    """The smallest of `shortest`, `factor` times that, and so on that is at least `length`; at most `longest`."""
    bucket = shortest
    while bucket < length:
        bucket *= factor
    return bucket if longest is None else min(bucket, longest)
