"""Some of the classes by id, and all others as one: a softmax of `K + 1` parts.

What a label says of `K` classes depends on their logits, and on what the others have
together, which is summed over them and never taken for what is left. Notation, for one
example with parts `i`, the last of which is the rest:

    x_i    what a part is ahead of the largest logit `m`, after cap and scale
    nll_i  = log sum_j exp(x_j - x_i)
"""

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxlosses._elementary import expm1, log1p
from jaxlosses._math import pairs, ratios, softcap
from jaxlosses._math.classes import Ids, Mask, Spec, Values, masked
from jaxlosses._math.pairs import Pair
from jaxlosses._math.tails import proper
from jaxlosses._math.transform import exp_of_sum, gap_of, lead_of, scaled, with_sign

Rest = Literal["ignore", "bucket", "renormalize"]


@dataclasses.dataclass(frozen=True)
class TopK:
    """What is static about labels of some classes.

    Attributes:
        rest: what becomes of the classes that they do not name.
        as_divergence: whether their entropy is subtracted.
    """

    rest: Rest
    as_divergence: bool


class Distinct(NamedTuple):
    """Labels of some classes, of which none is named twice.

    Attributes:
        ids: -1 for none.
        probs: 0 for none.
    """

    ids: Ids
    probs: Values


class Parts(NamedTuple):
    """What a softmax of some classes and the rest depends on.

    Attributes:
        picks: logits of the classes, `B... K`.
        exists: which of them there are, likewise.
        peak: the largest logit of the rest, with the sign of the scale; a constant.
        spread: of the rest, `-inf` without one.
        scale: as in `Inputs`.
    """

    picks: Values
    exists: Mask
    peak: Values
    spread: Values
    scale: Values | None


class Softmax(NamedTuple):
    """Of each part `-log p` and `p`, and of all the largest logit and what is beyond.

    `peak` and `spread` are those of `Statistics`.
    """

    nll: Values
    p: Values
    peak: Values
    spread: Values


# --- Labels


def distinct(ids: Ids, probs: Values) -> Distinct:
    """Every class once, where it is named first, with all that it is given."""
    same = (ids[..., :, None] == ids[..., None, :]) & (ids >= 0)[..., None]
    one, other = (
        lax.broadcasted_iota(jnp.int32, same.shape, ids.ndim - i) for i in (1, 0)
    )
    earlier = other < one
    first = (ids >= 0) & ~jnp.any(same & earlier, -1)
    merged = jnp.sum(jnp.where(same, probs[..., None, :], 0), -1)
    return Distinct(jnp.where(first, ids, -1), masked(first, merged))


def targets(
    static: TopK, probs: Values, given: Values, is_left: Mask
) -> tuple[Values, Values]:
    """The label of each part, and by how much they are more than one.

    Args:
        static: which.
        probs: of the classes that are named.
        given: the terms of these, whose sum is not rounded.
        is_left: whether there are others.
    """
    none = jnp.zeros_like(is_left, dtype=probs.dtype)
    if static.rest == "renormalize":
        return jnp.concatenate([_normalized(probs), none], -1), none
    left = _left(given)
    rest = none
    if static.rest == "bucket":
        rest = jnp.where(is_left & (left > 0), left, 0)
    return jnp.concatenate([probs, rest], -1), -(left - rest)


@jax.custom_jvp
def _normalized(probs: Values) -> Values:
    """Divided by their sum, without any left as they are."""
    mass = jnp.sum(probs, -1, keepdims=True)
    return probs / jnp.where(mass == 0, 1, mass)


@_normalized.defjvp
def _normalized_jvp(
    primals: tuple[Values], tangents: tuple[Values]
) -> tuple[Values, Values]:
    """Of a single one exactly nothing, which the slope of a quotient is not."""
    (probs,), (d_probs,) = primals, tangents
    mass = jnp.sum(probs, -1, keepdims=True)
    own = _normalized(probs)
    d = d_probs - own * jnp.sum(d_probs, -1, keepdims=True)
    return own, jnp.where(mass == 0, 0, d / jnp.where(mass == 0, 1, mass))


def _left(probs: Values) -> Values:
    """`1 - sum(probs)`: of digits that add up exactly, and of what they leave."""
    one = 2.0 ** (jnp.finfo(probs.dtype).nmant // 2)
    high = jnp.round(probs * one) / one
    low = probs - high
    return (1 - jnp.sum(high, -1, keepdims=True)) - jnp.sum(low, -1, keepdims=True)


# --- The softmax of the parts


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def softmax(spec: Spec, has_rest: bool, parts: Parts) -> Softmax:
    """The softmax of the parts, without the rest if it is left out.

    No two large numbers are subtracted: the sum is that of all parts but the largest.
    """
    x, peak = _ahead(spec, parts)
    if not has_rest:
        x = Pair(_without_rest(x.high), x.low)
    size = x.high + x.low
    place = lax.broadcasted_iota(jnp.int32, size.shape, size.ndim - 1)
    is_top = place == jnp.argmax(size, -1, keepdims=True).astype(place.dtype)

    def at_top(a: Values) -> Values:
        return jnp.sum(jnp.where(is_top, a, 0), -1, keepdims=True)

    top = Pair(at_top(x.high), at_top(x.low))
    # Without any, -inf - (-inf) would be NaN.
    top = top._replace(high=jnp.where(top.high == -jnp.inf, 0, top.high))
    behind = _finite(pairs.add_pairs(x, Pair(-top.high, -top.low)))
    others = jnp.where(is_top, 0, exp_of_sum(behind))
    sum_of_others = jnp.sum(others, -1, keepdims=True)
    spread = log1p(sum_of_others)
    nll = jnp.where(is_top, spread, spread - (behind.high + behind.low))
    p = jnp.where(is_top, exp_of_sum(behind), others) / (1 + sum_of_others)
    # Infinity, for what there is none of, would be a cotangent of its label.
    some = _some(parts, has_rest)
    nll, p = masked(some, nll), masked(some, p)
    return Softmax(nll, p, peak, (top.high + top.low) + spread)


@softmax.defjvp
def _softmax_jvp(
    spec: Spec, has_rest: bool, primals: tuple[Parts], tangents: tuple[Parts]
) -> tuple[Softmax, Softmax]:
    (parts,), (d_parts,) = primals, tangents
    found = softmax(spec, has_rest, parts)
    d_x = _d_ahead(spec, parts, d_parts, found.peak)
    d_x = d_x if has_rest else _without_rest(d_x, 0.0)
    moved = found.p * d_x
    number = moved.shape[-1]
    others = jnp.ones((number, number), moved.dtype) - jnp.eye(
        number, dtype=moved.dtype
    )
    d_nll = jnp.dot(moved, others, precision=lax.Precision.HIGHEST)
    d_nll = masked(_some(parts, has_rest), d_nll + expm1(-found.nll) * d_x)
    d_spread = jnp.sum(moved, -1, keepdims=True)
    d_peak = jnp.zeros_like(found.peak)
    return found, Softmax(d_nll, -found.p * d_nll, d_peak, d_spread)


def _some(parts: Parts, has_rest: bool) -> Mask:
    """Which parts there are; of a rest of no classes it is not asked."""
    rest = jnp.full((*parts.exists.shape[:-1], 1), has_rest)
    return jnp.concatenate([parts.exists, rest], -1)


def _ahead(spec: Spec, parts: Parts) -> tuple[Pair, Values]:
    """`x_i`, and the largest logit with the sign of the scale."""
    signed, peak, magnitude = _signed(parts)
    both = jnp.concatenate([signed, peak], -1)
    largest = jnp.max(both, -1, keepdims=True)
    # A maximum of XLA:CPU may lose a NaN.
    largest = jnp.where(jnp.any(jnp.isnan(both), -1, keepdims=True), jnp.nan, largest)
    largest = proper(largest)
    lead = lead_of(spec, both, largest, magnitude)
    more = jnp.concatenate([jnp.zeros_like(signed), parts.spread], -1)
    return _finite(pairs.add_pairs(lead, pairs.of(more))), largest


def _d_ahead(spec: Spec, parts: Parts, d_parts: Parts, largest: Values) -> Values:
    """The tangent of `x_i`, with the largest logit held."""
    d_picks = masked(parts.exists, d_parts.picks)
    if spec.softcap is not None:
        d_picks = softcap.slope(spec.softcap, parts.picks) * d_picks
    d_spread = masked(parts.spread != -jnp.inf, d_parts.spread)
    d_x = jnp.concatenate([scaled(d_picks, parts.scale), d_spread], -1)
    if parts.scale is None or d_parts.scale is None:
        return d_x
    signed, peak, _ = _signed(parts)
    both = jnp.concatenate([signed, peak], -1)
    gap = gap_of(spec, both, lax.stop_gradient(largest))
    gap = jnp.where(both == -jnp.inf, 0, gap)
    moved: Values = jnp.where(parts.scale < 0, -gap, gap) * d_parts.scale
    return d_x + moved


def _signed(parts: Parts) -> tuple[Values, Values, Values | None]:
    """Logits of both with the sign of the scale, `-inf` for none; its magnitude."""
    signed, magnitude = with_sign(parts.picks, parts.scale)
    peak = jnp.where(parts.spread == -jnp.inf, -jnp.inf, parts.peak)
    return jnp.where(parts.exists, signed, -jnp.inf), peak, magnitude


def _without_rest(a: Values, instead: float = -jnp.inf) -> Values:
    return jnp.concatenate([a[..., :-1], jnp.full_like(a[..., -1:], instead)], -1)


def _finite(x: Pair) -> Pair:
    return x._replace(low=masked(jnp.isfinite(x.high), x.low))


# --- Losses of the parts


@jax.custom_jvp
def cross_entropy(labels: Values, found: Softmax) -> Values:
    """`sum_i q_i nll_i` with `0 * inf = 0`; by a label, `nll_i` also where it is 0."""
    terms = jnp.where(labels == 0, 0, labels * found.nll)
    return jnp.sum(terms, -1, keepdims=True)


@cross_entropy.defjvp
def _cross_entropy_jvp(
    primals: tuple[Values, Softmax], tangents: tuple[Values, Softmax]
) -> tuple[Values, Values]:
    (labels, found), (d_labels, d_found) = primals, tangents
    d = labels * d_found.nll + found.nll * d_labels
    return cross_entropy(labels, found), jnp.sum(d, -1, keepdims=True)


@jax.custom_jvp
def relative_entropy(labels: Values, excess: Values, found: Softmax) -> Values:
    """`sum_i q_i (log q_i + nll_i)`, by terms that are not negative.

    They are `q (d + exp(-d) - 1)` with `d = log q - log p`, whose sum is less by
    `excess`, what the labels are more than one. Where those of less than one, with no
    class left, make it negative, it is 0.
    """
    is_some = labels > 0
    own = jnp.where(is_some, labels, 1)
    ratio = (found.p - own) / own
    far = jnp.log(own) + found.nll
    lead = jnp.where(jnp.abs(ratio) < 0.5, -log1p(jnp.clip(ratio, -0.5, 0.5)), far)
    lead = jnp.where(is_some, lead, -jnp.inf)
    terms, _ = ratios.relative_entropy(labels, found.p, lead)
    return jnp.maximum(jnp.sum(terms, -1, keepdims=True) + excess, 0)


@relative_entropy.defjvp
def _relative_entropy_jvp(
    primals: tuple[Values, Values, Softmax], tangents: tuple[Values, Values, Softmax]
) -> tuple[Values, Values]:
    (labels, excess, found), (d_labels, _, d_found) = primals, tangents
    # At a label of 0 that of its entropy is infinite, and left out.
    none = labels == 0
    of_entropy = jnp.where(none, 0, jnp.log(jnp.where(none, 1, labels)) + 1)
    by_label = of_entropy + found.nll
    d = labels * d_found.nll + by_label * d_labels
    return relative_entropy(labels, excess, found), jnp.sum(d, -1, keepdims=True)
