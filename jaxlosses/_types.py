"""Names for types that Python has no word for."""

from typing import Any

import numpy as np

# An int, or an expression of the symbols of `jax.export`: arithmetic and equality are
# those of numbers, but which of two is larger may not be known.
Size = Any
Shape = tuple[Size, ...]

DType = np.dtype[Any]

# Arrays in containers of any kind: a pytree.
Tree = Any


def are_numbers(*sizes: Size) -> bool:
    """Whether sizes can be compared, counted and looped over while tracing."""
    return all(isinstance(size, int) for size in sizes)
