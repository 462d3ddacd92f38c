"""The public losses on logits: check, statistics, combine, reduce."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, Float, Integer

from jaxlosses import _checks, _combine, _logits, _sharding, _statistics
from jaxlosses._combine import Coefficients, Example, Masses, Reduction, Stats, Terms
from jaxlosses._sizes import Shape
from jaxlosses._statistics import Inputs, Spec


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
    axis_name: str | tuple[str, ...] | None = None,
    forward_mode: bool = False,
    return_stats: bool = False,
) -> Any:
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
        where: bool. Of the logits' rank and broadcastable to them: the classes that
            exist; what a label puts on a masked class is dropped. Of shape `B...`:
            the examples that count.
        class_weights: shape `(V,)`, floating. Multiplies the term of each class by
            its weight.
        label_smoothing: `α` in `[0, 1)`, a number or a traced scalar: the label
            becomes `(1 - α) q + α / V` over the classes that exist, each class
            weighted by its class weight.
        z_loss: a number of 0 or more, or a traced scalar: adds `z_loss * lse**2` to
            each example, not class-weighted, in a mean neither.
        logit_softcap: a number `c > 0` or None: `z <- c tanh(z / c)`, before anything
            else. Infinite logits stay infinite.
        logit_scale: a number or a traced scalar: `z <- logit_scale * z` after the
            cap, an inverse temperature.
        weights: shape `B...`, floating, integer or bool: multiplies each example's loss
            and enters the denominator of the mean; for weights of both signs take
            `"sum"`, since theirs may be near 0. An example of weight 0 does not count,
            whatever it holds; the derivative by its weight is its loss, where that is
            finite.
        reduction: `"none"`, `"sum"`, or `"mean"`: `sum(weighted loss) / sum(weights)`
            over the examples that count. With nothing to count the mean is 0
            and its gradient 0.
        axis_name: inside `shard_map`, the mesh axis or axes over which the classes
            are split, equally: fill up classes that do not divide, and mask them with
            `where`. `class_weights` and `where` are the local part. With
            `check_vma=False`, in `pmap` and for the axis of a `vmap` no gradient
            could be right, and it is refused.
        forward_mode: register the same value and gradient so that `jax.jvp`,
            `jax.jacfwd` and `jax.linearize` work too.
        return_stats: also return `Stats(lse, nll, z_loss, predicted, correct)`, each
            of shape `B...`: metrics from the same pass, not differentiated.

    Returns:
        The loss in nats: `B...`, or a scalar if reduced; float64 for float64 logits,
        else float32. With `return_stats`, the pair `(loss, Stats)`.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or range. Both name the argument,
            what came, what was expected, and the fix, at trace time.

        Values that are not known before running have one policy. A class of logit
        `-inf` has probability zero: gradient 0, or loss `+inf` if its label is not 0.
        A NaN or `+inf` in an example that counts makes that example NaN, and no
        other. A masked class has probability 0 and gradient 0; an example without a
        class has loss 0 and gradient 0.

    Differentiation:
        Reverse mode, by a `custom_vjp` that keeps its arguments and three numbers per
        example, and rebuilds the probabilities. Gradients by `logits`, `labels`
        (`w_j (lse - z_j)`, also where a label is 0),
        `class_weights`, `weights`, `logit_scale`, `label_smoothing` and `z_loss`, each
        in the dtype of its argument. Second derivatives (`jax.hessian`, reverse over
        reverse), `vmap`, `scan` and `jax.checkpoint` work as they are; forward mode
        needs `forward_mode=True`.

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
    return _check_and_run(
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
        axis_name=axis_name,
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
    axis_name: str | tuple[str, ...] | None = None,
    forward_mode: bool = False,
    return_stats: bool = False,
) -> Any:
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
        logit_scale: a number or a traced scalar: `z <- logit_scale * z` after the
            cap, an inverse temperature.
        weights: shape `B...`, floating, integer or bool: multiplies each example's loss
            and enters the denominator of the mean; for weights of both signs take
            `"sum"`, since theirs may be near 0. An example of weight 0 does not count,
            whatever it holds; the derivative by its weight is its loss, where that is
            finite.
        reduction: `"none"`, `"sum"`, or `"mean"`: `sum(weighted loss) / sum(weights)`
            over the examples that count;
            with `class_weights`, `/ sum(weights * w_y)`, as in PyTorch, and the z-loss
            `/ sum(weights)`. With nothing to count the mean is 0 and its gradient 0.
        axis_name: inside `shard_map`, the mesh axis or axes over which the classes
            are split, equally: fill up classes that do not divide, and mask them with
            `where`. Labels are global ids, `class_weights` and `where` are the
            local part. With `check_vma=False`, in `pmap` and for the axis of a `vmap`
            no gradient could be right, and it is refused.
        forward_mode: register the same value and gradient so that `jax.jvp`,
            `jax.jacfwd` and `jax.linearize` work too.
        return_stats: also return `Stats(lse, nll, z_loss, predicted, correct)`, each
            of shape `B...`: metrics from the same pass, not differentiated.

    Returns:
        The loss in nats: `B...`, or a scalar if reduced; float64 for float64 logits,
        else float32. With `return_stats`, the pair `(loss, Stats)`.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or range. Both name the argument,
            what came, what was expected, and the fix, at trace time.

        Values that are not known before running have one policy. A label outside
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
    return _check_and_run(
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
        axis_name=axis_name,
        forward_mode=forward_mode,
        return_stats=return_stats,
    )


@dataclasses.dataclass(frozen=True)
class Static:
    """Everything that a compiled loss is specialised for."""

    spec: Spec
    ignored: int | None
    reduction: Reduction
    forward_mode: bool
    return_stats: bool
    batch_axes: tuple[str, ...] = ()


class Arrays(NamedTuple):
    """Everything that may change from call to call without a new compilation."""

    logits: Float[Array, "..."]
    labels: Array
    where: Bool[Array, "..."] | None
    examples: Bool[Array, "..."] | None
    class_weights: Float[Array, " V"] | None
    weights: Float[Array, "..."] | None
    label_smoothing: float | Array | None
    z_loss: float | Array | None
    logit_scale: float | Array | None


def _check_and_run(
    logits: Float[Array, "..."],
    labels: Array,
    axes: tuple[int, ...],
    where: Any,
    *,
    dense: bool,
    ignored: int | None,
    class_weights: Any,
    label_smoothing: Any,
    z_loss: Any,
    logit_softcap: Any,
    logit_scale: Any,
    weights: Any,
    reduction: Any,
    axis_name: Any,
    forward_mode: Any,
    return_stats: Any,
) -> Any:
    shape = logits.shape
    batch = _checks.batch_shape(shape, axes)
    where, examples = _checks.where(where, shape, axes)
    arrays = Arrays(
        logits,
        labels,
        where,
        examples,
        _checks.class_weights(class_weights, math.prod(shape[i] for i in axes)),
        _checks.weights(weights, batch),
        _checks.label_smoothing(label_smoothing),
        _checks.z_loss(z_loss),
        _checks.logit_scale(logit_scale),
    )
    static = specialise(
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
    _checks.split_over(static.spec.axis_name, "logits", logits)
    return loss_on_logits(static, arrays)


def specialise(
    axes: tuple[int, ...],
    *,
    dense: bool,
    smooth: bool,
    lse: bool,
    ignored: int | None,
    logit_softcap: Any,
    reduction: Any,
    axis_name: Any,
    forward_mode: Any,
    return_stats: Any,
) -> Static:
    """The static part of a loss, from options that are still to be checked."""
    return_stats = _checks.flag("return_stats", return_stats)
    spec = Spec(
        axes=axes,
        dense=dense,
        softcap=_checks.logit_softcap(logit_softcap),
        smooth=smooth,
        lse=lse,
        predicted=return_stats,
        axis_name=_checks.axis_name(axis_name),
    )
    return Static(
        spec,
        ignored,
        _checks.reduction(reduction),
        _checks.flag("forward_mode", forward_mode),
        return_stats,
    )


@functools.partial(jax.jit, static_argnums=0)
def loss_on_logits(static: Static, arrays: Arrays) -> Any:
    spec = static.spec
    mesh = _sharding.explicit_mesh(arrays)
    if mesh is not None:
        arrays = _split_alike(spec, arrays, mesh)
    dtype = _statistics.accumulation_dtype(arrays.logits.dtype)
    weights = optional(arrays.weights, dtype)
    counted = _counted(static, arrays)
    label_weights = None
    if spec.dense:
        labels = arrays.labels
    else:
        ids = class_ids(spec, arrays.logits.shape, arrays.labels)
        labels = jnp.expand_dims(ids, spec.axes)
        if arrays.class_weights is not None:
            label_weights = weights_of_labels(spec, arrays.class_weights, ids, dtype)
    class_weights = None
    if arrays.class_weights is not None and (spec.dense or spec.smooth):
        class_weights = _along_classes(spec, arrays.class_weights, arrays.logits)
    inputs = Inputs(
        arrays.logits,
        labels,
        arrays.where,
        None if counted is None else jnp.expand_dims(counted, spec.axes),
        class_weights,
        optional(arrays.logit_scale, dtype),
    )
    if static.forward_mode and weights is not None:
        # A forward rule is linear in what reaches it: it cannot let a NaN pass where
        # an example counts and stop it where one does not.
        plain = _logits.statistics(spec, lax.stop_gradient(inputs))
        fine = jnp.isfinite(plain.nll) & jnp.isfinite(plain.spread)
        on = fine | jnp.expand_dims(weights != 0, spec.axes)
        inputs = inputs._replace(counted=_both(inputs.counted, on))
    statistics = _logits.statistics(spec, inputs, static.forward_mode)
    lse = _statistics.lse(spec, inputs, statistics)
    terms = jax.tree.map(
        lambda a: jnp.squeeze(a, spec.axes),
        Terms(lse, statistics.nll, statistics.smooth),
    )
    coefficients = Coefficients(
        optional(arrays.label_smoothing, dtype), optional(arrays.z_loss, dtype)
    )
    example = Example(counted, label_weights, weights)
    masses = masses_of(static, coefficients, example, terms.nll)
    weighed = _combine.for_mean(coefficients, masses)
    loss = _combine.per_example(weighed, terms, example)
    loss = reduced(static, loss, masses)
    if not static.return_stats:
        return loss
    found = stats(spec, inputs, statistics.predicted, terms, coefficients, example)
    return loss, found


def masses_of(
    static: Static,
    coefficients: Coefficients,
    example: Example,
    like: Float[Array, "..."],
) -> Masses | None:
    """What a mean divides by, which is known before its logits; None for no mean."""
    if static.reduction != "mean":
        return None
    masses = _combine.masses(coefficients, example, like)
    return lax.psum(masses, static.batch_axes) if static.batch_axes else masses


def reduced(
    static: Static, loss: Float[Array, "..."], masses: Masses | None
) -> Float[Array, "..."]:
    """Losses of examples as the caller wants them."""
    if static.reduction == "none":
        return loss
    return over_batch(static, jnp.sum(loss), masses)


def over_batch(
    static: Static, total: Float[Array, ""], masses: Masses | None
) -> Float[Array, ""]:
    """A sum, or a mean, over the examples of all devices."""
    if static.batch_axes:
        total = lax.psum(total, static.batch_axes)
    return total if masses is None else _combine.mean_of(total, masses)


def _split_alike(spec: Spec, arrays: Arrays, mesh: Any) -> Arrays:
    """On a mesh of explicit axes: what belongs to the logits, split as they are."""
    logits = _sharding.split_of(arrays.logits)
    batch = tuple(a for i, a in enumerate(logits) if i not in spec.axes)
    filled: Any = arrays._replace
    splits = filled(
        logits=logits,
        labels=logits if spec.dense else batch,
        where=logits,
        examples=batch,
        class_weights=(None,),
        weights=batch,
        label_smoothing=(),
        z_loss=(),
        logit_scale=(),
    )
    return _sharding.reshard(mesh, arrays, splits)


def stats(
    spec: Spec,
    inputs: Inputs,
    predicted: Any,
    terms: Terms,
    coefficients: Coefficients,
    example: Example,
) -> Stats:
    """Metrics of each example, not differentiated."""
    inputs, terms, coefficients = lax.stop_gradient((inputs, terms, coefficients))
    nll, penalty = terms.nll, jnp.zeros_like(terms.nll)
    if spec.dense and inputs.class_weights is not None:
        plain = _logits.statistics(spec, inputs._replace(class_weights=None))
        nll = jnp.squeeze(plain.nll, spec.axes)
    if coefficients.z_loss is not None:
        penalty = _combine.penalty(coefficients.z_loss, terms.lse)
    correct = predicted == _statistics.label_ids(spec, inputs)
    correct &= predicted >= 0
    if inputs.counted is not None:
        correct &= inputs.counted
    predicted, correct = (jnp.squeeze(a, spec.axes) for a in (predicted, correct))
    found = Stats(terms.lse, nll, penalty, predicted, correct)
    if example.weights is None:
        return found
    on = example.weights != 0
    return jax.tree.map(lambda a: jnp.where(on, a, jnp.zeros_like(a)), found)


def _counted(static: Static, arrays: Arrays) -> Bool[Array, "..."] | None:
    """Which examples count, or None for all of them."""
    spec, shape = static.spec, arrays.logits.shape
    batch = _checks.batch_shape(shape, spec.axes)
    masks = not_ignored(static, arrays.labels)
    if arrays.examples is not None:
        masks.append(arrays.examples)
    if arrays.where is not None:
        left = jnp.squeeze(_statistics.any_class(spec, arrays.where), spec.axes)
        masks.append(left)
    if 0 in (shape[axis] for axis in spec.axes):
        masks.append(jnp.zeros(batch, bool))
    return all_of(masks, batch)


def not_ignored(static: Static, labels: Array) -> list[Bool[Array, "..."]]:
    """The mask that `ignore_index` makes, if it makes one."""
    if static.ignored is None:
        return []
    # A value that the labels' dtype cannot hold is no label.
    info = jnp.iinfo(labels.dtype)
    if not info.min <= static.ignored <= info.max:
        return []
    return [labels != np.asarray(static.ignored).astype(labels.dtype)]


def all_of(masks: list[Bool[Array, "..."]], batch: Shape) -> Bool[Array, "..."] | None:
    """Where every mask is true, or None without any."""
    if not masks:
        return None
    return functools.reduce(
        jnp.logical_and, [jnp.broadcast_to(mask, batch) for mask in masks]
    )


def class_ids(
    spec: Spec, shape: Shape, labels: Integer[Array, "..."]
) -> Integer[Array, "..."]:
    """The labels as int32, with -1 for one that is no class."""
    num_classes = math.prod(shape[axis] for axis in spec.axes)
    num_classes *= _statistics.num_shards(spec)
    if jnp.iinfo(labels.dtype).bits < 32:
        labels = labels.astype(jnp.int32)
    valid = (labels >= 0) & (labels < num_classes)
    return jnp.where(valid, labels, jnp.full_like(labels, -1)).astype(jnp.int32)


def weights_of_labels(
    spec: Spec,
    class_weights: Float[Array, " V"],
    ids: Integer[Array, "..."],
    dtype: Any,
) -> Float[Array, "..."]:
    """The class weight of each label; for one that is no class, the loss is NaN."""
    if class_weights.size == 0:
        return jnp.zeros(ids.shape, dtype)
    local = ids
    if spec.axis_name:
        local = ids - class_weights.size * lax.axis_index(spec.axis_name)
    here = (local >= 0) & (local < class_weights.size)
    at = class_weights.astype(dtype).at[jnp.where(here, local, 0)]
    found = at.get(out_sharding=_sharding.as_ids(ids))
    found = jnp.where(here, found, 0)
    return lax.psum(found, spec.axis_name) if spec.axis_name else found


def _along_classes(
    spec: Spec, class_weights: Float[Array, " V"], logits: Float[Array, "..."]
) -> Float[Array, "..."]:
    """The vector laid along the class axes, of the logits' rank."""
    shape = logits.shape
    sizes = [shape[axis] for axis in spec.axes]
    order = sorted(range(len(sizes)), key=lambda i: spec.axes[i])
    dims = [n if i in spec.axes else 1 for i, n in enumerate(shape)]
    laid = class_weights.reshape(sizes).transpose(order).reshape(dims)
    return _sharding.split_like(laid, logits)


def _both(a: Array | None, b: Array) -> Array:
    return b if a is None else a & b


def optional(x: Any, dtype: Any) -> Array | None:
    """An array of the dtype, or None."""
    return None if x is None else jnp.asarray(x).astype(dtype)
