"""The public losses on logits: their arguments, checked."""

import math

from jaxtyping import Array, ArrayLike, Float

from jaxlosses import _checks, _options
from jaxlosses._checks import Given
from jaxlosses._combine import Metric, Reduction, Result
from jaxlosses._logits import Arrays, loss_on_logits


@_checks.names_forward_mode
@_checks.has_own_messages
def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | tuple[int, ...] | None = -1,
    where: ArrayLike | None = None,
    *,
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
    """Softmax cross-entropy between logits and label distributions.

    For each example, with `q` the labels and `w` the class weights:

        loss = Σ_j w_j q_j (lse - z_j),    lse = log Σ_j exp z_j

    evaluated without a subtraction of large numbers, so that the loss of a confident
    example keeps its digits.

    Args:
        logits: `B... V` in any axis order, float16, bfloat16, float32 or float64:
            unscaled scores.
        labels: real, of the shape of the logits, or of size 1 on a batch axis to
            share: a distribution over classes, or any non-negative weights. They need
            not sum to one.
        axis: class axis, a tuple of axes whose flattening are the classes, or None
            for all axes.
        where: as in `softmax_cross_entropy_with_integer_labels`; what a label puts on
            a masked class is dropped.
        class_weights: shape `(V,)`, floating. Multiplies the term of each class by
            its weight, and enters no denominator.
        `label_smoothing`, `z_loss`, `logit_softcap`, `logit_scale`, `weights`,
        `reduction`, `normalizer`, `axis_name`, `batch_axis_name`, `forward_mode`,
        `return_stats`: as in `softmax_cross_entropy_with_integer_labels`.

    Returns:
        The loss in nats: `B...`, or a scalar if reduced; float64 for float64 logits,
        else float32. With `return_stats`, the pair `(loss, Stats)`.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or range.

    Values:
        As in `softmax_cross_entropy_with_integer_labels`. A class of logit `-inf` makes
        the loss `+inf` if its label is not 0.

    Differentiation:
        As in `softmax_cross_entropy_with_integer_labels`; by `labels`, too, with
        `w_j (lse - z_j)` also where a label is 0.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxlosses as jl
        >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 40.0, 0.0]])
        >>> labels = jnp.array([[0.8, 0.1, 0.1], [0.0, 1.0, 0.0]])
        >>> losses = jl.softmax_cross_entropy(logits, labels)
        >>> print(*(f"{loss:.4g}" for loss in losses))
        0.6395 8.497e-18

    Source:
        Goodfellow, Bengio, Courville, *Deep Learning*, 2016, section 6.2.2.3; the
        arguments of `optax.softmax_cross_entropy`; class weights and smoothing of
        `torch.nn.CrossEntropyLoss`; label smoothing: Szegedy et al. 2016, section 7
        (arXiv:1512.00567); z-loss: Chowdhery et al. 2022, section 5
        (arXiv:2204.02311); cap: Gemma Team 2024, section 2 (arXiv:2408.00118).
    """
    logits = _checks.logits(logits)
    axes = _checks.class_axes(axis, logits.ndim, allow_none=True)
    labels = _checks.dense_labels(labels, logits.shape, axes)
    return _run(
        logits,
        labels,
        axes,
        where,
        dense=True,
        ignored=None,
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


@_checks.names_forward_mode
@_checks.has_own_messages
def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | tuple[int, ...] = -1,
    where: ArrayLike | None = None,
    *,
    ignore_index: int | None = None,
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
    """Softmax cross-entropy between logits and class ids.

    For each example with label `y`, class weights `w` and smoothing `α`:

        loss = (1 - α) w_y (lse - z_y) + α / V Σ_j w_j (lse - z_j)

    with `lse = log Σ_j exp z_j`, evaluated without a subtraction of large numbers, so
    that the loss of a confident example keeps its digits. It equals the dense loss of
    the one-hot labels, without the array.

    Args:
        logits: `B... V` in any axis order, float16, bfloat16, float32 or float64:
            unscaled scores.
        labels: `B...`, any integer dtype: class ids from 0 to `V - 1`. Those of 64
            bits in a NumPy array are checked before JAX narrows them; `jax.jit` narrows
            its arguments first.
        axis: class axis, or a tuple of axes: the classes are then the flattened axes,
            in the order given.
        where: bool. Of the logits' rank and broadcastable to them: the classes that
            exist. Of shape `B...`: the examples that count.
        ignore_index: an int or None: an example with this label does not count. Its
            loss and gradient are exactly 0, even if its logits are NaN.
        class_weights: shape `(V,)`, floating. Multiplies the loss by the weight of the
            label's class; smoothing spreads the weights.
        label_smoothing: `α` in `[0, 1)`, a number or a traced scalar: the label
            becomes `(1 - α) q + α / V` over the classes that exist, each class
            weighted by its class weight.
        z_loss: a number of 0 or more, or a traced scalar: adds `z_loss * lse**2` to
            each example, not class-weighted, in a mean neither.
        logit_softcap: a number `c > 0` or None: `z <- c tanh(z / c)`, before anything
            else. Infinite logits stay infinite.
        logit_scale: a number, a traced scalar, or an array of shape `B...`:
            `z <- logit_scale * z` after the cap, an inverse temperature.
        weights: shape `B...`, floating, integer or bool: multiplies each example's loss
            and enters the denominator of the mean; for weights of both signs take
            `"sum"`, since theirs may be near 0. An example of weight 0 does not count,
            whatever it holds; the derivative by its weight is its loss, where that is
            finite.
        reduction: `"none"`, `"sum"`, or `"mean"`: `sum(weighted loss) / sum(weights)`
            over the examples that count;
            with `class_weights`, `/ sum(weights * w_y)`, as in PyTorch, and the z-loss
            `/ sum(weights)`. With nothing to count the mean is 0 and its gradient 0.
        normalizer: a number of 0 or more, or a traced scalar, with `"mean"`: what the
            mean divides by instead, z-loss and all. With the number of tokens of all
            steps, the means of accumulated steps add up to the mean of all. 0 gives 0.
        axis_name: inside `shard_map`, the mesh axis or axes over which the classes
            are split, equally: fill up classes that do not divide, and mask them with
            `where`. Labels are global ids, `class_weights` and `where` are the
            local part. With `check_vma=False`, in `pmap` and for the axis of a `vmap`
            no gradient could be right, and it is refused.
        batch_axis_name: inside `shard_map`, the mesh axis or axes over which the
            examples are split, with `"sum"` or `"mean"`: those are then of all
            devices, which may have different numbers of examples that count, or none.
            Not with `check_vma=False`, in `pmap` or for the axis of a `vmap`.
        forward_mode: register the same value and gradient so that `jax.jvp`,
            `jax.jacfwd` and `jax.linearize` work too.
        return_stats: True, or names: also return `Stats(lse, nll, z_loss, predicted,
            correct, weight)`, each of shape `B...`: metrics from the same pass, not
            differentiated. A tuple adds any of `"entropy"`, `"confidence"`,
            `"label_logit"` and, by one read more, `"rank"`; see `Stats`.

    Returns:
        The loss in nats: `B...`, or a scalar if reduced; float64 for float64 logits,
        else float32. With `return_stats`, the pair `(loss, Stats)`.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or range. Both name the argument,
            what came, what was expected, and the fix, at trace time.

    Values:
        What is not known before running has one policy. A label outside
        `[0, V)` that is not `ignore_index`, or that names a masked class, gives NaN,
        in the loss and in the whole gradient of its example. A class of logit `-inf`
        has probability zero: gradient 0, or loss `+inf` if it is the label. A NaN or
        `+inf` in an example that counts makes that example NaN, and no other. A
        masked class has probability 0 and gradient 0; an example without a class has
        loss 0 and gradient 0.

    Differentiation:
        Reverse mode, by a `custom_vjp` that keeps its arguments and three numbers per
        example, and rebuilds the probabilities. Gradients by `logits`,
        `class_weights`, `weights`, `logit_scale`, `label_smoothing` and `z_loss`, each
        in the dtype of its argument. Second derivatives (`jax.hessian`, reverse over
        reverse), `vmap`, `scan` and `jax.checkpoint` work as they are; forward mode
        needs `forward_mode=True`.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxlosses as jl
        >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 40.0, 0.0], [1.0, 2.0, 3.0]])
        >>> labels = jnp.array([0, 1, -100])
        >>> losses = jl.softmax_cross_entropy_with_integer_labels(
        ...     logits, labels, ignore_index=-100
        ... )
        >>> print(*(f"{loss:.4g}" for loss in losses))
        0.2395 8.497e-18 0

    Source:
        Goodfellow, Bengio, Courville, *Deep Learning*, 2016, section 6.2.2.3; the
        arguments of `optax.softmax_cross_entropy_with_integer_labels`; class weights,
        smoothing and mean of `torch.nn.CrossEntropyLoss`; label smoothing: Szegedy et
        al. 2016, section 7 (arXiv:1512.00567); z-loss: Chowdhery et al. 2022,
        section 5 (arXiv:2204.02311); cap: Gemma Team 2024, section 2
        (arXiv:2408.00118).
    """
    logits = _checks.logits(logits)
    axes = _checks.class_axes(axis, logits.ndim, allow_none=False)
    labels, ignored = _checks.integer_labels(labels, logits.shape, axes, ignore_index)
    return _run(
        logits,
        labels,
        axes,
        where,
        dense=False,
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


def _run(
    logits: Float[Array, "..."],
    labels: Array,
    axes: tuple[int, ...],
    where: Given,
    **options: Given,
) -> Result:
    shape = logits.shape
    batch = _checks.batch_shape(shape, axes)
    masks = _checks.where(where, shape, axes)
    num_classes = math.prod(shape[axis] for axis in axes)
    static, checked = _options.check(axes, batch, num_classes, **options)
    _checks.split_over("axis_name", static.axis_name, "logits", logits)
    _checks.split_over("batch_axis_name", static.batch_axes, "logits", logits)
    return loss_on_logits(static, Arrays(logits, labels, *masks, checked)).result()
