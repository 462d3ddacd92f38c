"""From logit statistics to a loss: every option that acts on `[B]` vectors.

This is ordinary differentiated JAX, written once for every way of computing the
statistics. A loss that is a function of them is one more term in `_unweighted`.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Integer

from jaxlosses._math import statistics
from jaxlosses._math.classes import Inputs, Spec, Values, label_ids, masked
from jaxlosses._math.statistics import Statistics

Reduction = Literal["none", "sum", "mean"]
# A metric that only its name brings.
Metric = Literal["entropy", "rank", "confidence", "label_logit"]


class Stats(NamedTuple):
    """Metrics of each example, from the pass that computed the loss.

    Not differentiated. An example that does not count (`ignore_index`, weight 0,
    masked by `where`) has zeros and `correct=False`.

    Attributes:
        lse: log-sum-exp of the logits after cap and scale, in nats.
        nll: cross-entropy in nats, before smoothing, z-loss and any weights.
        z_loss: the penalty `z_loss * lse**2`.
        predicted: arg max over the classes that exist, the lowest id of a tie; -1 for
            an example with a NaN or without a class.
        correct: whether `predicted` is the label (dense: the arg max of the labels).
        weight: its term of the mean's denominator: `weights * w_y` for a label `y` of
            class weight `w_y`, `weights` for dense labels.
        entropy: of the probabilities, in nats. This and what follows is None without
            its name in `return_stats`.
        rank: how many classes have a larger logit than the label; those of a label
            that cannot be are all. Among the best `k` is a label of `rank < k`.
        confidence: the largest probability.
        label_logit: logit of the label after cap and scale.
    """

    lse: Float[Array, "*B"]
    nll: Float[Array, "*B"]
    z_loss: Float[Array, "*B"]
    predicted: Integer[Array, "*B"]
    correct: Bool[Array, "*B"]
    weight: Float[Array, "*B"]
    entropy: Float[Array, "*B"] | None = None
    rank: Integer[Array, "*B"] | None = None
    confidence: Float[Array, "*B"] | None = None
    label_logit: Float[Array, "*B"] | None = None


# The loss, and with `return_stats` its metrics.
Result = Array | tuple[Array, Stats]


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
    """Scalars that weigh the terms; None stands for zero, or for a `main` of one.

    Attributes:
        label_smoothing: `α`.
        z_loss: factor of `lse**2`.
        main: factor of everything else.
    """

    label_smoothing: Float[Array, ""] | None
    z_loss: Float[Array, ""] | None
    main: Float[Array, ""] | None = None


class Losses(NamedTuple):
    """The loss of each example, and beside it what is wanted.

    Attributes:
        loss: of each example, or reduced.
        stats: metrics, or None.
        entropy: of each example, or None.
        aux: what a function of the caller returned beside its loss.
    """

    loss: Float[Array, "..."]
    stats: Stats | None
    entropy: Float[Array, "*B"] | None = None
    aux: Any = None

    def result(self) -> Result:
        """What a loss returns."""
        return self.loss if self.stats is None else (self.loss, self.stats)


class Masses(NamedTuple):
    """What the two parts of a mean are divided by: sums over the examples that count.

    Attributes:
        nll: of `weights * w_y`.
        z_loss: of `weights`; None where it is the same, or not wanted.
    """

    nll: Float[Array, ""]
    z_loss: Float[Array, ""] | None


def losses(
    spec: Spec,
    inputs: Inputs,
    found: Statistics,
    coefficients: Coefficients,
    weighed: Coefficients,
    example: Example,
    metrics: tuple[Metric, ...] = (),
    plain_nll: Values | None = None,
) -> Losses:
    """Losses and metrics from the statistics, whose class axes are of size 1.

    Args:
        spec: of the statistics.
        inputs: their arguments.
        found: their values.
        coefficients: of the options.
        weighed: of the loss: the same, or those of `for_mean`.
        example: what else is known of each example.
        metrics: those that are wanted by name.
        plain_nll: `nll` without class weights, where they are in that of `found`.
    """

    def squeezed(a: Array) -> Array:
        return jnp.squeeze(a, spec.axes)

    lse = statistics.lse(spec, inputs, found)
    terms = jax.tree.map(squeezed, Terms(lse, found.nll, found.smooth))
    loss = per_example(weighed, terms, example)
    entropy = None if found.entropy is None else squeezed(found.entropy)
    if found.predicted is None:
        return Losses(loss, None, entropy)
    inputs, terms, coefficients = lax.stop_gradient((inputs, terms, coefficients))
    nll = terms.nll if plain_nll is None else squeezed(plain_nll)
    z_loss = jnp.zeros_like(nll)
    if coefficients.z_loss is not None:
        z_loss = penalty(coefficients.z_loss, terms.lse)
    correct = (found.predicted == label_ids(spec, inputs)) & (found.predicted >= 0)
    correct = squeezed(correct if inputs.counted is None else correct & inputs.counted)
    weight = lax.stop_gradient(_weights(example, nll))
    if example.label_weights is not None:
        weight = weight * lax.stop_gradient(example.label_weights)
    predicted = squeezed(found.predicted)
    stats = Stats(terms.lse, nll, z_loss, predicted, correct, weight)
    more = {name: squeezed(_metric(name, spec, inputs, found)) for name in metrics}
    stats = stats._replace(**lax.stop_gradient(more))
    if example.weights is None:
        return Losses(loss, stats, entropy)
    on = example.weights != 0
    stats = jax.tree.map(lambda a: jnp.where(on, a, jnp.zeros_like(a)), stats)
    return Losses(loss, stats, entropy)


def _metric(name: Metric, spec: Spec, inputs: Inputs, found: Statistics) -> Any:
    """One of each example, whose class axes are of size 1."""
    match name:
        case "entropy":
            return found.entropy
        case "rank":
            return found.rank
        case "confidence":
            return masked(inputs.counted, jnp.exp(-found.spread))
        case "label_logit":
            if spec.dense:
                return statistics.label_logit(spec, inputs)
            return statistics.lse(spec, inputs, found) - found.nll


def per_example(
    coefficients: Coefficients, terms: Terms, example: Example
) -> Float[Array, "*B"]:
    """Loss of each example, in nats, zero where it does not count."""
    weights = example.weights
    if weights is None:
        return _unweighted(coefficients, terms, example)
    # An example of weight zero does not count, whatever it holds; yet where its loss
    # is finite, that loss is the derivative by the weight. What is not finite may
    # first become so on the way, as the square of a large `lse`.
    loss = lax.stop_gradient(_unweighted(coefficients, terms, example))
    off = (weights == 0) & ~jnp.isfinite(loss)
    terms, label_weights = jax.tree.map(
        lambda a: jnp.where(off, 0, a), (terms, example.label_weights)
    )
    example = example._replace(label_weights=label_weights)
    return weights * _unweighted(coefficients, terms, example)


def _unweighted(
    coefficients: Coefficients, terms: Terms, example: Example
) -> Float[Array, "*B"]:
    label_smoothing, z_loss, main = coefficients
    loss = terms.nll
    if example.label_weights is not None:
        loss = _weigh(example.label_weights, loss)
    if label_smoothing is not None and terms.smooth is not None:
        loss = (1 - label_smoothing) * loss + _weigh(label_smoothing, terms.smooth)
    if main is not None:
        loss = _weigh(main, loss)
    return loss if z_loss is None else loss + penalty(z_loss, terms.lse)


def penalty(z_loss: Float[Array, ""], lse: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """The z-loss, which keeps the normalizer near one; a factor of zero is none."""
    beyond = (z_loss == 0) & jnp.isinf(jnp.square(lse))
    return z_loss * jnp.square(jnp.where(beyond, 0, lse))


def masses(
    coefficients: Coefficients, example: Example, like: Float[Array, "*B"]
) -> Masses:
    """Denominators of a mean; the arrays of the example may be of fewer examples."""
    weights = _weights(example, like)
    if example.label_weights is None:
        return Masses(jnp.sum(weights), None)
    apart = None if coefficients.z_loss is None else jnp.sum(weights)
    return Masses(jnp.sum(weights * example.label_weights), apart)


def _weights(example: Example, like: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """Of each example, 0 where it does not count."""
    weights = jnp.ones_like(like)
    if example.weights is not None:
        weights = weights * example.weights
    if example.counted is None:
        return weights
    return jnp.where(example.counted, weights, 0)


def for_mean(coefficients: Coefficients, masses: Masses | None) -> Coefficients:
    """Coefficients with which a sum, divided by `masses.nll`, is the mean.

    The z-loss is divided by a mass of its own. Where the labels have no mass, its
    part alone is left.
    """
    if masses is None or masses.z_loss is None or coefficients.z_loss is None:
        return coefficients
    z_loss = coefficients.z_loss * _or_one(masses.nll) / _or_one(masses.z_loss)
    return coefficients._replace(
        z_loss=jnp.where(masses.z_loss == 0, 0, z_loss),
        main=jnp.where(masses.nll == 0, 0, jnp.ones_like(z_loss)),
    )


def mean_of(total: Float[Array, ""], masses: Masses) -> Float[Array, ""]:
    """A weighted mean from its numerator and denominators; zero over nothing."""
    mean = total / _or_one(masses.nll)
    if masses.z_loss is not None:
        return mean
    # A NaN is shown even where nothing weighs anything.
    nothing = (masses.nll == 0) & ~jnp.isnan(total)
    return jnp.where(nothing, 0, mean)


def _or_one(mass: Float[Array, ""]) -> Float[Array, ""]:
    return jnp.where(mass == 0, 1, mass)


def _weigh(weight: Float[Array, "..."], loss: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """`weight * loss` with `0 * inf = 0`; a NaN stays, in the gradient as well."""
    weight = jnp.where(jnp.isnan(loss), jnp.nan, weight)
    return weight * jnp.where((weight == 0) & jnp.isinf(loss), 0, loss)
