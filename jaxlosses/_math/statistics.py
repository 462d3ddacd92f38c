"""Logit statistics: the few numbers per example that every loss is a function of.

Nothing here subtracts two large numbers. The sum of exponentials is taken without the
entry that would be one (the label's, or those at the peak) and relative to the largest
of the rest, so it neither cancels nor underflows; both terms of `nll` are
non-negative. That is why a confident example keeps its digits.

How a row is read is a `Reading`; parts of the classes, read one after the other or by
several devices, are merged.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxlosses._elementary import exp, log1p
from jaxlosses._math import softcap, tails
from jaxlosses._math.classes import (
    Ids,
    Inputs,
    Mask,
    Spec,
    Values,
    Whole,
    count_of,
    expected,
    first,
    has_label,
    has_tail,
    is_id,
    is_label,
    label_ids,
    largest,
    masked,
    num_classes,
    targets_of,
    total,
    uniform_of,
)
from jaxlosses._math.pairs import Pair
from jaxlosses._math.tails import Tail
from jaxlosses._math.transform import (
    exp_of_sum,
    gap_of,
    lead_of,
    magnitude_of,
    scaled,
    signed_of,
)
from jaxlosses._types import Size


class Statistics(NamedTuple):
    """Statistics of each example, all of shape `K` in the accumulation dtype.

    `peak` is the largest logit, or a number near it, before cap and scale. It
    is taken for constant: the derivative of `lse = |scale| * cap(peak) + spread` is
    carried by `spread`. So it is with `depth`, which only the gradient of the entropy
    needs. Without labels `nll` is 0. Examples that do not count have zeros.

    `picks` are logits of some classes, before cap and scale, with these along the class
    axis; all else is then of the other classes, and `spread` is `-inf` where they have
    no probability.
    """

    peak: Values
    spread: Values
    nll: Values
    smooth: Values | None = None
    predicted: Ids | None = None
    entropy: Values | None = None
    depth: Values | None = None
    rank: Ids | None = None
    picks: Values | None = None


class Partial(NamedTuple):
    """What a loss on class ids needs of some of the classes; parts can be merged.

    Attributes:
        label: logit at the label, with the sign of the scale; `-inf` where the label
            is not among these classes.
        rival: the largest of the other logits, likewise.
        mass: sum over the others of `exp` of what they are behind `rival`, after cap
            and scale.
        slack: sum over classes of `u_j` times what they are behind the larger of
            `label` and `rival`, likewise; or None.
        share: sum of `u_j`, or None.
        predicted: lowest id of the largest logit, or None.
        tail: what the entropy needs of all of them, and a spread with all its digits;
            or None.
    """

    label: Values
    rival: Values
    mass: Values
    slack: Values | None = None
    share: Values | None = None
    predicted: Ids | None = None
    tail: Tail | None = None


class Reading(NamedTuple):
    """How the logits of an example are read.

    Attributes:
        partial: the label's logit, the largest of the others, and their mass, from
            the inputs, their signed logits and the magnitude of the scale; maybe what
            smoothing sums.
        tail: of all classes, from the same; maybe with what targets need.
    """

    partial: Callable[[Spec, Inputs, Values, Values | None], Partial]
    tail: Callable[[Spec, Inputs, Values, Values | None], Tail]


def _partial(
    spec: Spec, inputs: Inputs, signed: Values, magnitude: Values | None
) -> Partial:
    """The label's logit, and its rivals."""
    at_label = is_label(spec, inputs)
    label = _at_label(spec, inputs, signed, at_label)
    others = jnp.where(at_label, -jnp.inf, signed)
    rival, mass, _ = _rivals(spec, others, magnitude)
    return Partial(label, rival, mass)


def _at_label(spec: Spec, inputs: Inputs, a: Values, at_label: Mask) -> Values:
    """The entry at the label, `-inf` without one."""
    # A sum, since the maximum of XLA:CPU may lose a NaN.
    found = total(spec, jnp.where(at_label, a, 0))
    here = (inputs.labels >= 0) & (inputs.labels < count_of(spec, a.shape))
    return jnp.where(here, found, -jnp.inf)


def _rivals(
    spec: Spec, others: Values, magnitude: Values | None
) -> tuple[Values, Values, Values | None]:
    """The largest of some logits, and their sum of `exp` relative to it."""
    rival = largest(spec, others)
    # Without any, -inf - (-inf) would be NaN.
    gap = gap_of(spec, others, jnp.where(rival == -jnp.inf, 0, rival), of_sum=True)
    gap = scaled(gap, magnitude)
    terms = exp(gap)
    depth = total(spec, tails.times_depth(terms, gap)) if spec.entropy else None
    return rival, total(spec, terms), depth


PLAIN = Reading(_partial, functools.partial(tails.read, rivals=_rivals))


def normalize(
    spec: Spec, inputs: Inputs, reading: Reading = PLAIN
) -> tuple[Values, Tail]:
    """What turns logits into probabilities: `log p = gap - spread`.

    Returns:
        `gap = z - m`, of the logits' shape, `-inf` for a masked class; and the tail of
        all classes, of which `tails.spread_of` is the spread.
    """
    signed, magnitude = signed_of(inputs)
    tail = reading.tail(spec, inputs, signed, magnitude)
    peak = tails.proper(tail.peak)
    return scaled(gap_of(spec, signed, peak), magnitude), tail._replace(peak=peak)


def evaluate(spec: Spec, inputs: Inputs, reading: Reading = PLAIN) -> Statistics:
    """Statistics of every example: two reads of the logits, no second array."""
    smooth = predicted = None
    if spec.dense:
        gap, tail = normalize(spec, inputs, reading)
        peak, spread = tails.peak_and_spread(tail)
        nll = jnp.zeros_like(spread)
        if tail.slack is not None and tail.share is not None:
            nll = tail.slack + tail.share * spread
        elif inputs.labels is not None:
            nll = expected(spec, targets_of(inputs, gap.dtype), spread - gap)
        # With targets of zero, no term is left in which a NaN of the logits shows.
        nll = jnp.where(jnp.isnan(spread), spread, nll)
        found = with_entropy(Statistics(peak, spread, nll), tail)
    else:
        gap, found = _against_label(spec, inputs, reading)
    peak, spread = found.peak, found.spread
    if spec.smooth:
        smooth = _smooth(spec, inputs, gap, spread)
    if spec.predicted:
        at_peak = signed_of(inputs)[0] == peak
        predicted = jnp.where(jnp.isnan(spread), -1, first(spec, at_peak))
    found = found._replace(smooth=smooth, predicted=predicted)
    return counted_only(found, inputs.counted)


def _smooth(spec: Spec, inputs: Inputs, gap: Values, spread: Values) -> Values:
    """The mean surprise of all classes, each with what it weighs."""
    if inputs.where is None and inputs.class_weights is None:
        # One number for all: no product, and none of zero and infinity.
        return spread + total(spec, -gap) / num_classes(spec, inputs, gap.dtype)
    return expected(spec, uniform_of(spec, inputs, gap.dtype).target, spread - gap)


def _against_label(
    spec: Spec, inputs: Inputs, reading: Reading
) -> tuple[Values, Statistics]:
    """`gap`, and statistics from the label's logit and its rivals."""
    signed, magnitude = signed_of(inputs)
    part = reading.partial(spec, inputs, signed, magnitude)
    if has_tail(spec, inputs):
        part = part._replace(tail=reading.tail(spec, inputs, signed, magnitude))
    found = _finish(spec, part, magnitude, has_label(spec, inputs))
    return scaled(gap_of(spec, signed, found.peak, of_sum=True), magnitude), found


def with_entropy(found: Statistics, tail: Tail) -> Statistics:
    """The same with the entropy, if it is wanted: two terms of one sign."""
    depth = tails.depth_of(tail)
    if depth is None:
        return found
    # Where the label cannot be, all is NaN.
    depth = jnp.where(jnp.isnan(found.nll), jnp.nan, depth)
    return found._replace(entropy=found.spread + depth, depth=depth)


def partial(
    spec: Spec, inputs: Inputs, uniform: Values | None, reading: Reading = PLAIN
) -> Partial:
    """Reads a part of the classes.

    Args:
        spec: of whole classes: what devices hold is merged as other parts are.
        inputs: of these classes; labels count from the first of them.
        uniform: `u_j` of these classes, or None without smoothing.
        reading: how each example is read.
    """
    signed, magnitude = signed_of(inputs)
    part = reading.partial(spec, inputs, signed, magnitude)
    peak = jnp.maximum(part.label, part.rival)
    slack, share, predicted, tail = part.slack, part.share, None, None
    if has_tail(spec, inputs):
        tail = reading.tail(spec, inputs, signed, magnitude)
    if uniform is not None:
        base = jnp.where(peak == -jnp.inf, 0, peak)  # or -inf - (-inf) would be NaN
        slack = expected(
            spec, uniform, -scaled(gap_of(spec, signed, base, of_sum=True), magnitude)
        )
        share = total(spec, uniform)
    if spec.predicted:
        predicted = first(spec, signed == peak)
    return Partial(*part[:3], slack, share, predicted, tail)


def merge(spec: Spec, part: Partial, parts: Whole, inputs: Inputs) -> Partial:
    """The statistics of all classes from those of the parts.

    Args:
        spec: what is static.
        part: of each part.
        parts: how they come together, of which `max`, `min` and `sum` are used.
        inputs: of which the scale is used.
    """
    magnitude = None if inputs.scale is None else magnitude_of(inputs.scale)

    def below(top: Values, own: Values) -> Values:
        # Without any class, -inf - (-inf) would be NaN.
        base = jnp.where(top == -jnp.inf, 0, top)
        return scaled(gap_of(spec, own, base), magnitude)

    rival = parts.max(part.rival)
    # One part has the label, and a sum keeps its NaN.
    none = part.label == -jnp.inf
    label = parts.sum(jnp.where(none, 0, part.label))
    label = jnp.where(parts.min(none.astype(jnp.int32)) == 1, -jnp.inf, label)
    mass = parts.sum(part.mass * exp(below(rival, part.rival)))
    slack = share = predicted = None
    own = jnp.maximum(part.label, part.rival)
    peak = jnp.maximum(label, rival)
    if part.slack is not None and part.share is not None:
        # Infinite for a part without logits above -inf, as its slack is.
        moved = part.share * -below(peak, own)
        slack = parts.sum(part.slack + jnp.where(part.share == 0, 0, moved))
        share = parts.sum(part.share)
    if part.predicted is not None:
        found = (own == peak) & (part.predicted >= 0)
        nobody = jnp.iinfo(part.predicted.dtype).max
        predicted = parts.min(jnp.where(found, part.predicted, nobody))
    tail = part.tail
    if tail is not None:
        tail = tails.merge(spec, tail, parts, magnitude)
    return Partial(label, rival, mass, slack, share, predicted, tail)


def finish(spec: Spec, part: Partial, inputs: Inputs) -> Statistics:
    """Statistics from what is known of all classes; `inputs.logits` is not read."""
    magnitude = None if inputs.scale is None else magnitude_of(inputs.scale)
    found = _finish(spec, part, magnitude, inputs.labels >= 0)
    spread, smooth = found.spread, None
    if part.slack is not None and part.share is not None:
        smooth = part.slack + jnp.where(part.share == 0, 0, part.share * spread)
        smooth = jnp.where(jnp.isnan(spread), spread, smooth)
    predicted = part.predicted
    if predicted is not None:
        predicted = jnp.where(jnp.isnan(spread), -1, predicted)
    found = found._replace(smooth=smooth, predicted=predicted)
    return counted_only(found, inputs.counted)


def _finish(
    spec: Spec, part: Partial, magnitude: Values | None, is_label: Mask
) -> Statistics:
    """What follows from the label's logit, its rivals and the tail.

    With `r` the largest of the other logits and `S = sum_{j != y} exp(z_j - r)`,

        nll = log1p(S exp(r - z_y))                        label ahead
        nll = log1p(S - 1 + exp(z_y - r)) + (r - z_y)      label behind

    `S` is at least one, so nothing underflows, and every term is non-negative.
    """
    label, rival, mass = part.label, part.rival, part.mass
    peak = tails.proper(jnp.maximum(label, rival))
    lead = lead_of(spec, label, rival, magnitude)
    ahead = lead.high >= 0
    ratio = exp_of_sum(Pair(*(jnp.where(ahead, -a, a) for a in lead)))
    excess = jnp.where(ahead, mass * ratio, (mass - 1) + ratio)
    spread = log1p(jnp.where(jnp.isnan(peak), peak, excess))
    nll = spread - jnp.minimum(lead.high + lead.low, 0)
    nll = jnp.where(is_label, nll, jnp.nan)
    if part.tail is None:
        return Statistics(peak, spread, nll)
    # A rival may be a number near the peak, and `S - 1` has few digits.
    peak, spread = tails.peak_and_spread(part.tail)
    return with_entropy(Statistics(peak, spread, nll), part.tail)


def with_rank(spec: Spec, inputs: Inputs, found: Statistics) -> Statistics:
    """The same with the rank of the label, by one read more, if it is wanted."""
    if not spec.rank:
        return found
    label = signed_at_label(spec, inputs)
    number = spec.shards.sum(number_ahead(spec, inputs, label))
    return ranked(inputs, found, number, count_of(spec, inputs.logits.shape))


def ranked(inputs: Inputs, found: Statistics, number: Ids, of: Size) -> Statistics:
    """The same with so many classes ahead of the label: all, where it cannot be."""
    rank = jnp.where(jnp.isnan(found.nll), jnp.asarray(of, number.dtype), number)
    return found._replace(rank=masked(inputs.counted, rank))


def signed_at_label(spec: Spec, inputs: Inputs) -> Values:
    """The label's logit, with the sign of the scale; of a distribution, the arg max."""
    signed, _ = signed_of(inputs)
    at = is_id(spec, signed.shape, label_ids(spec, inputs))
    return total(spec, jnp.where(at, signed, 0))


def number_ahead(spec: Spec, inputs: Inputs, label: Values) -> Ids:
    """How many of the classes that are here have a larger logit."""
    ahead = signed_of(inputs)[0] > label
    return jnp.sum(ahead.astype(jnp.int32), spec.axes, keepdims=True)


def lse(spec: Spec, inputs: Inputs, statistics: Statistics) -> Values:
    """Log-sum-exp of the transformed logits; zero for what does not count."""
    # A NaN is in the spread as well; here it would be the slope of the scale.
    peak = masked(~jnp.isnan(statistics.peak), lax.stop_gradient(statistics.peak))
    peak, low = _transformed(spec, inputs, peak)
    return peak + (low + statistics.spread)


def label_logit(spec: Spec, inputs: Inputs) -> Values:
    """The label's logit after cap and scale, by one read."""
    z = _transformed(spec, inputs, signed_at_label(spec, inputs))
    return z.high + z.low


def _transformed(spec: Spec, inputs: Inputs, signed: Values) -> Pair:
    """`|scale| * cap(z)` of some logits with the sign of the scale."""
    z = Pair(signed, jnp.zeros_like(signed))
    if spec.softcap is not None:
        z = softcap.exact_difference(spec.softcap, *z)
    if inputs.scale is not None:
        magnitude = magnitude_of(inputs.scale)
        z = Pair(magnitude * z.high, magnitude * z.low)
    return z


def counted_only(statistics: Statistics, counted: Mask | None) -> Statistics:
    """Zeros for what does not count; an arg max is left as it is."""
    kept = jax.tree.map(
        lambda a: masked(counted, a), statistics._replace(predicted=None)
    )
    return kept._replace(predicted=statistics.predicted)
