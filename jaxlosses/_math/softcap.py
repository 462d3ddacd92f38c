"""The cap of logits, `c tanh(z / c)`, as exact as logits without one.

`tanh` in float32 is right to a few units in the last place: at a cap of 50, 1e-5 of
an exponential. Losses need no capped logit but the difference of two, and that has a
form in which nothing cancels:

    c tanh(a / c) - c tanh(b / c) = s (y - 1) / (g + y)
    y = exp(2 (a - b) / c),  g = exp(-2 b / c),  s = 2 c g / (1 + g)
"""

import fractions
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlosses._elementary import exp
from jaxlosses._math import pairs
from jaxlosses._math.pairs import Pair

Values = Float[Array, "..."]

# The cap is reached to 1e-17 of it.
_REACHED = 20

# A larger cap changes no logit below 1e22; its reciprocal has too few digits.
_LARGEST = 1e30


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def difference(cap: float, a: Values, b: Values) -> Values:
    """`cap tanh(a / cap) - cap tanh(b / cap)`, in float32 to 1.2e-7 of itself.

    An infinite logit stays infinite, or a diverged model would look healthy: `a` is
    returned as it is where it is not finite.

    Args:
        cap: largest size of a capped logit, positive.
        a: logits.
        b: of a shape that broadcasts to that of `a`; constant in derivatives.
    """
    high, low = _difference(cap, a, b)
    return jnp.where(jnp.isfinite(a), high + low, a)


@difference.defjvp
def _difference_jvp(cap: float, primals: Any, tangents: Any) -> tuple[Values, Values]:
    return difference(cap, *primals), slope(cap, primals[0]) * tangents[0]


def exact_difference(cap: float, a: Values, b: Values) -> Pair:
    """The same as a pair; not differentiable.

    In float32 right to 4e-8 of itself if that is tens of nats, else to 8e-8.
    """
    high, low = pairs.add_to_larger(*_difference(cap, a, b))
    finite = jnp.isfinite(a)
    return Pair(jnp.where(finite, high, a), jnp.where(finite, low, 0))


def rough_difference(cap: float, a: Values, b: Values) -> Values:
    """The same to ten roundings of itself, for the terms of a sum; not differentiable.

    At a third of the cost (benchmarks/NOTES.md, "A cap of which only sums are taken").
    """
    finite, given, dtype = jnp.isfinite(a), a, a.dtype
    a, b, doubled = _within_reach(cap, a, b)
    (g, _), (s, _) = _of_base(doubled, b)
    x = (a - b) * float(doubled)
    n = jnp.round(x * (1 / math.log(2)))
    step = pairs.constant(pairs.LOG_2, dtype, jnp.finfo(dtype).nmant - 7)
    r = (x - n * step.high) - n * step.low
    power = pairs.power_of_two(n, dtype)
    beyond = power * (r * pairs.series_of_exp(r, 1, pairs.last_term(dtype)))
    gap = (beyond + (power - 1)) / (g + (power + beyond)) * s
    return jnp.where(finite, gap, given)


def _difference(cap: float, a: Values, b: Values) -> Pair:
    """That of finite logits, halved."""
    a, b, doubled = _within_reach(cap, a, b)
    g, s = _of_base(doubled, b)
    y, behind = pairs.exp(pairs.add(a, -b), doubled)
    return pairs.multiply(pairs.divide(behind, pairs.add_pairs(g, y)), s)


def _within_reach(
    cap: float, a: Values, b: Values
) -> tuple[Values, Values, fractions.Fraction]:
    """Logits of which the cap is not yet reached, and `2 / cap`."""
    exact = fractions.Fraction(min(cap, _LARGEST))
    limit = float(_REACHED * exact)
    return jnp.clip(a, -limit, limit), jnp.clip(b, -limit, limit), 2 / exact


def _of_base(doubled: fractions.Fraction, b: Values) -> tuple[Pair, Pair]:
    """`g` and `s`."""
    g, _ = pairs.exp(pairs.of(-b), doubled)
    twice = pairs.constant(4 / doubled, b.dtype, jnp.finfo(b.dtype).nmant + 1)
    beside = pairs.add_pairs(g, pairs.of(jnp.ones_like(b)))
    return g, pairs.add_to_larger(*pairs.multiply(pairs.divide(g, beside), twice))


def slope(cap: float, a: Values) -> Values:
    """Derivative of `cap tanh(a / cap)`, one where that leaves `a` as it is."""
    e = exp(-2 * jnp.abs(jnp.where(jnp.isfinite(a), a, 0) / cap))
    # 1 - tanh^2 without the cancellation near the cap.
    return 4 * e / jnp.square(1 + e)
