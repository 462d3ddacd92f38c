"""The cap of logits, `c tanh(z / c)`, as exact as logits without one.

`tanh` in float32 is right to a few units in the last place: at a cap of 50, 1e-5 of
an exponential. Losses need no capped logit but the difference of two, and that has a
form in which nothing cancels:

    c tanh(a / c) - c tanh(b / c) = s (y - 1) / (g + y)
    y = exp(2 (a - b) / c),  g = exp(-2 b / c),  s = 2 c g / (1 + g)
"""

import fractions
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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
    high, low = _difference(cap, a, b)
    finite = jnp.isfinite(a)
    return Pair(jnp.where(finite, high, a), jnp.where(finite, low, 0))


def _difference(cap: float, a: Values, b: Values) -> Pair:
    dtype, exact = a.dtype, fractions.Fraction(min(cap, _LARGEST))
    limit = float(_REACHED * exact)
    a, b = jnp.clip(a, -limit, limit), jnp.clip(b, -limit, limit)
    g = pairs.exp(pairs.of(-b), 2 / exact)
    twice = pairs.constant(2 * exact, dtype, jnp.finfo(dtype).nmant + 1)
    beside = pairs.add_pairs(g, pairs.of(jnp.ones_like(b)))
    s = pairs.multiply(pairs.divide(g, beside), twice)
    s = pairs.add_to_larger(*s)
    y = pairs.exp(pairs.add(a, -b), 2 / exact)
    behind = pairs.add_to_larger(*pairs.add_pairs(y, pairs.of(-jnp.ones_like(a))))
    return pairs.multiply(s, pairs.divide(behind, pairs.add_pairs(g, y)))


def slope(cap: float, a: Values) -> Values:
    """Derivative of `cap tanh(a / cap)`, one where that leaves `a` as it is."""
    e = jnp.exp(-2 * jnp.abs(jnp.where(jnp.isfinite(a), a, 0) / cap))
    # 1 - tanh^2 without the cancellation near the cap.
    return 4 * e / jnp.square(1 + e)
