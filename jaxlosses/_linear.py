"""The public fused loss: check, plan, statistics in chunks, combine, reduce."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, ArrayLike, Bool

from jaxlosses import _checks, _combine, _options, _rules, _sharding
from jaxlosses._backends import choose, head, tokens
from jaxlosses._backends.choose import Strategy
from jaxlosses._backends.chunks import Plan
from jaxlosses._backends.head import (
    Head,
    Labels,
    Layout,
    Product,
    classes_of,
    compute_dtype,
)
from jaxlosses._backends.logits import OnLogits
from jaxlosses._backends.recompute import ByExamples
from jaxlosses._backends.vocab import ByClasses
from jaxlosses._combine import Coefficients, Example, Losses, Reduction, Result
from jaxlosses._cross_entropy import Arrays, loss_on_logits
from jaxlosses._math.classes import Spec, accumulation_dtype, any_class
from jaxlosses._options import Options, Static
from jaxlosses._types import DType


@_checks.names_forward_mode
@_checks.has_own_messages
def linear_softmax_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    kernel_layout: Layout = "dv",
    where: ArrayLike | None = None,
    ignore_index: int | None = None,
    strategy: Strategy = "auto",
    workspace_bytes: int | None = None,
    class_weights: ArrayLike | None = None,
    label_smoothing: float | Array = 0.0,
    z_loss: float | Array = 0.0,
    logit_softcap: float | None = None,
    logit_scale: float | Array = 1.0,
    weights: ArrayLike | None = None,
    reduction: Reduction = "none",
    axis_name: str | tuple[str, ...] | None = None,
    forward_mode: bool = False,
    return_stats: bool = False,
) -> Result:
    """Softmax cross-entropy of `hidden @ kernel + bias`, without holding the logits.

    For each example with label `y`, class weights `w` and smoothing `α`:

        z = hidden @ kernel + bias
        loss = (1 - α) w_y (lse - z_y) + α / V Σ_j w_j (lse - z_j)

    with `lse = log Σ_j exp z_j`. It is the loss of
    `softmax_cross_entropy_with_integer_labels` on the logits `z`, which are computed
    in pieces: memory grows with `workspace_bytes`, not with examples times classes.

    Args:
        hidden: `B... D`, float16, bfloat16, float32 or float64: features of each
            example.
        kernel: of the same dtypes, `D V` or, with `kernel_layout="vd"`, `V D`.
        labels: `B...`, any integer dtype: class ids from 0 to `V - 1`. Or `B... V`,
            floating: a distribution over classes, with `strategy` `"dense"` or
            `"auto"` only.
        bias: shape `(V,)`, floating, or None.
        kernel_layout: `"dv"` for the kernel of a dense layer, `"vd"` for an embedding
            table that is tied to the output. Neither is transposed in memory.
        where: bool. Of shape `(V,)`: the classes that exist. Of shape `B...`: the
            examples that count; a shape that is both means classes.
        strategy: how to go through the logits.
            `"tokens"`: chunks of examples, the gradient formed in the forward pass;
            three matmuls for value and gradient. Needs `reduction` `"sum"` or
            `"mean"`. Under `jax.checkpoint` the pass runs again.
            `"recompute"`: chunks of examples, whose logits the backward pass computes
            again; four matmuls, any reduction.
            `"vocab"`: chunks of classes; four matmuls, any reduction, the smallest
            memory for very many classes.
            `"dense"`: all logits at once; three matmuls.
            `"auto"`: `"dense"` if all logits fit the workspace or labels are
            distributions; `"vocab"` if the logits of 64 examples do not (on one
            device and inside `shard_map`: elsewhere its slices of a kernel that is
            split over devices would be gathered); else, as for symbolic sizes of
            `jax.export`, `"tokens"` for a sum or a mean, and `"recompute"` otherwise
            or with `forward_mode`.
        workspace_bytes: bounds what is held at once beyond the arguments, the result,
            copies of `hidden` and the accumulators of the gradients (float32, of the
            shapes of `hidden` and `kernel`), as far as one example or one class
            fits. None takes a sixth of the logits, from 32 to 128 MiB, on a CPU, and
            1 GiB elsewhere. Where `jax.export` leaves the number of examples or of
            classes open, bytes cannot be counted: a chunk is a sixteenth of them.
        weights: shape `B...`, floating, integer or bool: multiplies each example's loss
            and enters the denominator of the mean; for weights of both signs take
            `"sum"`, since theirs may be near 0. An example of weight 0 is left out, as
            one with `ignore_index` is: the derivative by its weight is 0.
        axis_name: inside `shard_map`, the mesh axis or axes over which the classes
            are split, equally: fill up classes that do not divide, and mask them with
            `where`. Labels are global ids; `kernel`, `bias`, `class_weights` and
            `where` are the local part. With `check_vma=False`, in `pmap` and for the
            axis of a `vmap` no gradient could be right, and it is refused.
        forward_mode: register the same value and gradient so that `jax.jvp`,
            `jax.jacfwd` and `jax.linearize` work too; not with `"tokens"`.
        `ignore_index`, `class_weights`, `label_smoothing`, `z_loss`, `logit_softcap`,
        `logit_scale`, `reduction`, `return_stats`: as in
        `softmax_cross_entropy_with_integer_labels`.

    Returns:
        The loss in nats: `B...`, or a scalar if reduced; float64 if hidden or kernel
        are, else float32. With `return_stats`, the pair `(loss, Stats)`.

        The matmuls run in the dtype to which hidden and kernel promote and accumulate
        in float32: 16-bit heads get float32 logits. So do the gradients, which are
        rounded once to the dtype of their argument.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or range, or a strategy cannot do
            what is asked for.

    Values:
        As in `softmax_cross_entropy_with_integer_labels`.

    Differentiation:
        Reverse mode. Gradients by `hidden`, `kernel`, `bias`, `class_weights`,
        `weights`, `logit_scale`, `label_smoothing` and `z_loss`; those that are not
        asked for are not computed: a frozen kernel costs no matmul. Second
        derivatives, `vmap`, `scan` and `jax.checkpoint` work as they are; forward
        mode needs `forward_mode=True`.

        Examples that do not count cost nothing in `"tokens"` and `"recompute"` on one
        device and inside `shard_map`: chunks without any other are skipped.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import jaxlosses as jl
        >>> hidden, embedding = jnp.eye(2, 4), jnp.eye(3, 4)
        >>> labels = jnp.array([0, 2])
        >>> loss = jl.linear_softmax_cross_entropy(
        ...     hidden, embedding, labels, kernel_layout="vd", reduction="mean"
        ... )
        >>> print(f"{loss:.4f}")
        1.0514

    Source:
        Wijmans et al. 2025, *Cut Your Losses in Large-Vocabulary Language Models*
        (arXiv:2411.09009), for the classes in chunks; Hsu et al. 2024, *Liger Kernel*
        (arXiv:2410.10989), for the gradient in the forward pass.
    """
    hidden = _checks.hidden(hidden)
    batch, features = hidden.shape[:-1], hidden.shape[-1]
    kernel = _checks.kernel(kernel, kernel_layout, features)
    classes = classes_of(kernel_layout, kernel)
    shape, axes = (*batch, classes), (len(batch),)
    dense = _checks.is_distribution(labels)
    if dense:
        labels, ignored = _checks.dense_labels(labels, shape, axes, fused=True), None
        _checks.no_ignore_index(ignore_index)
    else:
        labels, ignored = _checks.integer_labels(
            labels, shape, axes, ignore_index, fused=True
        )
    masks = _checks.fused_where(where, classes, batch)
    static, options = _options.check(
        axes,
        batch,
        classes,
        dense=dense,
        ignored=ignored,
        class_weights=class_weights,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        logit_softcap=logit_softcap,
        logit_scale=logit_scale,
        weights=weights,
        reduction=reduction,
        axis_name=axis_name,
        forward_mode=forward_mode,
        return_stats=return_stats,
    )
    _checks.split_over(static.axis_name, "kernel", kernel)
    asked = _checks.strategy(strategy)
    _checks.suits(asked, static.reduction, dense, static.forward_mode)
    workspace = _checks.workspace_bytes(workspace_bytes)
    head = Head(hidden, kernel, _checks.bias(bias, classes))
    fused = _Fused(static, kernel_layout, asked, workspace)
    return _loss(fused, _Arrays(head, labels, *masks, options))


@dataclasses.dataclass(frozen=True)
class _Fused:
    """Everything that a compiled loss is specialised for, as the caller says it."""

    on_logits: Static
    layout: Layout
    strategy: Strategy
    workspace: int | None


class _Arrays(NamedTuple):
    """What a fused loss reads."""

    head: Head
    labels: Array
    where: Bool[Array, " V"] | None
    examples: Bool[Array, "*B"] | None
    options: Options

    @property
    def dtype(self) -> DType:
        """Of sums."""
        return accumulation_dtype(compute_dtype(self.head))


@functools.partial(jax.jit, static_argnums=0)
def _loss(static: _Fused, arrays: _Arrays) -> Result:
    mesh = _sharding.explicit_mesh(arrays)
    return _run(static, arrays) if mesh is None else _by_hand(static, arrays, mesh)


def _by_hand(static: _Fused, arrays: _Arrays, mesh: Mesh | AbstractMesh) -> Result:
    """On a mesh of explicit axes: split as the types say, inside a `shard_map`.

    Examples stay as they are split. The classes stay where no axis of the examples
    has them; features are gathered.
    """
    hidden, kernel, _ = arrays.head
    on_logits = static.on_logits
    batch = _sharding.split_of(hidden)[:-1]
    over = tuple(name for entry in batch for name in _sharding.names(entry))
    split = _sharding.names(_sharding.split_of(kernel)[static.layout == "dv"])
    split = tuple(name for name in split if name not in over)
    every = (split or None,)
    of_head, of_options, filled = _sharding.of_splits(Head, Options, _Arrays)
    splits = filled(
        head=of_head(
            hidden=(*batch, None),
            kernel=(None, *every) if static.layout == "dv" else (*every, None),
            bias=every,
        ),
        # A distribution has the classes as well.
        labels=(*batch, *every) if on_logits.spec.dense else batch,
        where=every,
        examples=batch,
        options=of_options(every, batch, (), (), ()),
    )
    # Inside a `shard_map` over other axes, the caller may have split the classes.
    part = on_logits.over((*on_logits.axis_name, *split), over)
    run = functools.partial(_run, dataclasses.replace(static, on_logits=part))
    loss = P(*batch) if on_logits.reduction == "none" else P()
    out_specs = (loss, P(*batch)) if on_logits.return_stats else loss
    return _sharding.by_hand(run, mesh, arrays, splits, out_specs)


def _run(static: _Fused, arrays: _Arrays) -> Result:
    """The loss of arrays of which every axis may be cut, or none."""
    counted = _counted(static, arrays)
    if counted is not None:  # a NaN times a cotangent of zero would be NaN
        hidden = jnp.where(counted[..., None], arrays.head.hidden, 0)
        arrays = arrays._replace(head=arrays.head._replace(hidden=hidden))
    on_logits = static.on_logits
    request = choose.Request(
        on_logits.spec.dense, on_logits.reduction != "none", on_logits.forward_mode
    )
    way, plan = choose.plan(
        static.layout, arrays.head, request, static.strategy, static.workspace
    )
    if way == "dense":
        return _on_logits(static, arrays)
    batch = arrays.labels.shape
    if not batch or plan.local:
        arrays = _flattened(arrays)
        on_logits = on_logits.of_rank(1)
    cut = dataclasses.replace(static, on_logits=on_logits)
    loss, stats = _in_chunks(cut, way, plan, arrays)
    loss = loss.reshape(batch) if on_logits.reduction == "none" else loss
    if stats is None:
        return loss
    return loss, jax.tree.map(lambda a: a.reshape(batch), stats)


def _on_logits(static: _Fused, arrays: _Arrays) -> Result:
    """The loss on all logits at once."""
    on_logits = static.on_logits
    rule = head.project if on_logits.forward_mode else head.logits
    batch = arrays.head.hidden.shape[:-1]
    of_all = (1,) * len(batch) + (-1,)
    where = None if arrays.where is None else arrays.where.reshape(of_all)
    masks = _options.all_of(_masks(arrays), batch)
    z = rule(static.layout, arrays.head)
    given = Arrays(z, arrays.labels, where, masks, arrays.options)
    return loss_on_logits(on_logits, given)


def _flattened(arrays: _Arrays) -> _Arrays:
    """The same with one batch axis."""
    hidden, options = arrays.head.hidden, arrays.options
    labels, examples, weights = jax.tree.map(
        jnp.ravel, (arrays.labels, arrays.examples, options.weights)
    )
    return arrays._replace(
        head=arrays.head._replace(hidden=hidden.reshape(-1, hidden.shape[-1])),
        labels=labels,
        examples=examples,
        options=options._replace(weights=weights),
    )


def _in_chunks(static: _Fused, way: choose.Way, plan: Plan, arrays: _Arrays) -> Losses:
    """The loss by any strategy but the dense one."""
    on_logits, spec = static.on_logits, static.on_logits.spec
    options, dtype = arrays.options, arrays.dtype
    labels, example = _labels(static, arrays)
    coefficients, scale = options.coefficients(dtype), options.scale(dtype)
    class_weights = options.class_weights if spec.smooth else None
    like = jnp.zeros(labels.ids.shape, dtype)
    masses = _options.masses_of(on_logits, coefficients, example, like)
    weighed = _combine.for_mean(coefficients, masses)

    if way == "tokens":
        operands = tokens.Operands(
            arrays.head,
            (class_weights, scale, coefficients, weighed),
            (example.label_weights, example.weights),
            labels,
            arrays.where,
        )
        loss_of = functools.partial(_loss_of_chunk, spec)
        total, stats = tokens.summed(plan, loss_of, operands)
        return Losses(_options.over_batch(on_logits, total, masses), stats)

    product = Product(arrays.head, class_weights, scale, labels, arrays.where)
    backend = ByClasses(spec, plan) if way == "vocab" else ByExamples(spec, plan)
    found = _rules.statistics(backend, product, on_logits.forward_mode)
    inputs = head.inputs_of(spec, None, labels, arrays.where, class_weights, scale)
    out = _combine.losses(
        spec, inputs, head.expanded(spec, found), coefficients, weighed, example
    )
    return out._replace(loss=_options.reduced(on_logits, out.loss, masses))


def _loss_of_chunk(
    spec: Spec,
    z: Array,
    shared: tuple[Array | None, Array | None, Coefficients, Coefficients],
    rows: tuple[Array | None, Array | None],
    labels: Labels,
    exists: Bool[Array, " V"] | None,
) -> Losses:
    """Loss of each example of a chunk, from its logits."""
    class_weights, scale, coefficients, weighed = shared
    inputs = head.inputs_of(spec, z, labels, exists, class_weights, scale)
    found = _rules.statistics(OnLogits(spec), inputs)
    example = Example(labels.counted, *rows)
    return _combine.losses(spec, inputs, found, coefficients, weighed, example)


def _labels(static: _Fused, arrays: _Arrays) -> tuple[Labels, Example]:
    """What is known of each example: for its statistics, and for its loss."""
    spec, dtype, options = static.on_logits.spec, arrays.dtype, arrays.options
    num_classes = classes_of(static.layout, arrays.head.kernel)
    shape = (*arrays.labels.shape, num_classes)
    ids = _options.class_ids(spec, shape, arrays.labels)
    of_labels = functools.partial(
        _options.weights_of_labels, spec, ids=ids, dtype=dtype
    )
    label_weights = None
    if options.class_weights is not None:
        label_weights = of_labels(options.class_weights)
    if arrays.where is not None:
        ids = jnp.where(of_labels(arrays.where.astype(dtype)) > 0, ids, -1)
    counted, weights = _counted(static, arrays), options.example_weights(dtype)
    return Labels(ids, counted), Example(counted, label_weights, weights)


def _counted(static: _Fused, arrays: _Arrays) -> Bool[Array, "*B"] | None:
    """Which examples count, or None for all of them."""
    masks = _options.not_ignored(static.on_logits, arrays.labels) + _masks(arrays)
    if arrays.where is not None:
        spec = dataclasses.replace(static.on_logits.spec, axes=(0,))
        masks.append(any_class(spec, arrays.where)[0])
    return _options.all_of(masks, arrays.head.hidden.shape[:-1])


def _masks(arrays: _Arrays) -> list[Bool[Array, "*B"]]:
    """Masks of examples that the caller gave."""
    weights = arrays.options.weights
    masks = [] if arrays.examples is None else [arrays.examples]
    return masks if weights is None else [*masks, weights != 0]
