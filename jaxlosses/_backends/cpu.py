"""Given logits on a CPU: rows in blocks that are read again from cache.

Four readings: `once.FEW` of plain logits of few classes, class by class; `once.ONCE` of
plain logits that fit a block; `BLOCK` of rows in cache, by reductions that are fast
there; `SAMPLE` the same without a search for the largest logit. What each gains, and
how it was found, is in benchmarks/NOTES.md.
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

from jaxlosses._backends import folds, once
from jaxlosses._backends.blocks import by_rows, rows_of_block
from jaxlosses._backends.once import gathered, in_rows
from jaxlosses._elementary import exp
from jaxlosses._math import statistics, tails
from jaxlosses._math.classes import (
    Ids,
    Inputs,
    Mask,
    Spec,
    Values,
    accumulation_dtype,
    count_of,
    ids_of_classes,
    is_label,
    largest,
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

# A sample saves less than it costs in shorter rows, and in rows that are no multiple
# of a fold in those that are shorter than the second number.
FEWEST_SAMPLED = (128, 512)
# Where only sums are written, a block may be so many times as large (NOTES.md, "The
# sample is spread, and each block decides").
LARGER = 2
# Classes among which the rival of a sampled row is looked for.
_SAMPLE = 32
# So many exponentials are added up before any is written: what one core has written is
# slow to read for another. A loop over more would not be unrolled (NOTES.md, "Eight of
# them added up").
_LARGEST_FOLD = 8
# float32 numbers of a vector of XLA:CPU.
_LANES = 8
# If one logit exceeds the largest of the sample by 32 nats, the terms of others are
# rounded by half of 2^-19 of it.
_LARGEST_MASS = math.exp(32)
# A label that exceeds it by more may have an exponential of its lead that underflows.
_LARGEST_LEAD = 80

# XLA:CPU reduces longer rows at half the rate or less (NOTES.md, "Rows of a block").
LONGEST_ROW = 2**15 - 1
# Shorter ones cost more to start with than a copy.
_MOST_PARTS = 64


def evaluate(
    spec: Spec, inputs: Inputs, rows: int | None = None, sampled: bool = True
) -> Statistics:
    """Statistics by blocks of rows, each small enough to be read again from cache.

    Args:
        spec: with the class axis last.
        inputs: any batch axes.
        rows: of a block; None for as many as fit.
        sampled: whether plain rows may be sampled.
    """
    *batch, num_classes = inputs.logits.shape
    plain = _is_plain(spec, inputs)
    # But for what smoothing sums of a row, by whatever it was read.
    nearly = _is_plain(dataclasses.replace(spec, smooth=False), inputs)
    uneven = spec.smooth and inputs.class_weights is not None
    one_axis = dataclasses.replace(spec, axes=(1,))
    inputs = in_rows(inputs)
    num_rows = len(inputs.logits)
    rows = rows_of_block(num_classes) if rows is None else rows
    sampled = (
        sampled and num_rows > rows and num_classes >= _fewest_sampled(num_classes)
    )
    if plain and num_classes <= FEW_CLASSES:
        out = _of_few(one_axis, inputs)
    elif shares_terms(one_axis, inputs, rows):
        out = statistics.evaluate(one_axis, inputs, once.ONCE)
    elif spec.dense or uneven or inputs.where is not None:
        out = by_rows(
            lambda block: statistics.evaluate(one_axis, block(), BLOCK),
            inputs,
            num_rows,
            rows,
        )
    else:
        sampled &= nearly
        read = _read_sampled if sampled else _read
        if sampled and not spec.smooth and num_rows > LARGER * rows:
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

    def normalizer(spec: Spec, inputs: Inputs) -> tuple[Values, Values]:
        return tails.peak_and_spread(statistics.normalize(spec, inputs, BLOCK)[1])

    def of_block(block: Callable[[], Operands]) -> Found:
        return evaluate_divergence(rule, normalizer, block())

    rows = rows_of_block(4 * num_classes)  # of both, and of their probabilities
    found = by_rows(of_block, operands, len(operands.student), rows)
    return jax.tree.map(lambda a: a.reshape(*batch, 1), found)


def shares_terms(spec: Spec, inputs: Inputs, rows: int | None = None) -> bool:
    """Whether the gradient takes the exponentials that the statistics took."""
    *batch, num_classes = inputs.logits.shape
    rows = rows_of_block(num_classes) if rows is None else rows
    fits = math.prod(batch) <= rows
    return fits and num_classes > FEW_CLASSES and _is_plain(spec, inputs)


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


def _read(spec: Spec, block: Callable[[], Inputs]) -> Partial:
    """What a loss on class ids needs of each row of a block."""
    inputs = block()
    return _with_slack(spec, inputs, statistics.partial(spec, inputs, None, BLOCK))


def _with_slack(spec: Spec, inputs: Inputs, part: Partial) -> Partial:
    """The same with what smoothing needs, where all classes weigh the same.

    A plain sum, for which XLA:CPU has a library.
    """
    if not spec.smooth or part.slack is not None:
        return part
    signed, magnitude = signed_of(inputs)
    peak = jnp.maximum(part.label, part.rival)
    base = jnp.where(peak == -jnp.inf, 0, peak)
    behind = -scaled(gap_of(spec, signed, base, of_sum=True), magnitude)
    slack = total(spec, behind) / count_of(spec, signed.shape)
    return part._replace(slack=slack, share=jnp.ones_like(slack))


def _read_sampled(spec: Spec, block: Callable[[], Inputs]) -> Partial:
    """The same without a search for the largest logit, if a sample is fit."""
    inputs = block()
    part = statistics.partial(spec, inputs, None, SAMPLE)
    part = _with_slack(spec, inputs, part)
    unsafe = ~is_safe(part)
    if inputs.counted is not None:
        unsafe &= inputs.counted
    # Cut out anew: as an operand of both branches a block would be copied.
    out: Partial = lax.cond(jnp.any(unsafe), lambda: _read(spec, block), lambda: part)
    return out


def _fewest_sampled(num_classes: int) -> int:
    even, uneven = FEWEST_SAMPLED
    return uneven if _fold_of(num_classes) is None else even


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


def _is_plain(spec: Spec, inputs: Inputs) -> bool:
    """Whether nothing but the logits and class ids is to be read."""
    if spec.dense or spec.smooth or spec.predicted or spec.softcap is not None:
        return False
    return inputs.where is None and inputs.scale is None and inputs.picks is None


def _partial_of_block(
    spec: Spec, inputs: Inputs, signed: Values, magnitude: Values | None
) -> Partial:
    """The label's logit and its rivals, of a block of rows in cache."""
    at_label = is_label(spec, inputs)
    label = gathered(inputs, signed, spec)
    others = jnp.where(at_label, -jnp.inf, signed)
    rival, mass, _ = _rivals_in_cache(spec, others, magnitude)
    return Partial(label, rival, mass)


def _partial_of_sample(
    spec: Spec, inputs: Inputs, signed: Values, magnitude: Values | None
) -> Partial:
    """The same for a block of plain logits, with the rival from a few of them.

    Known before, the rival lets the sum begin where the exponentials are taken, so that
    a part of them is written (benchmarks/NOTES.md, "The largest of a sample"). The
    sample is spread over the row: in many vocabularies the first ids are control
    tokens, whose logits lie far below the rest. `is_safe` says whether it was fit.
    """
    del magnitude  # of plain logits
    logits, labels = inputs.logits, inputs.labels
    num_rows, num_classes = logits.shape

    def wide(logits: Values) -> Values:
        return logits.astype(accumulation_dtype(logits.dtype))

    def others(logits: Values, ids: Ids) -> Values:
        return jnp.where(ids == labels, -jnp.inf, wide(logits))

    ids = ids_of_classes(spec, logits.shape)
    step = num_classes // _SAMPLE
    few = (slice(None), slice(None, step * _SAMPLE, step))
    rival = largest(spec, in_memory(others(logits[few], ids[few])))
    # Without any, -inf - (-inf) would be NaN.
    base = in_memory(jnp.where(rival == -jnp.inf, 0, rival))

    def terms(logits: Values, ids: Ids) -> tuple[Values, ...]:
        mass = exp(others(logits, ids) - base)
        return (mass, base - wide(logits)) if spec.smooth else (mass,)

    def summed(a: Values) -> Values:
        return total(spec, _each(_short_rows(a), lambda a, _: jnp.sum(a, 1)))

    def add(a: tuple[Array, ...], b: tuple[Array, ...]) -> tuple[Array, ...]:
        if spec.smooth:
            return tuple(x + y for x, y in zip(a, b, strict=True))
        # For a plain sum XLA:CPU calls a library, to which all terms would be written
        # first; it does not for a sum of absolute values. No exponential is negative.
        return (a[0] + jnp.abs(b[0]),)

    fold = _fold_of(num_classes) or _LARGEST_FOLD
    size = num_classes // (fold * _LANES) * (fold * _LANES)
    cut = (num_rows, -1, fold, _LANES)
    entries = tuple(a.reshape(cut) for a in terms(logits[:, :size], ids[:, :size]))
    zeros = tuple(jnp.zeros((), a.dtype) for a in entries)
    folded = in_memory(lax.reduce(entries, zeros, add, (2,)))
    sums = tuple(summed(a.reshape(num_rows, -1)) for a in folded)
    if size < num_classes:
        left = terms(logits[:, size:], ids[:, size:])
        sums = tuple(a + summed(b) for a, b in zip(sums, left, strict=True))
    mass, *behind = sums
    part = Partial(gathered(inputs, signed, spec), rival, mass)
    if not behind:
        return part
    # Behind the label, if that leads.
    slack = behind[0] / num_classes + jnp.maximum(part.label - rival, 0)
    return part._replace(slack=slack, share=jnp.ones_like(slack))


def _fold_of(num_classes: int) -> int | None:
    """How many exponentials are added up at a time if none is to be left over."""
    folds = range(_LARGEST_FOLD, _LARGEST_FOLD // 2 - 1, -1)
    return next((n for n in folds if num_classes % (n * _LANES) == 0), None)


def is_safe(part: Partial) -> Mask:
    """Whether a sampled rival is near enough to the largest of the other logits.

    It is one of them, so `mass` is at least one. If it is far below, the sum overflows
    or is inexact, or the label is so far ahead that all underflows. NaN is not safe.
    """
    lead = part.label - part.rival
    return (part.mass < _LARGEST_MASS) & (lead < _LARGEST_LEAD)


def _tail_in_cache(spec: Spec, signed: Values, magnitude: Values | None) -> Tail:
    """The tail of a block, by reductions that are fast on XLA:CPU."""
    if signed.shape[1] >= folds.FEWEST:
        return folds.read(spec, signed, magnitude)
    if spec.entropy:
        return statistics.PLAIN.tail(spec, signed, magnitude)
    return tails.read(spec, signed, magnitude, _rivals_in_cache)


def _rivals_in_cache(
    spec: Spec, others: Values, magnitude: Values | None
) -> tuple[Values, Values, None]:
    """The largest of some logits of a block, and the mass relative to it."""
    rows = _short_rows(others)
    rival = largest(spec, _each(rows, lambda a, _: jnp.max(a, 1)))
    base = in_memory(jnp.where(rival == -jnp.inf, 0, rival))

    def mass(a: Values, parts: int) -> Values:
        of_part = jnp.broadcast_to(base, (len(base), parts)).reshape(-1, 1)
        gap = gap_of(spec, a, of_part, of_sum=True)
        if spec.softcap is not None:
            gap = in_memory(gap)
        # Not the exponential of `_elementary`: XLA:CPU has a library for a sum of its
        # own exponentials, and would write ours to memory before they are summed.
        return jnp.sum(jnp.exp(scaled(gap, magnitude)), 1)

    return rival, total(spec, _each(rows, mass)), None


def _short_rows(a: Values) -> list[tuple[Values, int]]:
    """Arrays of the parts of each row, and how many those are.

    XLA:CPU is fast at reductions of an array in memory, which must not be converted
    from bfloat16, and of short rows: a long one is cut in equal parts. Without a
    divisor of fit size, less than one entry per part is left over, at the price of a
    copy.
    """
    num_rows, num_classes = a.shape
    least = -(-num_classes // LONGEST_ROW)
    exact = (n for n in range(least, _MOST_PARTS) if num_classes % n == 0)
    num_parts = next(exact, least)
    width = num_classes // num_parts
    cut, left = jnp.split(a, [width * num_parts], 1)
    rows = [(in_memory(in_memory(cut).reshape(num_rows * num_parts, width)), num_parts)]
    return [*rows, (in_memory(left), 1)] if left.shape[1] else rows


def _each(
    rows: list[tuple[Values, int]], reduced: Callable[[Values, int], Values]
) -> Values:
    """A reduction of every part of each row."""
    found = [in_memory(reduced(a, parts)).reshape(-1, parts) for a, parts in rows]
    return jnp.concatenate(found, 1)


BLOCK = Reading(_partial_of_block, _tail_in_cache)
SAMPLE = Reading(_partial_of_sample, _tail_in_cache)
