"""The public loss of logits and labels of some classes: its arguments, checked."""

import math

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike

from jaxlosses import _checks, _options
from jaxlosses._combine import Metric, Reduction, Result
from jaxlosses._logits import Arrays, loss_on_logits
from jaxlosses._math.top_k import Rest
from jaxlosses._types import Shape, Tree


@_checks.names_forward_mode
@_checks.has_own_messages
def softmax_cross_entropy_with_top_k_labels(
    logits: ArrayLike,
    ids: ArrayLike,
    probs: ArrayLike,
    axis: int | tuple[int, ...] = -1,
    where: ArrayLike | None = None,
    *,
    rest: Rest = "ignore",
    as_divergence: bool = False,
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
    """Softmax cross-entropy between logits and the `K` likeliest classes of a label.

    For each example with class ids `i_k` of probabilities `q_k`, and with
    `lse = log Σ_j exp z_j` over all classes:

        ignore         Σ_k q_k (lse - z_k)
        bucket         Σ_k q_k (lse - z_k) + (1 - Σ_k q_k) (lse - r),
                       r = log Σ exp z_j over all other classes
        renormalize    Σ_k q_k (s - z_k) / Σ_k q_k,    s = log Σ_k exp z_k

    The other classes are summed by themselves, not taken for what the first ones leave:
    a student that puts all but 1e-9 on them has that in all its digits. No array of
    distributions is formed.

    Args:
        logits: `B... V` in any axis order, float16, bfloat16, float32 or float64:
            unscaled scores.
        ids: `B... K`, any integer dtype: class ids from 0 to `V - 1`, in any order, and
            -1 for none, whatever its probability. Probabilities of an id that is given
            twice add up.
        probs: `B... K`, real: the probability of each id. They need not sum to one.
        `axis`, `where`: as in `softmax_cross_entropy_with_integer_labels`.
        rest: what becomes of the other classes. `"ignore"`: they are in the student's
            sum alone. `"bucket"`: they are one class more, whose label is what is left
            to one, at least 0; there is none where no class is left. `"renormalize"`:
            student and labels are normalised over the ids alone; without any, the loss
            is 0.
        as_divergence: subtract the entropy of the labels, of the bucket as well: the
            Kullback-Leibler divergence, never negative. Not with `"ignore"`.
        `z_loss`, `logit_softcap`, `logit_scale`: as in
            `softmax_cross_entropy_with_integer_labels`; the log-sum-exp of the z-loss
            is that of all classes.
        weights: as in `linear_softmax_cross_entropy`.
        `reduction`, `normalizer`, `axis_name`, `batch_axis_name`, `forward_mode`: as in
            `softmax_cross_entropy_with_integer_labels`.
        return_stats: likewise, by one read more; `nll` is the cross-entropy, and the
            label of the other metrics is the id of the largest probability.

    Returns:
        The loss in nats: `B...`, or a scalar if reduced; float64 for float64 logits,
        else float32. With `return_stats`, the pair `(loss, Stats)`.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape or range.

    Values:
        As in `softmax_cross_entropy_with_integer_labels`. An id that is neither a class
        nor -1, or that names a masked class, gives NaN, also at probability 0.

    Differentiation:
        As in `softmax_cross_entropy_with_integer_labels`; by `probs`, too, also where
        one is 0, and through what `rest` makes of them. The backward pass keeps the
        arguments and `K` and a few numbers per example.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxlosses as jl
        >>> logits = jnp.array([[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0]])
        >>> ids = jnp.array([[0, 1], [3, -1]])
        >>> probs = jnp.array([[0.6, 0.3], [1.0, 0.0]])
        >>> for rest in ("ignore", "bucket", "renormalize"):
        ...     losses = jl.softmax_cross_entropy_with_top_k_labels(
        ...         logits, ids, probs, rest=rest
        ...     )
        ...     print(rest, *(f"{loss:.4f}" for loss in losses))
        ignore 0.6962 1.3863
        bucket 0.9089 1.3863
        renormalize 0.6466 0.0000

    Source:
        Hinton et al. 2015, *Distilling the knowledge in a neural network*
        (arXiv:1503.02531); Anshumann et al. 2025, *Sparse logit sampling*
        (arXiv:2503.16870), for what becomes of the other classes; two-hot targets:
        Bellemare et al. 2017 (arXiv:1707.06887) and Farebrother et al. 2024
        (arXiv:2403.03950).
    """
    logits = _checks.logits(logits)
    axes = _checks.class_axes(axis, logits.ndim, allow_none=False)
    batch = _checks.batch_shape(logits.shape, axes)
    ids, probs = _checks.top_k_labels(ids, probs, batch)
    classes, examples = _checks.where(where, logits.shape, axes)
    num_classes = math.prod(logits.shape[axis] for axis in axes)
    static, options = _options.check_top_k(
        (len(batch),),
        batch,
        num_classes,
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
    _checks.split_over("axis_name", static.axis_name, "logits", logits)
    _checks.split_over("batch_axis_name", static.batch_axes, "logits", logits)
    last, classes = _classes_last(logits, axes), _classes_last(classes, axes)
    arrays = Arrays(last, probs, classes, examples, options, ids)
    return loss_on_logits(static, arrays).result()


def _classes_last(a: Tree, axes: Shape) -> Tree:
    """The same with one class axis, the last, on which ids are looked up."""
    if a is None or axes == (a.ndim - 1,):
        return a
    places = range(a.ndim - len(axes), a.ndim)
    a = jnp.moveaxis(a, axes, places)
    shape = a.shape[: a.ndim - len(axes)]
    return a.reshape(*shape, math.prod(a.shape[a.ndim - len(axes) :]))
