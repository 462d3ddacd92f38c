"""All classes but one of the largest: what an entropy keeps its digits by.

With `m` the largest logit, left out of both sums once,

    excess = sum' exp(z_j - m)
    depth  = sum' exp(z_j - m) (m - z_j)
    entropy = log1p(excess) + depth / (1 + excess)

are sums of numbers of one sign. That of two sets of classes comes together as in
`merge`, in any order.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from jaxlosses._elementary import log1p
from jaxlosses._math.classes import Inputs, Spec, Values, Whole, largest, total
from jaxlosses._math.transform import exp_of_sum, lead_of


class Tail(NamedTuple):
    """What is known of some classes, one of the largest of which is left out.

    Attributes:
        peak: the largest logit, with the sign of the scale; `-inf` without any.
        excess: sum of `exp` of what the others are behind it, after cap and scale; -1
            without any class.
        depth: the same sum, each times what it is behind; None if it is not wanted.
        slack: sum of the targets, each times what its class is behind; None where that
            is left to who asks for it.
        share: sum of the targets, likewise.
    """

    peak: Values
    excess: Values
    depth: Values | None
    slack: Values | None = None
    share: Values | None = None


# Of some signed logits and the magnitude of the scale: the largest, the sum of `exp` of
# what they are behind it, and that of what they are behind, times that.
Rivals = Callable[[Spec, Values, Values | None], tuple[Values, Values, Values | None]]


def read(
    spec: Spec,
    inputs: Inputs,
    signed: Values,
    magnitude: Values | None,
    rivals: Rivals,
) -> Tail:
    """The tail of all classes.

    What is below the peak is summed up relative to the largest of it, `r`: a rounding
    of `r - m` would be an error of every term.
    """
    del inputs
    peak = largest(spec, signed)
    top = signed == peak
    rival, mass, depth = rivals(spec, jnp.where(top, -jnp.inf, signed), magnitude)
    ties = total(spec, jnp.where(top, 1, 0).astype(mass.dtype))
    return above(spec, peak, ties, (rival, mass, depth), magnitude)


def above(
    spec: Spec,
    peak: Values,
    ties: Values,
    rivals: tuple[Values, Values, Values | None],
    magnitude: Values | None,
) -> Tail:
    """The tail below a peak, of so many entries, from what is known of the others."""
    rival, mass, depth = rivals
    gap, ratio = _behind(spec, rival, peak, magnitude)
    # The mass joins last: added to the count of ties, its digits would be lost.
    excess = jnp.where(ties == 0, peak, (ties - 1) + mass * ratio)
    excess = jnp.where(peak == -jnp.inf, mass - 1, excess)
    return Tail(peak, excess, _moved(depth, mass, gap, ratio))


def merge(spec: Spec, tail: Tail, parts: Whole, magnitude: Values | None) -> Tail:
    """The tail of all classes from those of parts.

    Of two, with `1` that of the larger peak and `d` what the other is behind,

        excess = excess1 + exp(-d) (1 + excess2)
        depth  = depth1 + exp(-d) (depth2 + (1 + excess2) d)
    """
    peak = parts.max(tail.peak)
    gap, ratio = _behind(spec, tail.peak, peak, magnitude)
    mass = 1 + tail.excess
    # Each leaves out one of its largest; of those at the peak, one stays out.
    is_top = (tail.peak == peak) & (tail.excess >= 0)
    ties = parts.sum(is_top.astype(mass.dtype))
    excess = parts.sum(jnp.where(is_top, tail.excess, ratio * mass)) + (ties - 1)
    depth = _moved(tail.depth, mass, gap, ratio)
    return Tail(peak, excess, None if depth is None else parts.sum(depth))


def peak_and_spread(tail: Tail) -> tuple[Values, Values]:
    """`m` and `log sum_j exp(z_j - m)`, both NaN where no distribution is."""
    # A NaN is larger than no logit, but it is in the sum.
    peak = proper(jnp.where(tail.excess >= 0, tail.peak, jnp.nan))
    return peak, jnp.where(jnp.isnan(peak), peak, log1p(tail.excess))


def depth_of(tail: Tail) -> Values | None:
    """`sum_j p_j (m - z_j)`, the mean depth; what an entropy is beyond the spread."""
    return None if tail.depth is None else tail.depth / (1 + tail.excess)


def proper(peak: Values) -> Values:
    """NaN for a peak of `+inf`, and where every class has probability zero."""
    return jnp.where(jnp.isfinite(peak), peak, jnp.nan)


def times_depth(mass: Values, gap: Values) -> Values:
    """`mass * -gap` with `0 * inf = 0`."""
    return jnp.where(mass == 0, 0, mass * -gap)


def _behind(
    spec: Spec, own: Values, peak: Values, magnitude: Values | None
) -> tuple[Values, Values]:
    """A logit minus a larger one, after cap and scale, and `exp` of that."""
    # Without any class, -inf - (-inf) would be NaN.
    base = jnp.where(peak == -jnp.inf, 0, peak)
    lead = lead_of(spec, own, base, magnitude)
    return lead.high + lead.low, exp_of_sum(lead)


def _moved(
    depth: Values | None, mass: Values, gap: Values, ratio: Values
) -> Values | None:
    """A sum of depths below a logit, as one below another that it is `gap` from."""
    if depth is None:
        return None
    return jnp.where(ratio == 0, 0, ratio * (depth + times_depth(mass, gap)))
