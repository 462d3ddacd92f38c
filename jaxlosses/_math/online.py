"""Logit statistics in one read: a reduction that needs no peak beforehand.

Of some classes are known their largest logit, and sums over the others relative to it.
That of two sets of classes is merged without a second look at any logit, so that a row
can be read in any order and by any number of lanes, once. With `1` the set of the
larger top, and `d` what the other top is behind:

    top    = top1
    excess = excess1 + exp(-d) (1 + excess2)
    slack  = slack1 + slack2 + share2 d

One of the largest logits stays out of the excess, so nothing cancels in it however
small it is. The recurrence is that of Milakov and Gimelshein 2018 (arXiv:1805.02867),
made exact: class ids leave the label out, as `Partial` does; without them, differences
are taken in twice the digits.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxlosses._elementary import log1p
from jaxlosses._math import pairs
from jaxlosses._math.classes import (
    Ids,
    Inputs,
    Mask,
    Spec,
    Values,
    Whole,
    accumulation_dtype,
    count_of,
    ids_of_classes,
    is_label,
    masked,
    targets_of,
    uniform_of,
)
from jaxlosses._math.statistics import (
    Partial,
    Statistics,
    counted_only,
    finish,
    merge,
    proper,
)
from jaxlosses._math.transform import lead_of, scaled, signed_of
from jaxlosses._types import Size, Tree, are_numbers

_NOBODY = jnp.iinfo(jnp.int32).max

# Classes of a tile, of which a slice of a row has a whole number.
_TILE = 128


class Mean(NamedTuple):
    """What a distribution `t` over some classes adds up to.

    Attributes:
        slack: sum of `t_j` times what the classes are behind the top.
        share: sum of `t_j`.
    """

    slack: Values
    share: Values


class Label(NamedTuple):
    """What is known of the label, which the sums leave out; zeros where it is not.

    Attributes:
        logit: with the sign of the scale.
        found: 1 if it exists, or None where every class does.
        share: its `t_j`, or None.
    """

    logit: Values
    found: Values | None
    share: Values | None


class Some(NamedTuple):
    """What is known of some classes.

    Attributes:
        top: the largest logit, with the sign of the scale.
        excess: sum of `exp` of what the others are behind it; -1 for no class at all.
        label: of class ids, or None.
        means: of distributions.
        id: lowest id of the largest logit, or None.
        magnitude: of the scale, or None for one.
    """

    top: Values
    excess: Values
    label: Label | None
    means: tuple[Mean, ...]
    id: Ids | None
    magnitude: Values | None


def evaluate(spec: Spec, inputs: Inputs, slices: int = 1) -> Statistics:
    """The statistics of every example, as of `statistics.evaluate`.

    Args:
        spec: what is static.
        inputs: what they depend on.
        slices: of a row, which are merged class by class before the reduction, in
            whose steps most of the arithmetic is.
    """
    uniform = None
    if spec.smooth:
        dtype = accumulation_dtype(inputs.logits.dtype)
        uniform = uniform_of(spec, inputs, dtype).target
    if spec.dense:
        return _of_distributions(spec, inputs, uniform)
    some = _read(spec, inputs, uniform, slices)
    part = _partial(spec, inputs, some)
    if some.label is not None and some.label.found is not None:
        exists = spec.shards.sum(some.label.found) > 0
        inputs = inputs._replace(labels=jnp.where(exists, inputs.labels, -1))
    if spec.shards != Whole():
        part = merge(spec, part, spec.shards, inputs)
    return finish(spec, part, inputs)


def normalizer(spec: Spec, inputs: Inputs) -> tuple[Values, Values]:
    """`peak` and `spread`, as of `statistics.normalize`."""
    inputs = inputs._replace(labels=None)
    return _peak_and_spread(_across(spec, _read(spec, inputs, None)))


def partial(spec: Spec, inputs: Inputs, uniform: Values | None) -> Partial:
    """What class ids need of a part of the classes, as of `statistics.partial`."""
    return _partial(spec, inputs, _read(spec, inputs, uniform))


def _of_distributions(spec: Spec, inputs: Inputs, uniform: Values | None) -> Statistics:
    some = _across(spec, _read(spec, inputs, uniform))
    peak, spread = _peak_and_spread(some)
    # With targets of zero, no term is left in which a NaN of the logits shows.
    nll, *others = (
        jnp.where(jnp.isnan(spread), spread, mean.slack + _times(mean.share, spread))
        for mean in some.means
    )
    predicted = some.id
    if predicted is not None:
        predicted = jnp.where(jnp.isnan(spread), -1, predicted)
    smooth = others[0] if others else None
    statistics = Statistics(peak, spread, nll, smooth, predicted)
    return counted_only(statistics, inputs.counted)


def _peak_and_spread(some: Some) -> tuple[Values, Values]:
    # A NaN is larger than no logit, but it is in the sum.
    peak = proper(jnp.where(some.excess >= 0, some.top, jnp.nan))
    return peak, jnp.where(jnp.isnan(peak), peak, log1p(some.excess))


def _partial(spec: Spec, inputs: Inputs, some: Some) -> Partial:
    """The rivals of the label, and the label among them."""
    label = some.label
    assert label is not None
    here = (inputs.labels >= 0) & (inputs.labels < count_of(spec, inputs.logits.shape))
    at_label = jnp.where(here, label.logit, -jnp.inf)
    rival = jnp.where(some.excess < 0, -jnp.inf, some.top)
    part = Partial(at_label, rival, 1 + some.excess)
    if label.share is not None:
        (mean,) = some.means
        peak = jnp.maximum(at_label, rival)
        moved = _behind(spec, peak, some.top, some.magnitude, exact=False)[0]
        own = _behind(spec, peak, label.logit, some.magnitude, exact=False)[0]
        slack = mean.slack + _times(mean.share, moved) + _times(label.share, own)
        part = part._replace(slack=slack, share=mean.share + label.share)
    if some.id is not None:
        own = jnp.where(here, inputs.labels, _NOBODY)
        lowest = jnp.where(at_label > rival, own, some.id)
        lowest = jnp.where(at_label == rival, jnp.minimum(some.id, own), lowest)
        lowest = jnp.where(lowest == _NOBODY, -1, lowest)
        part = part._replace(predicted=lowest)
    return part


def _read(spec: Spec, inputs: Inputs, uniform: Values | None, slices: int = 1) -> Some:
    """What is known of the classes that are here, in one read."""
    exact = spec.dense or inputs.labels is None
    if exact:
        some = _each(spec, inputs, uniform)
    else:
        cut = _slices(spec, inputs, uniform, slices)
        some = _together(spec, [_each(spec, *part) for part in cut])
    leaves, tree = jax.tree.flatten(some)
    nothing = jax.tree.leaves(_nothing(some))

    def both(a: list[Array], b: list[Array]) -> list[Array]:
        merged = _merge(
            spec, jax.tree.unflatten(tree, a), jax.tree.unflatten(tree, b), exact
        )
        return jax.tree.leaves(merged)

    out = lax.reduce(leaves, nothing, both, spec.axes)
    out = [jnp.expand_dims(a, spec.axes) for a in out]
    result: Some = jax.tree.unflatten(tree, out)
    return result


def _slices(
    spec: Spec, inputs: Inputs, uniform: Values | None, number: int
) -> Iterator[tuple[Inputs, Values | None, Size, Mask | None]]:
    """The inputs in slices of the classes, and the arguments of `_each` beside them."""
    *others, axis = spec.axes
    size = inputs.logits.shape[axis]
    if number == 1 or others or not are_numbers(size) or size < number * _TILE:
        yield inputs, uniform, 0, None
        return
    length = -(-size // (number * _TILE)) * _TILE
    for begin in range(0, size, length):
        start = min(begin, size - length)

        def cut(a: Tree, start: int = start) -> Tree:
            if a is None or a.shape[axis] == 1:
                return a
            return lax.slice_in_dim(a, start, start + length, axis=axis)

        fresh = None
        if start < begin:  # the last slice has some classes of the one before
            dims = [length if i == axis else 1 for i in range(inputs.logits.ndim)]
            fresh = lax.broadcasted_iota(jnp.int32, dims, axis) >= begin - start
        piece = inputs._replace(
            logits=cut(inputs.logits),
            labels=inputs.labels - start,
            where=cut(inputs.where),
        )
        yield piece, cut(uniform), start, fresh


def _each(
    spec: Spec,
    inputs: Inputs,
    uniform: Values | None,
    start: Size = 0,
    fresh: Mask | None = None,
) -> Some:
    """Every class by itself.

    Args:
        spec: what is static.
        inputs: of some classes; labels count from the first of them.
        uniform: `u_j` of these classes, or None.
        start: id of the first of them.
        fresh: those that another slice does not have, or None for all.
    """
    signed, magnitude = signed_of(inputs)
    shape, dtype = signed.shape, signed.dtype
    if fresh is not None:
        signed = jnp.where(fresh, signed, -jnp.inf)
    distributions = [] if uniform is None else [masked(fresh, uniform)]
    label, left_out = None, signed == -jnp.inf
    if spec.dense and inputs.labels is not None:
        distributions.insert(0, targets_of(inputs, dtype))
    elif inputs.labels is not None:
        at_label = is_label(spec, inputs)
        at_label = at_label if fresh is None else at_label & fresh
        left_out |= at_label
        found = None
        if inputs.where is not None:
            found = jnp.where(at_label & inputs.where, 1, 0).astype(dtype)
        share = None if uniform is None else jnp.where(at_label, uniform, 0)
        label = Label(jnp.where(at_label, signed, 0), found, share)
        distributions = [jnp.where(at_label, 0, t) for t in distributions]

    def alone(t: Values) -> Mean:
        # Unlike `signed == -inf`, which XLA:GPU would write down for both uses.
        gone = (signed < jnp.finfo(dtype).min) & (t > 0)
        return Mean(jnp.where(gone, jnp.inf, 0).astype(dtype), t)

    # What is left out has ids as well: they count only where nothing else does.
    ids = ids_of_classes(spec, shape) + start if spec.predicted else None
    some = Some(
        jnp.where(left_out, jnp.finfo(dtype).min, signed),
        jnp.where(left_out, -1, 0).astype(dtype),
        label,
        tuple(map(alone, distributions)),
        ids,
        magnitude,
    )
    return jax.tree.map(lambda a: jnp.broadcast_to(a, shape), some)


def _nothing(like: Some) -> Some:
    """What is known of no class, in scalars of the dtypes of another one."""
    zeros = jax.tree.map(lambda a: jnp.zeros((), a.dtype), like)
    return zeros._replace(
        top=jnp.full_like(zeros.top, jnp.finfo(zeros.top.dtype).min),
        excess=jnp.full_like(zeros.excess, -1),
        id=None if like.id is None else jnp.full_like(zeros.id, _NOBODY),
    )


def _merge(spec: Spec, a: Some, b: Some, exact: bool) -> Some:
    """What is known of two sets of classes together, by one exponential."""
    a_leads = a.top >= b.top

    def larger(x: Array, y: Array) -> Array:
        return lax.select(a_leads, x, y)

    top = larger(a.top, b.top)
    magnitude = jax.tree.map(lax.max, a.magnitude, b.magnitude)
    behind, ratio = _behind(spec, top, larger(b.top, a.top), magnitude, exact)
    excess = larger(a.excess, b.excess) + ratio * (1 + larger(b.excess, a.excess))

    def together(x: Mean, y: Mean) -> Mean:
        moved = _times(larger(y.share, x.share), behind)
        return Mean(x.slack + y.slack + moved, x.share + y.share)

    lowest = None
    if a.id is not None and b.id is not None:
        lowest = lax.select(a.top == b.top, lax.min(a.id, b.id), larger(a.id, b.id))
    label = jax.tree.map(lax.add, a.label, b.label)
    means = tuple(map(together, a.means, b.means))
    return Some(top, excess, label, means, lowest, magnitude)


def _together(spec: Spec, parts: list[Some]) -> Some:
    """What is known of several sets together, where nothing is left out but labels."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    top = functools.reduce(jnp.maximum, (part.top for part in parts))
    magnitude = first.magnitude
    moved = [_behind(spec, top, p.top, magnitude, exact=False) for p in parts]
    masses = (r * (1 + p.excess) for p, (_, r) in zip(parts, moved, strict=True))
    mass = functools.reduce(jnp.add, masses)

    def mean(*means: Mean) -> Mean:
        slacks = (
            m.slack + _times(m.share, behind)
            for m, (behind, _) in zip(means, moved, strict=True)
        )
        slack = functools.reduce(jnp.add, slacks)
        return Mean(slack, functools.reduce(jnp.add, (m.share for m in means)))

    lowest = None
    if first.id is not None:
        ids = (
            jnp.where(p.top == top, p.id, _NOBODY) for p in parts if p.id is not None
        )
        lowest = functools.reduce(jnp.minimum, ids)
    label = jax.tree.map(lambda *a: sum(a), *(p.label for p in parts))
    means = tuple(map(mean, *(p.means for p in parts)))
    return Some(top, mass - 1, label, means, lowest, magnitude)


def _across(spec: Spec, some: Some) -> Some:
    """What is known of all classes, where devices hold parts of them."""
    shards = spec.shards
    if shards == Whole():
        return some
    top = shards.max(some.top)
    behind, ratio = _behind(spec, top, some.top, some.magnitude, exact=True)
    # Each leaves out one of its largest; of those at the top, one stays out.
    is_top = (some.top == top) & (some.excess >= 0)
    ties = shards.sum(is_top.astype(top.dtype))
    beyond = jnp.where(is_top, some.excess, ratio * (1 + some.excess))
    means = tuple(
        Mean(shards.sum(x.slack + _times(x.share, behind)), shards.sum(x.share))
        for x in some.means
    )
    lowest = some.id
    if lowest is not None:
        lowest = shards.min(jnp.where(is_top, lowest, _NOBODY))
    excess = shards.sum(beyond) + (ties - 1)
    return Some(top, excess, None, means, lowest, some.magnitude)


def _behind(
    spec: Spec, top: Values, other: Values, magnitude: Values | None, exact: bool
) -> tuple[Values, Values]:
    """How far a logit is behind a larger one, and `exp` of that.

    Rounded, a difference of 80 nats is an error of 4e-6 of its exponential.
    """
    if spec.softcap is None and not exact:
        gap = scaled(other - top, magnitude)
        return -gap, lax.exp(gap)
    gap, low = pairs.add_to_larger(*lead_of(spec, other, top, magnitude))
    low = jnp.where(jnp.isfinite(low), low, 0)
    return -gap, lax.exp(gap) * (1 + low)


def _times(share: Values, behind: Values) -> Values:
    """Their product, with `0 * inf = 0`."""
    return jnp.where(share == 0, 0, share * behind)
