"""What is known of some classes, merged in any order and by any number of lanes.

With `1` the set of the larger top, and `d` what the other top is behind:

    top    = top1
    excess = excess1 + exp(-d) (1 + excess2)
    depth  = depth1 + exp(-d) (depth2 + (1 + excess2) d)
    slack  = slack1 + slack2 + share2 d

One of the largest logits stays out of the excess, so nothing cancels in it however
small it is. The recurrence is that of Milakov and Gimelshein 2018 (arXiv:1805.02867),
made exact.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxlosses._math import pairs, tails
from jaxlosses._math.classes import Ids, Spec, Values, Whole
from jaxlosses._math.tails import Tail
from jaxlosses._math.transform import lead_of, scaled

NOBODY = jnp.iinfo(jnp.int32).max


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
        fine: the same with all digits, where it is wanted beside class ids, or None.
        depth: the same sum, each times what it is behind, or None.
        label: of class ids, or None.
        means: of distributions.
        id: lowest id of the largest logit, or None.
        magnitude: of the scale, or None for one.
    """

    top: Values
    excess: Values
    fine: Values | None
    depth: Values | None
    label: Label | None
    means: tuple[Mean, ...]
    id: Ids | None
    magnitude: Values | None


def nothing(like: Some) -> Some:
    """What is known of no class, in scalars of the dtypes of another one."""
    zeros = jax.tree.map(lambda a: jnp.zeros((), a.dtype), like)
    return zeros._replace(
        top=jnp.full_like(zeros.top, jnp.finfo(zeros.top.dtype).min),
        excess=jnp.full_like(zeros.excess, -1),
        fine=jax.tree.map(lambda a: jnp.full_like(a, -1), zeros.fine),
        id=None if like.id is None else jnp.full_like(zeros.id, NOBODY),
    )


def tail_of(some: Some) -> Tail:
    """The same without labels and distributions."""
    return Tail(some.top, some.excess if some.fine is None else some.fine, some.depth)


def merge(spec: Spec, a: Some, b: Some, exact: bool) -> Some:
    """What is known of two sets of classes together, by one exponential.

    Args:
        spec: what is static.
        a: of one set.
        b: of another.
        exact: differences of logits in twice the digits.
    """

    def larger(x: Some, y: Some) -> Some:
        return jax.tree.map(functools.partial(lax.select, a.top >= b.top), x, y)

    first, second = larger(a, b), larger(b, a)
    magnitude = jax.tree.map(lax.max, a.magnitude, b.magnitude)
    behind, ratio = steps(spec, first.top, second.top, magnitude, exact)
    excess = first.excess + ratio * (1 + second.excess)
    fine = depth = None
    if first.depth is not None and second.depth is not None:
        more = second.excess
        if first.fine is not None and second.fine is not None:
            more = second.fine
            behind, ratio = steps(spec, first.top, second.top, magnitude, exact=True)
            fine = first.fine + ratio * (1 + more)
        depth = second.depth + times(1 + more, behind)
        depth = first.depth + times(ratio, depth)

    def together(x: Mean, y: Mean) -> Mean:
        moved = times(y.share, behind)
        return Mean(x.slack + y.slack + moved, x.share + y.share)

    lowest = first.id
    if a.id is not None and b.id is not None and lowest is not None:
        lowest = lax.select(a.top == b.top, lax.min(a.id, b.id), lowest)
    label = jax.tree.map(lax.add, a.label, b.label)
    means = tuple(map(together, first.means, second.means))
    return Some(first.top, excess, fine, depth, label, means, lowest, magnitude)


def together(spec: Spec, parts: list[Some]) -> Some:
    """What is known of several sets together, where nothing is left out but labels."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    top = functools.reduce(jnp.maximum, (part.top for part in parts))
    magnitude = first.magnitude
    moved = [steps(spec, top, p.top, magnitude, exact=False) for p in parts]
    masses = (r * (1 + p.excess) for p, (_, r) in zip(parts, moved, strict=True))
    mass = functools.reduce(jnp.add, masses)

    def mean(*means: Mean) -> Mean:
        slacks = (
            m.slack + times(m.share, behind)
            for m, (behind, _) in zip(means, moved, strict=True)
        )
        slack = functools.reduce(jnp.add, slacks)
        return Mean(slack, functools.reduce(jnp.add, (m.share for m in means)))

    lowest = None
    if first.id is not None:
        ids = (jnp.where(p.top == top, p.id, NOBODY) for p in parts if p.id is not None)
        lowest = functools.reduce(jnp.minimum, ids)
    fine = depth = None
    if first.fine is not None:  # `mass - 1` has few digits
        one = functools.reduce(functools.partial(merge, spec, exact=False), parts)
        fine, depth = one.fine, one.depth
    label = jax.tree.map(lambda *a: sum(a), *(p.label for p in parts))
    means = tuple(map(mean, *(p.means for p in parts)))
    return Some(top, mass - 1, fine, depth, label, means, lowest, magnitude)


def across(spec: Spec, some: Some) -> Some:
    """What is known of all classes, where devices hold parts of them."""
    shards = spec.shards
    if shards == Whole():
        return some
    tail = tails.merge(spec, tail_of(some), shards, some.magnitude)
    top = tail.peak
    behind, _ = steps(spec, top, some.top, some.magnitude, exact=True)
    means = tuple(
        Mean(shards.sum(x.slack + times(x.share, behind)), shards.sum(x.share))
        for x in some.means
    )
    lowest = some.id
    if lowest is not None:
        here = (some.top == top) & (some.excess >= 0)
        lowest = shards.min(jnp.where(here, lowest, NOBODY))
    return Some(
        tail.peak, tail.excess, None, tail.depth, None, means, lowest, some.magnitude
    )


def steps(
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


def times(share: Values, behind: Values) -> Values:
    """Their product, with `0 * inf = 0`."""
    return jnp.where(share == 0, 0, share * behind)
