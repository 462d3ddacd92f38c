"""The public fused loss of labels of some classes: its arguments, checked."""

from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike

from jaxlosses import _checks, _options
from jaxlosses._backends.head import Head, Layout, classes_of
from jaxlosses._backends.plan import Strategy
from jaxlosses._combine import Metric, Reduction, Result
from jaxlosses._linear import FusedArrays, fused_loss, fused_of
from jaxlosses._math.top_k import Rest


@_checks.names_forward_mode
@_checks.has_own_messages
def linear_softmax_cross_entropy_with_top_k_labels(
    hidden: ArrayLike,
    kernel: ArrayLike,
    ids: ArrayLike,
    probs: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    rest: Rest = "ignore",
    as_divergence: bool = False,
    kernel_layout: Layout = "dv",
    where: ArrayLike | None = None,
    strategy: Strategy = "auto",
    workspace_bytes: int | None = None,
    compute_dtype: DTypeLike | None = None,
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
    """Cross-entropy of `hidden @ kernel + bias` and the `K` likeliest classes.

    It is the loss of `softmax_cross_entropy_with_top_k_labels` on the logits

        z = hidden @ kernel + bias

    which are computed in pieces, as in `linear_softmax_cross_entropy`.

    Args:
        `hidden`, `kernel`: as in `linear_softmax_cross_entropy`.
        `ids`, `probs`: as in `softmax_cross_entropy_with_top_k_labels`.
        `bias`: as in `linear_softmax_cross_entropy`.
        `rest`, `as_divergence`: as in `softmax_cross_entropy_with_top_k_labels`.
        `kernel_layout`, `where`, `strategy`, `workspace_bytes`, `compute_dtype`: as in
            `linear_softmax_cross_entropy`, of its class ids.
        `z_loss`, `logit_softcap`, `logit_scale`: as in
            `softmax_cross_entropy_with_integer_labels`.
        `weights`: as in `linear_softmax_cross_entropy`.
        `reduction`, `normalizer`: as in `softmax_cross_entropy_with_integer_labels`.
        `axis_name`: as in `linear_softmax_cross_entropy`.
        `batch_axis_name`: as in `softmax_cross_entropy_with_integer_labels`.
        `forward_mode`: as in `linear_softmax_cross_entropy`, of its class ids.
        return_stats: as in `softmax_cross_entropy_with_top_k_labels`; with
            `"recompute"` and `"vocab"` by one matmul more.

    Returns:
        As in `linear_softmax_cross_entropy`.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or range, or a strategy cannot do
            what is asked for.

    Values:
        As in `softmax_cross_entropy_with_top_k_labels`.

    Differentiation:
        As in `linear_softmax_cross_entropy`, by `hidden`, `kernel`, `bias`, `probs`,
        `weights`, `logit_scale` and `z_loss`.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxlosses as jl
        >>> hidden, kernel = jnp.eye(2, 4), jnp.eye(4, 5)
        >>> ids = jnp.array([[0, 1], [1, 4]])
        >>> probs = jnp.array([[0.7, 0.2], [0.5, 0.5]])
        >>> loss = jl.linear_softmax_cross_entropy_with_top_k_labels(
        ...     hidden, kernel, ids, probs, rest="bucket", reduction="mean"
        ... )
        >>> print(f"{loss:.4f}")
        1.2499

    Source:
        As of `softmax_cross_entropy_with_top_k_labels`.
    """
    hidden = _checks.hidden(hidden)
    batch, features = hidden.shape[:-1], hidden.shape[-1]
    kernel = _checks.kernel(kernel, kernel_layout, features)
    classes = classes_of(kernel_layout, kernel)
    ids, probs = _checks.top_k_labels(ids, probs, batch, fused=True)
    masks = _checks.fused_where(where, classes, batch)
    static, options = _options.check_top_k(
        (len(batch),),
        batch,
        classes,
        rest=rest,
        as_divergence=as_divergence,
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
    )
    return fused_loss(
        fused, FusedArrays(head, probs, *masks, options, ids=ids)
    ).result()
