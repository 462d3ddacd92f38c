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

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxlosses._elementary import exp
from jaxlosses._math import pairs, ratios, softcap
from jaxlosses._math.classes import (
    Inputs,
    Mask,
    Spec,
    Values,
    accumulation_dtype,
    largest,
    masked,
    total,
)
from jaxlosses._math.pairs import Pair
from jaxlosses._math.transform import gap_of, scaled, signed_of

Direction = Literal["forward", "reverse", "jensen_shannon"]


@dataclasses.dataclass(frozen=True)
class Divergence:
    """What is static about a divergence.

    Attributes:
        direction: of which distribution to which.
        teacher_softcap: the cap of the teacher's logits, or None.
    """

    direction: Direction
    teacher_softcap: float | None = None


# `peak` and `spread` of some logits.
Normalizer = Callable[[Spec, Inputs], tuple[Values, Values]]


@dataclasses.dataclass(frozen=True)
class Rule:
    """How a divergence is computed.

    Attributes:
        spec: of the student's logits.
        kind: which divergence.
        read: `evaluate` with some normalizer, of all operands or of parts of them.
    """

    spec: Spec
    kind: Divergence
    read: "Callable[[Rule, Operands], Found]"

    @property
    def teacher(self) -> Spec:
        """The spec of the teacher's logits."""
        return dataclasses.replace(self.spec, softcap=self.kind.teacher_softcap)


class Operands(NamedTuple):
    """What a divergence depends on. `K` is as in `Inputs`.

    Attributes:
        student: logits, the one that is differentiated.
        teacher: logits, of the same shape.
        where: classes that exist, as in `Inputs`.
        counted: examples that count, of shape `K`, or None for all.
        scale: factor of both, a positive scalar, or None for one.
        teacher_weight: `b` of the mixture `b t + (1 - b) s`, or None.
        weightless: examples of shape `K` which, if their divergence is not finite,
            have no gradient; or None.
    """

    student: Values
    teacher: Values
    where: Mask | None
    counted: Mask | None
    scale: Values | None
    teacher_weight: Values | None
    weightless: Mask | None


class Norms(NamedTuple):
    """What makes probabilities of both, of shape `K`; see `Inputs`.

    Attributes:
        peak: of the student.
        spread: of the student; carries the derivative of its `lse`.
        teacher_peak: of the teacher.
        teacher_spread: of the teacher.
        ahead: what the spread of the teacher is ahead, with all its digits.
    """

    peak: Values
    spread: Values
    teacher_peak: Values
    teacher_spread: Values
    ahead: Values


class Parts(NamedTuple):
    """Of each class, the probabilities of both, and `d_j`."""

    student: Values
    teacher: Values
    lead: Values


class Found(NamedTuple):
    """The divergence of each example, and what its derivative needs besides."""

    value: Values
    norms: Norms


def divergence(rule: Rule, operands: Operands) -> Values:
    """The divergence of each example in nats, differentiable by the student's logits.

    Where an example does not count, and where no class exists, it is zero. Where the
    first distribution of a KL has mass and the second none, it is infinite.
    """
    found = rule.read(rule, lax.stop_gradient(operands))
    return _differentiable(rule, operands, *found)


def evaluate(rule: Rule, normalizer: Normalizer, operands: Operands) -> Found:
    """The same without a derivative, and what that needs besides."""
    norms = _norms(rule, normalizer, operands)
    return Found(_value(rule, operands, norms), norms)


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
        return total(rule.spec, slope * _moved(rule, operands, d_student))

    # Reverse mode keeps the logits and rebuilds what is as large.
    tangent = jax.checkpoint(tangent, prevent_cse=False)
    d = tangent(operands, norms, value, d_student)
    return _differentiable(rule, operands, value, norms), d


def _value(rule: Rule, operands: Operands, norms: Norms) -> Values:
    parts = _parts(rule, operands, norms)
    match rule.kind.direction:
        case "forward":
            terms = ratios.relative_entropy(parts.teacher, parts.student, parts.lead)
        case "reverse":
            terms = ratios.relative_entropy(parts.student, parts.teacher, -parts.lead)
        case "jensen_shannon":
            weight = operands.teacher_weight
            assert weight is not None
            terms = ratios.to_mixture(*parts, weight)
    return masked(operands.counted, total(rule.spec, terms))


def _slope(rule: Rule, operands: Operands, norms: Norms, value: Values) -> Values:
    """The derivative by every logit of the student, after cap and scale.

    With `f_j` the logarithm of what stands against `s_j`, over `s_j`, that is
    `s_j sum_k s_k (f_k - f_j)` for all but the forward direction.
    """
    parts = _parts(rule, operands, norms)
    student, weight = parts.student, operands.teacher_weight
    if rule.kind.direction == "forward":
        slope = -ratios.excess(*parts)
    else:
        part, beyond = student, _beyond_peak(rule, operands, norms, parts)
        if weight is not None:
            part = (1 - weight) * student
        mean = total(rule.spec, jnp.where(student == 0, 0, student * beyond))
        # Of no probability, or in an infinite sum, a class has no direction.
        none = (student == 0) | jnp.isinf(value)
        slope = part * jnp.where(none, 0, mean - beyond)
    if operands.weightless is not None:
        slope = masked(~(operands.weightless & ~jnp.isfinite(value)), slope)
    if operands.where is not None:
        slope = masked(operands.where, slope)
    return masked(operands.counted, slope)


def _beyond_peak(rule: Rule, operands: Operands, norms: Norms, parts: Parts) -> Values:
    """`f_j - f_r`, with `r` the student's largest logit, of which it is exactly 0.

    Where that class has all but nothing of the probability, what is left of its own
    entry is less than a rounding of `f_r`.
    """

    def log_ratio(lead: Values) -> Values:
        weight = operands.teacher_weight
        return lead if weight is None else ratios.log_of_mixture(lead, weight)

    at_peak = signed_of(_inputs(operands)[0])[0] == norms.peak
    top = largest(rule.spec, jnp.where(at_peak, parts.lead, -jnp.inf))
    beyond = log_ratio(parts.lead) - lax.stop_gradient(log_ratio(top))
    # All sums of `f_j - f_r` are the same for every constant in the place of `f_r`.
    alone = total(rule.spec, at_peak.astype(jnp.int32)) == 1
    zero = jnp.where(alone & at_peak, lax.stop_gradient(beyond), 0)
    return beyond - zero


def _moved(rule: Rule, operands: Operands, d_student: Values) -> Values:
    """The tangent of the student's logits, after cap and scale."""
    spec, student = rule.spec, operands.student
    dtype = accumulation_dtype(student.dtype)
    d = d_student.astype(dtype)
    if spec.softcap is not None:
        d = softcap.slope(spec.softcap, student.astype(dtype)) * d
    return scaled(d, operands.scale)


# --- Probabilities of both, and their ratio.


def _norms(rule: Rule, normalizer: Normalizer, operands: Operands) -> Norms:
    """Peaks and spreads, and the difference of these from those of the logits.

    Each spread is rounded, and near convergence a rounding is more than `d_j`. With
    `g_j` what the teacher's logit is ahead, each below its peak, the difference is

        log1p(sum_j s_j (exp(g_j) - 1)) = -log1p(sum_j t_j (exp(-g_j) - 1))

    which is 0 where all `g_j` are, and in which spreads are but factors.
    """
    student, teacher = _inputs(operands)
    (peak, spread), (teacher_peak, teacher_spread) = (
        normalizer(rule.spec, student),
        normalizer(rule.teacher, teacher),
    )
    norms = Norms(peak, spread, teacher_peak, teacher_spread, jnp.zeros_like(peak))
    parts = _parts(rule, operands, norms)
    ratio = exp(teacher_spread - spread)
    over = total(
        rule.spec, ratios.excess(parts.student, ratio * parts.teacher, parts.lead)
    )
    ahead = jnp.where(ratio >= 1, jnp.log1p(over), -jnp.log1p(-over / ratio))
    norms = norms._replace(ahead=ahead)
    # `jax_debug_nans` looks at what is kept of examples that do not count, too.
    return Norms(*(masked(operands.counted, a) for a in norms))


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
    p = _parts(rule, operands, norms).student
    d_spread = total(rule.spec, p * _moved(rule, operands, d_student))
    d_spread = masked(operands.counted, d_spread)
    zeros = Norms(*map(jnp.zeros_like, norms))
    return norms, zeros._replace(spread=d_spread)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _parts(rule: Rule, operands: Operands, norms: Norms) -> Parts:
    """Probabilities and the logarithm of their ratio."""
    spec, scale = rule.spec, operands.scale
    (student, _), (teacher, _) = map(signed_of, _inputs(operands))
    is_student, is_teacher = student != -jnp.inf, teacher != -jnp.inf
    student, teacher = masked(is_student, student), masked(is_teacher, teacher)

    def share(spec: Spec, some: Mask, z: Values, peak: Values, low: Values) -> Values:
        behind = scaled(gap_of(spec, z, peak), scale) - low
        return exp(jnp.where(some, behind, -jnp.inf))

    ahead = _pair_of(rule, teacher, student)
    peaks = _pair_of(rule, norms.teacher_peak, norms.peak)
    high, low = pairs.add_pairs(ahead, Pair(-peaks.high, -peaks.low))
    # The same function of the same numbers, which compilers may evaluate in two ways.
    at_both = (student == norms.peak) & (teacher == norms.teacher_peak)
    lead = scaled(jnp.where(at_both, 0, high + low), scale)
    lead = lead - norms.ahead
    lead = jnp.where(is_teacher, lead, -jnp.inf)
    lead = jnp.where(is_student, lead, jnp.where(is_teacher, jnp.inf, 0))
    return Parts(
        share(spec, is_student, student, norms.peak, norms.spread),
        share(
            rule.teacher, is_teacher, teacher, norms.teacher_peak, norms.teacher_spread
        ),
        lead,
    )


@_parts.defjvp
def _parts_jvp(
    rule: Rule,
    primals: tuple[Operands, Norms],
    tangents: tuple[Operands, Norms],
) -> tuple[Parts, Parts]:
    (operands, _), ((d_student, *_), d_norms) = primals, tangents
    parts = _parts(rule, *primals)
    d = _moved(rule, operands, d_student) - d_norms.spread
    if operands.where is not None:
        d = masked(operands.where, d)
    return parts, Parts(parts.student * d, jnp.zeros_like(d), -d)


def _pair_of(rule: Rule, teacher: Values, student: Values) -> Pair:
    """A logit of the teacher minus one of the student, after their caps.

    XLA takes `(x + c) - c` for `x` where `c` is a constant of the program, as a teacher
    may be, and what a sum loses would be lost: each is made to depend on the other
    (benchmarks/NOTES.md, "A logit less a logit, where one is a constant").
    """
    teacher, student = (
        jnp.where(jnp.isnan(student), jnp.nan, teacher),
        jnp.where(jnp.isnan(teacher), jnp.nan, student),
    )
    caps = rule.kind.teacher_softcap, rule.spec.softcap
    if caps[0] == caps[1]:
        if caps[0] is None:
            return pairs.add(teacher, -student)
        return softcap.exact_difference(caps[0], teacher, student)

    def capped(cap: float | None, z: Values) -> Pair:
        if cap is None:
            return pairs.of(z)
        return softcap.exact_difference(cap, z, jnp.zeros_like(z))

    high, low = capped(caps[1], student)
    return pairs.add_pairs(capped(caps[0], teacher), Pair(-high, -low))


def _inputs(operands: Operands) -> tuple[Inputs, Inputs]:
    """Both as the normalizer takes them: sums are in the student's dtype."""
    student, teacher, where, counted, scale, *_ = operands
    dtype = accumulation_dtype(student.dtype)
    if accumulation_dtype(teacher.dtype) != dtype:
        teacher = teacher.astype(dtype)
    of_student = Inputs(student, None, where, counted, None, scale)
    return of_student, of_student._replace(logits=teacher)
