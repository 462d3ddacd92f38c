"""The largest entry of rows in cache, and sums of several terms, on a CPU.

XLA:CPU unrolls a reduction over a short axis, of several numbers at once, and makes
vectors of the axis behind it (benchmarks/NOTES.md, "What is below the peak, by
exponentials as they are").
"""

import functools

import jax.numpy as jnp
from jax import lax

from jaxlosses._backends.blocks import (
    LARGEST_FOLD,
    Operands,
    each,
    folded,
    in_folds,
    short_rows,
)
from jaxlosses._elementary import exp
from jaxlosses._math.classes import Values
from jaxlosses._math.transform import scaled
from jaxlosses._platform import in_memory


def cuts(num_classes: int, most: int = LARGEST_FOLD) -> list[slice]:
    """Of a row, what is in whole folds of so many, and what is left over, if any is."""
    size = in_folds(num_classes, most)
    return [slice(size), slice(size, None)] if size < num_classes else [slice(size)]


def largest(a: Values) -> Values:
    """The largest entry of each row; not of a NaN."""

    def larger(a: Operands, b: Operands) -> Operands:
        # Not the maximum of JAX, which is slow here since it keeps a NaN.
        return (lax.select(a[0] > b[0], a[0], b[0]),)

    whole, *left = (a[:, cut] for cut in cuts(a.shape[1]))
    found = [*folded((whole,), larger, (-jnp.inf,)), *left]
    tops = [jnp.max(a, 1, keepdims=True, initial=-jnp.inf) for a in found]
    return in_memory(functools.reduce(jnp.maximum, tops))


def peak_and_mass(signed: Values, magnitude: Values | None) -> tuple[Values, Values]:
    """The largest logit, and the sum of exponentials relative to it."""
    peak = largest(signed)
    base = in_memory(jnp.where(peak == -jnp.inf, 0, peak))

    def terms(cut: slice) -> Operands:
        return (exp(scaled(signed[:, cut] - base, magnitude)),)

    (mass,) = sums([terms(cut) for cut in cuts(signed.shape[1])])
    return peak, mass


def in_halves(terms: Operands) -> Operands:
    """The sums along rows of some terms, each half of a row added to the other.

    Of terms of so many operations that a loop over more would not be unrolled. Alone,
    each sum would compute what they share.
    """
    num_rows, num_classes = terms[0].shape
    half = num_classes // 2
    if half == 0:
        return terms
    cut = tuple(a[:, : 2 * half].reshape(num_rows, 2, half) for a in terms)
    zeros = tuple(jnp.zeros((), a.dtype) for a in terms)
    found = in_memory(lax.reduce(cut, zeros, _add, (1,)))
    sums = tuple(map(_total, found))
    if num_classes % 2:
        sums = _add(sums, tuple(a[:, -1:] for a in terms))
    return sums


def sums(terms: list[Operands], most: int = LARGEST_FOLD) -> Operands:
    """The sums along rows of some terms, in parts as cut; of a single one, its size."""
    whole, *left = terms
    add = _add_sizes if len(whole) == 1 else _add
    found = folded(whole, add, (0.0,) * len(whole), most)
    return functools.reduce(_add, (tuple(map(_total, part)) for part in (found, *left)))


def _total(a: Values) -> Values:
    found = each(short_rows(a), lambda a, _: jnp.sum(a, 1))
    return jnp.sum(found, 1, keepdims=True)


def _add(a: Operands, b: Operands) -> Operands:
    return tuple(x + y for x, y in zip(a, b, strict=True))


def _add_sizes(a: Operands, b: Operands) -> Operands:
    # For a plain sum XLA:CPU calls a library, to which all terms would be written
    # first; it does not for a sum of absolute values.
    return tuple(x + jnp.abs(y) for x, y in zip(a, b, strict=True))
