"""Arrays along their class axes: what is asked about, and sums over classes.

Notation of this folder, for one example with logits `z` after cap and scale, and
classes `j`:

    m      = max_j z_j                                   the peak
    spread = log sum_j exp(z_j - m)           so that  lse = m + spread
    nll    = spread + (m - z_y)                          integer label y
    nll    = sum_j t_j (spread + (m - z_j))              targets t_j = q_j w_j
    smooth = sum_j u_j (spread + (m - z_j))              u_j = w_j / number of classes
    depth  = sum_j p_j (m - z_j)                p = softmax(z), entropy = spread + depth

The mathematics knows no machine: how a row is read, cut into pieces or spread over
devices is decided by backends, which hand in what they do in another way.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Integer

from jaxlosses._elementary import fused_sum, same
from jaxlosses._types import DType, Shape, Size

Values = Float[Array, "..."]
# Of what only the shape and dtype are asked.
Shaped = Array | jax.ShapeDtypeStruct
Ids = Integer[Array, "..."]
Mask = Bool[Array, "..."]


@dataclasses.dataclass(frozen=True)
class Whole:
    """All classes are here: how reductions over them come together, trivially.

    Where devices hold parts of the classes, `jaxlosses._sharding.Shards` takes this
    place.
    """

    def sum(self, a: Array) -> Array:
        """A sum over all parts, from that of each."""
        return a

    def max(self, a: Array) -> Array:
        """The largest of all parts."""
        return a

    def min(self, a: Array) -> Array:
        """The smallest of all parts."""
        return a

    def count(self) -> int:
        """How many parts there are."""
        return 1

    def first_id(self, size: Size) -> Size | Array:
        """The id of the first class of this part, if all are of one size."""
        del size
        return 0


@dataclasses.dataclass(frozen=True)
class Stacked(Whole):
    """Parts along a first axis."""

    def sum(self, a: Array) -> Array:
        return jnp.sum(a, 0, keepdims=True)

    def max(self, a: Array) -> Array:
        return jnp.max(a, 0, keepdims=True)

    def min(self, a: Array) -> Array:
        return jnp.min(a, 0, keepdims=True)


@dataclasses.dataclass(frozen=True)
class Spec:
    """What is static about a set of logit statistics.

    Attributes:
        axes: class axes, non-negative, in the order in which they are flattened.
        dense: labels are a distribution over classes, not class ids.
        softcap: `c` of `c * tanh(z / c)`, or None.
        smooth: whether the smoothing statistic is wanted.
        lse: whether the cotangent of `lse` can be other than zero.
        predicted: whether the arg max is wanted.
        entropy: whether the entropy is wanted.
        rank: whether the number of classes ahead of the label is.
        shards: how sums over classes come together where devices hold parts of them.
    """

    axes: tuple[int, ...]
    dense: bool
    softcap: float | None = None
    smooth: bool = False
    lse: bool = False
    predicted: bool = False
    entropy: bool = False
    rank: bool = False
    shards: Whole = Whole()


class Inputs(NamedTuple):
    """What the statistics depend on. `K` is `B` with every class axis kept as 1.

    Attributes:
        logits: `B... V`, any floating dtype.
        labels: class ids of shape `K`, -1 for one that cannot be; or a distribution
            of the logits' shape, with batch axes of size 1 where it is shared; or
            None for what needs no labels, with a spec of dense ones.
        where: classes that exist, of the logits' rank, or None for all.
        counted: examples that count, of shape `K`, or None for all.
        class_weights: of the logits' rank with batch axes of size 1, or None.
        scale: factor of the logits, a scalar or of the shape `K`, or None for one.
        picks: ids of classes, as in `picks`, which are left out of the statistics of
            the others; or None.
    """

    logits: Values
    labels: Any
    where: Mask | None = None
    counted: Mask | None = None
    class_weights: Values | None = None
    scale: Float[Array, "..."] | None = None
    picks: Ids | None = None


def accumulation_dtype(dtype: DType) -> Any:
    """float64 for float64, float32 for everything smaller."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def ids_of_classes(spec: Spec, shape: Shape) -> Ids:
    """The id of every class, of the logits' rank with batch axes of size 1."""
    ids, local = None, 1
    for axis in spec.axes:
        dims = [n if i == axis else 1 for i, n in enumerate(shape)]
        along = lax.broadcasted_iota(jnp.int32, dims, axis)
        ids = along if ids is None else ids * shape[axis] + along
        local *= shape[axis]
    if ids is None:
        ids = jnp.zeros((1,) * len(shape), jnp.int32)
    return ids if spec.shards == Whole() else ids + spec.shards.first_id(local)


def is_id(spec: Spec, shape: Shape, ids: Ids) -> Mask:
    """For each class, whether it is the one that an example names."""
    # A comparison fuses into the pass over the logits, on every kind of mesh axis;
    # a gather does not.
    return same(ids_of_classes(spec, shape), ids, count_of(spec, shape))


def is_label(spec: Spec, inputs: Inputs) -> Mask:
    """For each class, whether it is the label."""
    return is_id(spec, inputs.logits.shape, inputs.labels)


def has_label(spec: Spec, inputs: Inputs) -> Mask:
    """Whether the label is a class that exists."""
    if inputs.where is None:
        return inputs.labels >= 0
    found = is_label(spec, inputs) & inputs.where
    return total(spec, found.astype(jnp.int32)) > 0


def first(spec: Spec, mask: Mask) -> Ids:
    """The lowest class id at which the mask holds, or -1."""
    ids = ids_of_classes(spec, mask.shape)
    nobody = jnp.iinfo(ids.dtype).max
    lowest = smallest(spec, jnp.where(mask, ids, nobody))
    return jnp.where(lowest == nobody, -1, lowest)


def label_ids(spec: Spec, inputs: Inputs) -> Ids:
    """The labels as class ids: of a distribution, the arg max."""
    if not spec.dense:
        return inputs.labels
    targets = inputs.labels.astype(accumulation_dtype(inputs.logits.dtype))
    if inputs.where is not None:
        targets = jnp.where(inputs.where, targets, -jnp.inf)
    return first(spec, targets == largest(spec, targets))


def any_class(spec: Spec, mask: Mask) -> Mask:
    """Whether the mask holds for any class."""
    return total(spec, mask.astype(jnp.int32)) > 0


def weighted(a: Values, inputs: Inputs) -> Values:
    """An entry for each class, times the class weight."""
    if inputs.class_weights is None:
        return a
    return a * inputs.class_weights.astype(a.dtype)


def targets_of(inputs: Inputs, dtype: DType) -> Values:
    """Class-weighted label distribution over the classes that exist."""
    return masked(inputs.where, weighted(inputs.labels.astype(dtype), inputs))


class Uniform(NamedTuple):
    """The class-weighted uniform distribution over the classes that exist.

    Attributes:
        target: its entries `u_j`.
        others: for each class, the sum over the other classes.
        num_classes: how many classes exist, at least one.
    """

    target: Values
    others: Values
    num_classes: Values


def uniform_of(spec: Spec, inputs: Inputs, dtype: DType) -> Uniform:
    """What smoothing spreads; of `inputs.logits` only the shape is used."""
    shape = [n if i in spec.axes else 1 for i, n in enumerate(inputs.logits.shape)]
    ones = masked(inputs.where, weighted(jnp.ones(shape, dtype), inputs))
    number = num_classes(spec, inputs, dtype)
    target = ones / number
    if inputs.class_weights is None:
        return Uniform(target, (number - 1) * target, number)
    return Uniform(target, sum_of_others(spec, target), number)


def has_tail(spec: Spec, inputs: Inputs) -> bool:
    """Whether a spread needs all its digits where the label is not the largest.

    An entropy is made of it; and smoothing has a gradient by the weight of a class
    that is all but certain, which is the surprise of that class.
    """
    return spec.entropy or (spec.smooth and inputs.class_weights is not None)


def count_of(spec: Spec, shape: Shape) -> Size:
    """How many classes there are, on all devices."""
    return math.prod(shape[axis] for axis in spec.axes) * spec.shards.count()


def num_classes(spec: Spec, inputs: Inputs, dtype: DType) -> Values:
    """How many classes exist, at least one."""
    shape = inputs.logits.shape
    if inputs.where is None:
        return jnp.full((1,) * len(shape), count_of(spec, shape), dtype)
    return jnp.maximum(total(spec, inputs.where.astype(dtype)), 1)


def expected(spec: Spec, targets: Values, surprise: Values) -> Values:
    """Sum of `targets * surprise` with `0 * inf = 0`."""
    return total(spec, jnp.where(targets == 0, 0, targets * surprise))


def sum_of_others(spec: Spec, targets: Values) -> Values:
    """For each class, the sum of the targets of the other classes.

    `sum(t) - t_j` loses its digits where one target dominates, so the others of that
    one are summed by themselves.
    """
    of_all = total(spec, targets)
    dominates = targets > of_all / 2
    below = jnp.where(dominates, 0, targets)
    rest = spec.shards.sum(fused_sum(below, spec.axes))
    return jnp.where(dominates, rest, of_all - targets)


def masked(mask: Mask | None, a: Array) -> Array:
    """`a` where the mask holds, else zero; no mask holds everywhere."""
    return a if mask is None else jnp.where(mask, a, 0)


def both(a: Mask | None, b: Mask | None) -> Mask | None:
    """Conjunction of two masks, either of which may be None."""
    if a is None or b is None:
        return b if a is None else a
    return a & b


def sum_to(a: Values, like: Values) -> Values:
    """Sums over the axes along which `like` was broadcast, in the dtype of `like`."""
    axes = [i for i, n in enumerate(like.shape) if n == 1 and a.shape[i] != 1]
    return jnp.sum(a, axes, keepdims=True).astype(like.dtype)


def total(spec: Spec, a: Array) -> Array:
    """The sum over all classes."""
    return spec.shards.sum(jnp.sum(a, spec.axes, keepdims=True))


def largest(spec: Spec, a: Array) -> Array:
    """The largest entry of all classes, `-inf` without any."""
    return spec.shards.max(jnp.max(a, spec.axes, keepdims=True, initial=-jnp.inf))


def smallest(spec: Spec, a: Array) -> Array:
    """The smallest of whole numbers of all classes."""
    initial = jnp.iinfo(a.dtype).max
    return spec.shards.min(jnp.min(a, spec.axes, keepdims=True, initial=initial))
