"""Logit statistics in one read: a reduction that needs no peak beforehand.

Of some classes are known their largest logit, and sums over the others relative to it.
That of two sets of classes is merged without a second look at any logit, so that a row
can be read in any order and by any number of lanes, once; see `sets`. Class ids leave
the label out, as `Partial` does; without them, differences are taken in twice the
digits.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxlosses._math import sets, tails
from jaxlosses._math.classes import (
    Inputs,
    Mask,
    Spec,
    Stacked,
    Values,
    Whole,
    accumulation_dtype,
    count_of,
    has_tail,
    ids_of_classes,
    is_label,
    masked,
    targets_of,
    uniform_of,
)
from jaxlosses._math.sets import NOBODY, Label, Mean, Some
from jaxlosses._math.statistics import (
    Partial,
    Statistics,
    counted_only,
    finish,
    merge,
    with_entropy,
)
from jaxlosses._math.tails import Tail
from jaxlosses._math.transform import signed_of
from jaxlosses._types import Size, Tree, are_numbers

# Classes of a tile, of which a slice of a row has a whole number.
_TILE = 128


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
    return tails.peak_and_spread(
        sets.tail_of(sets.across(spec, _read(spec, inputs, None)))
    )


def partial(spec: Spec, inputs: Inputs, uniform: Values | None) -> Partial:
    """What class ids need of a part of the classes, as of `statistics.partial`."""
    return _partial(spec, inputs, _read(spec, inputs, uniform))


def _of_distributions(spec: Spec, inputs: Inputs, uniform: Values | None) -> Statistics:
    some = sets.across(spec, _read(spec, inputs, uniform))
    peak, spread = tails.peak_and_spread(sets.tail_of(some))
    # With targets of zero, no term is left in which a NaN of the logits shows.
    means = [
        jnp.where(
            jnp.isnan(spread), spread, mean.slack + sets.times(mean.share, spread)
        )
        for mean in some.means
    ]
    if inputs.labels is None:
        means.insert(0, jnp.where(jnp.isnan(spread), spread, 0))
    nll, *others = means
    predicted = some.id
    if predicted is not None:
        predicted = jnp.where(jnp.isnan(spread), -1, predicted)
    smooth = others[0] if others else None
    found = Statistics(peak, spread, nll, smooth, predicted)
    return counted_only(with_entropy(found, sets.tail_of(some)), inputs.counted)


def _partial(spec: Spec, inputs: Inputs, some: Some) -> Partial:
    """The rivals of the label, and the label among them."""
    label = some.label
    assert label is not None
    here = (inputs.labels >= 0) & (inputs.labels < count_of(spec, inputs.logits.shape))
    at_label = jnp.where(here, label.logit, -jnp.inf)
    rival = jnp.where(some.excess < 0, -jnp.inf, some.top)
    part = Partial(at_label, rival, 1 + some.excess)
    if some.depth is not None:
        alone = jnp.where(at_label == -jnp.inf, -1, 0 * at_label)
        of_label = Tail(at_label, alone, jnp.zeros_like(alone))
        others = sets.tail_of(some)._replace(peak=rival)
        both = jax.tree.map(lambda *pair: jnp.stack(pair), others, of_label)
        magnitude = jax.tree.map(lambda a: a[None], some.magnitude)
        both = tails.merge(spec, both, Stacked(), magnitude)
        tail = jax.tree.map(lambda a: jnp.squeeze(a, 0), both)
        part = part._replace(tail=tail if spec.entropy else tail._replace(depth=None))
    if label.share is not None:
        (mean,) = some.means
        peak = jnp.maximum(at_label, rival)
        moved = sets.steps(spec, peak, some.top, some.magnitude, exact=False)[0]
        own = sets.steps(spec, peak, label.logit, some.magnitude, exact=False)[0]
        slack = (
            mean.slack + sets.times(mean.share, moved) + sets.times(label.share, own)
        )
        part = part._replace(slack=slack, share=mean.share + label.share)
    if some.id is not None:
        own = jnp.where(here, inputs.labels, NOBODY)
        lowest = jnp.where(at_label > rival, own, some.id)
        lowest = jnp.where(at_label == rival, jnp.minimum(some.id, own), lowest)
        lowest = jnp.where(lowest == NOBODY, -1, lowest)
        part = part._replace(predicted=lowest)
    return part


def _read(spec: Spec, inputs: Inputs, uniform: Values | None, slices: int = 1) -> Some:
    """What is known of the classes that are here, in one read."""
    exact = spec.dense or inputs.labels is None
    if exact:
        some = _each(spec, inputs, uniform)
    else:
        cut = _slices(spec, inputs, uniform, slices)
        some = sets.together(spec, [_each(spec, *part) for part in cut])
    leaves, tree = jax.tree.flatten(some)
    nothing = jax.tree.leaves(sets.nothing(some))

    def both(a: list[Array], b: list[Array]) -> list[Array]:
        merged = sets.merge(
            spec, jax.tree.unflatten(tree, a), jax.tree.unflatten(tree, b), exact
        )
        return jax.tree.leaves(merged)

    out = lax.reduce(leaves, nothing, both, spec.axes)
    out = [jnp.expand_dims(a, spec.axes) for a in out]
    result: Some = jax.tree.unflatten(tree, out)
    return result


def may_slice(spec: Spec, inputs: Inputs, number: int) -> bool:
    """Whether a row has so many slices; of distributions there is but one."""
    *others, axis = spec.axes
    size = inputs.logits.shape[axis]
    long = are_numbers(size) and size >= number * _TILE
    return number > 1 and not others and not spec.dense and long


def _slices(
    spec: Spec, inputs: Inputs, uniform: Values | None, number: int
) -> Iterator[tuple[Inputs, Values | None, Size, Mask | None]]:
    """The inputs in slices of the classes, and the arguments of `_each` beside them."""
    if not may_slice(spec, inputs, number):
        yield inputs, uniform, 0, None
        return
    (axis,) = spec.axes
    size = inputs.logits.shape[axis]
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
    excess = jnp.where(left_out, -1, 0).astype(dtype)
    has_fine = label is not None and has_tail(spec, inputs)
    some = Some(
        jnp.where(left_out, jnp.finfo(dtype).min, signed),
        excess,
        excess if has_fine else None,
        jnp.zeros_like(signed) if spec.entropy or has_fine else None,
        label,
        tuple(map(alone, distributions)),
        ids,
        magnitude,
    )
    return jax.tree.map(lambda a: jnp.broadcast_to(a, shape), some)
