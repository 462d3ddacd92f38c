"""The public fused loss: check, plan, statistics in chunks, combine, reduce."""

import dataclasses
import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, ArrayLike, Bool, Float

from jaxlosses import (
    _checks,
    _chunked,
    _combine,
    _cross_entropy,
    _logits,
    _sharding,
    _sizes,
    _statistics,
)
from jaxlosses._chunked import Examples, Head, Operands, Plan, Product, Way
from jaxlosses._combine import Coefficients, Example, Reduction, Stats, Terms
from jaxlosses._cross_entropy import Arrays, Static
from jaxlosses._sizes import Size
from jaxlosses._statistics import Inputs, Statistics

Strategy = Literal["auto", "tokens", "recompute", "vocab", "dense"]

# Least and most on a CPU, measured: see benchmarks/NOTES.md.
_CPU_WORKSPACE = (2**25, 2**27)
_WORKSPACE = 2**30
# Chunks of fewer examples spend their time on reading the kernel.
_FEW_EXAMPLES = 64
# A piece of the kernel's gradient takes this part of the workspace.
_PIECES = 8
# Chunks of what has a symbolic size, whose bytes cannot be counted.
_CHUNKS_OF_ANY_SIZE = 16


@_checks.names_forward_mode
@_checks.has_own_messages
def linear_softmax_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    kernel_layout: Literal["dv", "vd"] = "dv",
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
) -> Any:
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
        ignore_index: an int or None: an example with this label does not count. Its
            loss and gradient are exactly 0, even if its features are NaN.
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
        class_weights: shape `(V,)`, floating. Multiplies the loss by the weight of the
            label's class; smoothing spreads the weights.
        label_smoothing: `α` in `[0, 1)`, a number or a traced scalar: the label
            becomes `(1 - α) q + α / V` over the classes that exist, each class
            weighted by its class weight.
        z_loss: a number of 0 or more, or a traced scalar: adds `z_loss * lse**2` to
            each example, not class-weighted, in a mean neither.
        logit_softcap: a number `c > 0` or None: `z <- c tanh(z / c)`, before anything
            else.
        logit_scale: a number or a traced scalar: `z <- logit_scale * z` after the
            cap, an inverse temperature.
        weights: shape `B...`, floating, integer or bool: multiplies each example's loss
            and enters the denominator of the mean; for weights of both signs take
            `"sum"`, since theirs may be near 0. An example of weight 0 is left out, as
            one with `ignore_index` is: the derivative by its weight is 0.
        reduction: `"none"`, `"sum"`, or `"mean"`: `sum(weighted loss) / sum(weights)`
            over the examples that count;
            with `class_weights`, `/ sum(weights * w_y)`, as in PyTorch, and the z-loss
            `/ sum(weights)`. With nothing to count the mean is 0 and its gradient 0.
        axis_name: inside `shard_map`, the mesh axis or axes over which the classes
            are split, equally: fill up classes that do not divide, and mask them with
            `where`. Labels are global ids; `kernel`, `bias`, `class_weights` and
            `where` are the local part. With `check_vma=False`, in `pmap` and for the
            axis of a `vmap` no gradient could be right, and it is refused.
        forward_mode: register the same value and gradient so that `jax.jvp`,
            `jax.jacfwd` and `jax.linearize` work too; not with `"tokens"`.
        return_stats: also return `Stats(lse, nll, z_loss, predicted, correct)`, each
            of shape `B...`: metrics from the same pass, not differentiated.

    Returns:
        The loss in nats: `B...`, or a scalar if reduced; float64 if hidden or kernel
        are, else float32. With `return_stats`, the pair `(loss, Stats)`.

        The matmuls run in the dtype to which hidden and kernel promote (cast a
        float32 kernel to bfloat16 for bfloat16 matmuls), accumulate in float32, and
        the loss is computed from those float32 logits. The gradients accumulate in
        float32, too, and are rounded once to the dtype of their argument.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or range, or a strategy cannot do
            what is asked for. Both name the argument, what came, what was expected,
            and the fix, at trace time.

        Labels that cannot be and logits that are not finite: as in
        `softmax_cross_entropy_with_integer_labels`.

    Differentiation:
        Reverse mode. Gradients by `hidden`, `kernel`, `bias`, `class_weights`,
        `weights`, `logit_scale`, `label_smoothing` and `z_loss`; those that are not
        asked for are not computed: a frozen kernel costs no matmul. Second
        derivatives, `vmap`, `scan` and `jax.checkpoint` work as they are; forward
        mode needs `forward_mode=True`.

        Examples that do not count cost nothing in `"tokens"` and `"recompute"` on one
        device and inside `shard_map`: those that count are moved to the front, and
        chunks without any are skipped at run time.

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
    classes = _chunked.num_classes(kernel_layout, kernel)
    shape, axes = (*batch, classes), (len(batch),)
    dense = _checks.is_distribution(labels)
    if dense:
        labels, ignored = _checks.dense_labels(labels, shape, axes, fused=True), None
        _checks.no_ignore_index(ignore_index)
    else:
        labels, ignored = _checks.integer_labels(
            labels, shape, axes, ignore_index, fused=True
        )
    arrays = _Arrays(
        Head(hidden, kernel, _checks.bias(bias, classes)),
        labels,
        *_checks.fused_where(where, classes, batch),
        _checks.class_weights(class_weights, classes),
        _checks.weights(weights, batch),
        _checks.label_smoothing(label_smoothing),
        _checks.z_loss(z_loss),
        _checks.logit_scale(logit_scale),
    )
    on_logits = _cross_entropy.specialise(
        axes,
        dense=dense,
        smooth=arrays.label_smoothing is not None,
        lse=arrays.z_loss is not None,
        ignored=ignored,
        logit_softcap=logit_softcap,
        reduction=reduction,
        axis_name=axis_name,
        forward_mode=forward_mode,
        return_stats=return_stats,
    )
    _checks.split_over(on_logits.spec.axis_name, "kernel", kernel)
    asked = _checks.strategy(strategy)
    _checks.suits(asked, on_logits.reduction, dense, on_logits.forward_mode)
    workspace = _checks.workspace_bytes(workspace_bytes)
    return _loss(_Fused(on_logits, kernel_layout, asked, workspace), arrays)


@dataclasses.dataclass(frozen=True)
class _Fused:
    """Everything that a compiled loss is specialised for, as the caller says it."""

    on_logits: Static
    layout: Literal["dv", "vd"]
    strategy: str
    workspace: int | None


class _Arrays(NamedTuple):
    """Everything that may change from call to call without a new compilation."""

    head: Head
    labels: Array
    where: Bool[Array, " V"] | None
    examples: Bool[Array, "*B"] | None
    class_weights: Float[Array, " V"] | None
    weights: Float[Array, "*B"] | None
    label_smoothing: float | Array | None
    z_loss: float | Array | None
    logit_scale: float | Array | None


def _plan(static: _Fused, head: Head) -> tuple[str, Plan]:
    """The strategy and the number of its chunks."""
    layout, strategy, workspace = static.layout, static.strategy, static.workspace
    on_logits = static.on_logits
    *batch, _ = head.hidden.shape
    examples, classes = math.prod(batch), _chunked.num_classes(layout, head.kernel)
    is_known = _sizes.are_numbers(examples * classes)
    on_cpu = jax.default_backend() == "cpu"
    if workspace is None:
        workspace = _WORKSPACE
        if on_cpu:
            least, most = _CPU_WORKSPACE
            workspace = most
            if is_known:
                workspace = min(max(least, 4 * examples * classes // 6), most)
    local = _is_local()
    dtype = _chunked.compute_dtype(head)
    # Logits, which their cotangent replaces, and that in the compute dtype; a quarter
    # is left for what else a chunk needs.
    entry = _statistics.accumulation_dtype(dtype).itemsize
    entry += dtype.itemsize if dtype.itemsize < 4 else 0
    held = examples * classes * entry * 4 // 3
    if strategy == "auto":
        if on_logits.spec.dense or (is_known and held <= workspace):
            strategy = "dense"
        elif is_known and local and _FEW_EXAMPLES * held > workspace * examples:
            strategy = "vocab"
        elif on_logits.reduction != "none" and not on_logits.forward_mode:
            strategy = "tokens"
        else:
            strategy = "recompute"
    if examples * classes == 0:
        strategy = "dense"

    def chunks(pieces: Size, times: int = 1) -> int:
        number = -(-times * held // workspace) if is_known else _CHUNKS_OF_ANY_SIZE
        return max(1, min(pieces, number)) if _sizes.are_numbers(pieces) else number

    # Flattened examples have one axis; where they may be split over devices, the
    # longest one is cut and the others stay.
    axis = 0 if local or not batch else batch.index(_longest(batch))
    if strategy in ("dense", "vocab"):  # a piece keeps its logits beside the cotangent
        return strategy, Plan(layout, chunks(classes, 2))
    pieces = examples if local or not batch else batch[axis]
    number = chunks(pieces)
    if not (local and on_cpu) and _sizes.are_numbers(pieces):
        # Equal chunks need no padding, whose entries would move between devices; and
        # a matmul of whole tiles pads no operand.
        equal = range(number, min(2 * number, pieces) + 1)
        number = next((n for n in equal if pieces % n == 0), number)
    kernel_pieces = 1
    if local and on_cpu and _sizes.are_numbers(head.kernel.size):
        accumulator = head.kernel.size * _statistics.accumulation_dtype(dtype).itemsize
        kernel_pieces = max(1, min(classes, -(-_PIECES * accumulator // workspace)))
    return strategy, Plan(layout, number, axis, not local, local, kernel_pieces)


def _longest(sizes: list[Size]) -> Size:
    """The largest size; for that counts the first whose number is not known."""
    unknown = (size for size in sizes if not _sizes.are_numbers(size))
    return next(unknown, None) or max(sizes)


def _is_local() -> bool:
    """Whether the arrays are on one device, as far as a trace can know."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.device_count() == 1 if mesh.empty else mesh.are_all_axes_manual


@functools.partial(jax.jit, static_argnums=0)
def _loss(static: _Fused, arrays: _Arrays) -> Any:
    mesh = _sharding.explicit_mesh(arrays)
    return _run(static, arrays) if mesh is None else _by_hand(static, arrays, mesh)


def _by_hand(static: _Fused, arrays: _Arrays, mesh: Any) -> Any:
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
    every: Any = (split or None,)
    filled: Any = arrays._replace
    # A distribution has the classes as well.
    splits = filled(
        head=Head(
            hidden=(*batch, None),
            kernel=(None, *every) if static.layout == "dv" else (*every, None),
            bias=every,
        ),
        labels=(*batch, *every) if on_logits.spec.dense else batch,
        where=every,
        examples=batch,
        class_weights=every,
        weights=batch,
        label_smoothing=(),
        z_loss=(),
        logit_scale=(),
    )
    # Inside a `shard_map` over other axes, the caller may have split the classes.
    axis_name = (*on_logits.spec.axis_name, *split)
    spec = dataclasses.replace(on_logits.spec, axis_name=axis_name)
    reduction = on_logits.reduction
    part = dataclasses.replace(on_logits, spec=spec, batch_axes=over)
    run = functools.partial(_run, dataclasses.replace(static, on_logits=part))
    loss = P(*batch) if reduction == "none" else P()
    out_specs = (loss, P(*batch)) if on_logits.return_stats else loss
    return _sharding.by_hand(run, mesh, arrays, splits, out_specs)


def _run(static: _Fused, arrays: _Arrays) -> Any:
    """The loss of arrays of which every axis may be cut, or none."""
    counted = _counted(static, arrays)
    if counted is not None:
        # In the kernel's gradient, a NaN times a cotangent of zero would be NaN.
        hidden = jnp.where(counted[..., None], arrays.head.hidden, 0)
        arrays = arrays._replace(head=arrays.head._replace(hidden=hidden))
    strategy, plan = _plan(static, arrays.head)
    if strategy == "dense":
        return _on_logits(static, arrays)
    batch = arrays.labels.shape
    if not batch or plan.compact:
        arrays = _flattened(arrays)
        static = _of_rank(static, 1)
    loss, stats = _in_chunks(static, strategy, plan, arrays)
    if stats is not None:
        stats = jax.tree.map(lambda a: a.reshape(batch), stats)
    if static.on_logits.reduction == "none":
        loss = loss.reshape(batch)
    return loss if stats is None else (loss, stats)


def _on_logits(static: _Fused, arrays: _Arrays) -> Any:
    """The loss on all logits at once."""
    on_logits = static.on_logits
    rule = _chunked.project if on_logits.forward_mode else _chunked.logits
    where, masks = arrays.where, []
    if where is not None:
        where = where.reshape((1,) * (arrays.head.hidden.ndim - 1) + (-1,))
    if arrays.examples is not None:
        masks.append(arrays.examples)
    if arrays.weights is not None:
        masks.append(arrays.weights != 0)
    return _cross_entropy.loss_on_logits(
        on_logits,
        Arrays(
            rule(static.layout, arrays.head),
            arrays.labels,
            where,
            _cross_entropy.all_of(masks, arrays.head.hidden.shape[:-1]),
            arrays.class_weights,
            arrays.weights,
            arrays.label_smoothing,
            arrays.z_loss,
            arrays.logit_scale,
        ),
    )


def _flattened(arrays: _Arrays) -> _Arrays:
    """The same with one batch axis."""
    hidden = arrays.head.hidden
    labels, examples, weights = jax.tree.map(
        jnp.ravel, (arrays.labels, arrays.examples, arrays.weights)
    )
    return arrays._replace(
        head=arrays.head._replace(hidden=hidden.reshape(-1, hidden.shape[-1])),
        labels=labels,
        examples=examples,
        weights=weights,
    )


def _of_rank(static: _Fused, rank: int) -> _Fused:
    spec = dataclasses.replace(static.on_logits.spec, axes=(rank,))
    return dataclasses.replace(
        static, on_logits=dataclasses.replace(static.on_logits, spec=spec)
    )


def _examples(static: _Fused, arrays: _Arrays) -> tuple[Examples, Example]:
    """What is known of each example: for its statistics, and for its loss."""
    spec, head, labels = static.on_logits.spec, arrays.head, arrays.labels
    dtype = _statistics.accumulation_dtype(_chunked.compute_dtype(head))
    classes = _chunked.num_classes(static.layout, head.kernel)
    ids = _cross_entropy.class_ids(spec, (*labels.shape, classes), labels)
    label_weights = None
    if arrays.class_weights is not None:
        label_weights = _cross_entropy.weights_of_labels(
            spec, arrays.class_weights, ids, dtype
        )
    if arrays.where is not None:
        found = _cross_entropy.weights_of_labels(
            spec, arrays.where.astype(dtype), ids, dtype
        )
        ids = jnp.where(found > 0, ids, -1)
    counted = _counted(static, arrays)
    weights = _cross_entropy.optional(arrays.weights, dtype)
    return Examples(ids, counted), Example(counted, label_weights, weights)


def _in_chunks(
    static: _Fused, strategy: str, plan: Plan, arrays: _Arrays
) -> tuple[Array, Stats | None]:
    on_logits, spec, head = static.on_logits, static.on_logits.spec, arrays.head
    dtype = _statistics.accumulation_dtype(_chunked.compute_dtype(head))
    examples, example = _examples(static, arrays)
    coefficients = Coefficients(
        _cross_entropy.optional(arrays.label_smoothing, dtype),
        _cross_entropy.optional(arrays.z_loss, dtype),
    )
    scale = _cross_entropy.optional(arrays.logit_scale, dtype)
    class_weights = arrays.class_weights if spec.smooth else None
    like = jnp.zeros(examples.labels.shape, dtype)
    masses = _cross_entropy.masses_of(on_logits, coefficients, example, like)
    weighed = _combine.for_mean(coefficients, masses)

    if strategy == "tokens":
        operands = Operands(
            head,
            (class_weights, scale, coefficients, weighed),
            (example.label_weights, example.weights),
            examples,
            arrays.where,
        )
        loss_of = functools.partial(_loss_of_chunk, on_logits)
        total, stats = _chunked.summed(plan, loss_of, operands)
        return _cross_entropy.over_batch(on_logits, total, masses), stats

    product = Product(head, class_weights, scale, examples, arrays.where)
    way = Way(plan, strategy == "vocab", spec)
    statistics = _chunked.statistics(way, product, on_logits.forward_mode)
    inputs = _chunked.inputs_of(spec, None, product)
    statistics = jax.tree.map(lambda a: a[..., None], statistics)
    loss, stats = _per_example(
        on_logits, statistics, inputs, coefficients, weighed, example
    )
    return _cross_entropy.reduced(on_logits, loss, masses), stats


def _loss_of_chunk(
    static: Static, z: Array, shared: Any, rows: Any, examples: Examples, exists: Any
) -> tuple[Array, Stats | None]:
    """Loss of each example of a chunk, from its logits."""
    class_weights, scale, coefficients, weighed = shared
    product = Product(Head(None, None, None), class_weights, scale, examples, exists)
    inputs = _chunked.inputs_of(static.spec, z, product)
    statistics = _logits.statistics(static.spec, inputs)
    example = Example(examples.counted, *rows)
    return _per_example(static, statistics, inputs, coefficients, weighed, example)


def _per_example(
    static: Static,
    statistics: Statistics,
    inputs: Inputs,
    coefficients: Coefficients,
    weighed: Coefficients,
    example: Example,
) -> tuple[Array, Stats | None]:
    """Loss of each example, and its metrics if they are wanted."""
    lse = _statistics.lse(static.spec, inputs, statistics)
    terms = jax.tree.map(
        lambda a: jnp.squeeze(a, -1),
        Terms(lse, statistics.nll, statistics.smooth),
    )
    loss = _combine.per_example(weighed, terms, example)
    if not static.return_stats:
        return loss, None
    return loss, _cross_entropy.stats(
        static.spec, inputs, statistics.predicted, terms, coefficients, example
    )


def _counted(static: _Fused, arrays: _Arrays) -> Bool[Array, "*B"] | None:
    """Which examples count, or None for all of them."""
    masks = _cross_entropy.not_ignored(static.on_logits, arrays.labels)
    if arrays.examples is not None:
        masks.append(arrays.examples)
    if arrays.weights is not None:
        masks.append(arrays.weights != 0)
    if arrays.where is not None:
        spec = dataclasses.replace(static.on_logits.spec, axes=(0,))
        masks.append(_statistics.any_class(spec, arrays.where)[0])
    return _cross_entropy.all_of(masks, arrays.head.hidden.shape[:-1])
