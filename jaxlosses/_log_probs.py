"""Log-probabilities of chosen classes, and the entropy of all, from the same pass."""

import math

from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float

from jaxlosses import _checks, _options
from jaxlosses._backends.head import Head, Layout, classes_of, matmul_of
from jaxlosses._backends.plan import Strategy
from jaxlosses._checks import Given
from jaxlosses._combine import Losses
from jaxlosses._linear import Fused, FusedArrays, fused_loss
from jaxlosses._logits import Arrays, loss_on_logits

Values = Float[Array, "*B"]


@_checks.names_forward_mode
@_checks.has_own_messages
def softmax_log_probs(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | tuple[int, ...] = -1,
    where: ArrayLike | None = None,
    *,
    ignore_index: int | None = None,
    return_entropy: bool = False,
    logit_softcap: float | None = None,
    logit_scale: float | Array = 1.0,
    axis_name: str | tuple[str, ...] | None = None,
    forward_mode: bool = False,
) -> Values | tuple[Values, Values]:
    """Log-probabilities of class ids, and the entropy of each example.

    For each example with label `y`:

        log_prob = z_y - lse,    lse = log Σ_j exp z_j

    It is minus the loss of `softmax_cross_entropy_with_integer_labels`, to the bit:
    never above 0, and exact for a confident example.

    Args:
        return_entropy: also return `softmax_entropy` of the same logits, from the same
            pass.
        `logits`, `labels`, `axis`, `where`, `ignore_index`, `logit_softcap`,
        `logit_scale`, `axis_name`, `forward_mode`: as in
        `softmax_cross_entropy_with_integer_labels`.

    Returns:
        Log-probabilities in nats, `B...`; float64 for float64 logits, else float32.
        With `return_entropy`, the pair `(log_probs, entropies)`. The bits of the first
        are the same with and without the second: the ratio of two equal policies is 1.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or range.

    Values:
        As in `softmax_cross_entropy_with_integer_labels`: an example that does not
        count has 0 for both, with gradient 0; a label that cannot be makes both NaN.

    Differentiation:
        As in `softmax_cross_entropy_with_integer_labels`, by `logits` and
        `logit_scale`, through both results.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxlosses as jl
        >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 40.0, 0.0]])
        >>> log_probs, entropies = jl.softmax_log_probs(
        ...     logits, jnp.array([1, 1]), return_entropy=True
        ... )
        >>> print(*(f"{x:.4g}" for x in [*log_probs, *entropies]))
        -2.24 -8.497e-18 0.6656 3.484e-16

    Source:
        Williams 1992, *Simple statistical gradient-following algorithms for
        connectionist reinforcement learning*, whose gradient is taken of them.
    """
    logits = _checks.logits(logits)
    axes = _checks.class_axes(axis, logits.ndim, allow_none=False)
    labels, ignored = _checks.integer_labels(labels, logits.shape, axes, ignore_index)
    out = _run(
        logits,
        labels,
        axes,
        where,
        ignored=ignored,
        return_entropy=return_entropy,
        logit_softcap=logit_softcap,
        logit_scale=logit_scale,
        axis_name=axis_name,
        forward_mode=forward_mode,
    )
    return _signed(out)


@_checks.names_forward_mode
@_checks.has_own_messages
def softmax_entropy(
    logits: ArrayLike,
    axis: int | tuple[int, ...] | None = -1,
    where: ArrayLike | None = None,
    *,
    logit_softcap: float | None = None,
    logit_scale: float | Array = 1.0,
    axis_name: str | tuple[str, ...] | None = None,
    forward_mode: bool = False,
) -> Values:
    """Entropy of the softmax of logits.

    For each example, with `p` the probabilities and `m` the largest logit:

        entropy = -Σ_j p_j log p_j = log1p(s) + t / (1 + s)
        s = Σ exp(z_j - m),  t = Σ exp(z_j - m) (m - z_j)

    where both sums leave out one class at the maximum: nothing cancels, so that the
    entropy of a confident example keeps its digits, and none is below 0.

    Args:
        logits: `B... V` in any axis order, float16, bfloat16, float32 or float64:
            unscaled scores.
        axis: class axis, a tuple of axes whose flattening are the classes, or None
            for all axes.
        `where`, `logit_softcap`, `logit_scale`, `axis_name`, `forward_mode`: as in
        `softmax_cross_entropy_with_integer_labels`.

    Returns:
        The entropy in nats, `B...`, from 0 to `log(V)`; float64 for float64 logits,
        else float32.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or range.

    Values:
        A class of logit `-inf` adds nothing, as does a masked one, and both have
        gradient 0. A NaN or `+inf` makes its example NaN, and no other. Without a class
        the entropy is 0.

    Differentiation:
        As in `softmax_cross_entropy_with_integer_labels`, by `logits` and
        `logit_scale`. The gradient is `p_j ((m - z_j) - t / (1 + s))`: finite where a
        probability is 0.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxlosses as jl
        >>> logits = jnp.array([[0.0, 0.0, 0.0], [0.0, 40.0, 0.0]])
        >>> print(*(f"{h:.4g}" for h in jl.softmax_entropy(logits)))
        1.099 3.484e-16

    Source:
        Shannon 1948, *A mathematical theory of communication*, section 6.
    """
    logits = _checks.logits(logits)
    axes = _checks.class_axes(axis, logits.ndim, allow_none=True)
    out = _run(
        logits,
        None,
        axes,
        where,
        dense=True,
        return_entropy=True,
        logit_softcap=logit_softcap,
        logit_scale=logit_scale,
        axis_name=axis_name,
        forward_mode=forward_mode,
    )
    assert out.entropy is not None
    return out.entropy


@_checks.names_forward_mode
@_checks.has_own_messages
def linear_softmax_log_probs(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    ignore_index: int | None = None,
    return_entropy: bool = False,
    kernel_layout: Layout = "dv",
    where: ArrayLike | None = None,
    strategy: Strategy = "auto",
    workspace_bytes: int | None = None,
    compute_dtype: DTypeLike | None = None,
    logit_softcap: float | None = None,
    logit_scale: float | Array = 1.0,
    axis_name: str | tuple[str, ...] | None = None,
    forward_mode: bool = False,
) -> Values | tuple[Values, Values]:
    """Log-probabilities and entropies of `hidden @ kernel + bias`, without the logits.

    For each example with label `y`:

        z = hidden @ kernel + bias
        log_prob = z_y - lse,    lse = log Σ_j exp z_j

    They are minus the losses of `linear_softmax_cross_entropy`, to the bit.

    Args:
        `hidden`, `kernel`, `labels`, `bias`: as in `linear_softmax_cross_entropy`; no
            distributions.
        `ignore_index`: as in `softmax_cross_entropy_with_integer_labels`.
        `return_entropy`: as in `softmax_log_probs`.
        `kernel_layout`, `where`: as in `linear_softmax_cross_entropy`.
        strategy: as of `linear_softmax_cross_entropy`, but for `"tokens"`, which forms
            the gradient of a sum. `"auto"` takes `"dense"`, `"vocab"` or `"recompute"`.
        `workspace_bytes`, `compute_dtype`: as in `linear_softmax_cross_entropy`.
        `logit_softcap`, `logit_scale`: as in
            `softmax_cross_entropy_with_integer_labels`.
        `axis_name`, `forward_mode`: as in `linear_softmax_cross_entropy`.

    Returns:
        Log-probabilities in nats, `B...`; float64 if hidden or kernel are, else
        float32. With `return_entropy`, the pair `(log_probs, entropies)`, for the same
        matmuls.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or range, or a strategy cannot do
            what is asked for.

    Values:
        As in `softmax_log_probs`.

    Differentiation:
        As in `linear_softmax_cross_entropy`, by `hidden`, `kernel`, `bias` and
        `logit_scale`, through both results.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxlosses as jl
        >>> hidden, embedding = jnp.eye(2, 4), jnp.eye(3, 4)
        >>> log_probs, entropies = jl.linear_softmax_log_probs(
        ...     hidden,
        ...     embedding,
        ...     jnp.array([0, 2]),
        ...     kernel_layout="vd",
        ...     return_entropy=True,
        ... )
        >>> print(*(f"{x:.4f}" for x in [*log_probs, *entropies]))
        -0.5514 -1.5514 0.9753 0.9753

    Source:
        Wijmans et al. 2025, *Cut Your Losses in Large-Vocabulary Language Models*
        (arXiv:2411.09009), for the classes in chunks.
    """
    hidden = _checks.hidden(hidden)
    batch, features = hidden.shape[:-1], hidden.shape[-1]
    kernel = _checks.kernel(kernel, kernel_layout, features)
    classes = classes_of(kernel_layout, kernel)
    axes = (len(batch),)
    labels, ignored = _checks.integer_labels(
        labels, (*batch, classes), axes, ignore_index, fused=True
    )
    masks = _checks.fused_where(where, classes, batch)
    static, options = _options.check_transform(
        axes,
        batch,
        classes,
        ignored=ignored,
        return_entropy=return_entropy,
        logit_softcap=logit_softcap,
        logit_scale=logit_scale,
        axis_name=axis_name,
        forward_mode=forward_mode,
    )
    _checks.split_over("axis_name", static.axis_name, "kernel", kernel)
    asked = _checks.strategy_of_examples(strategy)
    workspace = _checks.workspace_bytes(workspace_bytes)
    head = Head(hidden, kernel, _checks.bias(bias, classes))
    matmul = matmul_of(kernel_layout, head, _checks.compute_dtype(compute_dtype))
    fused = Fused(static, matmul, asked, workspace)
    return _signed(fused_loss(fused, FusedArrays(head, labels, *masks, options)))


def _signed(out: Losses) -> Values | tuple[Values, Values]:
    """Log-probabilities, which are minus the losses, and what is beside them."""
    return -out.loss if out.entropy is None else (-out.loss, out.entropy)


def _run(
    logits: Float[Array, "..."],
    labels: Array | None,
    axes: tuple[int, ...],
    where: Given,
    **options: Given,
) -> Losses:
    shape = logits.shape
    batch = _checks.batch_shape(shape, axes)
    masks = _checks.where(where, shape, axes)
    num_classes = math.prod(shape[axis] for axis in axes)
    static, checked = _options.check_transform(axes, batch, num_classes, **options)
    _checks.split_over("axis_name", static.axis_name, "logits", logits)
    return loss_on_logits(static, Arrays(logits, labels, *masks, checked))
