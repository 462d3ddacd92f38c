"""The one gradient of all losses: the probabilities, rebuilt from the statistics."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlosses._elementary import (
    exp,
    exp_of_row,
    kept_per_example,
    one_minus_exp,
)
from jaxlosses._math import picks, softcap
from jaxlosses._math.classes import (
    Inputs,
    Mask,
    Spec,
    Uniform,
    Values,
    both,
    is_label,
    masked,
    sum_of_others,
    sum_to,
    targets_of,
    uniform_of,
)
from jaxlosses._math.statistics import Statistics, counted_only
from jaxlosses._math.transform import gap_of, scaled, with_sign


class Cotangents(NamedTuple):
    """Cotangents of the differentiable statistics; None stands for zero."""

    spread: Values | None
    nll: Values
    smooth: Values | None
    entropy: Values | None = None
    picks: Values | None = None


class Gradients(NamedTuple):
    """Cotangents of the differentiable inputs; None for what there is none of.

    Of the class weights there is one only where a statistic depends on them.
    """

    logits: Values
    labels: Values | None
    class_weights: Values | None
    scale: Values | None


def pullback(
    spec: Spec,
    inputs: Inputs,
    statistics: Statistics,
    cotangents: Cotangents,
    *,
    linear: bool = False,
    uniform: Uniform | None = None,
    others: tuple[Values, Values] | None = None,
) -> Gradients:
    """Cotangents of the differentiable inputs, rebuilt from the statistics.

    With `p = softmax(z)`, `T = sum t` and `U = sum u`, the entry of a logit is

        g_spread p_j + g_nll (T p_j - t_j) + g_smooth (U p_j - u_j)
        + g_entropy p_j ((m - z_j) - depth)

    `T p_j - t_j` is evaluated as `(T - t_j) p_j - t_j (1 - p_j)`, with `p_j - 1` from
    the spread where it cancels; the same for `u`, unless all classes weigh the same.

    Args:
        spec: what is static.
        inputs: the arguments of `evaluate`.
        statistics: its result; `peak`, `spread`, `nll` and `depth` are used.
        cotangents: one per statistic.
        linear: stay linear in the cotangents, so that the function can be
            transposed. Otherwise an example whose cotangents are zero has gradient
            zero even if it holds a NaN.
        uniform: given if the classes are a part of all; else computed.
        others: an array and a number per example whose product is the probability of
            every class but the label, of plain logits and class ids; else computed.
    """
    if inputs.picks is not None:
        return _with_picks(spec, inputs, statistics, cotangents, linear, uniform)
    if not linear:
        silent = jnp.isnan(kept_per_example(statistics.nll))
        for g in cotangents:
            silent = silent if g is None else silent & (g == 0)
        inputs = inputs._replace(counted=both(inputs.counted, ~silent))
        statistics = counted_only(statistics, ~silent)
    g_spread, g_nll, g_smooth, g_entropy, _ = cotangents
    peak, spread, nll = statistics.peak, statistics.spread, statistics.nll
    present = both(inputs.where, inputs.counted)

    logits = inputs.logits.astype(peak.dtype)
    signed, magnitude = with_sign(logits, inputs.scale)
    # What is masked may hold a NaN, which must not reach a derivative.
    gap = masked(present, gap_of(spec, signed, peak))
    behind = scaled(gap, magnitude)
    log_p = behind - spread
    if others is None:
        others = exp_of_row(behind, inputs.logits), 1 / exp(spread)
    weight, share = others
    p = share * weight
    rest = None if spec.dense else one_minus_exp(nll)
    # A label that cannot be has a NaN statistic, and its whole row a NaN gradient.
    poison = jnp.where(jnp.isnan(nll if rest is None else rest), jnp.nan, 0)
    g_nll = g_nll + g_nll * poison

    d_labels = d_class_weights = d_scale = None
    if inputs.labels is None:
        d_z = poison * p if g_spread is None else (g_spread + poison) * p
    elif rest is None:
        targets = targets_of(inputs, p.dtype)
        minus_rest = _minus_others(behind, spread, p)
        d_z = g_nll * (sum_of_others(spec, targets) * p + targets * minus_rest)
        d_z = d_z if g_spread is None else d_z + g_spread * p
        d_targets = _of_targets(g_nll, log_p, present, linear)
        if jnp.issubdtype(inputs.labels.dtype, jnp.floating):
            d = d_targets
            if inputs.class_weights is not None:
                d = _times(inputs.class_weights.astype(p.dtype), d, log_p)
            d_labels = sum_to(d, inputs.labels)
        if inputs.class_weights is not None:
            d_class_weights = _times(inputs.labels.astype(p.dtype), d_targets, log_p)
    else:
        at_label = is_label(spec, inputs)
        d_label, d_other = -g_nll * rest, g_nll
        if g_spread is not None:
            d_label, d_other = d_label + g_spread * exp(-nll), g_nll + g_spread
        d_z = jnp.where(at_label, d_label, (d_other * share) * weight)
    if g_entropy is not None and statistics.depth is not None:
        # Of probability zero is what underflows, and what is behind by infinity.
        beyond = jnp.where(weight == 0, 0, -behind - statistics.depth)
        d_z = d_z + ((g_entropy * share) * weight) * beyond
    if g_smooth is not None:
        u = uniform_of(spec, inputs, p.dtype) if uniform is None else uniform
        if inputs.class_weights is None:
            # The same share of all: no class but one alone has nearly as much.
            d_z = d_z + g_smooth * (p - u.target)
        else:
            minus_rest = _minus_others(behind, spread, p)
            d_z = d_z + g_smooth * (u.others * p + u.target * minus_rest)
            d_uniform = _of_targets(g_smooth, log_p, present, linear)
            d_uniform = d_uniform / u.num_classes
            d_class_weights = _add(d_class_weights, d_uniform)
    if d_class_weights is not None and inputs.class_weights is not None:
        d_class_weights = sum_to(d_class_weights, inputs.class_weights)

    if inputs.where is not None:
        d_z = jnp.where(inputs.where, d_z, g_nll * poison)
    d_z = masked(inputs.counted, d_z)
    d_logits = d_z
    if inputs.scale is not None:
        d_logits = inputs.scale * d_z
        d_scale = d_z * masked(jnp.isfinite(gap), gap)
        of_each = inputs.scale.ndim > 0
        d_scale = sum_to(d_scale, inputs.scale) if of_each else jnp.sum(d_scale)
        d_scale = jnp.where(inputs.scale < 0, -d_scale, d_scale)
    if spec.softcap is not None:
        d_logits = softcap.slope(spec.softcap, logits) * d_logits
    d_logits = d_logits.astype(inputs.logits.dtype)
    return Gradients(d_logits, d_labels, d_class_weights, d_scale)


@jax.custom_jvp
def _minus_others(behind: Values, spread: Values, p: Values) -> Values:
    """`p - 1`, with its digits where `p` is near one: at the peak alone."""
    return jnp.where(behind == 0, -one_minus_exp(spread), p - 1)


@_minus_others.defjvp
def _minus_others_jvp(
    primals: tuple[Values, Values, Values], tangents: tuple[Values, Values, Values]
) -> tuple[Values, Values]:
    d_behind, d_spread, _ = tangents
    return _minus_others(*primals), primals[2] * (d_behind - d_spread)


def _with_picks(
    spec: Spec,
    inputs: Inputs,
    statistics: Statistics,
    cotangents: Cotangents,
    linear: bool,
    uniform: Uniform | None,
) -> Gradients:
    """The same of statistics of the rest, and of logits that are picked from it."""
    none = statistics.spread == -jnp.inf
    statistics = statistics._replace(spread=masked(~none, statistics.spread))
    g_picks = cotangents.picks
    d = pullback(
        spec,
        picks.rest_of(spec, inputs),
        statistics,
        cotangents._replace(picks=None),
        linear=linear,
        uniform=uniform,
    )
    if g_picks is None or inputs.picks is None:
        return d
    g_picks = masked(inputs.counted, g_picks)
    return d._replace(logits=picks.add(spec, d.logits, inputs.picks, g_picks))


def _of_targets(g: Values, log_p: Values, present: Mask | None, linear: bool) -> Values:
    """Cotangent of a target: `g` times the surprise of its class."""
    surprise = -log_p
    if not linear:
        surprise = masked(jnp.isfinite(surprise) | (g != 0), surprise)
    return masked(present, g * surprise)


def _times(factor: Values, d: Values, log_p: Values) -> Values:
    """The product, in which a factor of zero wins over an infinite surprise."""
    return factor * jnp.where((factor == 0) & jnp.isinf(log_p), 0, d)


def _add(a: Values | None, b: Values) -> Values:
    return b if a is None else a + b
