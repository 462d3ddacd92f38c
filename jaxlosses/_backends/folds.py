"""The tail of rows in cache, on a CPU: eight entries are one before any is written.

XLA:CPU unrolls a reduction over a short axis, of several numbers at once, and makes
vectors of the axis behind it (benchmarks/NOTES.md, "An entropy in two folds").
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxlosses._elementary import exp
from jaxlosses._math import tails
from jaxlosses._math.classes import Spec, Values
from jaxlosses._math.tails import Tail
from jaxlosses._math.transform import gap_of, scaled
from jaxlosses._platform import in_memory

# Entries that become one, and float32 numbers of a vector.
_FOLD, _LANES = 8, 8
# Shorter rows have too few of them.
FEWEST = 512

Operands = tuple[Array, ...]


def read(spec: Spec, signed: Values, magnitude: Values | None) -> Tail:
    """As `tails.read`, of a block of rows."""
    # A conversion from 16 bits alone would be made anew in each loop, one by one; with
    # a choice it is written.
    rows = in_memory(jnp.where(jnp.isnan(signed), jnp.nan, signed))
    peak, rival = _two_largest(rows)
    # Without any, -inf - (-inf) would be NaN.
    base = in_memory(jnp.where(rival == -jnp.inf, 0, rival))

    def terms(a: Values) -> Operands:
        top = a == peak
        gap = gap_of(spec, jnp.where(top, -jnp.inf, a), base, of_sum=True)
        if spec.softcap is not None:
            gap = in_memory(gap)
        gap = scaled(gap, magnitude)
        mass = exp(gap)
        # Of no mass the depth is finite, or their product would be NaN.
        depth = mass * -jnp.maximum(gap, jnp.finfo(gap.dtype).min)
        return mass, depth, jnp.where(top, 1, 0).astype(gap.dtype)

    def add(a: Operands, b: Operands) -> Operands:
        return tuple(x + y for x, y in zip(a, b, strict=True))

    zeros = (0.0, 0.0, 0.0)
    sums = (jnp.sum(a, 1, keepdims=True) for a in _folded(rows, terms, add, zeros))
    mass, depth, ties = sums
    return tails.above(spec, peak, ties, (rival, mass, depth), magnitude)


def _two_largest(rows: Values) -> tuple[Values, Values]:
    """The two largest entries; a NaN, which is neither, is in the sums."""

    def terms(a: Values) -> Operands:
        return a, jnp.full_like(a, -jnp.inf)

    def larger(a: Array, b: Array) -> Array:
        return lax.select(a > b, a, b)

    def both(a: Operands, b: Operands) -> Operands:
        # Not the maximum of JAX, which is slow here since it keeps a NaN.
        behind = lax.select(a[0] > b[0], b[0], a[0])
        return larger(a[0], b[0]), larger(behind, larger(a[1], b[1]))

    first, second = _folded(rows, terms, both, (-jnp.inf, -jnp.inf))
    peak = in_memory(jnp.max(first, 1, keepdims=True))
    below = jnp.max(jnp.where(first == peak, -jnp.inf, first), 1, keepdims=True)
    return peak, jnp.maximum(below, jnp.max(second, 1, keepdims=True))


def _folded(
    rows: Values,
    terms: Callable[[Values], Operands],
    both: Callable[[Operands, Operands], Operands],
    nothing: tuple[float, ...],
) -> Operands:
    """Terms of the entries, of which eight at a time have become one."""
    num_rows, num_classes = rows.shape
    size = num_classes // (_FOLD * _LANES) * (_FOLD * _LANES)
    cut = (num_rows, size // (_FOLD * _LANES), _FOLD, _LANES)
    head = tuple(a.reshape(cut) for a in terms(rows[:, :size]))
    start = tuple(jnp.asarray(a, rows.dtype) for a in nothing)
    folded = in_memory(lax.reduce(head, start, both, (2,)))
    found = [a.reshape(num_rows, size // _FOLD) for a in folded]
    if size == num_classes:
        return tuple(found)
    left = in_memory(terms(rows[:, size:]))
    pairs = zip(found, left, strict=True)
    return tuple(jnp.concatenate(pair, 1) for pair in pairs)
