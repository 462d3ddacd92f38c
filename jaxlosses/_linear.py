"""The fused loss of arguments that are checked: plan, chunks, combine, reduce."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Bool, Integer

from jaxlosses import _checks, _combine, _options, _rules, _sharding, _top_k
from jaxlosses._backends import head, plan, recompute, tokens
from jaxlosses._backends.chunks import Plans
from jaxlosses._backends.examples import Operands
from jaxlosses._backends.head import (
    Head,
    Labels,
    Layout,
    Matmul,
    Product,
    classes_of,
    matmul_of,
)
from jaxlosses._backends.plan import Strategy
from jaxlosses._backends.vocab import ByClasses
from jaxlosses._checks import Given
from jaxlosses._chunk import ForAll, OfEach, loss_of_chunk
from jaxlosses._combine import Example, Losses
from jaxlosses._logits import Arrays, loss_on_logits, partitions_of, splits_of
from jaxlosses._math.classes import Inputs, Spec, any_class, is_id
from jaxlosses._math.statistics import Statistics
from jaxlosses._options import Options, Static, Weighing
from jaxlosses._types import DType, Tree


@dataclasses.dataclass(frozen=True)
class Fused:
    """Everything that a compiled loss is specialised for, as the caller says it.

    Attributes:
        on_logits: what it is of logits.
        matmul: how they are formed.
        strategy: how to go through them.
        workspace: bytes to hold at once, or None.
        teacher: how the logits of a teacher are formed that has a head of its own.
    """

    on_logits: Static
    matmul: Matmul
    strategy: Strategy
    workspace: int | None
    teacher: Matmul | None = None

    @property
    def dtype(self) -> DType:
        """Of sums."""
        return self.matmul.accumulation


class FusedArrays(NamedTuple):
    """What a fused loss reads.

    Attributes:
        head: the factors of the logits.
        labels: class ids, distributions or logits of a teacher; None for one that has
            a head of its own; or probabilities of `ids`.
        where: classes that exist, `V` or `B... V`, or None for all.
        examples: those that count, or None for all.
        options: of the loss.
        teacher: the factors of the teacher's logits, or None.
        ids: classes that a label names, or None.
    """

    head: Head
    labels: Array | None
    where: Bool[Array, "..."] | None
    examples: Bool[Array, "*B"] | None
    options: Options
    teacher: Head | None = None
    ids: Integer[Array, "*B K"] | None = None


def fused_of(
    on_logits: Static,
    layout: Layout,
    head: Head,
    *,
    strategy: Given,
    workspace_bytes: Given,
    compute_dtype: Given,
    every_class: str | None = None,
    teacher: Matmul | None = None,
) -> Fused:
    """How logits are formed and gone through, as the caller says it, checked.

    Args:
        on_logits: what the loss is of logits.
        layout: of the kernel.
        head: the factors of the logits.
        strategy: how to go through them.
        workspace_bytes: to hold at once.
        compute_dtype: of the matmuls.
        every_class: what labels are that have a number for each class, or None.
        teacher: how the logits of a teacher are formed.
    """
    _checks.split_over("axis_name", on_logits.axis_name, "kernel", head.kernel)
    _checks.split_over("batch_axis_name", on_logits.batch_axes, "hidden", head.hidden)
    way = _checks.strategy(strategy)
    _checks.suits(way, on_logits.reduction, every_class, on_logits.forward_mode)
    workspace = _checks.workspace_bytes(workspace_bytes)
    matmul = matmul_of(layout, head, _checks.compute_dtype(compute_dtype))
    return Fused(on_logits, matmul, way, workspace, teacher)


@functools.partial(jax.jit, static_argnums=0)
def fused_loss(static: Fused, arrays: FusedArrays) -> Losses:
    """The loss, and what is wanted beside it."""
    mesh = _sharding.explicit_mesh(arrays)
    return _run(static, arrays) if mesh is None else _by_hand(static, arrays, mesh)


def _by_hand(static: Fused, arrays: FusedArrays, mesh: Mesh | AbstractMesh) -> Losses:
    """On a mesh of explicit axes: split as the types say, inside a `shard_map`.

    Examples stay as they are split. The classes stay where no axis of the examples
    has them; features are gathered.
    """
    hidden, kernel, _ = arrays.head
    on_logits = static.on_logits
    batch = _sharding.split_of(hidden)[:-1]
    over = _sharding.every_name(batch)
    split = _sharding.names(_sharding.split_of(kernel)[static.matmul.layout == "dv"])
    split = tuple(name for name in split if name not in over)
    every = (split or None,)
    _checks.closes_over_nothing(arrays.options.given.closed)
    of_head, filled = _sharding.of_splits(Head, FusedArrays)

    def of(matmul: Matmul | None) -> Tree:
        is_dv = matmul is not None and matmul.layout == "dv"
        kernel = (None, *every) if is_dv else (*every, None)
        return of_head(hidden=(*batch, None), kernel=kernel, bias=every)

    of_labels = batch
    if on_logits.spec.dense:  # a distribution has the classes as well
        of_labels = (*batch, None) if on_logits.top_k else (*batch, *every)
    splits = filled(
        head=of(static.matmul),
        teacher=of(static.teacher),
        labels=of_labels,
        ids=(*batch, None),
        where=every if _is_shared(arrays.where) else (*batch, *every),
        examples=batch,
        options=splits_of(arrays.options, batch, every),
    )
    # Inside a `shard_map` over other axes, the caller may have split the classes.
    batch_axes = (*on_logits.batch_axes, *over)
    part = on_logits.over((*on_logits.axis_name, *split), batch_axes)
    run = functools.partial(_run, dataclasses.replace(static, on_logits=part))
    out_specs = partitions_of(on_logits, batch)
    return _sharding.by_hand(run, mesh, arrays, splits, out_specs)


def _run(static: Fused, arrays: FusedArrays) -> Losses:
    """The loss of arrays of which every axis may be cut, or none."""
    counted = _counted(static, arrays)
    if counted is not None:  # a NaN times a cotangent of zero would be NaN
        hidden = jnp.where(counted[..., None], arrays.head.hidden, 0)
        arrays = arrays._replace(head=arrays.head._replace(hidden=hidden))
    on_logits = static.on_logits
    # What a function closes over is differentiated in the type it has there: as one
    # value for all devices, before the cotangent of each of them is known.
    closed = arrays.options.given.closed
    shared = any(_sharding.varies_less(x, arrays.head.hidden) for x in closed)
    _checks.closes_over_parts(shared, static.strategy)
    summed = on_logits.reduction != "none" and not shared
    request = plan.Request(
        _has_every_class(on_logits),
        summed,
        on_logits.forward_mode,
        teacher=static.teacher is not None,
    )
    way, plans = plan.choose(
        static.matmul, arrays.head, request, static.strategy, static.workspace
    )
    if way == "dense":
        return _on_logits(static, arrays)
    batch = arrays.head.hidden.shape[:-1]
    if not batch or plans.first.local:
        arrays = _flattened(arrays)
        on_logits = on_logits.of_rank(1)
    cut = dataclasses.replace(static, on_logits=on_logits)
    out = _in_chunks(cut, way, plans, arrays)
    loss = out.loss.reshape(batch) if on_logits.reduction == "none" else out.loss
    return Losses(loss, *jax.tree.map(lambda a: a.reshape(batch), out[1:]))


def _on_logits(static: Fused, arrays: FusedArrays) -> Losses:
    """The loss on all logits at once."""
    on_logits = static.on_logits
    rule = head.project if on_logits.forward_mode else head.logits
    batch = arrays.head.hidden.shape[:-1]
    where = arrays.where
    if where is not None and _is_shared(where):
        where = where.reshape((1,) * len(batch) + (-1,))
    masks = _options.all_of(_masks(arrays), batch)
    z = rule(static.matmul, arrays.head)
    labels = arrays.labels
    if static.teacher is not None and arrays.teacher is not None:
        labels = head.project(static.teacher, arrays.teacher)
    given = Arrays(z, labels, where, masks, arrays.options, arrays.ids)
    return loss_on_logits(on_logits, given)


def _flattened(arrays: FusedArrays) -> FusedArrays:
    """The same with one batch axis."""
    hidden, options = arrays.head.hidden, arrays.options
    args, scale = options.given.args, options.logit_scale
    labels, teacher = arrays.labels, arrays.teacher
    if labels is not None and labels.ndim < hidden.ndim:
        labels = jnp.ravel(labels)
    elif labels is not None:
        classes = labels.shape[-1]
        if labels[..., 0].size > 1:  # not shared by all examples
            labels = jnp.broadcast_to(labels, (*hidden.shape[:-1], classes))
        labels = labels.reshape(-1, classes)
    examples, weights, args = jax.tree.map(
        jnp.ravel, (arrays.examples, options.weights, args)
    )
    given = options.given._replace(args=args)
    scale = jnp.ravel(jnp.asarray(scale)) if options.scales_each else scale
    where = arrays.where
    if where is not None and not _is_shared(where):
        where = where.reshape(-1, where.shape[-1])

    def flat(head: Head) -> Head:
        return head._replace(hidden=head.hidden.reshape(-1, head.hidden.shape[-1]))

    return arrays._replace(
        head=flat(arrays.head),
        teacher=None if teacher is None else flat(teacher),
        labels=labels,
        ids=None
        if arrays.ids is None
        else arrays.ids.reshape(-1, arrays.ids.shape[-1]),
        where=where,
        examples=examples,
        options=options._replace(weights=weights, logit_scale=scale, given=given),
    )


def _in_chunks(
    static: Fused, way: plan.Way, plans: Plans, arrays: FusedArrays
) -> Losses:
    """The loss by any strategy but the dense one."""
    on_logits, spec = static.on_logits, static.on_logits.spec
    options, given, dtype = arrays.options, arrays.options.given, static.dtype
    labels, example = _labels(static, arrays)
    exists = arrays.where if labels.exists is None else None
    coefficients, scale = options.coefficients(dtype), options.scale(dtype)
    class_weights = options.class_weights if spec.smooth or spec.dense else None
    like = jnp.zeros(labels.ids.shape, dtype)
    masses = _options.masses_of(on_logits, options, coefficients, example, like)
    weighing = Weighing(coefficients, _combine.for_mean(coefficients, masses))

    if way == "tokens" or _has_every_class(on_logits):
        of_all, of_each = (None, scale) if options.scales_each else (scale, None)
        # A distribution that all examples share is of one row.
        given_labels = arrays.labels if spec.dense else None
        is_shared = given_labels is not None and given_labels[..., 0].size == 1
        is_shared = is_shared and arrays.ids is None
        if given_labels is not None and not is_shared:
            shape = (*like.shape, given_labels.shape[-1])
            given_labels = jnp.broadcast_to(given_labels, shape)
        teacher, teacher_hidden = arrays.teacher, None
        if teacher is not None:
            teacher_hidden, teacher = teacher.hidden, teacher._replace(hidden=None)
        operands = Operands(
            arrays.head,
            ForAll(
                class_weights,
                of_all,
                weighing,
                given_labels if is_shared else None,
                teacher,
                options.part_of_teacher(dtype),
            ),
            given.closed,
            OfEach(
                example.label_weights,
                example.weights,
                of_each,
                given.args,
                None if is_shared else given_labels,
                teacher_hidden,
            ),
            labels,
            exists,
        )
        loss_of = functools.partial(loss_of_chunk, on_logits, static.teacher)
        if way == "tokens":
            total, beside = tokens.summed(plans, loss_of, operands)
            return Losses(_options.over_batch(on_logits, total, masses), *beside)
        loss, beside = recompute.of_each(plans, loss_of, operands)
        return _options.reduced(on_logits, Losses(loss, *beside), masses)

    by = ByClasses if way == "vocab" else recompute.ByExamples
    if on_logits.top_k is not None:

        def of(spec: Spec, inputs: Inputs) -> Statistics:
            named, ids = labels._replace(picks=inputs.picks), inputs.labels
            if ids is not None:
                named = named._replace(ids=ids[..., 0])
            product = Product(arrays.head, None, scale, named, exists)
            found = _rules.statistics(by(spec, plans), product, on_logits.forward_mode)
            return head.expanded(spec, found)

        number = classes_of(static.matmul.layout, arrays.head.kernel)
        z = jax.ShapeDtypeStruct((*like.shape, number), dtype)
        inputs = head.inputs_of(spec, z, labels, exists, None, scale)
        inputs = inputs._replace(labels=arrays.labels)
        out = _top_k.losses(on_logits, inputs, weighing, example, of)
        return _options.reduced(on_logits, out, masses)

    product = Product(arrays.head, class_weights, scale, labels, exists)
    found = _rules.statistics(by(spec, plans), product, on_logits.forward_mode)
    inputs = head.inputs_of(spec, None, labels, exists, class_weights, scale)
    found = head.expanded(spec, found)
    out = _options.losses(on_logits, inputs, found, weighing, example, given)
    return _options.reduced(on_logits, out, masses)


def _labels(static: Fused, arrays: FusedArrays) -> tuple[Labels, Example]:
    """What is known of each example: for its statistics, and for its loss."""
    spec, dtype, options = static.on_logits.spec, static.dtype, arrays.options
    num_classes = classes_of(static.matmul.layout, arrays.head.kernel)
    batch = arrays.head.hidden.shape[:-1]
    counted, weights = _counted(static, arrays), options.example_weights(dtype)
    where, shape = arrays.where, (*batch, num_classes)
    own = None if _is_shared(where) else where
    if spec.dense or arrays.labels is None:
        ids = jnp.zeros(batch, jnp.int32)
        labels = Labels(ids, counted, own)
        if arrays.ids is not None:
            picks = _top_k.class_ids(spec, shape, arrays.ids)
            labels = labels._replace(ids=ids - 1, picks=picks)
        return labels, Example(counted, None, weights)
    ids = _options.class_ids(spec, shape, arrays.labels)
    of_labels = functools.partial(
        _options.weights_of_labels, spec, ids=ids, dtype=dtype
    )
    label_weights = None
    if options.class_weights is not None:
        label_weights = of_labels(options.class_weights)
    if own is not None:
        at_label = is_id(spec, shape, ids[..., None])
        ids = jnp.where(any_class(spec, at_label & own)[..., 0], ids, -1)
    elif where is not None:
        ids = jnp.where(of_labels(where.astype(dtype)) > 0, ids, -1)
    return Labels(ids, counted, own), Example(counted, label_weights, weights)


def _counted(static: Fused, arrays: FusedArrays) -> Bool[Array, "*B"] | None:
    """Which examples count, or None for all of them."""
    labels = None if static.on_logits.spec.dense else arrays.labels
    masks = _options.not_ignored(static.on_logits, labels) + _masks(arrays)
    if arrays.where is not None:
        axes = (arrays.where.ndim - 1,)
        spec = dataclasses.replace(static.on_logits.spec, axes=axes)
        masks.append(any_class(spec, arrays.where)[..., 0])
    return _options.all_of(masks, arrays.head.hidden.shape[:-1])


def _has_every_class(static: Static) -> bool:
    """Whether labels have a number for each class, which are cut with examples."""
    return static.spec.dense and static.top_k is None


def _is_shared(where: Bool[Array, "..."] | None) -> bool:
    """Whether the classes that exist are the same for every example."""
    return where is not None and where.ndim == 1


def _masks(arrays: FusedArrays) -> list[Bool[Array, "*B"]]:
    """Masks of examples that the caller gave."""
    weights = arrays.options.weights
    masks = [] if arrays.examples is None else [arrays.examples]
    return masks if weights is None else [*masks, weights != 0]
