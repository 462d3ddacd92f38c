"""The tail of rows in cache, on a CPU: some entries are one before any is written.

XLA:CPU unrolls a reduction over a short axis, of several numbers at once, and makes
vectors of the axis behind it (benchmarks/NOTES.md, "An entropy in two folds").
"""

import functools
from collections.abc import Callable, Iterable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxlosses._backends.blocks import Operands, folded, in_folds
from jaxlosses._elementary import exp
from jaxlosses._math import tails
from jaxlosses._math.classes import Spec, Values
from jaxlosses._math.tails import Tail
from jaxlosses._math.transform import gap_of, scaled
from jaxlosses._platform import in_memory

# Shorter rows have too few of them.
FEWEST = 512


def read(spec: Spec, signed: Values, magnitude: Values | None) -> Tail:
    """As `tails.read`, of a block of rows."""
    # A conversion from 16 bits alone would be made anew in each loop, one by one, and
    # so would a slice; with a choice they are written.
    whole, left = jnp.split(signed, [in_folds(signed.shape[1])], 1)
    rows = [in_memory(jnp.where(jnp.isnan(a), jnp.nan, a)) for a in (whole, left)]
    rows = rows if left.shape[1] else rows[:1]
    peak, rival = _two_largest(rows)
    # Without any, -inf - (-inf) would be NaN.
    base = in_memory(jnp.where(rival == -jnp.inf, 0, rival))

    def terms(a: Values) -> Operands:
        top = a == peak
        gap = gap_of(spec, jnp.where(top, -jnp.inf, a), base, of_sum=True)
        if spec.softcap is not None:
            gap = in_memory(gap)
        gap = scaled(gap, magnitude)
        mass, ties = exp(gap), jnp.where(top, 1, 0).astype(gap.dtype)
        if not spec.entropy:
            return mass, ties
        # Of no mass the depth is finite, or their product would be NaN.
        return mass, ties, mass * -jnp.maximum(gap, jnp.finfo(gap.dtype).min)

    def add(a: Operands, b: Operands) -> Operands:
        return tuple(x + y for x, y in zip(a, b, strict=True))

    def sums(a: Operands) -> Operands:
        return tuple(jnp.sum(x, 1, keepdims=True) for x in a)

    zeros = (0.0,) * (3 if spec.entropy else 2)
    parts = map(sums, _folded(rows, terms, add, zeros))
    mass, ties, *depth = functools.reduce(add, parts)
    rivals = rival, mass, depth[0] if depth else None
    return tails.above(spec, peak, ties, rivals, magnitude)


def _two_largest(rows: list[Values]) -> tuple[Values, Values]:
    """The two largest entries; a NaN, which is neither, is in the sums."""

    def terms(a: Values) -> Operands:
        return a, jnp.full_like(a, -jnp.inf)

    def larger(a: Array, b: Array) -> Array:
        return lax.select(a > b, a, b)

    def both(a: Operands, b: Operands) -> Operands:
        # Not the maximum of JAX, which is slow here since it keeps a NaN.
        behind = lax.select(a[0] > b[0], b[0], a[0])
        return larger(a[0], b[0]), larger(behind, larger(a[1], b[1]))

    def most(found: Iterable[Array]) -> Array:
        each = (jnp.max(a, 1, keepdims=True, initial=-jnp.inf) for a in found)
        return functools.reduce(jnp.maximum, each)

    found = _folded(rows, terms, both, (-jnp.inf, -jnp.inf))
    firsts, seconds = zip(*found, strict=True)
    peak = in_memory(most(firsts))
    below = most(jnp.where(a == peak, -jnp.inf, a) for a in firsts)
    return peak, jnp.maximum(below, most(seconds))


def _folded(
    rows: list[Values],
    terms: Callable[[Values], Operands],
    both: Callable[[Operands, Operands], Operands],
    nothing: tuple[float, ...],
) -> list[Operands]:
    """Terms of the entries, of which some at a time have become one; and of others."""
    whole, *left = rows
    found = folded(terms(whole), both, nothing)
    return [found, *(in_memory(terms(a)) for a in left)]
