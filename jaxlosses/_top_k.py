"""The loss of labels that name some of the classes: of a softmax of `K + 1` parts."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Integer

from jaxlosses import _options, _rows
from jaxlosses._combine import Example, Losses, Stats
from jaxlosses._math import picks, statistics, top_k
from jaxlosses._math.classes import (
    Ids,
    Inputs,
    Mask,
    Spec,
    Values,
    accumulation_dtype,
    count_of,
    first,
    masked,
    total,
)
from jaxlosses._math.statistics import Statistics
from jaxlosses._options import Static, Weighing
from jaxlosses._types import Shape

StatisticsOf = Callable[[Spec, Inputs], Statistics]

# In the place of logits, which only statistics read.
_none: Any = None
# Beside -1 for no class: an id that cannot be.
_INVALID = -2


def class_ids(
    spec: Spec, shape: Shape, ids: Integer[Array, "*B K"]
) -> Integer[Array, "*B K"]:
    """The ids as int32, with -1 for what pads and -2 for one that is no class."""
    pads = jnp.zeros(ids.shape, bool)
    if jnp.issubdtype(ids.dtype, jnp.signedinteger):
        pads = ids == -1
    found = _options.class_ids(spec, shape, ids)
    return jnp.where((found < 0) & ~pads, _INVALID, found)


def losses(
    static: Static,
    inputs: Inputs,
    weighing: Weighing,
    example: Example,
    statistics_of: StatisticsOf,
) -> Losses:
    """Losses, weighted, and what is wanted beside them.

    Args:
        static: which.
        inputs: with the ids of the labels as picks, and their probabilities as labels.
            Of logits that are not there the shape and dtype.
        weighing: the terms of a loss.
        example: what else is known of each example.
        statistics_of: what computes statistics.
    """
    kind, spec = static.top_k, static.spec
    assert kind is not None
    assert inputs.picks is not None
    dtype = accumulation_dtype(inputs.logits.dtype)
    given = masked(inputs.picks >= 0, inputs.labels.astype(dtype))
    named = top_k.distinct(inputs.picks, given)
    there = (named.ids >= 0) & picks.exists(spec, inputs.where, named.ids)
    cannot_be = (inputs.picks == _INVALID) | ((named.ids >= 0) & ~there)
    cannot_be = jnp.any(cannot_be, -1, keepdims=True)
    ids, probs = jnp.where(there, named.ids, -1), masked(there, named.probs)

    plain = dataclasses.replace(spec, predicted=False, entropy=False, rank=False)
    found = statistics_of(plain, inputs._replace(labels=None, picks=ids))
    assert found.picks is not None
    parts = top_k.Parts(found.picks, there, found.peak, found.spread, inputs.scale)
    whole = top_k.softmax(spec, True, parts)
    own = whole
    if kind.rest == "renormalize":
        own = top_k.softmax(spec, False, parts)
    is_left = _is_left(spec, inputs, there)
    labels, excess = top_k.targets(kind, probs, given, is_left)
    # What cannot be makes its example NaN, in the loss and in the whole gradient, and
    # so does a NaN of a logit that no label names.
    bad = cannot_be | jnp.isnan(whole.spread)
    bad = bad if inputs.counted is None else bad & inputs.counted
    poison = jnp.where(bad, jnp.nan, 0) * (whole.spread + found.nll)
    nll = top_k.cross_entropy(labels, own) + poison
    value = nll
    if kind.as_divergence:
        value = top_k.relative_entropy(labels, excess, own) + poison
    of_loss = statistics.counted_only(
        Statistics(whole.peak, whole.spread, value), inputs.counted
    )
    of_plain = dataclasses.replace(static, spec=plain)
    unread = inputs._replace(logits=_none)
    out = _options.losses(of_plain, unread, of_loss, weighing, example, _rows.Given())
    if not static.return_stats:
        return out
    named = top_k.Distinct(ids, probs)
    nll = masked(inputs.counted, nll)
    stats = _stats(static, inputs, named, nll, weighing, example, statistics_of)
    return out._replace(stats=stats)


def _is_left(spec: Spec, inputs: Inputs, there: Mask) -> Mask:
    """Whether there are classes that no label names."""
    named = jnp.sum(there.astype(jnp.int32), -1, keepdims=True)
    if inputs.where is None:
        return named < count_of(spec, inputs.logits.shape)
    return named < total(spec, inputs.where.astype(jnp.int32))


def _stats(
    static: Static,
    inputs: Inputs,
    named: top_k.Distinct,
    nll: Values,
    weighing: Weighing,
    example: Example,
    statistics_of: StatisticsOf,
) -> Stats:
    """Metrics, by a second read; the label is the class that is given most."""
    some = named.ids >= 0
    probs = jnp.where(some, named.probs, -jnp.inf)
    best = some & (probs == jnp.max(probs, -1, keepdims=True))
    nobody = jnp.iinfo(jnp.int32).max
    label = jnp.min(jnp.where(best, named.ids, nobody), -1, keepdims=True)
    label = jnp.where(label == nobody, _fallback(static.spec, inputs), label)
    spec = dataclasses.replace(static.spec, dense=False)
    static = dataclasses.replace(static, spec=spec)
    inputs = inputs._replace(labels=label, picks=None)
    found = statistics_of(spec, inputs)
    unread = inputs._replace(logits=_none)
    beside = _options.losses(static, unread, found, weighing, example, _rows.Given())
    assert beside.stats is not None
    stats = beside.stats
    correct = stats.correct & jnp.any(some, -1)
    stats = stats._replace(nll=jnp.squeeze(nll, spec.axes), correct=correct)
    return lax.stop_gradient(stats)


def _fallback(spec: Spec, inputs: Inputs) -> Ids:
    """A class that exists, in the place of a label that names none."""
    if inputs.where is None:
        return jnp.zeros((), jnp.int32)
    return first(spec, inputs.where)
