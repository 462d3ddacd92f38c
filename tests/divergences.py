"""What divergences must return, from the textbook: mpmath, no JAX."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from mpmath import mp

DIGITS = 60
DIRECTIONS = ("forward", "reverse", "jensen_shannon")


def exact(
    student: Any,
    teacher: Any,
    direction: str = "forward",
    *,
    teacher_weight: float = 0.5,
    temperature: float = 1.0,
    logit_softcap: float | None = None,
    teacher_logit_softcap: float | None = None,
    where: Any = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Values `B` and gradients `B V` of rows of logits, rounded once, to float64."""
    rows = np.asarray(student, np.float64), np.asarray(teacher, np.float64)
    mask = np.broadcast_to(True if where is None else where, rows[0].shape)
    caps = logit_softcap, teacher_logit_softcap
    values, gradients = [], []
    with mp.workdps(DIGITS):
        for *both, exists in zip(*rows, mask, strict=True):
            kept = np.flatnonzero(exists)
            s, t = (
                _log_p(z[kept], cap, temperature)
                for z, cap in zip(both, caps, strict=True)
            )
            value, d = _of_row(s, t, direction, mp.mpf(teacher_weight))
            slope = [_slope(z, caps[0], temperature) for z in both[0][kept]]
            gradient = np.zeros(len(exists))
            gradient[kept] = [float(a * b) for a, b in zip(d, slope, strict=True)]
            values.append(float(value))
            gradients.append(gradient)
    return np.array(values), np.array(gradients)


def _log_p(z: Any, cap: float | None, temperature: float) -> list[Any]:
    capped = [
        mp.mpf(float(x)) if cap is None else cap * mp.tanh(mp.mpf(float(x)) / cap)
        for x in z
    ]
    scaled = [x / mp.mpf(temperature) for x in capped]
    lse = mp.log(mp.fsum(mp.exp(x) for x in scaled))
    return [x - lse for x in scaled]


def _slope(x: Any, cap: float | None, temperature: float) -> Any:
    slope = mp.mpf(1) if cap is None else mp.sech(mp.mpf(float(x)) / cap) ** 2
    return slope / mp.mpf(temperature)


def _of_row(
    s: Sequence[Any], t: Sequence[Any], direction: str, b: Any
) -> tuple[Any, list[Any]]:
    p, q = [mp.exp(x) for x in s], [mp.exp(x) for x in t]
    if direction == "forward":
        value = mp.fsum(_kl(*row) for row in zip(q, t, s, strict=True))
        return value, [a - c for a, c in zip(p, q, strict=True)]
    if direction == "reverse":
        value = mp.fsum(_kl(*row) for row in zip(p, s, t, strict=True))
        return value, _pull(p, s, t, value)
    m = [mp.log(b * c + (1 - b) * a) for a, c in zip(p, q, strict=True)]
    of_student = mp.fsum(_kl(*row) for row in zip(p, s, m, strict=True))
    of_teacher = mp.fsum(_kl(*row) for row in zip(q, t, m, strict=True))
    d = [(1 - b) * x for x in _pull(p, s, m, of_student)]
    return b * of_teacher + (1 - b) * of_student, d


def _kl(p: Any, log_p: Any, log_q: Any) -> Any:
    return p * (log_p - log_q) if p else mp.mpf(0)


def _pull(p: Any, s: Any, t: Any, value: Any) -> list[Any]:
    return [
        x * (a - b - value) if x else mp.mpf(0) for x, a, b in zip(p, s, t, strict=True)
    ]
