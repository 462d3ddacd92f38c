"""The loss of a chunk of examples, from its logits."""

from typing import NamedTuple

from jaxtyping import Array, Bool

from jaxlosses._backends import head
from jaxlosses._backends.head import Head, Labels, Matmul
from jaxlosses._combine import Example
from jaxlosses._logits import losses
from jaxlosses._options import Static, Weighing
from jaxlosses._rows import Given
from jaxlosses._types import Tree


class ForAll(NamedTuple):
    """What the loss of every example depends on; None for what there is none of.

    Attributes:
        class_weights: of the loss.
        scale: factor of all logits.
        weighing: the terms of the loss.
        labels: a distribution that all share.
        teacher: the factors of its logits, but for its hidden states.
        part_of_teacher: in a mixture.
    """

    class_weights: Array | None
    scale: Array | None
    weighing: Weighing
    labels: Array | None
    teacher: Head | None
    part_of_teacher: Array | None


class OfEach(NamedTuple):
    """What that of one depends on, likewise.

    Attributes:
        label_weights: class weight of its label.
        weights: its own weight.
        scale: factor of its logits.
        args: of a function of the caller.
        labels: a distribution, logits of a teacher, or probabilities of some classes.
        teacher_hidden: what its logits are formed of.
    """

    label_weights: Array | None
    weights: Array | None
    scale: Array | None
    args: Tree
    labels: Array | None
    teacher_hidden: Array | None


def loss_of_chunk(
    static: Static,
    teacher_matmul: Matmul | None,
    z: Array,
    for_all: ForAll,
    closed: tuple[Array, ...],
    of_each: OfEach,
    labels: Labels,
    exists: Bool[Array, " V"] | None,
) -> tuple[Array, Tree]:
    """Loss of each example of a chunk, from its logits, and what else to keep."""
    spec = static.spec
    scale = for_all.scale if of_each.scale is None else of_each.scale
    class_weights = for_all.class_weights
    inputs = head.inputs_of(spec, z, labels, exists, class_weights, scale)
    if spec.dense:
        own = for_all.labels if of_each.labels is None else of_each.labels
        if teacher_matmul is not None and for_all.teacher is not None:
            teacher = for_all.teacher._replace(hidden=of_each.teacher_hidden)
            own = head.project(teacher_matmul, teacher)
        inputs = inputs._replace(labels=own)
    example = Example(labels.counted, of_each.label_weights, of_each.weights)
    given = Given(of_each.args, closed)
    loss, *beside = losses(
        static, inputs, for_all.weighing, example, given, for_all.part_of_teacher
    )
    return loss, beside
