"""What the losses must return, from the textbook: NumPy and mpmath, no JAX.

`loss` and `gradients` evaluate whole arrays in `np.longdouble` and round once, to
float64. `mp_loss` and `mp_gradient` evaluate one row at 100 digits, by the shortest
formulas there are, and certify the other two (`test_oracle.py`).

Per row, with `z` the transformed logits, `p = softmax(z)` and the sums over the
classes that exist:

    z = logit_scale · cap · tanh(logits / cap)
    τ_c = (1-α) · w_c · q_c + α · w_c / n                  (q one-hot for ids)
    loss = Σ_c τ_c · (lse - z_c) + z_loss · lse²           (0 · inf = 0)
    ∂loss/∂z_j = Σ_{c≠j} τ_c · p_j - τ_j · (1 - p_j) + 2 · z_loss · lse · p_j

A mean of weighted rows has a denominator for each of the two parts of the loss: with
class ids, Σ weights · w_y for the first and Σ weights for the z-loss.
"""

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from mpmath import mp
from numpy.typing import ArrayLike, DTypeLike

Axis = int | Sequence[int] | None
Row = Sequence[Any] | np.ndarray
# Textbook formulas subtract numbers of 1e4 to leave 1e-35: 40 digits go that way.
DIGITS = 100


@np.errstate(all="ignore")
def loss(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    reduction: str = "none",
    **options: Any,
) -> np.ndarray | np.float64:
    """Cross-entropy in float64: `Σ_c τ_c · (lse - z_c) + z_loss · lse²` per example.

    Options, by keyword: `ignore_index`, `class_weights`, `label_smoothing`, `z_loss`,
    `logit_softcap`, `logit_scale`, `weights`. Labels of the batch's shape are class
    ids; labels of the logits' rank are distributions.
    """
    rows = _rows(logits, labels, axis, where, **options)
    if reduction == "none":
        return rows.weighted.sum(0).reshape(rows.layout.batch).astype(np.float64)
    value, inverse = _reduce(rows, reduction)
    return np.float64((value * inverse).sum())


@np.errstate(all="ignore")
def gradients(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    cotangent: ArrayLike | None = None,
    reduction: str = "none",
    **options: Any,
) -> dict[str, Any]:
    """Gradients of `Σ cotangent · loss(...)`, each entry exact, as float64.

    Keys: "logits", "logit_scale", and where they were given "labels" (distributions
    only), "class_weights" and "weights". "logits_terms" is the sum of the absolute
    terms of each logits entry, `|g| · |dz/dlogits| · (Σ_{c≠j} τ_c · p_j +
    τ_j · (1 - p_j) + |2 · z_loss · lse| · p_j)`: the yardstick for rounding errors
    where smoothing or z-loss cancel.
    """
    rows = _rows(logits, labels, axis, where, **options)
    layout, counts = rows.layout, rows.counts
    value, inverse = _reduce(rows, reduction)
    g = _longdouble(1.0 if cotangent is None else cotangent)
    g = np.broadcast_to(g.ravel(), counts.shape)
    g, g_lse = g * inverse[0], g * inverse[1]
    g_row = np.where(counts, g * rows.weight, 0)[:, None]
    g_row_lse = np.where(counts, g_lse * rows.weight, 0)[:, None]
    lse_pull = g_row_lse * 2 * rows.z_loss * rows.lse * rows.p
    dz = g_row * (rows.pull - rows.push) + lse_pull
    terms = abs(g_row) * (rows.pull + rows.push) + abs(lse_pull)

    def logits_like(d_rows: np.ndarray, kept: np.ndarray) -> np.ndarray:
        return layout.unrows(np.where(counts[:, None] & kept, d_rows, 0))

    # A bad example is NaN in its whole row, masked classes included.
    kept = rows.exists | rows.bad[:, None]

    d_scale = np.where(rows.exists, _times(dz, rows.capped), 0)
    out = {
        "logits": logits_like(dz * rows.slope, kept),
        "logits_terms": logits_like(abs(rows.slope) * terms, kept),
        "logit_scale": np.float64(d_scale.sum(-1)[counts].sum()),
    }
    if not rows.ids_given:
        nll = _times((1 - rows.alpha) * rows.class_weights, rows.nll)
        d_labels = logits_like(_times(g_row, nll), rows.exists)
        shape = np.shape(labels)
        stretched = [i for i, n in enumerate(shape) if n != d_labels.shape[i]]
        out["labels"] = d_labels.sum(tuple(stretched), keepdims=True)
    # The mean is N / W: d(N / W) = (dN - mean · dW) / W.
    mean, mean_lse = value * inverse if reduction == "mean" else (0.0, 0.0)
    if options.get("class_weights") is not None:
        share = (1 - rows.alpha) * rows.q + rows.alpha * rows.uniform
        d_row = np.where(rows.bad[:, None], np.nan, _times(share, rows.nll))
        if rows.ids_given:
            d_row = d_row - _times(rows.q, mean)
        d_row = np.where(rows.exists, _times(g_row, d_row), 0)[counts]
        out["class_weights"] = d_row.sum(0).astype(np.float64)
    if options.get("weights") is not None:
        d_row = np.where(rows.counted, rows.loss[0] - mean * rows.denominator, 0)
        d_lse = np.where(rows.counted, rows.loss[1] - mean_lse, 0)
        d_row = _times(g, d_row) + _times(g_lse, d_lse)
        out["weights"] = d_row.reshape(layout.batch).astype(np.float64)
    return out


@np.errstate(all="ignore")
def entropy(
    logits: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    cotangent: ArrayLike | None = None,
    **options: Any,
) -> dict[str, Any]:
    """`-Σ_c p_c · log p_c` of each example, and gradients of `Σ cotangent · entropy`.

    Options: `logit_softcap`, `logit_scale`. Keys: "entropy", "logits", "logit_scale",
    and "largest", the largest size of a gradient by the logits of an example.
    """
    rows = _rows(logits, np.zeros(np.shape(logits)), axis, where, **options)
    layout, counted = rows.layout, rows.counted
    value = np.where(counted, _times(rows.p, rows.nll).sum(-1), 0)
    g = _longdouble(1.0 if cotangent is None else cotangent)
    g = np.broadcast_to(g.ravel(), counted.shape)
    # A class of probability zero may be infinitely far behind.
    depth = _times(rows.p, rows.behind).sum(-1)
    dz = g[:, None] * _times(rows.p, rows.behind - depth[:, None])
    kept = counted[:, None] & (rows.exists | rows.bad[:, None])
    dz, capped = np.where(kept, dz, 0), np.where(rows.exists, rows.capped, 0)
    largest = np.broadcast_to(abs(rows.slope * dz).max(-1)[:, None], dz.shape)
    return {
        "entropy": value.reshape(layout.batch).astype(np.float64),
        "logits": layout.unrows(dz * rows.slope),
        "largest": layout.unrows(largest),
        "logit_scale": np.float64(_times(dz, capped).sum()),
    }


def mp_loss(
    logits: Row, label: int | Row, where: Row | None = None, **options: Any
) -> mp.mpf:
    """One row's `Σ_c τ_c · (lse - z_c) + z_loss · lse²` at 100 digits.

    `label` is a class id or a sequence. Options, by keyword: `class_weights`,
    `label_smoothing`, `z_loss`, `logit_softcap`, `logit_scale`.
    """
    with mp.workdps(DIGITS):
        row = _mp_row(logits, label, where, **options)
        nll = [t * (row.lse - z) for t, z in zip(row.tau, row.z, strict=True) if t]
        return mp.fsum(nll) + row.z_loss * row.lse**2


def mp_gradient(
    logits: Row, label: int | Row, where: Row | None = None, **options: Any
) -> dict[str, Any]:
    """One row's gradients at 100 digits: `T · p_j - τ_j + 2 · z_loss · lse · p_j`.

    Keys: "logits", "class_weights" (of ones where none were given), "logit_scale",
    and "labels" for a distribution.
    """
    with mp.workdps(DIGITS):
        row = _mp_row(logits, label, where, **options)
        classes = range(len(row.z))
        total = mp.fsum(row.tau) + 2 * row.z_loss * row.lse
        dz = [total * mp.exp(row.z[j] - row.lse) - row.tau[j] for j in classes]
        nll = [row.lse - z for z in row.z]
        share = [(1 - row.alpha) * row.q[j] + row.alpha * row.u[j] for j in classes]
        out = {
            "logits": [dz[j] * row.slope[j] if dz[j] else 0 for j in classes],
            "logit_scale": mp.fsum(dz[j] * row.capped[j] for j in classes if dz[j]),
            "class_weights": [share[j] * nll[j] if share[j] else 0 for j in classes],
        }
        if np.ndim(label):
            kept = [(1 - row.alpha) * row.w[j] * row.exists[j] for j in classes]
            out["labels"] = [kept[j] * nll[j] if kept[j] else 0 for j in classes]
        return out


def mp_entropy(
    logits: Row, where: Row | None = None, **options: Any
) -> tuple[Any, list[Any]]:
    """One row's `-Σ_c p_c · log p_c` and its gradient by the logits, at 100 digits."""
    with mp.workdps(DIGITS):
        row = _mp_row(logits, 0, where, **options)
        p = [mp.exp(z - row.lse) for z in row.z]
        terms = [(x, row.lse - z) for x, z in zip(p, row.z, strict=True)]
        value = mp.fsum(x * nll for x, nll in terms if x)
        dz = [x * (nll - value) if x else mp.mpf(0) for x, nll in terms]
        return value, [d * slope for d, slope in zip(dz, row.slope, strict=True)]


def confident_logits(
    rng: np.random.Generator,
    batch: int | Sequence[int],
    classes: int,
    margin: float,
    scale: float = 1.0,
    dtype: DTypeLike = np.float32,
) -> tuple[np.ndarray, np.ndarray]:
    """Logits `[batch, classes]` and ids: `z_y = max_{j≠y} z_j + margin`, in `dtype`.

    The other logits are normal with standard deviation `scale`; `margin` is in nats.
    """
    batch = (batch,) if isinstance(batch, int) else tuple(batch)
    logits = scale * rng.standard_normal((*batch, classes))
    labels = rng.integers(classes, size=batch, dtype=np.int32)[..., None]
    if classes > 1:
        others = logits.copy()
        np.put_along_axis(others, labels, -np.inf, -1)
        top = others.max(-1, keepdims=True)
        np.put_along_axis(logits, labels, top + margin, -1)
    return logits.astype(dtype), labels[..., 0]


class _Layout:
    """Moves the class axes last and flattens: `shape` to `[examples, classes]`."""

    def __init__(self, shape: tuple[int, ...], axis: Axis) -> None:
        rank = len(shape)
        axes = range(rank) if axis is None else np.atleast_1d(axis)
        axes = [int(a) % rank for a in axes]
        self.shape = shape
        self.order = [a for a in range(rank) if a not in axes] + axes
        self.batch = tuple(shape[a] for a in self.order[: rank - len(axes)])
        self.classes = math.prod(shape[a] for a in axes)

    def rows(self, array: np.ndarray) -> np.ndarray:
        array = np.broadcast_to(array, self.shape).transpose(self.order)
        return array.reshape(math.prod(self.batch), self.classes)

    def unrows(self, rows: np.ndarray) -> np.ndarray:
        array = rows.reshape([self.shape[a] for a in self.order])
        return array.transpose(np.argsort(self.order)).astype(np.float64)


def _longdouble(array: ArrayLike) -> np.ndarray:
    return np.asarray(array).astype(np.float64).astype(np.longdouble)


def _times(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`a · b` where `a = 0` wins over `b = inf`."""
    return np.where(a == 0, 0, a * b)


def _sum_of_others(x: np.ndarray) -> np.ndarray:
    """`Σ_{k≠j} x_k` of non-negative rows; `Σ x - x_j` cancels only at the largest."""
    others = x.sum(-1, keepdims=True) - x
    top = x.argmax(-1)[:, None]
    rest = x.copy()
    np.put_along_axis(rest, top, 0, -1)
    np.put_along_axis(others, top, rest.sum(-1, keepdims=True), -1)
    return others


@np.errstate(all="ignore")
def _rows(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: Axis,
    where: ArrayLike | None,
    *,
    ignore_index: int | None = None,
    class_weights: ArrayLike | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_softcap: float | None = None,
    logit_scale: float = 1.0,
    weights: ArrayLike | None = None,
) -> SimpleNamespace:
    layout = _Layout(np.shape(logits), axis)
    labels, given = np.asarray(labels), _longdouble(logits)
    ids_given = labels.shape == layout.batch
    alpha, zeta, scale = map(_longdouble, (label_smoothing, z_loss, logit_scale))
    w = _longdouble(np.ones(layout.classes) if class_weights is None else class_weights)
    weight = _longdouble(np.ones(layout.batch) if weights is None else weights).ravel()

    mask = np.asarray(True if where is None else where, bool)
    if where is not None and mask.ndim != given.ndim:
        assert mask.shape == layout.batch, (mask.shape, layout.batch)
        exists = np.repeat(mask.reshape(-1, 1), layout.classes, 1)
    else:
        exists = layout.rows(mask)

    x = layout.rows(given)
    capped, slope = x, scale * np.ones_like(x)
    if logit_softcap is not None:
        cap = _longdouble(logit_softcap)
        # The cap bounds finite scores; an infinite logit keeps its meaning.
        capped = np.where(np.isinf(x), x, cap * np.tanh(x / cap))
        slope = np.where(np.isinf(x), slope, scale / np.cosh(x / cap) ** 2)
    z = np.where(exists, scale * capped, -np.inf)
    diverged = exists & (np.isnan(z) | (z == np.inf))
    bad = diverged.any(-1) | (z.max(-1) == -np.inf)
    counted = exists.any(-1)
    if ids_given:
        ids = labels.astype(np.int64).ravel()
        named = np.arange(layout.classes) == ids[:, None]
        q, bad = _longdouble(exists & named), bad | ~(exists & named).any(-1)
        counted = counted & (ids != ignore_index)
    else:
        assert labels.ndim == given.ndim, (labels.shape, given.shape)
        assert ignore_index is None, "ignore_index needs class ids"
        q = np.where(exists, layout.rows(_longdouble(labels)), 0)
    z = np.where(bad[:, None], np.nan, z)
    z = np.where(counted[:, None], z, 0)

    # Excess over the largest: lse - z_c is a sum of non-negative terms.
    top = z.argmax(-1)[:, None]
    largest = np.take_along_axis(z, top, -1)
    e = np.exp(z - largest)
    others = _sum_of_others(e)
    log_sum = np.log1p(np.take_along_axis(others, top, -1))
    lse, nll = largest + log_sum, log_sum + (largest - z)
    p, not_p = e / e.sum(-1, keepdims=True), others / e.sum(-1, keepdims=True)

    uniform = exists / np.maximum(exists.sum(-1, keepdims=True), 1).astype(z.dtype)
    tau = (1 - alpha) * w * q + alpha * w * uniform
    parts = np.stack([_times(tau, nll).sum(-1), zeta * lse[:, 0] ** 2])
    parts = np.where(counted, np.where(bad, np.nan, parts), 0)
    counts = counted & (weight != 0)
    denominator = np.ones_like(weight)
    if ids_given and class_weights is not None:  # also of a class that does not exist
        denominator = (w * named).sum(-1)
    return SimpleNamespace(
        layout=layout, ids_given=ids_given, exists=exists, bad=bad, counted=counted,
        counts=counts, weight=weight, class_weights=w, q=q, uniform=uniform,
        alpha=alpha, z_loss=zeta, p=p, nll=nll, behind=largest - z, lse=lse,
        slope=slope, capped=capped, loss=parts,
        pull=_sum_of_others(tau) * p, push=tau * not_p,
        weighted=np.where(counts, weight * parts, 0),
        denominator=denominator,
    )  # fmt: skip


def _reduce(rows: SimpleNamespace, reduction: str) -> tuple[Any, Any]:
    """Sums of both parts of the loss, and what each weighted row of them counts."""
    value = rows.weighted.sum(-1)
    if reduction != "mean":
        assert reduction in ("none", "sum"), reduction
        return value, np.ones(2, np.longdouble)
    mass = np.stack([rows.weight * rows.denominator, rows.weight])[:, rows.counts]
    mass = mass.sum(-1)
    return value, np.where(mass == 0, 0, 1 / np.where(mass == 0, 1, mass))


def _mpf(x: Any) -> mp.mpf:
    return x if isinstance(x, mp.mpf) else mp.mpf(float(x))


def _mp_row(
    logits: Row,
    label: int | Row,
    where: Row | None,
    *,
    class_weights: Row | None = None,
    label_smoothing: Any = 0.0,
    z_loss: Any = 0.0,
    logit_softcap: Any = None,
    logit_scale: Any = 1.0,
) -> SimpleNamespace:
    classes = range(len(logits))
    x = [_mpf(v) for v in logits]
    scale, alpha = _mpf(logit_scale), _mpf(label_smoothing)
    exists = [bool(where is None or where[j]) for j in classes]
    q = label if np.ndim(label) else [j == label for j in classes]
    q = [_mpf(q[j]) * exists[j] for j in classes]
    w = [_mpf(1 if class_weights is None else class_weights[j]) for j in classes]
    u = [mp.mpf(exists[j]) / sum(exists) for j in classes]
    capped, slope = x, [scale] * len(x)
    if logit_softcap is not None:
        cap = _mpf(logit_softcap)
        finite = [mp.isfinite(v) for v in x]
        capped = [
            cap * mp.tanh(v / cap) if f else v for v, f in zip(x, finite, strict=True)
        ]
        slope = [
            scale * mp.sech(v / cap) ** 2 if f else scale
            for v, f in zip(x, finite, strict=True)
        ]
    z = [scale * capped[j] if exists[j] else -mp.inf for j in classes]
    return SimpleNamespace(
        exists=exists, q=q, w=w, u=u, z=z, capped=capped, slope=slope, alpha=alpha,
        tau=[w[j] * ((1 - alpha) * q[j] + alpha * u[j]) for j in classes],
        lse=mp.log(mp.fsum(mp.exp(v) for v in z)), z_loss=_mpf(z_loss),
    )  # fmt: skip
