"""`softmax` and `log_softmax`, with the accuracy and the policies of the losses."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from jaxlosses import _checks, _sharding
from jaxlosses._backends import choose
from jaxlosses._math.classes import Inputs, Mask, Spec, Values, any_class


@_checks.has_own_messages
def softmax(
    logits: ArrayLike,
    axis: int | tuple[int, ...] | None = -1,
    where: ArrayLike | None = None,
) -> Float[Array, "..."]:
    """Probabilities from logits.

        p_j = exp(z_j - m - log1p(Σ exp(z_k - m)))

    where `m` is the largest logit and the sum leaves out one class at the maximum.

    Args:
        logits: float16, bfloat16, float32 or float64: unscaled scores.
        axis: class axis, a tuple of axes whose flattening are the classes, or None
            for all axes.
        where: bool. Of the logits' rank and broadcastable to them: the classes that
            exist. Of the shape of the logits without the class axes: the examples
            with classes.

    Returns:
        Probabilities of the shape and dtype of the logits, computed in float32 or
        wider; they sum to one over the classes. A masked class has 0, and so has
        every class where none exists. A NaN or `+inf` makes its example NaN.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or range.

    Differentiation:
        Forward and reverse mode, to any order, by a `custom_jvp`. The backward pass
        keeps the logits and two numbers per example, and rebuilds the probabilities.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxlosses as jl
        >>> p = jl.softmax(jnp.array([0.1, 0.3, 0.5, 0.9]))
        >>> print(*(f"{x:.5f}" for x in p))
        0.16839 0.20567 0.25120 0.37475

    Source:
        Bridle 1990, *Training stochastic model recognition algorithms as networks*;
        the arguments of `jax.nn.softmax`.
    """
    return _run(_softmax, logits, axis, where)


@_checks.has_own_messages
def log_softmax(
    logits: ArrayLike,
    axis: int | tuple[int, ...] | None = -1,
    where: ArrayLike | None = None,
) -> Float[Array, "..."]:
    """Logarithms of probabilities from logits.

        log p_j = (z_j - m) - log1p(Σ exp(z_k - m))

    where `m` is the largest logit and the sum leaves out one class at the maximum.

    Args:
        `logits`, `axis`, `where`: as in `softmax`.

    Returns:
        Log-probabilities in nats, of the shape and dtype of the logits, computed in
        float32 or wider. A masked class has `-inf` with gradient 0. A NaN or `+inf`
        makes its example NaN.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or range.

    Differentiation:
        As of `softmax`.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxlosses as jl
        >>> log_p = jl.log_softmax(jnp.array([20.0, 0.0, 0.0]))
        >>> print(*(f"{x:.4g}" for x in log_p))
        -4.122e-09 -20 -20

    Source:
        Bridle 1990, *Training stochastic model recognition algorithms as networks*;
        the arguments of `jax.nn.log_softmax`.
    """
    return _run(_log_softmax, logits, axis, where)


def _run(function: Callable[..., Values], logits: Any, axis: Any, where: Any) -> Values:
    logits = _checks.logits(logits)
    axes = _checks.class_axes(axis, logits.ndim, allow_none=True)
    where, examples = _checks.where(where, logits.shape, axes)
    if examples is not None:
        where = jnp.expand_dims(examples, axes)
    return _compiled(function, Spec(axes, dense=True), logits, where)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compiled(
    function: Callable[..., Values], spec: Spec, logits: Values, where: Mask | None
) -> Values:
    mesh = _sharding.explicit_mesh(logits, where)
    if mesh is not None:
        split = _sharding.split_of(logits)
        arrays: Any = (logits, where)
        logits, where = _sharding.reshard(mesh, arrays, (split, split))
    return function(spec, logits, where)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _softmax(spec: Spec, logits: Values, where: Mask | None) -> Values:
    p = jnp.exp(_log_p(logits, where, *_normalizer(spec, logits, where)))
    return _masked(where, p, 0.0).astype(logits.dtype)


@_softmax.defjvp
def _softmax_jvp(spec: Spec, primals: Any, tangents: Any) -> tuple[Values, Values]:
    logits, where = primals

    def tangent(logits: Values, where: Mask | None, *rest: Values) -> Values:
        p, d_log_p = _p_and_tangent(spec, logits, where, *rest)
        return (p * d_log_p).astype(logits.dtype)

    return _softmax(spec, *primals), _rebuilt(tangent, spec, logits, where, tangents[0])


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _log_softmax(spec: Spec, logits: Values, where: Mask | None) -> Values:
    log_p = _log_p(logits, where, *_normalizer(spec, logits, where))
    return _masked(where, log_p, -jnp.inf).astype(logits.dtype)


@_log_softmax.defjvp
def _log_softmax_jvp(spec: Spec, primals: Any, tangents: Any) -> tuple[Values, Values]:
    logits, where = primals

    def tangent(logits: Values, where: Mask | None, *rest: Values) -> Values:
        _, d_log_p = _p_and_tangent(spec, logits, where, *rest)
        return _masked(where, d_log_p, 0.0).astype(logits.dtype)

    out = _log_softmax(spec, *primals)
    return out, _rebuilt(tangent, spec, logits, where, tangents[0])


def _rebuilt(
    tangent: Callable[..., Values],
    spec: Spec,
    logits: Values,
    where: Mask | None,
    d_logits: Values,
) -> Values:
    """The tangent, which rebuilds the probabilities: reverse mode keeps the logits.

    Kept in their place, probabilities would cost a second array, and those of
    bfloat16 logits would be rounded.
    """
    tangent = jax.checkpoint(tangent, prevent_cse=False)
    return tangent(logits, where, *_normalizer(spec, logits, where), d_logits)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _normalizer(
    spec: Spec, logits: Values, where: Mask | None
) -> tuple[Values, Values]:
    """`peak` and `spread`, of which the second carries the derivative of their sum."""
    peak, spread = choose.normalizer(spec, Inputs(logits, None, where))
    if where is None:
        return peak, spread
    # Without a class both are NaN, which `jax_debug_nans` finds in what is kept.
    some = any_class(spec, where)
    return jnp.where(some, peak, 0), jnp.where(some, spread, 0)


@_normalizer.defjvp
def _normalizer_jvp(spec: Spec, primals: Any, tangents: Any) -> tuple[Any, Any]:
    logits, where = primals
    peak, spread = _normalizer(spec, logits, where)
    p = _masked(where, jnp.exp(_log_p(logits, where, peak, spread)), 0.0)
    d_z = tangents[0].astype(p.dtype)
    d_spread = jnp.sum(p * d_z, spec.axes, keepdims=True)
    return (peak, spread), (jnp.zeros_like(peak), d_spread)


def _log_p(logits: Values, where: Mask | None, peak: Values, spread: Values) -> Values:
    z = logits.astype(peak.dtype)
    return (_masked(where, z, 0.0) - peak) - spread


def _p_and_tangent(
    spec: Spec,
    logits: Values,
    where: Mask | None,
    peak: Values,
    spread: Values,
    d_logits: Values,
) -> tuple[Values, Values]:
    p = _masked(where, jnp.exp(_log_p(logits, where, peak, spread)), 0.0)
    d_z = d_logits.astype(p.dtype)
    return p, d_z - jnp.sum(p * d_z, spec.axes, keepdims=True)


def _masked(where: Mask | None, a: Values, fill: float) -> Values:
    return a if where is None else jnp.where(where, a, fill)
