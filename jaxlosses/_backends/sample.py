"""A block of plain logits without a search for the largest, if a sample is fit.

Known before, the rival lets the sum begin where the exponentials are taken, so that a
part of them is written (benchmarks/NOTES.md, "The largest of a sample").
"""

import functools
import math

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxlosses._backends.blocks import each, short_rows
from jaxlosses._backends.once import gathered
from jaxlosses._elementary import exp
from jaxlosses._math.classes import (
    Ids,
    Inputs,
    Mask,
    Spec,
    Values,
    accumulation_dtype,
    ids_of_classes,
    largest,
    total,
)
from jaxlosses._math.statistics import Partial
from jaxlosses._platform import in_memory

# A sample saves less than it costs in shorter rows, and in rows that are no multiple
# of a fold in those that are shorter than the second number.
FEWEST_SAMPLED = (128, 512)
# Classes among which the rival of a sampled row is looked for: so many, side by side,
# in so many places.
_SAMPLE = (8, 4)
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


def fewest(num_classes: int) -> int:
    """Of how many classes a row is to be sampled."""
    even, uneven = FEWEST_SAMPLED
    return uneven if _fold_of(num_classes) is None else even


def classes_of(num_classes: int) -> list[slice]:
    """The classes of a sample, spread over the row."""
    width, places = _SAMPLE
    step = num_classes // places
    return [slice(i, i + width) for i in range(step // 2, step * places, step)]


def partial(
    spec: Spec, inputs: Inputs, signed: Values, magnitude: Values | None
) -> Partial:
    """What a loss on class ids needs of a block, with the rival from a few classes.

    They are spread over the row: in many vocabularies the first ids are control tokens,
    whose logits lie far below the rest. `is_safe` says whether they were fit.
    """
    del magnitude  # of plain logits
    logits, labels = inputs.logits, inputs.labels
    num_rows, num_classes = logits.shape

    def wide(logits: Values) -> Values:
        return logits.astype(accumulation_dtype(logits.dtype))

    def others(logits: Values, ids: Ids) -> Values:
        return jnp.where(ids == labels, -jnp.inf, wide(logits))

    ids = ids_of_classes(spec, logits.shape)
    found = (others(logits[:, at], ids[:, at]) for at in classes_of(num_classes))
    rival = largest(spec, in_memory(functools.reduce(jnp.maximum, found)))
    # Without any, -inf - (-inf) would be NaN.
    base = in_memory(jnp.where(rival == -jnp.inf, 0, rival))

    def terms(logits: Values, ids: Ids) -> tuple[Values, ...]:
        mass = exp(others(logits, ids) - base)
        return (mass, base - wide(logits)) if spec.smooth else (mass,)

    def summed(a: Values) -> Values:
        return total(spec, each(short_rows(a), lambda a, _: jnp.sum(a, 1)))

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
