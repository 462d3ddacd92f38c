"""The loss on logits of arguments that are checked: statistics, combine, reduce."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Integer

from jaxlosses import _checks, _combine, _options, _rules, _sharding, _teacher, _top_k
from jaxlosses._backends.logits import OnLogits
from jaxlosses._combine import Example, Losses
from jaxlosses._math.classes import (
    Inputs,
    Spec,
    Values,
    accumulation_dtype,
    any_class,
    both,
)
from jaxlosses._math.statistics import Statistics
from jaxlosses._options import Options, Static, Weighing
from jaxlosses._rows import Given
from jaxlosses._types import DType, Tree


class Arrays(NamedTuple):
    """What a loss on logits reads.

    Attributes:
        logits: in any axis order; with `ids`, the classes are the last axis.
        labels: class ids, distributions, logits of a teacher, or probabilities of
            `ids`.
        where: classes that exist, of the logits' rank, or None for all.
        examples: those that count, or None for all.
        options: of the loss.
        ids: classes that a label names, or None.
    """

    logits: Float[Array, "..."]
    labels: Any
    where: Bool[Array, "..."] | None
    examples: Bool[Array, "*B"] | None
    options: Options
    ids: Integer[Array, "*B K"] | None = None


@functools.partial(jax.jit, static_argnums=0)
def loss_on_logits(static: Static, arrays: Arrays) -> Losses:
    """The loss of arguments that are checked, and what is wanted beside it."""
    mesh = _sharding.explicit_mesh(arrays)
    if mesh is not None and static.top_k is not None:
        return _by_hand(static, arrays, mesh)
    if mesh is not None:
        arrays = _split_alike(static.spec, arrays, mesh)
    return _loss(static, arrays)


def _loss(static: Static, arrays: Arrays) -> Losses:
    """The same of arrays of which no explicit axis has a part unlike another."""
    spec = static.spec
    options, dtype = arrays.options, accumulation_dtype(arrays.logits.dtype)
    inputs, example = _inputs(static, arrays, dtype)
    coefficients = options.coefficients(dtype)
    like = jnp.zeros(_checks.batch_shape(arrays.logits.shape, spec.axes), dtype)
    masses = _options.masses_of(static, options, coefficients, example, like)
    weighing = Weighing(coefficients, _combine.for_mean(coefficients, masses))
    of_labels = static.divergence is None and static.top_k is None
    if static.forward_mode and of_labels and example.weights is not None:
        # A forward rule is linear in what reaches it: it cannot let a NaN pass where
        # an example counts and stop it where one does not.
        tried = _statistics(spec, lax.stop_gradient(inputs))
        fine = jnp.isfinite(tried.nll) & jnp.isfinite(tried.spread)
        on = fine | jnp.expand_dims(example.weights != 0, spec.axes)
        inputs = inputs._replace(counted=both(inputs.counted, on))
    part = options.part_of_teacher(dtype)
    out = losses(static, inputs, weighing, example, options.given, part)
    return _options.reduced(static, out, masses)


def losses(
    static: Static,
    inputs: Inputs,
    weighing: Weighing,
    example: Example,
    given: Given,
    part_of_teacher: Array | None,
) -> Losses:
    """The loss of each example, and what is beside it.

    Args:
        static: which.
        inputs: logits and labels.
        weighing: the terms of a loss.
        example: what else is known of each example.
        given: the other arguments of a function of the caller.
        part_of_teacher: in the mixture of a divergence.
    """
    if static.divergence is not None:
        return _teacher.losses(static, inputs, example, part_of_teacher)

    def of(spec: Spec, inputs: Inputs) -> Statistics:
        return _statistics(spec, inputs, static.forward_mode)

    if static.top_k is not None:
        return _top_k.losses(static, inputs, weighing, example, of)
    found, plain = of(static.spec, inputs), _plain_nll(static, inputs)
    return _options.losses(static, inputs, found, weighing, example, given, plain)


def _plain_nll(static: Static, inputs: Inputs) -> Values | None:
    """For metrics, `nll` without class weights, where they are in the loss."""
    if not (static.return_stats and static.spec.dense):
        return None
    if inputs.class_weights is None:
        return None
    unweighted = lax.stop_gradient(inputs._replace(class_weights=None))
    return _statistics(static.spec, unweighted).nll


def _statistics(spec: Spec, inputs: Inputs, forward_mode: bool = False) -> Statistics:
    return _rules.statistics(OnLogits(spec), inputs, forward_mode)


def _inputs(static: Static, arrays: Arrays, dtype: DType) -> tuple[Inputs, Example]:
    """What the statistics depend on, and what else is known of each example."""
    spec, logits, labels = static.spec, arrays.logits, arrays.labels
    options = arrays.options
    counted = _counted(static, arrays)
    label_weights = class_weights = None
    if not spec.dense:
        ids = _options.class_ids(spec, logits.shape, labels)
        labels = jnp.expand_dims(ids, spec.axes)
        if options.class_weights is not None:
            label_weights = _options.weights_of_labels(
                spec, options.class_weights, ids, dtype
            )
    if options.class_weights is not None and (spec.dense or spec.smooth):
        class_weights = _along_classes(spec, options.class_weights, logits)
    scale = options.scale(dtype)
    if scale is not None and options.scales_each:
        scale = jnp.expand_dims(scale, spec.axes)
    inputs = Inputs(
        logits,
        labels,
        arrays.where,
        None if counted is None else jnp.expand_dims(counted, spec.axes),
        class_weights,
        scale,
        None
        if arrays.ids is None
        else _top_k.class_ids(spec, logits.shape, arrays.ids),
    )
    return inputs, Example(counted, label_weights, options.example_weights(dtype))


def _counted(static: Static, arrays: Arrays) -> Bool[Array, "..."] | None:
    """Which examples count, or None for all of them."""
    spec, shape = static.spec, arrays.logits.shape
    batch = _checks.batch_shape(shape, spec.axes)
    masks = _options.not_ignored(static, arrays.labels)
    if arrays.examples is not None:
        masks.append(arrays.examples)
    if arrays.where is not None:
        masks.append(jnp.squeeze(any_class(spec, arrays.where), spec.axes))
    weights = arrays.options.weights
    if static.top_k is not None and weights is not None:
        masks.append(weights != 0)
    if 0 in (shape[axis] for axis in spec.axes):
        masks.append(jnp.zeros(batch, bool))
    return _options.all_of(masks, batch)


def _by_hand(static: Static, arrays: Arrays, mesh: Mesh | AbstractMesh) -> Losses:
    """On a mesh of explicit axes, inside a `shard_map`, which looks up ids."""
    logits = _sharding.split_of(arrays.logits)
    batch, classes = logits[:-1], logits[-1]
    (filled,) = _sharding.of_splits(Arrays)
    splits = filled(
        logits=logits,
        labels=(*batch, None),
        ids=(*batch, None),
        where=logits,
        examples=batch,
        options=splits_of(arrays.options, batch, ()),
    )
    part = static.over(
        (*static.axis_name, *_sharding.names(classes)),
        (*static.batch_axes, *_sharding.every_name(batch)),
    )
    out_specs = partitions_of(static, batch)
    run = functools.partial(_loss, part)
    return _sharding.by_hand(run, mesh, arrays, splits, out_specs)


def _split_alike(spec: Spec, arrays: Arrays, mesh: Mesh | AbstractMesh) -> Arrays:
    """On a mesh of explicit axes: what belongs to the logits, split as they are."""
    logits = _sharding.split_of(arrays.logits)
    batch = tuple(a for i, a in enumerate(logits) if i not in spec.axes)
    (filled,) = _sharding.of_splits(Arrays)
    splits = filled(
        logits=logits,
        labels=logits if spec.dense else batch,
        where=logits,
        examples=batch,
        ids=(),
        options=splits_of(arrays.options, batch, (None,)),
    )
    return _sharding.reshard(mesh, arrays, splits)


def splits_of(
    options: Options, batch: _sharding.Split, classes: _sharding.Split
) -> Tree:
    """How what the caller asked for is split where examples and classes are."""
    (of_options,) = _sharding.of_splits(Options)
    return of_options(
        class_weights=classes,
        weights=batch,
        label_smoothing=(),
        z_loss=(),
        logit_scale=batch if options.scales_each else (),
        normalizer=(),
        teacher_weight=(),
        given=Given(jax.tree.map(lambda _: batch, options.given.args)),
    )


def partitions_of(static: Static, batch: _sharding.Split) -> Losses:
    """Those of losses whose examples are split."""
    of_examples: Tree = P(*batch)
    of_sum: Tree = P()
    return Losses(
        of_examples if static.reduction == "none" else of_sum,
        of_examples if static.return_stats else None,
        of_examples if static.return_entropy else None,
        of_examples if static.function else None,
    )


def _along_classes(
    spec: Spec, class_weights: Float[Array, " V"], logits: Float[Array, "..."]
) -> Float[Array, "..."]:
    """The vector laid along the class axes, of the logits' rank."""
    shape = logits.shape
    sizes = [shape[axis] for axis in spec.axes]
    order = sorted(range(len(sizes)), key=lambda i: spec.axes[i])
    dims = [n if i in spec.axes else 1 for i, n in enumerate(shape)]
    laid = class_weights.reshape(sizes).transpose(order).reshape(dims)
    return _sharding.split_like(laid, logits)
