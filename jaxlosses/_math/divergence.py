"""Divergences of two softmaxes over the same classes, of which one is a constant.

With `d_j = log t_j - log s_j`, of a teacher `t` and a student `s`, what is summed over
the classes has one sign and vanishes with `d_j`:

    KL(t || s)   t_j (d + exp(-d) - 1)
    KL(s || t)   s_j (exp(d) - 1 - d)
    JS           b t_j h((1 - b) (exp(-d) - 1)) + (1 - b) s_j h(b (exp(d) - 1))
                 h(u) = u - log(1 + u)

for `sum_j t_j = sum_j s_j`. Neither is computed from the logarithms of two rounded
sums: `d_j` is a difference of differences of logits, less one number for each example
that vanishes with them; see `_norms`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jaxlosses._elementary import exp
from jaxlosses._math import ratios
from jaxlosses._math.classes import Inputs, Spec, Values, largest, masked, total
from jaxlosses._math.teacher import (
    Found,
    Norms,
    Operands,
    Parts,
    Rule,
    inputs_of,
    is_peak,
    moved,
    parts_of,
)

# `peak` and `spread` of some logits.
Normalizer = Callable[[Spec, Inputs], tuple[Values, Values]]
# The sums over all classes of two terms of each.
Totals = Callable[[Spec, tuple[Values, Values]], tuple[Values, Values]]
# Below, a teacher has nothing of a mixture that counts.
_LEAST_LEAD = -40


def divergence(rule: Rule, operands: Operands) -> Values:
    """The divergence of each example in nats, differentiable by the student's logits.

    Where an example does not count, and where no class exists, it is zero. Where the
    first distribution of a KL has mass and the second none, it is infinite.
    """
    found = rule.read(rule, lax.stop_gradient(operands))
    return _differentiable(rule, operands, *found)


def each_total(spec: Spec, terms: tuple[Values, Values]) -> tuple[Values, Values]:
    """Two sums, one by one."""
    return total(spec, terms[0]), total(spec, terms[1])


def evaluate(
    rule: Rule,
    normalizer: Normalizer,
    operands: Operands,
    totals: Totals = each_total,
) -> Found:
    """The same without a derivative, and what that needs besides."""
    norms = _norms(rule, normalizer, operands)
    if rule.kind.direction == "jensen_shannon":
        found = _to_mixture(rule, operands, norms)
    else:
        found = _relative_entropy(rule, operands, norms, totals)
    # `jax_debug_nans` looks at what is kept of examples that do not count, too.
    return jax.tree.map(lambda a: masked(operands.counted, a), found)


def _relative_entropy(
    rule: Rule, operands: Operands, norms: Norms, totals: Totals
) -> Found:
    """A KL, of log-ratios that are all wrong by the same: by half its square."""
    student, teacher, lead = parts_of(rule, operands, norms)
    is_forward = rule.kind.direction == "forward"
    log_p, log_q = (teacher, student) if is_forward else (student, teacher)
    ahead = lead if is_forward else -lead
    terms = ratios.relative_entropy(exp(log_p), exp(log_q), ahead)
    value, over = totals(rule.spec, terms)
    lost = jnp.log1p(over)
    value = jnp.maximum(value - lost * lost / 2, 0)
    lost = lost if is_forward else -lost
    norms = norms._replace(ahead=norms.ahead + lost)
    if not is_forward:
        norms = _with_mean(rule, operands, norms, Parts(student, teacher, lead - lost))
    return Found(value, norms)


def _to_mixture(rule: Rule, operands: Operands, norms: Norms) -> Found:
    """A Jensen-Shannon divergence, of log-ratios with all their digits."""
    over = total(rule.spec, ratios.excess(*parts_of(rule, operands, norms)))
    norms = norms._replace(ahead=norms.ahead + jnp.log1p(over))
    parts, weight = parts_of(rule, operands, norms), operands.teacher_weight
    assert weight is not None
    student, teacher = exp(parts.student), exp(parts.teacher)
    value = total(rule.spec, ratios.to_mixture(student, teacher, parts.lead, weight))
    return Found(value, _with_mean(rule, operands, norms, parts))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _differentiable(
    rule: Rule, operands: Operands, value: Values, norms: Norms
) -> Values:
    """The value, which depends on the operands."""
    del rule, operands, norms
    return value


@_differentiable.defjvp
def _differentiable_jvp(
    rule: Rule,
    primals: tuple[Operands, Values, Norms],
    tangents: tuple[Operands, Values, Norms],
) -> tuple[Values, Values]:
    (operands, value, norms), ((d_student, *_), _, _) = primals, tangents

    def tangent(
        operands: Operands, norms: Norms, value: Values, d_student: Values
    ) -> Values:
        norms = _differentiable_norms(rule, operands, norms)
        slope = _slope(rule, operands, norms, value)
        return total(rule.spec, slope * moved(rule, operands, d_student))

    # Reverse mode keeps the logits and rebuilds what is as large.
    tangent = jax.checkpoint(tangent, prevent_cse=False)
    d = tangent(operands, norms, value, d_student)
    return _differentiable(rule, operands, value, norms), d


def _slope(rule: Rule, operands: Operands, norms: Norms, value: Values) -> Values:
    """The derivative by every logit of the student, after cap and scale.

    With `f_j` the logarithm of what stands against `s_j`, over `s_j`, that is
    `s_j sum_k s_k (f_k - f_j)` for all but the forward direction.
    """
    parts = parts_of(rule, operands, norms)
    student, weight = exp(parts.student), operands.teacher_weight
    if rule.kind.direction == "forward":
        slope = -ratios.excess(*parts)
    else:
        assert norms.mean is not None
        part = student if weight is None else (1 - weight) * student
        # Of no probability, or in an infinite sum, a class has no direction.
        none = (student == 0) | jnp.isinf(value)
        beyond = _beyond_peak(rule, operands, norms, parts)
        slope = part * jnp.where(none, 0, norms.mean - beyond)
    if operands.weightless is not None:
        slope = masked(~(operands.weightless & ~jnp.isfinite(value)), slope)
    if operands.where is not None:
        slope = masked(operands.where, slope)
    return masked(operands.counted, slope)


def _with_mean(rule: Rule, operands: Operands, norms: Norms, parts: Parts) -> Norms:
    """The same with what the slope needs of all classes."""
    at_peak = is_peak(operands, norms)
    top = largest(rule.spec, jnp.where(at_peak, parts.lead, -jnp.inf))
    if operands.teacher_weight is not None:
        top = jnp.maximum(top, _LEAST_LEAD)
    norms = norms._replace(top=top, ties=total(rule.spec, at_peak.astype(top.dtype)))
    return norms._replace(mean=_mean(rule, operands, norms, parts))


def _mean(rule: Rule, operands: Operands, norms: Norms, parts: Parts) -> Values:
    beyond = _beyond_peak(rule, operands, norms, parts)
    student = exp(parts.student)
    terms = jnp.where(student == 0, 0, student * beyond)
    return total(rule.spec, terms)


def _beyond_peak(rule: Rule, operands: Operands, norms: Norms, parts: Parts) -> Values:
    """`f_j - f_r`, with `r` the student's largest logit, of which it is exactly 0.

    Where that class has all but nothing of the probability, what is left of its own
    entry is less than a rounding of `f_r`. All sums of `f_j - f_r` are the same for
    every constant in the place of `f_r`.
    """
    assert norms.top is not None
    top, weight = lax.stop_gradient(norms.top), operands.teacher_weight
    beyond = parts.lead - top
    if weight is not None:
        # f_j - f_r is of the same form, with what the teacher has of the mixture at r.
        odds = top + (jnp.log(weight) - jnp.log1p(-weight))
        shares = jax.nn.sigmoid(odds), jax.nn.sigmoid(-odds)
        beyond = ratios.log_of_mixture(beyond, *shares)
    alone = (norms.ties == 1) & is_peak(operands, norms)
    return beyond - jnp.where(alone, lax.stop_gradient(beyond), 0)


# --- Peaks and spreads.


def _norms(rule: Rule, normalizer: Normalizer, operands: Operands) -> Norms:
    """Peaks and spreads, and about the difference of these from those of the logits.

    Each spread is rounded, and near convergence a rounding is more than `d_j`. What is
    lost so, `log sum_j s_j exp(d_j)`, is `log1p` of the sum of `t_j - s_j`, taken from
    `d_j`: it is 0 where these are, and sums of exponentials are but factors in it.
    """
    student, teacher = inputs_of(operands)
    (peak, spread), (teacher_peak, teacher_spread) = (
        normalizer(rule.spec, student),
        normalizer(rule.teacher, teacher),
    )
    ahead = teacher_spread - spread
    # What may be nothing but roundings would cost the digits of a smaller difference.
    ahead = jnp.where(jnp.abs(ahead) < 4 * jnp.finfo(ahead.dtype).eps, 0, ahead)
    return Norms(peak, spread, teacher_peak, teacher_spread, ahead)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _differentiable_norms(rule: Rule, operands: Operands, norms: Norms) -> Norms:
    """The same, of which the student's spread depends on the operands."""
    del rule, operands
    return norms


@_differentiable_norms.defjvp
def _differentiable_norms_jvp(
    rule: Rule, primals: tuple[Operands, Norms], tangents: tuple[Operands, Norms]
) -> tuple[Norms, Norms]:
    (operands, norms), ((d_student, *_), _) = primals, tangents
    norms = _differentiable_norms(rule, operands, norms)
    p = exp(parts_of(rule, operands, norms).student)
    d_spread = total(rule.spec, p * moved(rule, operands, d_student))
    d_spread = masked(operands.counted, d_spread)
    d_norms = jax.tree.map(jnp.zeros_like, norms)._replace(spread=d_spread)
    if norms.mean is not None:

        def mean(student: Values, spread: Values) -> Values:
            some, own = (
                operands._replace(student=student),
                norms._replace(spread=spread),
            )
            return _mean(rule, some, own, parts_of(rule, some, own))

        _, d_mean = jax.jvp(
            mean, (operands.student, norms.spread), (d_student, d_spread)
        )
        d_norms = d_norms._replace(mean=masked(operands.counted, d_mean))
    return norms, d_norms
