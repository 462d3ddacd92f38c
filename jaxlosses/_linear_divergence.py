"""The public fused divergence: its arguments, checked."""

from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Float

from jaxlosses import _checks, _options
from jaxlosses._backends.head import Head, Layout, classes_of, matmul_of
from jaxlosses._backends.plan import Strategy
from jaxlosses._combine import Reduction
from jaxlosses._linear import FusedArrays, fused_loss, fused_of
from jaxlosses._math.teacher import Direction
from jaxlosses._types import Tree


@_checks.names_forward_mode
@_checks.has_own_messages
def linear_softmax_kl_divergence(
    hidden: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    teacher_logits: ArrayLike | None = None,
    teacher_hidden: ArrayLike | None = None,
    teacher_kernel: ArrayLike | None = None,
    teacher_bias: ArrayLike | None = None,
    teacher_kernel_layout: Layout | None = None,
    kernel_layout: Layout = "dv",
    where: ArrayLike | None = None,
    strategy: Strategy = "auto",
    workspace_bytes: int | None = None,
    compute_dtype: DTypeLike | None = None,
    direction: Direction = "forward",
    teacher_weight: float | Array = 0.5,
    temperature: float | Array = 1.0,
    logit_softcap: float | None = None,
    teacher_logit_softcap: float | None = None,
    weights: ArrayLike | None = None,
    reduction: Reduction = "none",
    normalizer: float | Array | None = None,
    axis_name: str | tuple[str, ...] | None = None,
    batch_axis_name: str | tuple[str, ...] | None = None,
    forward_mode: bool = False,
) -> Float[Array, "..."]:
    """Divergence of `hidden @ kernel + bias` from a teacher, without holding logits.

    It is that of `softmax_kl_divergence` on the logits

        z = hidden @ kernel + bias
        z of the teacher = teacher_hidden @ teacher_kernel + teacher_bias

    of which one chunk of examples is formed at a time, of both. With a sum or a mean
    the gradient is formed in the same pass: two matmuls for it, and one for each of the
    two sets of logits.

    Args:
        teacher_logits: `B... V`, floating: logits that are there already, in the place
            of a head. Nothing of the teacher is differentiated.
        teacher_hidden: `B... E`, float16, bfloat16, float32 or float64: hidden states
            of the teacher, of any width.
        teacher_kernel: of the same dtypes, `E V` or `V E`, with the classes of
            `kernel`.
        teacher_bias: shape `(V,)`, floating, or None.
        teacher_kernel_layout: as `kernel_layout` is for `kernel`; None for the same.
        strategy: as of `linear_softmax_cross_entropy` for distributions: not
            `"vocab"`; with a teacher's kernel, a chunk holds two sets of logits, and
            `"recompute"` takes six matmuls.
        compute_dtype: dtype of the matmuls of both heads, or None for the one that the
            hidden states and kernel of each promote to.
        forward_mode: register a rule for `jax.jvp`, `jax.jacfwd` and `jax.linearize`,
            with `"dense"` alone.
        `hidden`, `kernel`, `bias`, `kernel_layout`, `where`, `workspace_bytes`: as in
            `linear_softmax_cross_entropy`.
        `direction`, `teacher_weight`, `temperature`: as in `softmax_kl_divergence`.
        `logit_softcap`: as in `softmax_cross_entropy_with_integer_labels`, of the
            student.
        `teacher_logit_softcap`: as in `softmax_kl_divergence`.
        `weights`: as in `linear_softmax_cross_entropy`.
        `reduction`, `normalizer`: as in `softmax_cross_entropy_with_integer_labels`.
        `axis_name`: as in `linear_softmax_cross_entropy`; `teacher_kernel`,
            `teacher_bias` and `teacher_logits` are the local part as well.
        `batch_axis_name`: as in `softmax_cross_entropy_with_integer_labels`.

    Returns:
        The divergence in nats: `B...`, or a scalar if reduced; float64 if hidden or
        kernel are, else float32.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or range, or a strategy cannot do
            what is asked for.

    Values:
        As in `softmax_kl_divergence`: two equal heads give exactly 0, with gradient 0.

    Differentiation:
        As in `linear_softmax_cross_entropy` for distributions, by `hidden`, `kernel`,
        `bias` and `weights`; the teacher and the temperature are constants.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxlosses as jl
        >>> hidden, kernel = jnp.eye(2, 4), jnp.eye(4, 3)
        >>> wide, of_teacher = jnp.eye(2, 5), 2 * jnp.eye(5, 3)
        >>> loss = jl.linear_softmax_kl_divergence(
        ...     hidden,
        ...     kernel,
        ...     teacher_hidden=wide,
        ...     teacher_kernel=of_teacher,
        ...     reduction="mean",
        ... )
        >>> print(f"{loss:.4f}")
        0.0989

    Source:
        As of `softmax_kl_divergence`; Hsu et al. 2024, *Liger Kernel*
        (arXiv:2410.10989), for the gradient in the forward pass.
    """
    hidden = _checks.hidden(hidden)
    batch, features = hidden.shape[:-1], hidden.shape[-1]
    kernel = _checks.kernel(kernel, kernel_layout, features)
    classes = classes_of(kernel_layout, kernel)
    shape, axes = (*batch, classes), (len(batch),)
    dtype = _checks.compute_dtype(compute_dtype)
    beside = {
        "teacher_bias": teacher_bias,
        "teacher_kernel_layout": teacher_kernel_layout,
    }
    labels = teacher = teacher_matmul = None
    if _checks.has_head_of_teacher(
        teacher_logits, teacher_hidden, teacher_kernel, beside
    ):
        layout = teacher_kernel_layout
        layout = kernel_layout if layout is None else layout
        teacher = _teacher(
            teacher_hidden, teacher_kernel, teacher_bias, layout, batch, classes
        )
        teacher_matmul = matmul_of(layout, teacher, dtype)
    else:
        labels = lax.stop_gradient(_checks.teacher_logits(teacher_logits, shape))
    masks = _checks.fused_where(where, classes, batch)
    static, options = _options.check_divergence(
        axes,
        batch,
        classes,
        direction=direction,
        teacher_weight=teacher_weight,
        temperature=temperature,
        logit_softcap=logit_softcap,
        teacher_logit_softcap=teacher_logit_softcap,
        weights=weights,
        reduction=reduction,
        normalizer=normalizer,
        axis_name=axis_name,
        batch_axis_name=batch_axis_name,
        forward_mode=forward_mode,
    )
    head = Head(hidden, kernel, _checks.bias(bias, classes))
    fused = fused_of(
        static,
        kernel_layout,
        head,
        strategy=strategy,
        workspace_bytes=workspace_bytes,
        compute_dtype=compute_dtype,
        every_class=_checks.TEACHERS,
        teacher=teacher_matmul,
    )
    return fused_loss(fused, FusedArrays(head, labels, *masks, options, teacher)).loss


def _teacher(
    hidden: Tree, kernel: Tree, bias: Tree, layout: Tree, batch: Tree, classes: Tree
) -> Head:
    """The factors of its logits, as constants."""
    hidden = _checks.hidden(hidden, "teacher_hidden")
    kernel = _checks.kernel(kernel, layout, hidden.shape[-1], "teacher_")
    of_teacher = classes_of(layout, kernel)
    _checks.teacher_head(hidden, batch, kernel, (of_teacher, classes))
    bias = _checks.bias(bias, classes, "teacher_bias")
    constants: Head = lax.stop_gradient(Head(hidden, kernel, bias))
    return constants
