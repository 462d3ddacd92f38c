"""What the caller asked for: one record of options, checked once.

Its static half is what a loss is compiled for; the other may change from call to call.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Integer

from jaxlosses import _checks, _combine, _rows
from jaxlosses._checks import Given
from jaxlosses._combine import (
    Coefficients,
    Example,
    Losses,
    Masses,
    Metric,
    Reduction,
)
from jaxlosses._math.classes import Inputs, Spec, Values, count_of
from jaxlosses._math.statistics import Statistics
from jaxlosses._math.teacher import Divergence
from jaxlosses._math.top_k import TopK
from jaxlosses._rows import Function
from jaxlosses._sharding import as_ids, shards_over
from jaxlosses._types import DType, Shape, Size


@dataclasses.dataclass(frozen=True)
class Static:
    """Everything that a compiled loss is specialised for.

    Attributes:
        spec: the statistics that the options need.
        ignored: the label that does not count, or None.
        reduction: over examples.
        forward_mode: which of the two rules.
        axis_name: mesh axes that split the classes.
        batch_axes: mesh axes that split the examples of a sum or mean.
        return_entropy: whether that is a result, to be differentiated.
        function: of the statistics, in place of the loss that the options make.
        divergence: to a teacher, whose logits are in the place of the labels.
        top_k: labels name some classes, and are their probabilities.
        metrics: those that are wanted by name.
    """

    spec: Spec
    ignored: int | None
    reduction: Reduction
    forward_mode: bool
    axis_name: tuple[str, ...]
    batch_axes: tuple[str, ...] = ()
    return_entropy: bool = False
    function: Function | None = None
    divergence: Divergence | None = None
    top_k: TopK | None = None
    metrics: tuple[Metric, ...] = ()

    @property
    def return_stats(self) -> bool:
        """Whether metrics are wanted, too."""
        return self.spec.predicted

    def over(self, axis_name: tuple[str, ...], batch_axes: tuple[str, ...]) -> "Static":
        """The same where mesh axes split classes and examples."""
        spec = dataclasses.replace(self.spec, shards=shards_over(axis_name))
        return dataclasses.replace(
            self, spec=spec, axis_name=axis_name, batch_axes=batch_axes
        )

    def of_rank(self, rank: int) -> "Static":
        """The same for so many batch axes, with the classes last."""
        spec = dataclasses.replace(self.spec, axes=(rank,))
        return dataclasses.replace(self, spec=spec)


class Weighing(NamedTuple):
    """What weighs the terms of a loss.

    Attributes:
        coefficients: of the options.
        weighed: the same for the mean.
    """

    coefficients: Coefficients
    weighed: Coefficients


class Options(NamedTuple):
    """What may change without a new compilation; None for what is switched off."""

    class_weights: Float[Array, " V"] | None
    weights: Float[Array, "*B"] | None
    label_smoothing: float | Array | None
    z_loss: float | Array | None
    logit_scale: float | Array | None
    normalizer: float | Array | None = None
    given: _rows.Given = _rows.Given()
    teacher_weight: float | Array | None = None

    @property
    def scales_each(self) -> bool:
        """Whether each example has its own factor of the logits."""
        return getattr(self.logit_scale, "ndim", 0) > 0

    def coefficients(self, dtype: DType) -> Coefficients:
        """Of the terms of a loss."""
        return Coefficients(_of(self.label_smoothing, dtype), _of(self.z_loss, dtype))

    def scale(self, dtype: DType) -> Float[Array, "..."] | None:
        """The factor of all logits, or of those of each example."""
        return _of(self.logit_scale, dtype)

    def part_of_teacher(self, dtype: DType) -> Float[Array, ""] | None:
        """In the mixture of a Jensen-Shannon divergence."""
        return _of(self.teacher_weight, dtype)

    def example_weights(self, dtype: DType) -> Float[Array, "*B"] | None:
        """The weight of each example."""
        return _of(self.weights, dtype)


def check(
    axes: tuple[int, ...],
    batch: Shape,
    num_classes: Size,
    *,
    dense: bool,
    ignored: int | None,
    class_weights: Given,
    label_smoothing: Given,
    z_loss: Given,
    logit_softcap: Given,
    logit_scale: Given,
    weights: Given,
    reduction: Given,
    normalizer: Given = None,
    axis_name: Given,
    batch_axis_name: Given = None,
    forward_mode: Given,
    return_stats: Given,
) -> tuple[Static, Options]:
    """Both halves of the record, from options as the caller gave them."""
    reduction = _checks.reduction(reduction)
    options = Options(
        class_weights=_checks.class_weights(class_weights, num_classes),
        weights=_checks.weights(weights, batch),
        label_smoothing=_checks.label_smoothing(label_smoothing),
        z_loss=_checks.z_loss(z_loss),
        logit_scale=_checks.logit_scale(logit_scale, batch),
        normalizer=_checks.normalizer(normalizer, reduction),
    )
    names = _checks.axis_name(axis_name)
    over = _checks.batch_axis_name(batch_axis_name, names, reduction)
    stats, metrics = _checks.return_stats(return_stats)
    spec = Spec(
        axes=axes,
        dense=dense,
        softcap=_checks.logit_softcap(logit_softcap),
        smooth=options.label_smoothing is not None,
        lse=options.z_loss is not None,
        predicted=stats,
        entropy="entropy" in metrics,
        rank="rank" in metrics,
        shards=shards_over(names),
    )
    forward_mode = _checks.flag("forward_mode", forward_mode)
    static = Static(
        spec, ignored, reduction, forward_mode, names, over, metrics=metrics
    )
    return static, options


def check_transform(
    axes: tuple[int, ...],
    batch: Shape,
    num_classes: Size,
    *,
    dense: bool = False,
    ignored: int | None = None,
    return_entropy: Given,
    weights: Given = None,
    reduction: Given = "none",
    **transform: Given,
) -> tuple[Static, Options]:
    """The same for a function of examples without the options of their loss."""
    static, options = check(
        axes,
        batch,
        num_classes,
        dense=dense,
        ignored=ignored,
        class_weights=None,
        label_smoothing=0.0,
        z_loss=0.0,
        weights=weights,
        reduction=reduction,
        return_stats=False,
        **transform,
    )
    entropy = _checks.flag("return_entropy", return_entropy)
    spec = dataclasses.replace(static.spec, entropy=entropy)
    return dataclasses.replace(static, spec=spec, return_entropy=entropy), options


def check_top_k(
    axes: tuple[int, ...],
    batch: Shape,
    num_classes: Size,
    *,
    rest: Given,
    as_divergence: Given,
    **others: Given,
) -> tuple[Static, Options]:
    """The same for labels that name some classes."""
    static, options = check(
        axes,
        batch,
        num_classes,
        dense=True,
        ignored=None,
        class_weights=None,
        label_smoothing=0.0,
        **others,
    )
    rest = _checks.rest(rest)
    kind = TopK(rest, _checks.as_divergence(as_divergence, rest))
    # What the labels do not name comes by its log-sum-exp.
    spec = dataclasses.replace(static.spec, lse=True)
    return dataclasses.replace(static, spec=spec, top_k=kind), options


def check_divergence(
    axes: tuple[int, ...],
    batch: Shape,
    num_classes: Size,
    *,
    direction: Given,
    teacher_weight: Given,
    temperature: Given,
    teacher_logit_softcap: Given,
    **others: Given,
) -> tuple[Static, Options]:
    """The same for a divergence, whose temperature and teacher are constants."""
    direction = _checks.direction(direction)
    weight = _checks.teacher_weight(teacher_weight)
    static, options = check_transform(
        axes,
        batch,
        num_classes,
        dense=True,
        return_entropy=False,
        logit_scale=1.0,
        **others,
    )
    cap = _checks.logit_softcap(
        teacher_logit_softcap, "teacher_logit_softcap", "temperature"
    )
    static = dataclasses.replace(static, divergence=Divergence(direction, cap))
    scale, weight = lax.stop_gradient((_checks.temperature(temperature), weight))
    mixed = weight if direction == "jensen_shannon" else None
    return static, options._replace(logit_scale=scale, teacher_weight=mixed)


# --- Which examples count.


def not_ignored(static: Static, labels: Array | None) -> list[Bool[Array, "..."]]:
    """The mask that `ignore_index` makes, if it makes one."""
    if static.ignored is None or labels is None:
        return []
    # A value that the labels' dtype cannot hold is no label.
    info = jnp.iinfo(labels.dtype)
    if not info.min <= static.ignored <= info.max:
        return []
    return [labels != np.asarray(static.ignored).astype(labels.dtype)]


def all_of(masks: list[Bool[Array, "..."]], batch: Shape) -> Bool[Array, "..."] | None:
    """Where every mask is true, or None without any."""
    if not masks:
        return None
    return functools.reduce(
        jnp.logical_and, [jnp.broadcast_to(mask, batch) for mask in masks]
    )


# --- What belongs to the label of each example.


def class_ids(
    spec: Spec, shape: Shape, labels: Integer[Array, "..."]
) -> Integer[Array, "..."]:
    """The labels as int32, with -1 for one that is no class."""
    if jnp.iinfo(labels.dtype).bits < 32:
        labels = labels.astype(jnp.int32)
    valid = (labels >= 0) & (labels < count_of(spec, shape))
    return jnp.where(valid, labels, jnp.full_like(labels, -1)).astype(jnp.int32)


def weights_of_labels(
    spec: Spec,
    class_weights: Float[Array, " V"],
    ids: Integer[Array, "..."],
    dtype: DType,
) -> Float[Array, "..."]:
    """The class weight of each label; for one that is no class, the loss is NaN."""
    size = class_weights.size
    if size == 0:
        return jnp.zeros(ids.shape, dtype)
    local = ids - spec.shards.first_id(size)
    here = (local >= 0) & (local < size)
    at = class_weights.astype(dtype).at[jnp.where(here, local, 0)]
    found = at.get(out_sharding=as_ids(ids))
    return spec.shards.sum(jnp.where(here, found, 0))


# --- The loss of each example.


def losses(
    static: Static,
    inputs: Inputs,
    found: Statistics,
    weighing: Weighing,
    example: Example,
    given: _rows.Given,
    plain_nll: Values | None = None,
) -> Losses:
    """What the options make of the statistics, or a function of the caller.

    Args:
        static: which.
        inputs: the arguments of the statistics.
        found: their values, whose class axes are of size 1.
        weighing: the terms of a loss.
        example: what else is known of each example.
        given: the other arguments of the function.
        plain_nll: as in `_combine.losses`.
    """
    spec = static.spec
    if static.function is not None:
        return _rows.losses(spec, inputs, found, static.function, given, example)
    return _combine.losses(
        spec, inputs, found, *weighing, example, static.metrics, plain_nll
    )


# --- Reductions over examples.


def masses_of(
    static: Static,
    options: Options,
    coefficients: Coefficients,
    example: Example,
    like: Float[Array, "..."],
) -> Masses | None:
    """What a mean divides by, which is known before its logits; None for no mean."""
    if static.reduction != "mean":
        return None
    given = _of(options.normalizer, like.dtype)
    if given is not None:
        return Masses(given, None)
    masses = _combine.masses(coefficients, example, like)
    return lax.psum(masses, static.batch_axes) if static.batch_axes else masses


def reduced(static: Static, out: Losses, masses: Masses | None) -> Losses:
    """Losses of examples, and what is beside them, as the caller wants them."""
    if not static.return_entropy:
        out = out._replace(entropy=None)
    if static.reduction == "none":
        return out
    return out._replace(loss=over_batch(static, jnp.sum(out.loss), masses))


def over_batch(
    static: Static, total: Float[Array, ""], masses: Masses | None
) -> Float[Array, ""]:
    """A sum, or a mean, over the examples of all devices."""
    if static.batch_axes:
        total = lax.psum(total, static.batch_axes)
    return total if masses is None else _combine.mean_of(total, masses)


def _of(x: float | Array | None, dtype: DType) -> Array | None:
    """An array of the dtype, or None."""
    return None if x is None else jnp.asarray(x).astype(dtype)
