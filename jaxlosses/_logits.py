"""Logit statistics of given logits, differentiable in two ways.

`statistics` is a `custom_vjp`: one backward pass, no array of the logits' size kept.
`statistics_forward` is the same value and the same pullback as a `custom_jvp`, for
`jvp`, `jacfwd` and `linearize`, which a `custom_vjp` cannot serve. The backward rule
of the first calls the second, so higher derivatives of either meet an exact rule and
not the derivative of an implementation.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes
from jaxtyping import Array, Float

from jaxlosses import _statistics
from jaxlosses._statistics import Cotangents, Inputs, Spec, Statistics


class Residuals(NamedTuple):
    """What the backward pass keeps: the inputs, and three numbers per example.

    Attributes:
        inputs: the arguments themselves, which the caller holds anyway.
        peak: largest transformed logit, in the accumulation dtype.
        spread: `lse - |scale| * peak`.
        nll: negative log-likelihood, for the entry at the label.
    """

    inputs: Inputs
    peak: Float[Array, "..."]
    spread: Float[Array, "..."]
    nll: Float[Array, "..."]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def statistics(spec: Spec, inputs: Inputs) -> Statistics:
    """Logit statistics with a reverse rule."""
    return _statistics.evaluate(spec, inputs)


def _statistics_fwd(spec: Spec, inputs: Inputs) -> tuple[Statistics, Residuals]:
    result = statistics_forward(spec, inputs)
    return result, Residuals(inputs, result.peak, result.spread, result.nll)


def _statistics_bwd(spec: Spec, residuals: Residuals, g: Statistics) -> tuple[Inputs]:
    kept = Statistics(residuals.peak, residuals.spread, residuals.nll, None, None)
    # What no loss depends on has a cotangent of zeros, not worth a pass.
    cotangents = Cotangents(g.spread if spec.lse else None, g.nll, g.smooth)
    return (_statistics.pullback(spec, residuals.inputs, kept, cotangents),)


statistics.defvjp(_statistics_fwd, _statistics_bwd)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def statistics_forward(spec: Spec, inputs: Inputs) -> Statistics:
    """Logit statistics with a forward rule, which can also be transposed."""
    return _statistics.evaluate(spec, inputs)


@statistics_forward.defjvp
def _statistics_jvp(
    spec: Spec, primals: Any, tangents: Any
) -> tuple[Statistics, Statistics]:
    (inputs,), (d_inputs,) = primals, tangents
    result = statistics_forward(spec, inputs)
    kept = Statistics(result.peak, result.spread, result.nll, None, None)
    # Checkpointed, so that reverse mode through the tangent keeps what the
    # custom_vjp keeps and rebuilds the probabilities.
    push = jax.checkpoint(_push, prevent_cse=False, static_argnums=(0,))
    d = push(spec, inputs, kept, _differentiable(d_inputs))
    d_predicted: Any = None
    if result.predicted is not None:
        d_predicted = np.zeros(result.predicted.shape, dtypes.float0)
    d_peak = jnp.zeros_like(result.peak)
    return result, Statistics(d_peak, d.spread, d.nll, d.smooth, d_predicted)


def _push(spec: Spec, inputs: Inputs, kept: Statistics, d_inputs: Inputs) -> Cotangents:
    """Tangents of the statistics: the transpose of their pullback."""

    def pull(g: Cotangents) -> Inputs:
        d = _statistics.pullback(spec, inputs, kept, g, linear=True)
        return jax.tree.map(
            lambda _, leaf: leaf, d_inputs, d, is_leaf=lambda leaf: leaf is None
        )

    zero = jnp.zeros_like(kept.nll)
    example = Cotangents(zero, zero, zero if spec.smooth else None)
    (d,) = jax.linear_transpose(pull, example)(d_inputs)
    return d


def _differentiable(d_inputs: Inputs) -> Inputs:
    """The tangents without those of integers and booleans, which are float0."""
    return jax.tree.map(lambda t: None if t.dtype == dtypes.float0 else t, d_inputs)
