"""The mathematics of softmax cross-entropy, free of options, loops and transforms.

Every loss of this package is a function of a few numbers per example, its *logit
statistics*. This module computes them, and the pullback of their cotangents, for one
array of logits that is at hand. How the logits are blocked, sharded or produced is
decided elsewhere; smoothing, weights and reductions are applied elsewhere.

Notation, for one example with logits `z` after cap and scale, and classes `j`:

    m      = max_j z_j                                   the peak
    spread = log sum_j exp(z_j - m)           so that  lse = m + spread
    nll    = spread + (m - z_y)                          integer label y
    nll    = sum_j t_j (spread + (m - z_j))              targets t_j = q_j w_j
    smooth = sum_j u_j (spread + (m - z_j))              u_j = w_j / number of classes

Nothing here subtracts two large numbers. The sum of exponentials is taken without the
entry that would be one (the label's, or those at the peak) and relative to the largest
of the rest, so it neither cancels nor underflows; both terms of `nll` are
non-negative. That is why a confident example keeps its digits.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Integer

from jaxlosses import _pairs, _sizes, _softcap
from jaxlosses._elementary import exp, expm1, log1p, one_minus_exp
from jaxlosses._pairs import Pair
from jaxlosses._sizes import Shape


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
        axis_name: mesh axes over which the classes are split by hand.
        in_cache: the logits are a block that fits a CPU's cache, on one device.
        few: the logits are plain, on one CPU, and of so few classes that what is done
            with each is written out.
        sampled: the rivals of a label in such a block are compared with the largest of
            a few of them and not of all; what comes of it has to pass `is_safe`.
    """

    axes: tuple[int, ...]
    dense: bool
    softcap: float | None = None
    smooth: bool = False
    lse: bool = False
    predicted: bool = False
    axis_name: tuple[str, ...] = ()
    in_cache: bool = False
    few: bool = False
    sampled: bool = False


# Longer rows are reduced by XLA:CPU at half the rate or less.
_LONGEST_ROW = 2**15 - 1
# Shorter ones cost more to start with than a copy.
_MOST_PARTS = 64

# Classes among which the rival of a sampled row is looked for.
_SAMPLE = 32
# So many exponentials are added up before any is written, since what one core has in
# its cache is slow to read for another. A loop over more would not be unrolled.
_LARGEST_FOLD = 8
# float32 numbers of a vector of XLA:CPU.
_LANES = 8
# A logit that exceeds the largest of the sample by 32 is rounded by half of 2^-19.
_LARGEST_MASS = math.exp(32)
# A label that exceeds it by more may have an exponential of its lead that underflows.
_LARGEST_LEAD = 80

Values = Float[Array, "..."]
Ids = Integer[Array, "..."]
Mask = Bool[Array, "..."]


class Inputs(NamedTuple):
    """What the statistics depend on. `K` is `B` with every class axis kept as 1.

    Attributes:
        logits: `B... V`, any floating dtype.
        labels: class ids of shape `K`, -1 for one that cannot be; or a distribution
            of the logits' shape, with batch axes of size 1 where it is shared; or
            None for what needs no labels.
        where: classes that exist, of the logits' rank, or None for all.
        counted: examples that count, of shape `K`, or None for all.
        class_weights: of the logits' rank with batch axes of size 1, or None.
        scale: scalar factor of the logits, or None for one.
    """

    logits: Values
    labels: Any
    where: Mask | None = None
    counted: Mask | None = None
    class_weights: Values | None = None
    scale: Float[Array, ""] | None = None


class Statistics(NamedTuple):
    """Statistics of each example, all of shape `K` in the accumulation dtype.

    `peak` is the largest logit, or for a sample one near it, before cap and scale. It
    is taken for constant: the derivative of `lse = |scale| * cap(peak) + spread` is
    carried by `spread`. Examples that do not count have zeros.
    """

    peak: Values
    spread: Values
    nll: Values
    smooth: Values | None
    predicted: Ids | None


class Cotangents(NamedTuple):
    """Cotangents of the differentiable statistics; None stands for zero."""

    spread: Values | None
    nll: Values
    smooth: Values | None


def accumulation_dtype(dtype: Any) -> Any:
    """float64 for float64, float32 for everything smaller."""
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def normalize(spec: Spec, inputs: Inputs) -> tuple[Values, Values, Values]:
    """What turns logits into probabilities: `log p = gap - spread`.

    With `r` the largest logit below the peak `m`, `S = sum_{z_j < m} exp(z_j - r)` and
    `n` logits at the peak, `spread = log1p(n - 1 + S exp(r - m))`.

    Returns:
        `gap = z - m`, of the logits' shape, `-inf` for a masked class; `peak`, before
        the cap and the magnitude of the scale; and `spread`.
    """
    signed, magnitude = _signed(inputs)
    peak = _distribution(_max(spec, signed))
    top = signed == peak
    rival, mass = _rivals(spec, jnp.where(top, -jnp.inf, signed), magnitude)
    ratio = _exp_of_sum(_lead(spec, rival, peak, magnitude))
    ties = _sum(spec, jnp.where(top, 1, 0).astype(mass.dtype))
    # The mass joins last: added to the count of ties, its digits would be lost.
    spread = log1p((ties - 1) + mass * ratio)
    spread = jnp.where(ties == 0, peak, spread)
    return _scaled(_gap(spec, signed, peak), magnitude), peak, spread


def evaluate(spec: Spec, inputs: Inputs) -> Statistics:
    """Statistics of every example: two reads of the logits, no second array."""
    smooth = predicted = None
    if spec.dense:
        gap, peak, spread = normalize(spec, inputs)
        nll = _expected(spec, _targets(inputs, gap.dtype), spread - gap)
        # With targets of zero, no term is left in which a NaN of the logits shows.
        nll = jnp.where(jnp.isnan(spread), spread, nll)
    else:
        gap, peak, spread, nll = _against_label(spec, inputs)
    if spec.smooth:
        target = uniform_of(spec, inputs, gap.dtype).target
        smooth = _expected(spec, target, spread - gap)
    if spec.predicted:
        at_peak = _signed(inputs)[0] == peak
        predicted = jnp.where(jnp.isnan(spread), -1, first(spec, at_peak))
    statistics = Statistics(peak, spread, nll, smooth, predicted)
    return _counted_only(statistics, inputs.counted)


def _against_label(spec: Spec, inputs: Inputs) -> tuple[Values, Values, Values, Values]:
    """`gap`, `peak`, `spread` and `nll`, from the label's logit and its rivals."""
    signed, magnitude = _signed(inputs)
    part = _partial(spec, inputs, signed, magnitude)
    peak, spread, nll = _finish(spec, part, magnitude)
    if spec.few and not _is_tiny(inputs.logits):
        # A reduction, or XLA would compare all logits anew for each of the gradient.
        peak = _distribution(_max(spec, signed))
    nll = jnp.where(_has_label(spec, inputs), nll, jnp.nan)
    return _scaled(_gap(spec, signed, peak), magnitude), peak, spread, nll


class Partial(NamedTuple):
    """What a loss on class ids needs of some of the classes; parts can be merged.

    Attributes:
        label: logit at the label, with the sign of the scale; `-inf` where the label
            is not among these classes.
        rival: the largest of the other logits, likewise.
        mass: sum over the others of `exp` of what they are behind `rival`, after cap
            and scale.
        slack: sum over classes of `u_j` times what they are behind the larger of
            `label` and `rival`, likewise; or None.
        share: sum of `u_j`, or None.
        predicted: lowest id of the largest logit, or None.
    """

    label: Values
    rival: Values
    mass: Values
    slack: Values | None = None
    share: Values | None = None
    predicted: Ids | None = None


def partial(spec: Spec, inputs: Inputs, uniform: Values | None) -> Partial:
    """Reads a part of the classes.

    Args:
        spec: without `axis_name`: what devices hold is merged as other parts are.
        inputs: of these classes; labels count from the first of them.
        uniform: `u_j` of these classes, or None without smoothing.
    """
    signed, magnitude = _signed(inputs)
    part = _partial(spec, inputs, signed, magnitude)
    peak = jnp.maximum(part.label, part.rival)
    slack = share = predicted = None
    if uniform is not None:
        base = jnp.where(peak == -jnp.inf, 0, peak)  # or -inf - (-inf) would be NaN
        slack = _expected(spec, uniform, -_scaled(_gap(spec, signed, base), magnitude))
        share = _sum(spec, uniform)
    if spec.predicted:
        predicted = first(spec, signed == peak)
    return part._replace(slack=slack, share=share, predicted=predicted)


class Reducers(NamedTuple):
    """How parts come together: along an axis of an array, or of a mesh."""

    max: Callable[[Array], Array]
    min: Callable[[Array], Array]
    sum: Callable[[Array], Array]


def merge(spec: Spec, part: Partial, reducers: Reducers, inputs: Inputs) -> Partial:
    """The statistics of all classes from those of the parts."""
    magnitude = None if inputs.scale is None else _magnitude(inputs.scale)

    def below(largest: Values, own: Values) -> Values:
        # Without any class, -inf - (-inf) would be NaN.
        base = jnp.where(largest == -jnp.inf, 0, largest)
        return _scaled(_gap(spec, own, base), magnitude)

    rival = reducers.max(part.rival)
    # One part has the label, and a sum keeps its NaN.
    none = part.label == -jnp.inf
    label = reducers.sum(jnp.where(none, 0, part.label))
    label = jnp.where(reducers.min(none.astype(jnp.int32)) == 1, -jnp.inf, label)
    mass = reducers.sum(part.mass * exp(below(rival, part.rival)))
    slack = share = predicted = None
    own = jnp.maximum(part.label, part.rival)
    peak = jnp.maximum(label, rival)
    if part.slack is not None and part.share is not None:
        # A part without logits above -inf counted its gaps from 0.
        own_base = jnp.where(own == -jnp.inf, 0, own)
        moved = part.share * -below(peak, own_base)
        slack = reducers.sum(part.slack + jnp.where(part.share == 0, 0, moved))
        share = reducers.sum(part.share)
    if part.predicted is not None:
        found = (own == peak) & (part.predicted >= 0)
        nobody = jnp.iinfo(part.predicted.dtype).max
        predicted = reducers.min(jnp.where(found, part.predicted, nobody))
        predicted = jnp.where(predicted == nobody, -1, predicted)
    return Partial(label, rival, mass, slack, share, predicted)


def finish(spec: Spec, part: Partial, inputs: Inputs) -> Statistics:
    """Statistics from what is known of all classes; `inputs.logits` is not read."""
    magnitude = None if inputs.scale is None else _magnitude(inputs.scale)
    peak, spread, nll = _finish(spec, part, magnitude)
    nll = jnp.where(inputs.labels >= 0, nll, jnp.nan)
    smooth = None
    if part.slack is not None and part.share is not None:
        smooth = part.slack + jnp.where(part.share == 0, 0, part.share * spread)
        smooth = jnp.where(jnp.isnan(spread), spread, smooth)
    predicted = part.predicted
    if predicted is not None:
        predicted = jnp.where(jnp.isnan(spread), -1, predicted)
    statistics = Statistics(peak, spread, nll, smooth, predicted)
    return _counted_only(statistics, inputs.counted)


def _partial(
    spec: Spec, inputs: Inputs, signed: Values, magnitude: Values | None
) -> Partial:
    """The label's logit, and its rivals."""
    if spec.few:
        return _partial_of_few(spec, inputs)
    if spec.sampled:
        return _partial_of_sample(spec, inputs)
    is_label = _is_label(spec, inputs)
    label = _at_label(spec, inputs, signed, is_label)
    rival, mass = _rivals(spec, jnp.where(is_label, -jnp.inf, signed), magnitude)
    return Partial(label, rival, mass)


def _partial_of_few(spec: Spec, inputs: Inputs) -> Partial:
    """The same for plain logits of few classes, class by class.

    XLA:CPU makes it one loop over examples, each of whose steps is short.
    """
    (axis,) = spec.axes
    logits = inputs.logits.astype(accumulation_dtype(inputs.logits.dtype))
    columns = jnp.split(logits, logits.shape[axis], axis)
    at = [inputs.labels == j for j in range(len(columns))]
    others = [jnp.where(a, -jnp.inf, z) for a, z in zip(at, columns, strict=True)]
    rival = functools.reduce(jnp.maximum, others)
    # Without any, -inf - (-inf) would be NaN.
    base = jnp.where(rival == -jnp.inf, 0, rival)
    mass = functools.reduce(jnp.add, [exp(z - base) for z in others])
    found = [jnp.where(a, z, 0) for a, z in zip(at, columns, strict=True)]
    label = functools.reduce(jnp.add, found)
    return Partial(jnp.where(inputs.labels < 0, -jnp.inf, label), rival, mass)


def _partial_of_sample(spec: Spec, inputs: Inputs) -> Partial:
    """The same for a block of plain logits, with the rival from the first few.

    Known before, it lets the sum begin where the exponentials are taken, so that a
    part of them is written. `is_safe` says whether it was fit.
    """
    alone = lax.optimization_barrier
    logits, labels = inputs.logits, inputs.labels
    num_rows, num_classes = logits.shape

    def others(logits: Values, labels: Ids) -> Values:
        wide = logits.astype(accumulation_dtype(logits.dtype))
        return jnp.where(_class_ids(spec, wide.shape) == labels, -jnp.inf, wide)

    rival = _max(spec, alone(others(logits[:, :_SAMPLE], labels)))
    # Without any, -inf - (-inf) would be NaN.
    base = alone(jnp.where(rival == -jnp.inf, 0, rival))

    def mass(terms: Values) -> Values:
        return _sum(spec, _each(_short_rows(terms), lambda a, _: jnp.sum(a, 1)))

    fold = fold_of(num_classes) or _LARGEST_FOLD
    size = num_classes // (fold * _LANES) * (fold * _LANES)
    terms = exp(others(logits[:, :size], labels) - base)
    terms = terms.reshape(num_rows, -1, fold, _LANES)
    # XLA:CPU would give a plain sum to a library, for which it writes all terms first.
    zero = jnp.zeros((), terms.dtype)
    folded = lax.reduce(terms, zero, lambda a, b: a + jnp.abs(b), (2,))
    total = mass(alone(folded).reshape(num_rows, -1))
    if size < num_classes:
        total += mass(exp(others(logits[:, size:], labels - size) - base))
    return Partial(_gathered(spec, inputs, _signed(inputs)[0]), rival, total)


def fold_of(num_classes: int) -> int | None:
    """How many exponentials are added up at a time if none is to be left over."""
    folds = range(_LARGEST_FOLD, _LARGEST_FOLD // 2 - 1, -1)
    return next((n for n in folds if num_classes % (n * _LANES) == 0), None)


def is_safe(part: Partial) -> Mask:
    """Whether a sampled rival is near enough to the largest of the other logits.

    It is one of them, so `mass` is at least one. If it is far below, the sum overflows
    or is inexact, or the label is so far ahead that all underflows. NaN is not safe.
    """
    lead = part.label - part.rival
    return (part.mass < _LARGEST_MASS) & (lead < _LARGEST_LEAD)


def _finish(
    spec: Spec, part: Partial, magnitude: Values | None
) -> tuple[Values, Values, Values]:
    """`peak`, `spread` and `nll`.

    With `r` the largest of the other logits and `S = sum_{j != y} exp(z_j - r)`,

        nll = log1p(S exp(r - z_y))                        label ahead
        nll = log1p(S - 1 + exp(z_y - r)) + (r - z_y)      label behind

    `S` is at least one, so nothing underflows, and every term is non-negative.
    """
    label, rival, mass = part.label, part.rival, part.mass
    peak = _distribution(jnp.maximum(label, rival))
    lead = _lead(spec, label, rival, magnitude)
    ahead = lead.high >= 0
    ratio = _exp_of_sum(Pair(*(jnp.where(ahead, -a, a) for a in lead)))
    excess = jnp.where(ahead, mass * ratio, (mass - 1) + ratio)
    spread = log1p(jnp.where(jnp.isnan(peak), peak, excess))
    return peak, spread, spread - jnp.minimum(lead.high + lead.low, 0)


def _at_label(spec: Spec, inputs: Inputs, a: Values, is_label: Mask) -> Values:
    """The entry at the label, `-inf` without one."""
    if spec.in_cache:
        return _gathered(spec, inputs, a)
    # A sum, since the maximum of XLA:CPU may lose a NaN.
    found = _sum(spec, jnp.where(is_label, a, 0))
    num_classes = math.prod(a.shape[axis] for axis in spec.axes) * num_shards(spec)
    here = (inputs.labels >= 0) & (inputs.labels < num_classes)
    return jnp.where(here, found, -jnp.inf)


def _gathered(spec: Spec, inputs: Inputs, a: Values) -> Values:
    (axis,) = spec.axes
    found = jnp.take_along_axis(a, jnp.maximum(inputs.labels, 0), axis)
    # In one loop with what follows, that would not be vectorised.
    found = lax.optimization_barrier(found)
    return jnp.where(inputs.labels < 0, -jnp.inf, found)


def _rivals(
    spec: Spec, others: Values, magnitude: Values | None
) -> tuple[Values, Values]:
    """The largest of some logits, and their sum of `exp` relative to it."""
    if spec.in_cache:
        return _rivals_in_cache(spec, others, magnitude)
    rival = _max(spec, others)
    # Without any, -inf - (-inf) would be NaN.
    gap = _gap(spec, others, jnp.where(rival == -jnp.inf, 0, rival))
    return rival, _sum(spec, exp(_scaled(gap, magnitude)))


def _rivals_in_cache(
    spec: Spec, others: Values, magnitude: Values | None
) -> tuple[Values, Values]:
    """The same of a block, by reductions that are fast on XLA:CPU."""
    alone = lax.optimization_barrier
    rows = _short_rows(others)
    rival = _max(spec, _each(rows, lambda a, _: jnp.max(a, 1)))
    base = alone(jnp.where(rival == -jnp.inf, 0, rival))

    def mass(a: Values, parts: int) -> Values:
        of_part = jnp.broadcast_to(base, (len(base), parts)).reshape(-1, 1)
        gap = _gap(spec, a, of_part)
        if spec.softcap is not None:
            gap = alone(gap)
        # The library's exponential is part of its sum, ours would be written first.
        return jnp.sum(jnp.exp(_scaled(gap, magnitude)), 1)

    return rival, _sum(spec, _each(rows, mass))


def _short_rows(a: Values) -> list[tuple[Values, int]]:
    """Arrays of the parts of each row, and how many those are.

    XLA:CPU is fast at reductions of an array in memory, which must not be converted
    from bfloat16, and of short rows: a long one is cut in equal parts. Without a
    divisor of fit size, less than one entry per part is left over, at the price of a
    copy.
    """
    alone = lax.optimization_barrier
    num_rows, num_classes = a.shape
    least = -(-num_classes // _LONGEST_ROW)
    exact = (n for n in range(least, _MOST_PARTS) if num_classes % n == 0)
    num_parts = next(exact, least)
    width = num_classes // num_parts
    cut, left = jnp.split(a, [width * num_parts], 1)
    rows = [(alone(alone(cut).reshape(num_rows * num_parts, width)), num_parts)]
    return [*rows, (alone(left), 1)] if left.shape[1] else rows


def _each(
    rows: list[tuple[Values, int]], reduced: Callable[[Values, int], Values]
) -> Values:
    """A reduction of every part of each row."""
    found = [
        lax.optimization_barrier(reduced(a, parts)).reshape(-1, parts)
        for a, parts in rows
    ]
    return jnp.concatenate(found, 1)


def first(spec: Spec, mask: Mask) -> Ids:
    """The lowest class id at which the mask holds, or -1."""
    ids = _class_ids(spec, mask.shape)
    nobody = jnp.iinfo(ids.dtype).max
    lowest = _min(spec, jnp.where(mask, ids, nobody))
    return jnp.where(lowest == nobody, -1, lowest)


def pullback(
    spec: Spec,
    inputs: Inputs,
    statistics: Statistics,
    cotangents: Cotangents,
    *,
    linear: bool = False,
    uniform: "Uniform | None" = None,
) -> Inputs:
    """Cotangents of the differentiable inputs, rebuilt from the statistics.

    With `p = softmax(z)`, `T = sum t` and `U = sum u`, the entry of a logit is

        g_spread p_j + g_nll (T p_j - t_j) + g_smooth (U p_j - u_j)

    `T p_j - t_j` is evaluated as `(T - t_j) p_j - t_j (1 - p_j)`, with `p_j - 1` from
    `expm1`, so that nothing cancels for a confident example; the same for `u`.

    Args:
        spec: what is static.
        inputs: the arguments of `evaluate`.
        statistics: its result; `peak`, `spread` and `nll` are used.
        cotangents: one per statistic.
        linear: stay linear in the cotangents, so that the function can be
            transposed. Otherwise an example whose cotangents are zero has gradient
            zero even if it holds a NaN.
        uniform: given if the classes are a part of all; else computed.
    """
    if not linear:
        # Here and below, what each class needs of its example is a quotient: XLA:CPU
        # keeps those, and computes all else anew for each class.
        silent = jnp.isnan(1 / (1 + statistics.nll))
        for g in cotangents:
            silent = silent if g is None else silent & (g == 0)
        inputs = inputs._replace(counted=_both(inputs.counted, ~silent))
        statistics = _counted_only(statistics, ~silent)
    g_spread, g_nll, g_smooth = cotangents
    peak, spread, nll = statistics.peak, statistics.spread, statistics.nll
    present = _both(inputs.where, inputs.counted)

    logits = inputs.logits.astype(peak.dtype)
    signed, magnitude = _with_sign(logits, inputs.scale)
    # What is masked may hold a NaN, which must not reach a derivative.
    gap = _where(present, _gap(spec, signed, peak))
    scaled = _scaled(gap, magnitude)
    log_p = scaled - spread
    weight = jnp.exp(scaled) if _is_tiny(inputs.logits) else exp(scaled)
    share = 1 / exp(spread)
    p = share * weight
    rest = None if spec.dense else one_minus_exp(nll)
    # A label that cannot be has a NaN statistic, and its whole row a NaN gradient.
    poison = jnp.where(jnp.isnan(nll if rest is None else rest), jnp.nan, 0)
    g_nll = g_nll + g_nll * poison

    d_labels = d_class_weights = d_scale = None
    if rest is None:
        targets = _targets(inputs, p.dtype)
        minus_rest = expm1(log_p)
        d_z = g_nll * (_sum_of_others(spec, targets) * p + targets * minus_rest)
        d_z = d_z if g_spread is None else d_z + g_spread * p
        d_targets = _of_targets(g_nll, log_p, present, linear)
        if jnp.issubdtype(inputs.labels.dtype, jnp.floating):
            d_labels = _sum_to(_weighted(d_targets, inputs), inputs.labels)
        if inputs.class_weights is not None:
            d_class_weights = d_targets * inputs.labels.astype(p.dtype)
    else:
        is_label = _is_label(spec, inputs)
        minus_rest = jnp.where(is_label, -rest, expm1(log_p))
        at_label, elsewhere = -g_nll * rest, g_nll
        if g_spread is not None:
            at_label, elsewhere = at_label + g_spread * exp(-nll), g_nll + g_spread
        d_z = jnp.where(is_label, at_label, (elsewhere * share) * weight)
    if g_smooth is not None:
        u = uniform_of(spec, inputs, p.dtype) if uniform is None else uniform
        d_z = d_z + g_smooth * (u.others * p + u.target * minus_rest)
        if inputs.class_weights is not None:
            d_uniform = _of_targets(g_smooth, log_p, present, linear)
            d_uniform = d_uniform / u.num_classes
            d_class_weights = _add(d_class_weights, d_uniform)
    if d_class_weights is not None and inputs.class_weights is not None:
        d_class_weights = _sum_to(d_class_weights, inputs.class_weights)

    if inputs.where is not None:
        d_z = jnp.where(inputs.where, d_z, g_nll * poison)
    d_z = _where(inputs.counted, d_z)
    d_logits = d_z
    if inputs.scale is not None:
        d_logits = inputs.scale * d_z
        d_scale = jnp.sum(d_z * _where(jnp.isfinite(gap), gap))
        d_scale = jnp.where(inputs.scale < 0, -d_scale, d_scale)
    if spec.softcap is not None:
        d_logits = _softcap.slope(spec.softcap, logits) * d_logits
    d_logits = d_logits.astype(inputs.logits.dtype)
    return Inputs(d_logits, d_labels, None, None, d_class_weights, d_scale)


def _is_tiny(logits: Values) -> bool:
    """16-bit rows too short for a vector, which XLA:CPU converts one by one.

    Nothing that saves operations per vector is of use there.
    """
    size = logits.shape[-1]
    return logits.dtype.itemsize == 2 and _sizes.are_numbers(size) and size < 16


def label_ids(spec: Spec, inputs: Inputs) -> Ids:
    """The labels as class ids: of a distribution, the arg max."""
    if not spec.dense:
        return inputs.labels
    targets = inputs.labels.astype(accumulation_dtype(inputs.logits.dtype))
    if inputs.where is not None:
        targets = jnp.where(inputs.where, targets, -jnp.inf)
    return first(spec, targets == _max(spec, targets))


def any_class(spec: Spec, mask: Mask) -> Mask:
    """Whether the mask holds for any class."""
    return _sum(spec, mask.astype(jnp.int32)) > 0


def num_shards(spec: Spec) -> int:
    """Over how many devices the classes are split by hand."""
    return lax.axis_size(spec.axis_name) if spec.axis_name else 1


def lse(spec: Spec, inputs: Inputs, statistics: Statistics) -> Values:
    """Log-sum-exp of the transformed logits; zero for what does not count."""
    # A NaN is in the spread as well; here it would be the slope of the scale.
    peak = _where(~jnp.isnan(statistics.peak), lax.stop_gradient(statistics.peak))
    low = jnp.zeros_like(peak)
    if spec.softcap is not None:
        peak, low = _softcap.exact_difference(spec.softcap, peak, low)
    if inputs.scale is not None:
        magnitude = _magnitude(inputs.scale)
        peak, low = magnitude * peak, magnitude * low
    return peak + (low + statistics.spread)


def _distribution(peak: Values) -> Values:
    """NaN for a peak of `+inf`, and where every class has probability zero."""
    return jnp.where(jnp.isfinite(peak), peak, jnp.nan)


def _gap(spec: Spec, a: Values, b: Values) -> Values:
    """`cap(a) - cap(b)`, for the exponential of a logit `a`."""
    if spec.softcap is None:
        return a - b
    return _softcap.difference(spec.softcap, a, b)


def _lead(spec: Spec, a: Values, b: Values, magnitude: Values | None) -> Pair:
    """`magnitude * (cap(a) - cap(b))`, for two logits of every example.

    A rounding is worth up to 4e-6 at 80 nats, all of it an error of the loss.
    """
    if spec.softcap is None:
        lead = _pairs.add(a, -b)
    else:
        lead = _softcap.exact_difference(spec.softcap, a, b)
    if magnitude is not None:
        lead = _pairs.multiply(lead, _pairs.of(magnitude))
    return lead._replace(low=_where(jnp.isfinite(lead.low), lead.low))


def _exp_of_sum(x: Pair) -> Values:
    """`exp(high + low)` for a small `low`, which the sum would lose."""
    # Where `low` is not small, `high` is far below what exp can hold.
    low = jnp.clip(x.low, -1, 1)
    series = 1 + low * (1 + low * (1 / 2 + low * (1 / 6 + low * (1 / 24))))
    return exp(x.high) * series


def _scaled(gap: Values, magnitude: Values | None) -> Values:
    return gap if magnitude is None else magnitude * gap


def _signed(inputs: Inputs) -> tuple[Values, Values | None]:
    """`sign(scale) * logits`, `-inf` for a masked class, and `|scale|`.

    The scale is kept apart so that differences are taken before they are scaled: a
    rounded product of a large logit would cost a confident example its digits.
    """
    logits = inputs.logits.astype(accumulation_dtype(inputs.logits.dtype))
    logits = _where(inputs.counted, logits)
    signed, magnitude = _with_sign(logits, inputs.scale)
    if inputs.where is not None:
        signed = jnp.where(inputs.where, signed, -jnp.inf)
    return signed, magnitude


def _with_sign(logits: Values, scale: Values | None) -> tuple[Values, Values | None]:
    if scale is None:
        return logits, None
    return jnp.where(scale < 0, -1, 1).astype(logits.dtype) * logits, _magnitude(scale)


def _magnitude(scale: Values) -> Values:
    """`|scale|`, with the slope of a positive scale at 0, where `abs` has none."""
    return jnp.where(scale < 0, -scale, scale)


def _class_ids(spec: Spec, shape: Shape) -> Ids:
    """The id of every class, of the logits' rank with batch axes of size 1."""
    ids, local = jnp.zeros((1,) * len(shape), jnp.int32), 1
    for axis in spec.axes:
        dims = [n if i == axis else 1 for i, n in enumerate(shape)]
        ids = ids * shape[axis] + lax.broadcasted_iota(jnp.int32, dims, axis)
        local *= shape[axis]
    if spec.axis_name:
        ids = ids + local * lax.axis_index(spec.axis_name)
    return ids


def _is_label(spec: Spec, inputs: Inputs) -> Mask:
    # A comparison fuses into the pass over the logits, on every kind of mesh axis;
    # a gather does not.
    return _class_ids(spec, inputs.logits.shape) == inputs.labels


def _has_label(spec: Spec, inputs: Inputs) -> Mask:
    if inputs.where is None:
        return inputs.labels >= 0
    found = _is_label(spec, inputs) & inputs.where
    return _sum(spec, found.astype(jnp.int32)) > 0


def _weighted(a: Values, inputs: Inputs) -> Values:
    if inputs.class_weights is None:
        return a
    return a * inputs.class_weights.astype(a.dtype)


def _targets(inputs: Inputs, dtype: Any) -> Values:
    """Class-weighted label distribution over the classes that exist."""
    return _where(inputs.where, _weighted(inputs.labels.astype(dtype), inputs))


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


def uniform_of(spec: Spec, inputs: Inputs, dtype: Any) -> Uniform:
    """What smoothing spreads; of `inputs.logits` only the shape is used."""
    shape = [n if i in spec.axes else 1 for i, n in enumerate(inputs.logits.shape)]
    ones = _where(inputs.where, _weighted(jnp.ones(shape, dtype), inputs))
    num_classes = _num_classes(spec, inputs, dtype)
    target = ones / num_classes
    return Uniform(target, _sum_of_others(spec, target), num_classes)


def _num_classes(spec: Spec, inputs: Inputs, dtype: Any) -> Values:
    """How many classes exist, at least one."""
    shape = inputs.logits.shape
    if inputs.where is None:
        local = math.prod(shape[axis] for axis in spec.axes)
        return jnp.full((1,) * len(shape), local * num_shards(spec), dtype)
    return jnp.maximum(_sum(spec, inputs.where.astype(dtype)), 1)


def _expected(spec: Spec, targets: Values, surprise: Values) -> Values:
    """Sum of `targets * surprise` with `0 * inf = 0`."""
    return _sum(spec, jnp.where(targets == 0, 0, targets * surprise))


def _of_targets(g: Values, log_p: Values, present: Mask | None, linear: bool) -> Values:
    """Cotangent of a target: `g` times the surprise of its class."""
    surprise = -log_p
    if not linear:
        surprise = _where(jnp.isfinite(surprise) | (g != 0), surprise)
    return _where(present, g * surprise)


def _sum_of_others(spec: Spec, targets: Values) -> Values:
    """For each class, the sum of the targets of the other classes.

    `sum(t) - t_j` loses its digits where one target dominates, so the others of that
    one are summed by themselves.
    """
    total = _sum(spec, targets)
    dominates = targets > total / 2
    rest = _sum(spec, jnp.where(dominates, 0, targets))
    return jnp.where(dominates, rest, total - targets)


def _counted_only(statistics: Statistics, counted: Mask | None) -> Statistics:
    peak, spread, nll, smooth, predicted = statistics
    peak, spread, nll = (_where(counted, a) for a in (peak, spread, nll))
    smooth = None if smooth is None else _where(counted, smooth)
    return Statistics(peak, spread, nll, smooth, predicted)


def _where(mask: Mask | None, a: Values) -> Values:
    """`a` where the mask holds, else zero; no mask holds everywhere."""
    return a if mask is None else jnp.where(mask, a, 0)


def _both(a: Mask | None, b: Mask | None) -> Mask | None:
    """Conjunction of two masks, either of which may be None."""
    if a is None or b is None:
        return b if a is None else a
    return a & b


def _add(a: Values | None, b: Values) -> Values:
    return b if a is None else a + b


def _sum_to(a: Values, like: Values) -> Values:
    """Sums over the axes along which `like` was broadcast, in the dtype of `like`."""
    axes = [i for i, n in enumerate(like.shape) if n == 1 and a.shape[i] != 1]
    return jnp.sum(a, axes, keepdims=True).astype(like.dtype)


def _sum(spec: Spec, a: Array) -> Array:
    total = jnp.sum(a, spec.axes, keepdims=True)
    return lax.psum(total, spec.axis_name) if spec.axis_name else total


def _max(spec: Spec, a: Array) -> Array:
    largest = jnp.max(a, spec.axes, keepdims=True, initial=-jnp.inf)
    return lax.pmax(largest, spec.axis_name) if spec.axis_name else largest


def _min(spec: Spec, a: Array) -> Array:
    initial = jnp.iinfo(a.dtype).max
    smallest = jnp.min(a, spec.axes, keepdims=True, initial=initial)
    return lax.pmin(smallest, spec.axis_name) if spec.axis_name else smallest
