"""The divergence of each example from a teacher, whose logits are its labels."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlosses import _combine
from jaxlosses._backends import choose
from jaxlosses._combine import Coefficients, Example, Losses, Terms
from jaxlosses._math.classes import Inputs
from jaxlosses._math.divergence import divergence
from jaxlosses._math.teacher import Operands, Rule
from jaxlosses._options import Static


def losses(
    static: Static,
    inputs: Inputs,
    example: Example,
    part_of_teacher: Float[Array, ""] | None,
) -> Losses:
    """Divergences, weighted.

    Args:
        static: which.
        inputs: the logits of the student, and those of the teacher as labels.
        example: what else is known of each example.
        part_of_teacher: in the mixture of a Jensen-Shannon divergence.
    """
    spec, weights = static.spec, example.weights
    assert static.divergence is not None
    weightless = None if weights is None else jnp.expand_dims(weights == 0, spec.axes)
    operands = Operands(
        inputs.logits,
        inputs.labels,
        inputs.where,
        inputs.counted,
        inputs.scale,
        part_of_teacher,
        weightless,
    )
    rule = Rule(spec, static.divergence, choose.divergence)
    value = jnp.squeeze(divergence(rule, operands), spec.axes)
    terms = Terms(jnp.zeros_like(value), value, None)
    loss = _combine.per_example(Coefficients(None, None), terms, example)
    return Losses(loss, None)
