"""The public fused loss: its arguments, checked."""

from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike

from jaxlosses import _checks, _options
from jaxlosses._backends.head import Head, Layout, classes_of
from jaxlosses._backends.plan import Strategy
from jaxlosses._combine import Metric, Reduction, Result
from jaxlosses._linear import FusedArrays, fused_loss, fused_of


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
    compute_dtype: DTypeLike | None = None,
    class_weights: ArrayLike | None = None,
    label_smoothing: float | Array = 0.0,
    z_loss: float | Array = 0.0,
    logit_softcap: float | None = None,
    logit_scale: float | Array = 1.0,
    weights: ArrayLike | None = None,
    reduction: Reduction = "none",
    normalizer: float | Array | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    batch_axis_name: str | tuple[str, ...] | None = None,
    forward_mode: bool = False,
    return_stats: bool | tuple[Metric, ...] = False,
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
            floating, sizes equal or 1 on batch axes: a distribution over classes, cut
            with its examples; not with `strategy="vocab"`.
        bias: shape `(V,)`, floating, or None.
        kernel_layout: `"dv"` for the kernel of a dense layer, `"vd"` for an embedding
            table that is tied to the output. Neither is transposed in memory.
        where: bool. Of shape `(V,)`: the classes that exist. Of shape `B... V`, or
            broadcastable to it with the same rank: those of each example. Of shape
            `B...`: the examples that count. A shape that is both `(V,)` and `B...`
            means classes.
        strategy: how to go through the logits.
            `"tokens"`: chunks of examples, the gradient formed in the forward pass;
            three matmuls for value and gradient. Needs `reduction` `"sum"` or
            `"mean"`. Under `jax.checkpoint` the pass runs again.
            `"recompute"`: chunks of examples, whose logits the backward pass computes
            again; four matmuls, any reduction.
            `"vocab"`: chunks of classes; four matmuls, any reduction, the smallest
            memory for very many classes.
            `"dense"`: all logits at once; three matmuls.
            `"auto"`: never more memory than all logits take, by shapes, dtypes and
            sharding alone. `"dense"` if logits and cotangents fit 32 MiB (a given
            workspace) or a quarter of the kernel;
            `"vocab"` if the logits of 64 examples do not fit 256 MiB (a given
            workspace), or if the float32 sum of the gradient of a 16-bit kernel and
            chunks that pay for it take more than all logits: about less than three
            times as many examples as features; with distributions, `"dense"` for the
            latter, and with `forward_mode`. Else, and for symbolic sizes of
            `jax.export`, `"tokens"` for a sum or a mean, and `"recompute"` otherwise
            or with `forward_mode`; so, too, on automatic mesh axes, where slices of a
            kernel that is split over devices would be gathered, unless
            `jax.set_mesh` says how many devices there are, by which the classes are
            divided into strips of a multiple of 128.
            `jaxlosses.testing.plan` says what it takes.
        workspace_bytes: bounds what is held at once beyond the arguments, the result,
            copies of `hidden` and the accumulators of the gradients (float32, of the
            shapes of `hidden` and `kernel`), as far as one example or one class
            fits. None takes what the platform of the program wants: a sixth of the
            logits, from 32 to 128 MiB, on a CPU, and up to 1 GiB, or chunks of 2048
            examples or half as many as features, elsewhere. It counts for one device;
            on automatic mesh axes a trace knows the devices under `jax.set_mesh`
            alone: elsewhere give the bytes of all of them. Where `jax.export` leaves
            the number of examples or of classes open, bytes cannot be counted: a chunk
            is a sixteenth of them.
        compute_dtype: dtype of the matmuls, or None for the one that hidden and kernel
            promote to. With `"bfloat16"` a float32 kernel is multiplied in 16 bits,
            cast piece by piece; logits, sums and its gradient stay float32.
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
            `jax.jacfwd` and `jax.linearize` work too; not with `"tokens"`, and for
            distributions with `"dense"` alone.
        `ignore_index`, `class_weights`, `label_smoothing`, `z_loss`, `logit_softcap`,
        `logit_scale`, `reduction`, `normalizer`, `batch_axis_name`, `return_stats`:
        as in `softmax_cross_entropy_with_integer_labels`.

    Returns:
        The loss in nats: `B...`, or a scalar if reduced; float64 if hidden or kernel
        are, else float32. With `return_stats`, the pair `(loss, Stats)`.

        The matmuls run in the compute dtype and accumulate in float32: 16-bit heads
        get float32 logits. So do the gradients, also over devices, which are rounded
        once to the dtype of their argument.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or range, or a strategy cannot do
            what is asked for.

    Values:
        As in `softmax_cross_entropy_with_integer_labels`.

    Differentiation:
        Reverse mode. Gradients by `hidden`, `kernel`, `bias`, distributions,
        `class_weights`, `weights`, `logit_scale`, `label_smoothing` and `z_loss`;
        those that are not asked for are not computed: a frozen kernel costs no matmul.
        Second derivatives, `vmap`, `scan` and `jax.checkpoint` work as they are;
        forward mode needs `forward_mode=True`.

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
        normalizer=normalizer,
        axis_name=axis_name,
        batch_axis_name=batch_axis_name,
        forward_mode=forward_mode,
        return_stats=return_stats,
    )
    head = Head(hidden, kernel, _checks.bias(bias, classes))
    fused = fused_of(
        static,
        kernel_layout,
        head,
        strategy=strategy,
        workspace_bytes=workspace_bytes,
        compute_dtype=compute_dtype,
        every_class=_checks.DISTRIBUTIONS if dense else None,
    )
    return fused_loss(fused, FusedArrays(head, labels, *masks, options)).result()
