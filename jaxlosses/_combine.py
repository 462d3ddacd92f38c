"""From logit statistics to a loss: every option that acts on `[B]` vectors.

This is ordinary differentiated JAX, written once for every way of computing the
statistics.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer

Reduction = Literal["none", "sum", "mean"]


class Stats(NamedTuple):
    """Metrics of each example, from the pass that computed the loss.

    Not differentiated. An example that does not count (`ignore_index`, masked by
    `where`) has zeros and `correct=False`.

    Attributes:
        lse: log-sum-exp of the logits after cap and scale, in nats.
        nll: cross-entropy in nats, before smoothing, z-loss and any weights.
        z_loss: the penalty `z_loss * lse**2`.
        predicted: arg max over the classes that exist, the lowest id of a tie; -1 for
            an example with a NaN or without a class.
        correct: whether `predicted` is the label (dense: the arg max of the labels).
    """

    lse: Float[Array, "*B"]
    nll: Float[Array, "*B"]
    z_loss: Float[Array, "*B"]
    predicted: Integer[Array, "*B"]
    correct: Bool[Array, "*B"]


class Terms(NamedTuple):
    """What one example contributes, as `[B]` vectors; `smooth` only where used."""

    lse: Float[Array, "*B"]
    nll: Float[Array, "*B"]
    smooth: Float[Array, "*B"] | None


class Example(NamedTuple):
    """What is known of each example without its logits; None stands for ones.

    Attributes:
        counted: whether it counts.
        label_weights: class weight of its integer label.
        weights: weight given by the caller.
    """

    counted: Bool[Array, "*B"] | None
    label_weights: Float[Array, "*B"] | None
    weights: Float[Array, "*B"] | None


class Coefficients(NamedTuple):
    """Scalars that weigh the terms; None stands for zero."""

    label_smoothing: Float[Array, ""] | None
    z_loss: Float[Array, ""] | None


def per_example(
    coefficients: Coefficients, terms: Terms, example: Example
) -> Float[Array, "*B"]:
    """Loss of each example, in nats, zero where it does not count."""
    label_smoothing, z_loss = coefficients
    if example.weights is not None:
        # An example of weight zero does not count, whatever it holds; yet where its
        # loss is finite, that loss is the derivative by the weight.
        off = example.weights == 0
        terms = jax.tree.map(lambda a: jnp.where(off & ~jnp.isfinite(a), 0, a), terms)
    loss = terms.nll
    if example.label_weights is not None:
        loss = _weigh(example.label_weights, loss)
    if label_smoothing is not None and terms.smooth is not None:
        loss = (1 - label_smoothing) * loss + _weigh(label_smoothing, terms.smooth)
    if z_loss is not None:
        loss = loss + penalty(z_loss, terms.lse)
    return loss if example.weights is None else example.weights * loss


def penalty(z_loss: Float[Array, ""], lse: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """The z-loss, which keeps the normalizer near one."""
    return z_loss * jnp.square(lse)


def reduce(
    reduction: Reduction, loss: Float[Array, "*B"], example: Example
) -> Float[Array, "..."]:
    """Reduces losses over examples; a mean over nothing is zero."""
    if reduction == "none":
        return loss
    total = jnp.sum(loss)
    if reduction == "sum":
        return total
    return mean_of(total, denominator(loss, example))


def mean_of(total: Float[Array, ""], mass: Float[Array, ""]) -> Float[Array, ""]:
    """A weighted mean from its numerator and denominator; zero over nothing."""
    # A NaN is shown even where nothing weighs anything.
    nothing = (mass == 0) & ~jnp.isnan(total)
    return jnp.where(nothing, 0, total / jnp.where(mass == 0, 1, mass))


def denominator(loss: Float[Array, "*B"], example: Example) -> Float[Array, ""]:
    """What a mean divides by: the sum of the weights of the examples that count."""
    mass = jnp.ones_like(loss)
    if example.weights is not None:
        mass = mass * example.weights
    if example.label_weights is not None:
        mass = mass * example.label_weights
    if example.counted is not None:
        mass = jnp.where(example.counted, mass, 0)
    return jnp.sum(mass)


def _weigh(weight: Float[Array, "..."], loss: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """`weight * loss` with `0 * inf = 0`; a NaN stays, in the gradient as well."""
    weight = jnp.where(jnp.isnan(loss), jnp.nan, weight)
    return weight * jnp.where((weight == 0) & jnp.isinf(loss), 0, loss)
