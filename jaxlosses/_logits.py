"""The loss on logits of arguments that are checked: statistics, combine, reduce."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Bool, Float

from jaxlosses import _checks, _combine, _options, _rules, _sharding, _teacher
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
from jaxlosses._types import DType


class Arrays(NamedTuple):
    """What a loss on logits reads."""

    logits: Float[Array, "..."]
    labels: Any
    where: Bool[Array, "..."] | None
    examples: Bool[Array, "*B"] | None
    options: Options


@functools.partial(jax.jit, static_argnums=0)
def loss_on_logits(static: Static, arrays: Arrays) -> Losses:
    """The loss of arguments that are checked, and what is wanted beside it."""
    spec = static.spec
    mesh = _sharding.explicit_mesh(arrays)
    if mesh is not None:
        arrays = _split_alike(spec, arrays, mesh)
    options, dtype = arrays.options, accumulation_dtype(arrays.logits.dtype)
    inputs, example = _inputs(static, arrays, dtype)
    if static.divergence is not None:
        out = _teacher.losses(static, inputs, example, options.part_of_teacher(dtype))
        coefficients = options.coefficients(dtype)
        masses = _options.masses_of(static, options, coefficients, example, out.loss)
        return _options.reduced(static, out, masses)
    if static.forward_mode and example.weights is not None:
        # A forward rule is linear in what reaches it: it cannot let a NaN pass where
        # an example counts and stop it where one does not.
        tried = _statistics(spec, lax.stop_gradient(inputs))
        fine = jnp.isfinite(tried.nll) & jnp.isfinite(tried.spread)
        on = fine | jnp.expand_dims(example.weights != 0, spec.axes)
        inputs = inputs._replace(counted=both(inputs.counted, on))
    found = _statistics(spec, inputs, static.forward_mode)
    plain = plain_nll(static, inputs)
    coefficients = options.coefficients(dtype)
    like = jnp.squeeze(found.nll, spec.axes)
    masses = _options.masses_of(static, options, coefficients, example, like)
    weighing = Weighing(coefficients, _combine.for_mean(coefficients, masses))
    out = _options.losses(
        static, inputs, found, weighing, example, options.given, plain
    )
    return _options.reduced(static, out, masses)


def plain_nll(static: Static, inputs: Inputs) -> Values | None:
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
    if 0 in (shape[axis] for axis in spec.axes):
        masks.append(jnp.zeros(batch, bool))
    return _options.all_of(masks, batch)


def _split_alike(spec: Spec, arrays: Arrays, mesh: Mesh | AbstractMesh) -> Arrays:
    """On a mesh of explicit axes: what belongs to the logits, split as they are."""
    logits = _sharding.split_of(arrays.logits)
    batch = tuple(a for i, a in enumerate(logits) if i not in spec.axes)
    of_options, filled = _sharding.of_splits(Options, Arrays)
    splits = filled(
        logits=logits,
        labels=logits if spec.dense else batch,
        where=logits,
        examples=batch,
        options=of_options(
            class_weights=(None,),
            weights=batch,
            label_smoothing=(),
            z_loss=(),
            logit_scale=batch if arrays.options.scales_each else (),
            normalizer=(),
            teacher_weight=(),
        ),
    )
    return _sharding.reshard(mesh, arrays, splits)


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
