"""A teacher beside a student: the probabilities of both, and their ratio.

`d_j = log t_j - log s_j` is a difference of differences of logits, less one number for
each example that vanishes with them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxlosses._math import pairs, softcap
from jaxlosses._math.classes import (
    Inputs,
    Mask,
    Spec,
    Values,
    accumulation_dtype,
    masked,
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
        top: `d_j` at the student's largest logit, or None.
        ties: how many logits are as large, or None.
        mean: `sum_k s_k (f_k - f_r)`, or None; carries its derivative, too.
    """

    peak: Values
    spread: Values
    teacher_peak: Values
    teacher_spread: Values
    ahead: Values
    top: Values | None = None
    ties: Values | None = None
    mean: Values | None = None


class Parts(NamedTuple):
    """Of each class, the logarithms of both probabilities, and `d_j`."""

    student: Values
    teacher: Values
    lead: Values


class Found(NamedTuple):
    """The divergence of each example, and what its derivative needs besides."""

    value: Values
    norms: Norms


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def parts_of(rule: Rule, operands: Operands, norms: Norms) -> Parts:
    """Logarithms of probabilities, and of their ratio."""
    spec, scale = rule.spec, operands.scale
    (student, _), (teacher, _) = map(signed_of, inputs_of(operands))
    is_student, is_teacher = student != -jnp.inf, teacher != -jnp.inf
    student, teacher = masked(is_student, student), masked(is_teacher, teacher)

    def log_of(spec: Spec, some: Mask, z: Values, peak: Values, low: Values) -> Values:
        behind = scaled(gap_of(spec, z, peak), scale) - low
        return jnp.where(some, behind, -jnp.inf)

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
        log_of(spec, is_student, student, norms.peak, norms.spread),
        log_of(
            rule.teacher, is_teacher, teacher, norms.teacher_peak, norms.teacher_spread
        ),
        lead,
    )


@parts_of.defjvp
def _parts_jvp(
    rule: Rule,
    primals: tuple[Operands, Norms],
    tangents: tuple[Operands, Norms],
) -> tuple[Parts, Parts]:
    (operands, _), ((d_student, *_), d_norms) = primals, tangents
    parts = parts_of(rule, *primals)
    d = moved(rule, operands, d_student) - d_norms.spread
    if operands.where is not None:
        d = masked(operands.where, d)
    return parts, Parts(d, jnp.zeros_like(d), -d)


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


def inputs_of(operands: Operands) -> tuple[Inputs, Inputs]:
    """Both as they are read: sums are in the student's dtype."""
    student, teacher, where, counted, scale, *_ = operands
    dtype = accumulation_dtype(student.dtype)
    if accumulation_dtype(teacher.dtype) != dtype:
        teacher = teacher.astype(dtype)
    of_student = Inputs(student, None, where, counted, None, scale)
    return of_student, of_student._replace(logits=teacher)


def moved(rule: Rule, operands: Operands, d_student: Values) -> Values:
    """The tangent of the student's logits, after cap and scale."""
    spec, student = rule.spec, operands.student
    dtype = accumulation_dtype(student.dtype)
    d = d_student.astype(dtype)
    if spec.softcap is not None:
        d = softcap.slope(spec.softcap, student.astype(dtype)) * d
    return scaled(d, operands.scale)


def is_peak(operands: Operands, norms: Norms) -> Mask:
    return signed_of(inputs_of(operands)[0])[0] == norms.peak
