"""Plain logits of one block on a CPU: exponentials that both passes take.

A small call is bound by them, and by launches (benchmarks/NOTES.md, "One exponential
for both passes").
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxlosses._elementary import exp
from jaxlosses._math import gradient, statistics
from jaxlosses._math.classes import (
    Ids,
    Inputs,
    Spec,
    Values,
    accumulation_dtype,
    ids_of_classes,
    largest,
    total,
)
from jaxlosses._math.gradient import Cotangents, Gradients
from jaxlosses._math.statistics import Partial, Reading, Statistics
from jaxlosses._platform import in_memory


def pullback(
    spec: Spec, inputs: Inputs, kept: Statistics, cotangents: Cotangents, linear: bool
) -> Gradients:
    """That of plain logits of one block, by the exponentials of `ONCE`.

    In one program XLA finds that they are the same, and takes them once.
    """
    shape = inputs.logits.shape
    spec = dataclasses.replace(spec, axes=(1,))
    inputs, kept, cotangents = jax.tree.map(
        lambda a: a.reshape(-1, a.shape[-1]), (inputs, kept, cotangents)
    )
    rival, terms = _terms(spec, inputs.logits, inputs.labels)
    # Without any rival there is nothing to share.
    ratio = jnp.where(rival == -jnp.inf, 0, exp(rival - kept.peak))
    others = terms, ratio / exp(kept.spread)
    d = gradient.pullback(spec, inputs, kept, cotangents, linear=linear, others=others)
    return d._replace(logits=d.logits.reshape(shape))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _terms(spec: Spec, logits: Values, labels: Ids) -> tuple[Values, Values]:
    """The largest logit of the other classes, and their exponentials relative to it.

    The first is a constant, on which no gradient depends.
    """
    wide = logits.astype(accumulation_dtype(logits.dtype))
    others = jnp.where(ids_of_classes(spec, logits.shape) == labels, -jnp.inf, wide)
    rival = largest(spec, others)
    # Not the exponential of `_elementary`: XLA:CPU has a library for a sum of its own.
    return rival, jnp.exp(others - jnp.where(rival == -jnp.inf, 0, rival))


@_terms.defjvp
def _terms_jvp(
    spec: Spec, primals: tuple[Values, Ids], tangents: tuple[Values, Array]
) -> tuple[tuple[Values, Values], tuple[Values, Values]]:
    rival, terms = _terms(spec, *primals)
    # A row that does not count may hold a NaN.
    slope = jnp.where(jnp.isnan(terms), 0, terms)
    d_terms = slope * tangents[0].astype(terms.dtype)
    return (rival, terms), (jnp.zeros_like(rival), d_terms)


def _partial_at_once(
    spec: Spec, inputs: Inputs, signed: Values, magnitude: Values | None
) -> Partial:
    """The label's logit, the largest of the others, and their mass."""
    del magnitude  # of plain logits
    rival, terms = _terms(spec, inputs.logits, inputs.labels)
    return Partial(gathered(inputs, signed, spec), rival, total(spec, terms))


def gathered(inputs: Inputs, a: Values, spec: Spec) -> Values:
    """The entry at the label, `-inf` without one."""
    (axis,) = spec.axes
    found = jnp.take_along_axis(a, jnp.maximum(inputs.labels, 0), axis)
    # A loop that gathers is not vectorised: what follows is kept out of it.
    found = in_memory(found)
    return jnp.where(inputs.labels < 0, -jnp.inf, found)


ONCE = Reading(_partial_at_once, statistics.PLAIN.tail)
