"""Given logits on a CPU: rows in blocks that are read again from cache.

Four readings: `once.FEW` of plain logits of few classes, class by class; `once.ONCE` of
few plain logits; `BLOCK` of rows in cache, by reductions that are fast there; `DIRECT`
the same without a search for the largest logit. What each gains, and how it was found,
is in benchmarks/NOTES.md.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jaxtyping import Array

from jaxlosses._backends import direct, folds, once
from jaxlosses._backends.blocks import by_rows, each, rows_of_block, short_rows
from jaxlosses._backends.once import gathered, in_rows, labels_that_exist
from jaxlosses._math import statistics, tails
from jaxlosses._math.classes import (
    Inputs,
    Spec,
    Values,
    count_of,
    expected,
    is_label,
    largest,
    targets_of,
    total,
)
from jaxlosses._math.divergence import evaluate as evaluate_divergence
from jaxlosses._math.statistics import Partial, Reading, Statistics
from jaxlosses._math.tails import Tail
from jaxlosses._math.teacher import Found, Operands, Rule
from jaxlosses._math.transform import gap_of, scaled, signed_of
from jaxlosses._platform import in_memory
from jaxlosses._types import Size, Tree

Result = TypeVar("Result")

# Up to so many classes, what is done with each is written out.
FEW_CLASSES = 26

# Where only sums are written, a block may be so many times as large (NOTES.md, "Each
# block decides").
LARGER = 2

# Up to so many plain logits are read at once.
FEW_LOGITS = 2**15


def evaluate(
    spec: Spec, inputs: Inputs, rows: int | None = None, directly: bool = True
) -> Statistics:
    """Statistics by blocks of rows, each small enough to be read again from cache.

    Args:
        spec: with the class axis last.
        inputs: any batch axes.
        rows: of a block; None for as many as fit.
        directly: whether rows may be read without a search for the largest logit.
    """
    *batch, num_classes = inputs.logits.shape
    directly = directly and _suits_direct(spec, inputs)
    weights = inputs.where, inputs.class_weights
    uneven = spec.smooth and weights != (None, None)
    one_axis = dataclasses.replace(spec, axes=(1,))
    inputs = in_rows(inputs)
    if inputs.where is not None and not (spec.dense or uneven):
        inputs = inputs._replace(labels=labels_that_exist(inputs))
    num_rows = len(inputs.logits)
    rows = rows_of_block(num_classes) if rows is None else rows
    if num_classes <= FEW_CLASSES and _is_plain(spec, inputs):
        out = _of_few(one_axis, inputs)
    elif shares_terms(one_axis, inputs, rows):
        part = statistics.partial(one_axis, inputs, None, once.ONCE)
        out = statistics.finish(one_axis, part, inputs)
    elif spec.dense or uneven:
        of_block = functools.partial(_evaluate, one_axis)
        out = by_rows(of_block, inputs, num_rows, rows)
    else:
        read = _read_directly if directly else _read
        if directly:
            rows *= LARGER
        part = by_rows(functools.partial(read, one_axis), inputs, num_rows, rows)
        # What is left to do per row takes a single loop, and not one per block.
        out = statistics.finish(one_axis, part, inputs)
    return jax.tree.map(lambda a: a.reshape(*batch, 1), out)


def divergence(rule: Rule, operands: Operands) -> Found:
    """Divergences by blocks of rows, likewise."""
    *batch, num_classes = operands.student.shape
    rule = dataclasses.replace(rule, spec=dataclasses.replace(rule.spec, axes=(1,)))
    operands = in_rows(operands)

    def of_block(block: Callable[[], Operands]) -> Found:
        return evaluate_divergence(rule, _peak_and_spread, block(), _totals)

    rows = rows_of_block(4 * num_classes)  # of both, and of their probabilities
    found = by_rows(of_block, operands, len(operands.student), rows)
    return jax.tree.map(lambda a: a.reshape(*batch, 1), found)


def shares_terms(spec: Spec, inputs: Inputs, rows: int | None = None) -> bool:
    """Whether the gradient takes the exponentials that the statistics took."""
    *batch, num_classes = inputs.logits.shape
    rows = rows_of_block(num_classes) if rows is None else rows
    num_rows = math.prod(batch)
    fits = num_rows <= rows
    if num_classes >= direct.fewest(num_classes):
        fits &= num_rows * num_classes <= FEW_LOGITS
    unmasked = inputs._replace(where=None)
    return fits and num_classes > FEW_CLASSES and _is_plain(spec, unmasked)


def _of_few(spec: Spec, inputs: Inputs) -> Statistics:
    out = statistics.evaluate(spec, inputs, once.FEW)
    if inputs.logits.dtype.itemsize == 2 and inputs.logits.shape[1] < 16:
        return out  # converted one by one: no reduction is fast
    # By a reduction: a comparison of columns would be made anew for each class of the
    # gradient (NOTES.md, "The peak of few classes by a reduction").
    peak = tails.proper(largest(spec, signed_of(inputs)[0]))
    if inputs.counted is not None:
        peak = jnp.where(inputs.counted, peak, 0)
    return out._replace(peak=peak)


def _evaluate(spec: Spec, block: Callable[[], Inputs]) -> Statistics:
    """All that is asked about each row of a block."""
    return statistics.evaluate(spec, block(), _in_cache(block))


def _in_cache(block: Callable[[], Inputs]) -> Reading:
    """`BLOCK`, with a tail by exponentials as they are where that is possible."""
    return BLOCK._replace(tail=functools.partial(_tail_directly, block))


def _tail_directly(
    block: Callable[[], Inputs],
    spec: Spec,
    inputs: Inputs,
    signed: Values,
    magnitude: Values | None,
) -> Tail:
    """The tail of a block as it is cut out, read again where that was not fit."""
    if not _in_folds(spec, signed):
        return _tail_in_cache(spec, inputs, signed, magnitude)
    tail = direct.tail(spec, inputs, signed, magnitude)

    def again() -> Tail:
        # Cut out anew: as an operand of both branches a block would be copied.
        inputs = block()
        signed, magnitude = signed_of(inputs)
        found = _tail_in_cache(spec, inputs, signed, magnitude)
        if tail.share is None:
            return found
        behind = -scaled(gap_of(spec, signed, found.peak), magnitude)
        slack = expected(spec, targets_of(inputs, signed.dtype), behind)
        return found._replace(slack=slack, share=tail.share)

    out: Tail = lax.cond(direct.is_fit(tail), lambda: tail, again)
    return out


def _in_folds(spec: Spec, signed: Values) -> bool:
    """Whether rows are long enough for folds; a cap is too many operations for them."""
    num_classes = signed.shape[1]
    return spec.softcap is None and num_classes >= direct.fewest(num_classes)


def _read(
    spec: Spec, block: Callable[[], Inputs], label: Values | None = None
) -> Partial:
    """What a loss on class ids needs of each row of a block.

    Its label is known where exponentials as they are were not fit.
    """
    inputs = block()
    if label is None:
        reading = _in_cache(block)
    else:
        reading = BLOCK._replace(partial=functools.partial(_beside, label))
    return _with_slack(spec, inputs, statistics.partial(spec, inputs, None, reading))


def _with_slack(spec: Spec, inputs: Inputs, part: Partial) -> Partial:
    """The same with what smoothing needs, where all classes weigh the same.

    A plain sum, for which XLA:CPU has a library.
    """
    if not spec.smooth:
        return part
    signed, magnitude = signed_of(inputs)
    peak = jnp.maximum(part.label, part.rival)
    base = jnp.where(peak == -jnp.inf, 0, peak)
    behind = -scaled(gap_of(spec, signed, base, of_sum=True), magnitude)
    slack = total(spec, behind) / count_of(spec, signed.shape)
    return part._replace(slack=slack, share=jnp.ones_like(slack))


def _read_directly(spec: Spec, block: Callable[[], Inputs]) -> Partial:
    """The same without a search for the largest, if no logit is too large for that."""
    inputs = block()
    part = statistics.partial(spec, inputs, None, DIRECT)
    safe = direct.are_safe(part, inputs)
    # Cut out anew: as an operand of both branches a block would be copied.
    out: Partial = lax.cond(safe, lambda: part, lambda: _read(spec, block, part.label))
    return out


def in_blocks(
    spec: Spec, may_block: Callable[[Spec, Inputs], bool]
) -> Callable[[Inputs], Statistics]:
    """`evaluate` for a spec, of which `vmap` makes one of more rows."""
    blocked = custom_vmap(functools.partial(evaluate, spec))

    @blocked.def_vmap
    def of_more_rows(
        size: Size, mapped: list[Inputs], inputs: Inputs
    ) -> tuple[Statistics, Tree]:
        (is_mapped,) = mapped
        more = dataclasses.replace(spec, axes=tuple(axis + 1 for axis in spec.axes))
        rows = _with_rows(size, is_mapped, inputs)
        if rows is not None and may_block(more, rows):
            out = in_blocks(more, may_block)(rows)
        else:
            in_axes = jax.tree.map(lambda here: 0 if here else None, is_mapped)
            whole = functools.partial(statistics.evaluate, spec)
            out = jax.vmap(whole, (in_axes,))(inputs)
        return out, jax.tree.map(lambda _: True, out)

    return blocked


def _with_rows(size: Size, is_mapped: Inputs, inputs: Inputs) -> Inputs | None:
    """Inputs with a mapped axis as one more batch axis; None if it cannot be that."""
    if is_mapped.scale or is_mapped.class_weights:
        return None

    def lead(a: Array, here: bool) -> Array:
        return a if here or a.ndim == 0 else a[None]

    def repeated(a: Array) -> Array:
        return jnp.broadcast_to(a, (size, *a.shape[1:]))

    rows = jax.tree.map(lead, inputs, is_mapped)
    logits: Array
    labels: Array
    logits, labels, counted = jax.tree.map(
        repeated, (rows.logits, rows.labels, rows.counted)
    )
    scale = rows.scale
    if scale is not None and scale.ndim:
        scale = repeated(scale)
    where = rows.where
    if where is not None and where.size != logits.shape[-1]:
        where = repeated(where)
    return Inputs(logits, labels, where, counted, rows.class_weights, scale)


def _suits_direct(spec: Spec, inputs: Inputs) -> bool:
    """Whether exponentials as they are may do: also with a mask, a scale or smoothing.

    What smoothing sums of scaled logits is left to the other reading.
    """
    num_classes = inputs.logits.shape[-1]
    if num_classes < direct.fewest(num_classes):
        return False
    inputs = inputs._replace(where=None)
    if spec.smooth:
        return _is_plain(dataclasses.replace(spec, smooth=False), inputs)
    return _is_plain(spec, inputs._replace(scale=None))


def _is_plain(spec: Spec, inputs: Inputs) -> bool:
    """Whether nothing but the logits and class ids is to be read."""
    if spec.dense or spec.smooth or spec.predicted or spec.softcap is not None:
        return False
    return inputs.where is None and inputs.scale is None and inputs.picks is None


def _partial_of_block(
    spec: Spec, inputs: Inputs, signed: Values, magnitude: Values | None
) -> Partial:
    """The label's logit and its rivals, of a block of rows in cache."""
    return _beside(gathered(inputs, signed, spec), spec, inputs, signed, magnitude)


def _beside(
    label: Values, spec: Spec, inputs: Inputs, signed: Values, magnitude: Values | None
) -> Partial:
    """The rivals of a label whose logit is known."""
    others = jnp.where(is_label(spec, inputs), -jnp.inf, signed)
    rival, mass, _ = _rivals_in_cache(spec, others, magnitude)
    return Partial(label, rival, mass)


def _tail_in_cache(
    spec: Spec, inputs: Inputs, signed: Values, magnitude: Values | None
) -> Tail:
    """The tail of a block, by reductions that are fast on XLA:CPU."""
    if spec.entropy:
        return statistics.PLAIN.tail(spec, inputs, signed, magnitude)
    return tails.read(spec, inputs, signed, magnitude, _rivals_in_cache)


def _rivals_in_cache(
    spec: Spec, others: Values, magnitude: Values | None
) -> tuple[Values, Values, None]:
    """The largest of some logits of a block, and the mass relative to it."""
    rows = short_rows(others)
    rival = largest(spec, each(rows, lambda a, _: jnp.max(a, 1)))
    base = in_memory(jnp.where(rival == -jnp.inf, 0, rival))

    def mass(a: Values, parts: int) -> Values:
        of_part = jnp.broadcast_to(base, (len(base), parts)).reshape(-1, 1)
        gap = gap_of(spec, a, of_part, of_sum=True)
        if spec.softcap is not None:
            gap = in_memory(gap)
        # Not the exponential of `_elementary`: XLA:CPU has a library for a sum of its
        # own exponentials, and would write ours to memory before they are summed.
        return jnp.sum(jnp.exp(scaled(gap, magnitude)), 1)

    return rival, total(spec, each(rows, mass)), None


def _peak_and_spread(spec: Spec, inputs: Inputs) -> tuple[Values, Values]:
    """What turns logits of a block into probabilities, but for a rounding of one."""
    signed, magnitude = signed_of(inputs)
    if _in_folds(spec, signed):
        peak, mass = folds.peak_and_mass(signed, magnitude)
    else:
        peak, mass, _ = _rivals_in_cache(spec, signed, magnitude)
    peak = tails.proper(peak)
    return peak, jnp.where(jnp.isnan(peak), peak, jnp.log(mass))


def _totals(spec: Spec, terms: tuple[Values, Values]) -> tuple[Values, Values]:
    """Two sums in one loop over a block."""
    del spec  # of classes that are the second axis, all here
    first, second = folds.in_halves(terms)
    return first, second


BLOCK = Reading(_partial_of_block, _tail_in_cache)
DIRECT = Reading(direct.partial, direct.tail)
