"""Cap and scale of logits, as exact differences.

Losses need no transformed logit, but the difference of two. Differences are taken
before they are scaled, and in twice the digits where a rounding would be an error of
the loss.
"""

import jax.numpy as jnp

from jaxlosses._elementary import exp
from jaxlosses._math import pairs, softcap
from jaxlosses._math.classes import Inputs, Spec, Values, accumulation_dtype, masked
from jaxlosses._math.pairs import Pair


def signed_of(inputs: Inputs) -> tuple[Values, Values | None]:
    """`sign(scale) * logits`, `-inf` for a masked class, and `|scale|`.

    The scale is kept apart so that differences are taken before they are scaled: a
    rounded product of a large logit would cost a confident example its digits.
    """
    logits = inputs.logits.astype(accumulation_dtype(inputs.logits.dtype))
    logits = masked(inputs.counted, logits)
    signed, magnitude = with_sign(logits, inputs.scale)
    if inputs.where is not None:
        signed = jnp.where(inputs.where, signed, -jnp.inf)
    return signed, magnitude


def with_sign(logits: Values, scale: Values | None) -> tuple[Values, Values | None]:
    """`sign(scale) * logits` and `|scale|`; the latter None without a scale."""
    if scale is None:
        return logits, None
    return jnp.where(scale < 0, -1, 1).astype(logits.dtype) * logits, magnitude_of(
        scale
    )


def magnitude_of(scale: Values) -> Values:
    """`|scale|`, with the slope of a positive scale at 0, where `abs` has none.

    In the place of 0 stands the smallest number: a class that is out is behind by
    infinity, and stays out.
    """
    size = jnp.where(scale < 0, -scale, scale)
    return size + jnp.where(size == 0, jnp.finfo(size.dtype).tiny, 0)


def gap_of(spec: Spec, a: Values, b: Values, *, of_sum: bool = False) -> Values:
    """`cap(a) - cap(b)`, for the exponential of a logit `a`; maybe a term of a sum."""
    if spec.softcap is None:
        return a - b
    if of_sum:
        return softcap.rough_difference(spec.softcap, a, b)
    return softcap.difference(spec.softcap, a, b)


def lead_of(spec: Spec, a: Values, b: Values, magnitude: Values | None) -> Pair:
    """`magnitude * (cap(a) - cap(b))`, for two logits of every example.

    A rounding is worth up to 4e-6 at 80 nats, all of it an error of the loss.
    """
    if spec.softcap is None:
        lead = pairs.add(a, -b)
    else:
        lead = softcap.exact_difference(spec.softcap, a, b)
    if magnitude is not None:
        lead = pairs.multiply(pairs.halved(lead), pairs.of(magnitude))
    return lead._replace(low=masked(jnp.isfinite(lead.low), lead.low))


def exp_of_sum(x: Pair) -> Values:
    """`exp(high + low)` for a small `low`, which the sum would lose."""
    # Where `low` is not small, `high` is far below what exp can hold.
    low = jnp.clip(x.low, -1, 1)
    series = 1 + low * (1 + low * (1 / 2 + low * (1 / 6 + low * (1 / 24))))
    return exp(x.high) * series


def scaled(gap: Values, magnitude: Values | None) -> Values:
    """A difference of logits, times the magnitude of the scale."""
    return gap if magnitude is None else magnitude * gap
