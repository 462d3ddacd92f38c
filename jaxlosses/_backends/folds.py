"""The largest entry of rows in cache, and sums of several terms, on a CPU.

XLA:CPU unrolls a reduction over a short axis, of several numbers at once, and makes
vectors of the axis behind it (benchmarks/NOTES.md, "What is below the peak, by
exponentials as they are").
"""

import functools

import jax.numpy as jnp
from jax import lax

from jaxlosses._backends.blocks import LARGEST_FOLD, Operands, folded, in_folds
from jaxlosses._math.classes import Values
from jaxlosses._platform import in_memory


def in_parts(*arrays: Values, most: int) -> list[Operands]:
    """Rows of some arrays: what is in whole folds, and what is left over, if anything.

    Args:
        *arrays: of one number of classes.
        most: entries of a fold.
    """
    num_classes = arrays[0].shape[1]
    size = in_folds(num_classes, most)
    cuts = [slice(size), slice(size, None)] if size < num_classes else [slice(size)]
    return [tuple(a[:, cut] for a in arrays) for cut in cuts]


def largest(a: Values) -> Values:
    """The largest entry of each row; not of a NaN."""

    def larger(a: Operands, b: Operands) -> Operands:
        # Not the maximum of JAX, which is slow here since it keeps a NaN.
        return (lax.select(a[0] > b[0], a[0], b[0]),)

    whole, *left = in_parts(a, most=LARGEST_FOLD)
    found = [folded(whole, larger, (-jnp.inf,), LARGEST_FOLD), *left]
    tops = [jnp.max(a, 1, keepdims=True, initial=-jnp.inf) for (a,) in found]
    return in_memory(functools.reduce(jnp.maximum, tops))


def sums(terms: list[Operands], most: int) -> Operands:
    """The sums along rows of some terms, in parts."""

    def add(a: Operands, b: Operands) -> Operands:
        return tuple(x + y for x, y in zip(a, b, strict=True))

    def of_part(a: Operands) -> Operands:
        return tuple(jnp.sum(x, 1, keepdims=True) for x in a)

    whole, *left = terms
    found = folded(whole, add, (0.0,) * len(whole), most)
    return functools.reduce(add, map(of_part, [found, *map(in_memory, left)]))
