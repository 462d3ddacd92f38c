"""The public fused loss of a function of the statistics: its arguments, checked."""

import dataclasses
from typing import Literal

from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike

from jaxlosses import _checks, _options, _rows
from jaxlosses._backends.head import Head, Layout, classes_of
from jaxlosses._backends.plan import Strategy
from jaxlosses._linear import FusedArrays, fused_loss, fused_of
from jaxlosses._rows import Function
from jaxlosses._types import Tree


@_checks.names_forward_mode
@_checks.has_own_messages
def linear_softmax_loss(
    function: Function,
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *args: Tree,
    bias: ArrayLike | None = None,
    ignore_index: int | None = None,
    uses_entropy: bool = False,
    kernel_layout: Layout = "dv",
    where: ArrayLike | None = None,
    strategy: Strategy = "auto",
    workspace_bytes: int | None = None,
    compute_dtype: DTypeLike | None = None,
    logit_softcap: float | None = None,
    logit_scale: float | Array = 1.0,
    weights: ArrayLike | None = None,
    reduction: Literal["sum", "mean"] = "sum",
    normalizer: float | Array | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    batch_axis_name: str | tuple[str, ...] | None = None,
    forward_mode: bool = False,
) -> Array | tuple[Array, Tree]:
    """Any loss of the statistics of each example, without holding the logits.

    For a function `f` of what is known of each example, and weights `w`:

        z = hidden @ kernel + bias
        loss = Σ_b w_b f(nll_b, lse_b, entropy_b, z_y, args_b)

    with `lse = log Σ_j exp z_j` and `nll = lse - z_y` for the label `y`. The function
    sees vectors, never logits; its derivatives by the statistics become the gradient
    of the logits in the pass that computes them: three matmuls for value and gradient.

    Policy gradients, focal losses and margins are such functions: there is a table in
    notebooks/which_loss.md. What is nonlinear in a sum over a sequence is not: take
    `linear_softmax_log_probs` and sum its results.

    Args:
        function: from `Rows(nll, lse, entropy, label_logit)` of some examples, and the
            `args` of the same, to their losses: floating, one per example. Or to a
            pair of those and `aux`, a pytree of arrays of one number per example. It
            may be called for any number of examples, and must treat each by itself.
            Arrays that it closes over get their gradients. It is what a compilation is
            for: outside of `jit`, pass the same object again.
        `hidden`, `kernel`, `labels`: as in `linear_softmax_cross_entropy`; no
            distributions.
        args: pytrees of arrays `B...`, which it takes after the statistics.
        `bias`: as in `linear_softmax_cross_entropy`.
        `ignore_index`: as in `softmax_cross_entropy_with_integer_labels`.
        uses_entropy: whether it reads `Rows.entropy`, which is None otherwise.
        `kernel_layout`, `where`, `strategy`, `workspace_bytes`, `compute_dtype`: as in
            `linear_softmax_cross_entropy`; by `"recompute"` and `"vocab"` it takes a
            fourth matmul.
        `logit_softcap`, `logit_scale`: as in
            `softmax_cross_entropy_with_integer_labels`.
        weights: shape `B...`, floating, integer or bool: multiplies each example's loss
            and enters the denominator of the mean. An example of weight 0 is left out.
        reduction: `"sum"`, or `"mean"`, which divides by the sum of the weights.
        `normalizer`: as in `softmax_cross_entropy_with_integer_labels`.
        `axis_name`: as in `linear_softmax_cross_entropy`.
        `batch_axis_name`: as in `softmax_cross_entropy_with_integer_labels`. The
            function may close over what all devices share, but not with `"tokens"`.
        `forward_mode`: as in `linear_softmax_cross_entropy`.

    Returns:
        The loss, a scalar; float64 if hidden or kernel are, else float32. If the
        function returns a pair, `(loss, aux)`, with `aux` of shape `B...`, not
        differentiated, and 0 for examples that do not count.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or range, or a strategy cannot do
            what is asked for.

    Values:
        As in `linear_softmax_cross_entropy`: an example that does not count adds 0,
        whatever the function makes of it, with gradient 0; a label that cannot be makes
        the loss NaN, whatever the function makes of that.

    Differentiation:
        As in `linear_softmax_cross_entropy`, by `hidden`, `kernel`, `bias`,
        `logit_scale`, `weights`, `args`, and what the function closes over;
        `jax.lax.stop_gradient` in it is heeded.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxlosses as jl
        >>> def policy_loss(rows, old, advantages):
        ...     ratio = jnp.exp(-rows.nll - old)
        ...     return -ratio * advantages, {"ratio": ratio}
        >>> hidden, kernel, labels = jnp.eye(2, 4), jnp.eye(4, 3), jnp.array([0, 2])
        >>> old = jl.linear_softmax_log_probs(hidden, kernel, labels)
        >>> loss, aux = jl.linear_softmax_loss(
        ...     policy_loss, hidden, kernel, labels, old, jnp.array([1.0, -0.5])
        ... )
        >>> print(loss, aux["ratio"])
        -0.5 [1. 1.]

    Source:
        Hsu et al. 2024, *Liger Kernel* (arXiv:2410.10989), for the gradient in the
        forward pass.
    """
    function = _checks.function(function)
    hidden = _checks.hidden(hidden)
    batch, features = hidden.shape[:-1], hidden.shape[-1]
    kernel = _checks.kernel(kernel, kernel_layout, features)
    classes = classes_of(kernel_layout, kernel)
    axes = (len(batch),)
    labels, ignored = _checks.integer_labels(
        labels, (*batch, classes), axes, ignore_index, fused=True
    )
    masks = _checks.fused_where(where, classes, batch)
    uses_entropy = _checks.flag("uses_entropy", uses_entropy)
    _checks.reduced(reduction)
    static, options = _options.check_transform(
        axes,
        batch,
        classes,
        ignored=ignored,
        return_entropy=uses_entropy,
        logit_softcap=logit_softcap,
        logit_scale=logit_scale,
        weights=weights,
        reduction=reduction,
        normalizer=normalizer,
        axis_name=axis_name,
        batch_axis_name=batch_axis_name,
        forward_mode=forward_mode,
    )
    head = Head(hidden, kernel, _checks.bias(bias, classes))
    args = _checks.function_args(args, batch)
    spec = dataclasses.replace(static.spec, lse=True)
    static = dataclasses.replace(
        static, spec=spec, return_entropy=False, function=function
    )
    fused = fused_of(
        static,
        kernel_layout,
        head,
        strategy=strategy,
        workspace_bytes=workspace_bytes,
        compute_dtype=compute_dtype,
    )
    given = _rows.given_to(function, args, batch, fused.dtype, uses_entropy)
    arrays = FusedArrays(head, labels, *masks, options._replace(given=given))
    out = fused_loss(fused, arrays)
    return out.loss if out.aux is None else (out.loss, out.aux)
