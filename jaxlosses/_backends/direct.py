"""A block of logits by their exponentials as they are: relative to no other logit.

The largest of those that are summed keeps a sum of exponentials from overflowing, and
from losing its digits where all underflow. Few logits are so large or so small that it
is needed for that; a sum shows whether they were (benchmarks/NOTES.md, "Exponentials as
they are").
"""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jaxlosses._backends import folds
from jaxlosses._backends.blocks import LARGEST_FOLD, Operands, in_folds
from jaxlosses._backends.once import gathered
from jaxlosses._elementary import exp
from jaxlosses._math import pairs
from jaxlosses._math.classes import (
    Inputs,
    Mask,
    Spec,
    Values,
    accumulation_dtype,
    is_label,
    targets_of,
)
from jaxlosses._math.statistics import Partial
from jaxlosses._math.tails import Tail
from jaxlosses._math.transform import (
    exp_of_sum,
    lead_of,
    magnitude_of,
    scaled,
    with_sign,
)
from jaxlosses._platform import in_memory

# Shorter rows cost more to begin with than is saved, and if they are no multiple of a
# fold those that are shorter than the second number.
FEWEST_CLASSES = (32, 256)
# Of a label or a peak, in nats. Beyond it, exponentials are relative to that.
_LARGEST_LABEL = 60
# Of a sum of exponentials, in nats above or below one; and of those relative to such
# a logit or of scaled ones, where what is 24 nats is rounded by 2^-20.
_LARGEST_LEVEL = (69, 24)
# Of how far a label is ahead of such a sum: more would underflow; and likewise, where
# there are no terms that are larger.
_LARGEST_LEAD = (80, 8)

# Entries of a fold with a mask, or of three sums: XLA:CPU unrolls no more operations.
_FOLD_OF_MORE = 5

# From its label, before a scale: a rounding of more would be felt by the scale's slope.
_FURTHEST = 32


def fewest(num_classes: int) -> int:
    """How many classes a row is to have."""
    even, uneven = FEWEST_CLASSES
    return even if in_folds(num_classes) == num_classes else uneven


def partial(
    spec: Spec, inputs: Inputs, signed: Values, magnitude: Values | None
) -> Partial:
    """What a loss on class ids needs of a block.

    In the place of a rival is a number near the logarithm of the sum of exponentials of
    the other classes. `are_safe` says whether the exponentials were fit.
    """
    num_classes = signed.shape[1]
    label = gathered(inputs, signed, spec)
    base = in_memory(_base_of(label, magnitude))
    middle = in_memory(jnp.where(jnp.isfinite(label), label, 0))

    def terms(of: slice) -> Operands:
        some, out = _signed(inputs, of), at_label[:, of]
        if inputs.where is not None:
            out |= ~inputs.where[:, of]
        # Of the label itself it may be infinite.
        mass = jnp.where(out, 0, exp(scaled(some - base, magnitude)))
        return (mass, middle - some) if spec.smooth else (mass,)

    at_label = is_label(spec, inputs)
    fold = LARGEST_FOLD if inputs.where is None else _FOLD_OF_MORE
    parts = [terms(cut) for cut in folds.cuts(num_classes, fold)]
    mass, *behind = folds.sums(parts, fold)
    if magnitude is None:
        rival, mass = _near(base, mass)
        part = Partial(label, rival, mass)
    else:
        # By a small scale the sum is a logit far from all others.
        away = (base - middle) + jnp.log(mass) / magnitude
        rival = middle + jnp.clip(away, -_FURTHEST, _FURTHEST)
        beside = exp_of_sum(lead_of(spec, base, rival, magnitude))
        part = Partial(label, rival, mass * beside)
    if not behind:
        return part
    slack = behind[0] / num_classes + (jnp.maximum(label, rival) - middle)
    return part._replace(slack=slack, share=jnp.ones_like(slack))


def tail(spec: Spec, inputs: Inputs, signed: Values, magnitude: Values | None) -> Tail:
    """What is below the largest of all classes; NaN where exponentials were not fit.

    Without a search for the second largest, to which they would be relative, and with
    what targets need.
    """
    peak = folds.largest(signed)
    near, far = _largest_levels(magnitude)
    most = _LARGEST_LABEL if magnitude is None else near
    base = in_memory(_base_of(peak, magnitude, most))
    highest = jnp.finfo(signed.dtype).max

    def terms(a: Values, *targets: Values) -> Operands:
        top = a == peak
        others = jnp.where(top, -jnp.inf, a)
        mass = exp(scaled(others - base, magnitude))
        found: Operands = mass, top.astype(a.dtype)
        if spec.entropy:
            # Of no mass the depth is finite, or their product would be NaN.
            behind = jnp.minimum(scaled(peak - others, magnitude), highest)
            found = *found, mass * behind
        for t in targets:
            slack = jnp.where(t == 0, 0, t * scaled(peak - a, magnitude))
            found = *found, t, slack
        return found

    has_targets = spec.dense and inputs.labels is not None
    targets = (targets_of(inputs, signed.dtype),) if has_targets else ()
    fold = _FOLD_OF_MORE if targets or spec.entropy else LARGEST_FOLD
    cuts = folds.cuts(signed.shape[1], fold)
    parts = [terms(signed[:, cut], *(t[:, cut] for t in targets)) for cut in cuts]
    mass, ties, *others = folds.sums(parts, fold)
    least = jnp.where(base == 0, math.exp(-near), math.exp(-far))
    fit = (mass > least) | ((mass >= 0) & (ties > 1))
    ratio = exp(scaled(base - peak, magnitude))
    ratio = jnp.where(fit & jnp.isfinite(peak), ratio, jnp.nan)
    depth = others.pop(0) * ratio if spec.entropy else None
    share, slack = others if targets else (None, None)
    return Tail(peak, (ties - 1) + mass * ratio, depth, slack, share)


def is_fit(tail: Tail) -> Array:
    """Whether exponentials were fit for the tail of every row."""
    return _hold(tail.excess >= 0, tail.excess < jnp.inf)


def _near(base: Values, mass: Values) -> tuple[Values, Values]:
    """A rival within `log(2)` of `base + log(mass)`, and the mass relative to it.

    Without a logarithm: a multiple of `log(2)`, whose roundings are of the mass.
    """
    n, mass = pairs.exponent_of(mass)
    high, low = pairs.constant(pairs.LOG_2, mass.dtype, jnp.finfo(mass.dtype).nmant - 7)
    rival = base + n * high
    lost = (n * high - (rival - base)) + n * low
    return rival, mass * (1 + lost * (1 + lost / 2))


def _signed(inputs: Inputs, of: slice) -> Values:
    """Some logits with the sign of the scale. A conversion is part of their loop."""
    logits = inputs.logits[:, of]
    return with_sign(logits.astype(accumulation_dtype(logits.dtype)), inputs.scale)[0]


def _base_of(
    logit: Values, magnitude: Values | None, most: int = _LARGEST_LABEL
) -> Values:
    """What exponentials are relative to: a logit, if it is so large, or zero."""
    far = (scaled(jnp.abs(logit), magnitude) > most) & jnp.isfinite(logit)
    return jnp.where(far, logit, 0)


def _largest_levels(magnitude: Values | None) -> tuple[int, int]:
    """That of exponentials as they are, and that of those relative to a logit."""
    plain, rounded = _LARGEST_LEVEL
    return (plain if magnitude is None else rounded), rounded


def are_safe(part: Partial, inputs: Inputs) -> Array:
    """Whether no exponential overflowed, and none that counts underflowed, in any row.

    NaN is not safe.
    """
    counted, scale = inputs.counted, inputs.scale
    magnitude = None if scale is None else magnitude_of(scale)
    base = _base_of(part.label, magnitude)
    level = scaled(part.rival - base, magnitude)
    lead = scaled(part.label - part.rival, magnitude)
    most = jnp.where(base == 0, *_largest_levels(magnitude))
    furthest = jnp.where(base == 0, *_LARGEST_LEAD)
    if magnitude is not None:
        left = jnp.log(part.mass)
        level, lead = level + left, lead - left
    near, ahead = jnp.abs(level) < most, lead < furthest
    if counted is not None:
        near, ahead = near | ~counted, ahead | ~counted
    if part.tail is not None:
        near &= part.tail.excess >= 0
    return _hold(near, ahead)


def _hold(first: Mask, second: Mask) -> Array:
    """Whether two masks hold everywhere.

    Two at once, since XLA:CPU would cut a reduction of one in pieces, each of which is
    compiled.
    """

    def both(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        return a[0] & b[0], a[1] & b[1]

    a, b = lax.reduce((first, second), (np.True_, np.True_), both, (0, 1))
    return a & b
