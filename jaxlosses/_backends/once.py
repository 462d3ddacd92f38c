"""Plain logits of one block, or of few classes, on a CPU: each exponential once.

A small call is bound by them, and by launches (benchmarks/NOTES.md, "One exponential
for both passes").
"""

import dataclasses
import functools
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from jaxlosses._elementary import exp, exp_of_row
from jaxlosses._math import gradient, statistics
from jaxlosses._math.classes import (
    Ids,
    Inputs,
    Spec,
    Values,
    accumulation_dtype,
    is_label,
    largest,
    total,
)
from jaxlosses._math.gradient import Cotangents, Gradients
from jaxlosses._math.statistics import Partial, Reading, Statistics
from jaxlosses._platform import in_memory
from jaxlosses._types import Size

Rows = TypeVar("Rows")


def pullback(
    spec: Spec, inputs: Inputs, kept: Statistics, cotangents: Cotangents, linear: bool
) -> Gradients:
    """That of plain logits of one block, or with a mask, by the terms of `ONCE`.

    In one program XLA finds that they are the same, and takes them once.
    """
    shape = inputs.logits.shape
    spec = dataclasses.replace(spec, axes=(1,))
    inputs, kept, cotangents = in_rows((inputs, kept, cotangents))
    if inputs.where is not None:
        inputs = inputs._replace(labels=labels_that_exist(inputs))
    others = _others(spec, Inputs(*inputs[:3]), kept.peak, kept.spread)
    d = gradient.pullback(spec, inputs, kept, cotangents, linear=linear, others=others)
    return d._replace(logits=d.logits.reshape(shape))


def in_rows(tree: Rows) -> Rows:
    """Arrays with one batch axis; what all rows share keeps it at size 1."""
    return jax.tree.map(lambda a: a.reshape(-1, a.shape[-1]) if a.ndim else a, tree)


def labels_that_exist(inputs: Inputs) -> Ids:
    """The labels of some rows, -1 for one that names a masked class."""
    assert inputs.where is not None
    labels = inputs.labels
    here = jnp.take_along_axis(inputs.where, jnp.maximum(labels, 0), 1)
    return jnp.where(here, labels, -1)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _others(
    spec: Spec, inputs: Inputs, peak: Values, spread: Values
) -> tuple[Values, Values]:
    """Two factors of the probabilities of all classes but the label.

    Under `vmap` there are more rows than of one block, whose exponentials nobody keeps:
    they are those relative to the peak, for which no row is searched again.
    """

    @custom_vmap
    def shared(inputs: Inputs, peak: Values, spread: Values) -> tuple[Values, Values]:
        rival, terms = _terms(spec, inputs)
        # Without any rival there is nothing to share.
        ratio = jnp.where(rival == -jnp.inf, 0, exp(rival - peak))
        return terms, ratio / exp(spread)

    @shared.def_vmap
    def of_more_rows(
        size: Size, mapped: list[Any], *args: Any
    ) -> tuple[tuple[Values, Values], tuple[bool, bool]]:
        def alone(
            inputs: Inputs, peak: Values, spread: Values
        ) -> tuple[Values, Values]:
            behind = inputs.logits.astype(peak.dtype) - peak
            if inputs.where is not None:
                behind = jnp.where(inputs.where, behind, -jnp.inf)
            return exp_of_row(behind, inputs.logits), 1 / exp(spread)

        in_axes = jax.tree.map(lambda here: 0 if here else None, mapped)
        return jax.vmap(alone, tuple(in_axes), axis_size=size)(*args), (True, True)

    factors: tuple[Values, Values] = shared(inputs, peak, spread)
    return factors


@_others.defjvp
def _others_jvp(
    spec: Spec,
    primals: tuple[Inputs, Values, Values],
    tangents: tuple[Inputs, Values, Values],
) -> tuple[tuple[Values, Values], tuple[Values, Values]]:
    weight, share = _others(spec, *primals)
    (d_logits, *_), _, d_spread = tangents  # the peak is a constant
    # A row that does not count may hold a NaN.
    slope = jnp.where(jnp.isnan(weight), 0, weight)
    d = slope * d_logits.astype(weight.dtype), -share * d_spread
    return (weight, share), d


def _terms(spec: Spec, inputs: Inputs) -> tuple[Values, Values]:
    """The largest logit of the other classes, and their exponentials relative to it."""
    logits, _, where, *_ = inputs
    out = is_label(spec, inputs)
    out = out if where is None else out | ~where
    wide = logits.astype(accumulation_dtype(logits.dtype))
    others = jnp.where(out, -jnp.inf, wide)
    rival = largest(spec, others)
    # Not the exponential of `_elementary`: XLA:CPU has a library for a sum of its own.
    return rival, jnp.exp(others - jnp.where(rival == -jnp.inf, 0, rival))


def _partial_at_once(
    spec: Spec, inputs: Inputs, signed: Values, magnitude: Values | None
) -> Partial:
    """The label's logit, the largest of the others, and their mass."""
    del magnitude  # of plain logits
    rival, terms = _terms(spec, inputs)
    return Partial(gathered(inputs, signed, spec), rival, total(spec, terms))


def _partial_of_few(
    spec: Spec, inputs: Inputs, signed: Values, magnitude: Values | None
) -> Partial:
    """The same, class by class.

    XLA:CPU makes it one loop over examples, each of whose steps is short
    (benchmarks/NOTES.md, "Few classes, one by one").
    """
    del signed, magnitude  # of plain logits
    (axis,) = spec.axes
    logits = inputs.logits.astype(accumulation_dtype(inputs.logits.dtype))
    columns = jnp.split(logits, logits.shape[axis], axis)
    at = [inputs.labels == j for j in range(len(columns))]
    others = [jnp.where(a, -jnp.inf, z) for a, z in zip(at, columns, strict=True)]
    rival = functools.reduce(jnp.maximum, others)
    # Without any, -inf - (-inf) would be NaN.
    base = jnp.where(rival == -jnp.inf, 0, rival)
    mass = functools.reduce(jnp.add, [exp(z - base) for z in others])
    found = [jnp.where(a, z, 0) for a, z in zip(at, columns, strict=True)]
    label = functools.reduce(jnp.add, found)
    return Partial(jnp.where(inputs.labels < 0, -jnp.inf, label), rival, mass)


def gathered(inputs: Inputs, a: Values, spec: Spec) -> Values:
    """The entry at the label, `-inf` without one."""
    (axis,) = spec.axes
    found = jnp.take_along_axis(a, jnp.maximum(inputs.labels, 0), axis)
    # A loop that gathers is not vectorised: what follows is kept out of it.
    found = in_memory(found)
    return jnp.where(inputs.labels < 0, -jnp.inf, found)


FEW = Reading(_partial_of_few, statistics.PLAIN.tail)
ONCE = Reading(_partial_at_once, statistics.PLAIN.tail)
