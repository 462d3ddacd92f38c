"""The public divergence on logits: its arguments, checked."""

import math

from jax import lax
from jaxtyping import Array, ArrayLike, Float

from jaxlosses import _checks, _options
from jaxlosses._combine import Reduction
from jaxlosses._logits import Arrays, loss_on_logits
from jaxlosses._math.teacher import Direction


@_checks.has_own_messages
def softmax_kl_divergence(
    logits: ArrayLike,
    teacher_logits: ArrayLike,
    axis: int | tuple[int, ...] = -1,
    where: ArrayLike | None = None,
    *,
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
    """Divergence of the softmax of logits from that of a teacher, a constant.

    For each example, with the probabilities `s` of the student and `t` of the teacher
    after caps and temperature:

        forward          KL(t || s) = Σ_j t_j (log t_j - log s_j)
        reverse          KL(s || t) = Σ_j s_j (log s_j - log t_j)
        jensen_shannon   b KL(t || m) + (1 - b) KL(s || m),   m = b t + (1 - b) s

    Each is a sum of terms of one sign that vanish where both agree: never negative,
    and exactly 0 with gradient 0 for equal logits. A student close to its teacher has
    all its digits, where the plain sum is what the rounding of `log t_j` leaves.

    Args:
        logits: of the student, `B... V` in any axis order, float16, bfloat16, float32
            or float64: unscaled scores.
        teacher_logits: of the teacher, of the same shape; not differentiated. Both
            have the same classes: pad the smaller vocabulary and mask with `where`.
        `axis`, `where`: as in `softmax_cross_entropy_with_integer_labels`; a masked
            class counts for neither, whatever it holds.
        direction: `"forward"`, `"reverse"` or `"jensen_shannon"`.
        teacher_weight: `b` of the mixture, between 0 and 1; only
            `"jensen_shannon"` has one.
        temperature: above 0, divides the logits of both, after their caps; not
            differentiated. The result is not multiplied by its square, as Hinton et
            al. do to keep the gradient's size: multiply it where you add a loss of
            another temperature.
        `logit_softcap`: as in `softmax_cross_entropy_with_integer_labels`, of the
            student.
        teacher_logit_softcap: likewise, of the teacher.
        `weights`, `reduction`, `normalizer`, `axis_name`, `batch_axis_name`: as in
            `softmax_cross_entropy_with_integer_labels`.
        forward_mode: taken for the sake of the other losses; forward mode works
            without it.

    Returns:
        The divergence in nats: `B...`, or a scalar if reduced; float64 for float64
        logits of the student, else float32.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or range.

    Values:
        An example that does not count (weight 0, masked, without a class) has 0 and
        gradient 0. `0 log 0` is 0: a class of logit `-inf` adds nothing where the
        first distribution of a KL has none of it, and makes the divergence `+inf` where
        the second has none alone. A NaN or `+inf` in either makes its example NaN.

    Differentiation:
        Forward and reverse mode, to any order, by `logits` and `weights`. The backward
        pass keeps the logits and a few numbers per example.

    Example:
        >>> import jax
        >>> import jax.numpy as jnp
        >>> import jaxlosses as jl
        >>> teacher = jnp.array([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> student = teacher + 1e-4 * jnp.array([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
        >>> losses = jl.softmax_kl_divergence(student, teacher)
        >>> print(*(f"{loss:.4g}" for loss in losses))
        8.365e-10 0

    Source:
        Kullback and Leibler 1951, *On information and sufficiency*; Lin 1991,
        *Divergence measures based on the Shannon entropy*; Hinton et al. 2015,
        *Distilling the knowledge in a neural network* (arXiv:1503.02531), for the
        temperature; Agarwal et al. 2024, *On-policy distillation of language models*
        (arXiv:2306.13649), for the mixture's weight.
    """
    logits = _checks.logits(logits)
    axes = _checks.class_axes(axis, logits.ndim, allow_none=False)
    shape = logits.shape
    teacher = lax.stop_gradient(_checks.teacher_logits(teacher_logits, shape))
    masks = _checks.where(where, shape, axes)
    static, options = _options.check_divergence(
        axes,
        _checks.batch_shape(shape, axes),
        math.prod(shape[axis] for axis in axes),
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
    _checks.split_over("axis_name", static.axis_name, "logits", logits)
    _checks.split_over("batch_axis_name", static.batch_axes, "logits", logits)
    return loss_on_logits(static, Arrays(logits, teacher, *masks, options)).loss
