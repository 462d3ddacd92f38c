"""Sizes of arrays, some of which `jax.export` may leave open."""

from typing import Any

# An int, or an expression of symbols: arithmetic and equality are those of numbers,
# but which of two is larger may not be known.
Size = Any
Shape = tuple[Size, ...]


def are_numbers(*sizes: Size) -> bool:
    """Whether sizes can be compared, counted and looped over while tracing."""
    return all(isinstance(size, int) for size in sizes)
