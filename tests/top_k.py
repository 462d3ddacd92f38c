"""What losses of top-k labels must return, from their definition: mpmath, no JAX."""

from typing import Any

import numpy as np
from mpmath import mp

DIGITS = 60
RESTS = ("ignore", "bucket", "renormalize")


def exact(
    logits: Any,
    ids: Any,
    probs: Any,
    rest: str = "ignore",
    *,
    as_divergence: bool = False,
    z_loss: float = 0.0,
    logit_softcap: float | None = None,
    logit_scale: Any = 1.0,
    where: Any = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values `B`, and gradients `B V` and `B K` by logits and probabilities."""
    logits, probs = np.asarray(logits, np.float64), np.asarray(probs, np.float64)
    mask = np.broadcast_to(True if where is None else where, logits.shape)
    scales = np.broadcast_to(np.asarray(logit_scale, np.float64), len(logits))
    rows = []
    with mp.workdps(DIGITS):
        for z, names, q, exists, scale in zip(
            logits, ids, probs, mask, scales, strict=True
        ):
            row = _Row(z, exists, logit_softcap, mp.mpf(float(scale)))
            rows.append(row.loss(names, q, rest, as_divergence, mp.mpf(z_loss)))
    values, by_logits, by_probs = zip(*rows, strict=True)
    return np.array(values), np.array(by_logits), np.array(by_probs)


class _Row:
    """One example."""

    def __init__(self, z: Any, exists: Any, cap: float | None, scale: Any) -> None:
        self.size, self.kept = len(z), [int(j) for j in np.flatnonzero(exists)]
        self.e: dict[int, Any] = {}
        self.slope: dict[int, Any] = {}
        for j in self.kept:
            x = mp.mpf(float(z[j]))
            self.slope[j] = scale
            if cap is not None:
                self.slope[j] = scale * mp.sech(x / cap) ** 2
                x = cap * mp.tanh(x / cap)
            self.e[j] = mp.exp(scale * x)

    def loss(
        self, names: Any, q: Any, rest: str, as_divergence: bool, z_loss: Any
    ) -> tuple[float, Any, Any]:
        labels: dict[int, Any] = {}
        for j, x in zip(names, q, strict=True):
            if j != -1:
                labels[int(j)] = labels.get(int(j), mp.mpf(0)) + mp.mpf(float(x))
        others = [j for j in self.kept if j not in labels]
        mass = mp.fsum(labels.values())
        all_of, named = mp.fsum(self.e.values()), mp.fsum(self.e[j] for j in labels)
        lse = mp.log(all_of)
        # Terms `(label, classes)`, of which each is one part of the softmax.
        parts = [(x, [j]) for j, x in labels.items()]
        left = mp.mpf(0)
        if rest == "bucket" and others:
            left = max(1 - mass, mp.mpf(0))
            parts.append((left, others))
        base, divisor = all_of, mp.mpf(1)
        if rest == "renormalize":
            base, divisor = named, mass or mp.mpf(1)
        value, d_z, d_q = mp.mpf(0), [mp.mpf(0)] * self.size, {}
        of_all = mp.fsum(x for x, _ in parts) / divisor
        for x, classes in parts:
            x = x / divisor
            part = mp.fsum(self.e[j] for j in classes)
            nll = mp.log(base) - mp.log(part)
            value += x * nll + (x * mp.log(x) if as_divergence and x else 0)
            for j in classes:
                d_z[j] -= x * self.e[j] / part
            d_q[classes[0] if classes == [classes[0]] else None] = nll + (
                mp.log(x) + 1 if as_divergence and x else 0
            )
        in_base = labels if rest == "renormalize" else self.kept
        for j in in_base:
            d_z[j] += of_all * self.e[j] / base
        for j in self.kept:
            d_z[j] = (d_z[j] + 2 * z_loss * lse * self.e[j] / all_of) * self.slope[j]
        value += z_loss * lse**2
        by_probs = []
        weight = {j: x / divisor for j, x in labels.items()}
        for j in names:
            if j == -1:
                by_probs.append(0.0)
                continue
            d = d_q[int(j)]
            if rest == "bucket" and others and left > 0:
                d -= d_q[others[0] if len(others) == 1 else None]
            if rest == "renormalize":
                mean = mp.fsum(weight[i] * d_q[i] for i in labels if weight[i])
                d = (d - mean) / divisor if mass else mp.mpf(0)
            by_probs.append(float(d))
        return float(value), [float(x) for x in d_z], by_probs
