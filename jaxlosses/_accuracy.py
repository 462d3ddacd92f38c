"""The errors of the losses against float64, at margins up to 80 nats.

optax's, where it is installed, and the usual forms of the entropy are shown beside.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxlosses as jl

Rows = list[dict[str, Any]]

MARGINS = (0.0, 5.0, 20.0, 30.0, 50.0, 80.0)
_OPTIONS: dict[str, dict[str, float]] = {
    "none": {},
    "label_smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-3},
    "logit_scale": {"logit_scale": 0.7},
    "logit_softcap": {"logit_softcap": 30.0},
    "all": {
        "label_smoothing": 0.1,
        "z_loss": 1e-3,
        "logit_scale": 0.7,
        "logit_softcap": 30.0,
    },
}
_PER_MARGIN = 4
_CLASSES = (1000,)
_MORE_CLASSES = (10, 50257)  # without options; each size is a compilation
# Half a unit in the last place of what the gradient is rounded to.
_ROUNDING = {"float64": 0.0, "float32": 0.0, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def accuracy() -> Rows:
    """Worst relative errors by dtype and option, over margins and class counts."""
    rows = []
    for dtype in ("float32", "float64", "bfloat16", "float16"):
        for name, options in _OPTIONS.items():
            sizes = _CLASSES if options else _CLASSES + _MORE_CLASSES
            bars = _bars(dtype)
            row: dict[str, Any] = {"dtype": dtype, "option": name}
            row |= {"loss bar": bars[0], "gradient bar": bars[1]}
            ours = _errors(
                jl.softmax_cross_entropy_with_integer_labels, dtype, options, sizes
            )
            row |= {"loss": ours[0], "gradient": ours[1]}
            row["holds"] = ours[0] <= bars[0] and ours[1] <= bars[1]
            if installed_optax() is not None:
                theirs = _errors(_composed_with_optax, dtype, options, sizes)
                row |= {"optax loss": theirs[0], "optax gradient": theirs[1]}
            rows.append(row)
    return rows


def entropy() -> Rows:
    """The same of the entropy, beside the two forms in which people write it.

    A gradient's error is relative to the largest of its example.
    """
    forms: dict[str, Callable[..., Any]] = {
        "entropy": jl.softmax_entropy,
        "lse - Σ p z": _difference,
        "-Σ p log p": _sum_of_logs,
    }
    rows = []
    for dtype in ("float32", "float64", "bfloat16", "float16"):
        bars = _bars(dtype)
        row: dict[str, Any] = {"dtype": dtype, "bar": bars[0], "gradient bar": bars[1]}
        logits, _ = _confident(_CLASSES[0], dtype)
        want, want_gradient = _exact_entropy(_CLASSES[0], dtype)
        size = np.abs(want_gradient).max(-1, keepdims=True)
        for name, form in forms.items():

            def both(z: jax.Array, form: Callable[..., Any] = form) -> Any:
                value, pull = jax.vjp(form, z)
                return value, *pull(jnp.ones_like(value))

            with jax.enable_x64(dtype == "float64"):
                value, gradient = jax.jit(both)(jnp.asarray(logits))
            row[name] = _worst(value, want, want)
            if name == "entropy":
                row["gradient"] = _worst(
                    gradient, want_gradient, np.broadcast_to(size, gradient.shape)
                )
        row["holds"] = row["entropy"] <= bars[0] and row["gradient"] <= bars[1]
        rows.append(row)
    return rows


def _difference(z: jax.Array) -> jax.Array:
    z = _accumulated(z)
    return jax.nn.logsumexp(z, axis=-1) - jnp.sum(jax.nn.softmax(z) * z, -1)


def _sum_of_logs(z: jax.Array) -> jax.Array:
    log_p = jax.nn.log_softmax(_accumulated(z))
    return -jnp.sum(jnp.exp(log_p) * log_p, -1)


def _accumulated(z: jax.Array) -> jax.Array:
    return z.astype(jnp.float64 if z.dtype == jnp.float64 else jnp.float32)


def _exact_entropy(num_classes: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The entropy and its gradient, in float64."""
    z = _confident(num_classes, dtype)[0].astype(np.float64)
    behind = z.max(-1, keepdims=True) - z
    mass = np.exp(-behind)
    excess = np.take_along_axis(_sum_of_others(mass), z.argmax(-1)[:, None], -1)
    depth = (mass * behind).sum(-1, keepdims=True) / (1 + excess)
    gradient = mass / (1 + excess) * (behind - depth)
    return (np.log1p(excess) + depth)[:, 0], gradient


def _bars(dtype: str) -> tuple[float, float]:
    loss, gradient = (1e-13, 1e-12) if dtype == "float64" else (4e-6, 1e-5)
    return loss, gradient + _ROUNDING[dtype]


def _errors(
    loss_fn: Callable[..., Any],
    dtype: str,
    options: dict[str, float],
    sizes: tuple[int, ...],
) -> tuple[float, float]:
    """Worst relative error of the loss, and of the gradient by its terms."""
    worst_loss = worst_gradient = 0.0
    for num_classes in sizes:
        logits, labels = _confident(num_classes, dtype)

        def both(z: jax.Array, labels: np.ndarray = labels) -> Any:
            loss, pull = jax.vjp(lambda z: loss_fn(z, labels, **options), z)
            return loss, *pull(jnp.ones_like(loss))

        with jax.enable_x64(dtype == "float64"):
            loss, gradient = jax.jit(both)(jnp.asarray(logits))
        want, want_gradient, terms = _exact(num_classes, dtype, **options)
        worst_loss = max(worst_loss, _worst(loss, want, want))
        worst_gradient = max(worst_gradient, _worst(gradient, want_gradient, terms))
    return worst_loss, worst_gradient


def _worst(got: jax.Array, want: np.ndarray, size: np.ndarray) -> float:
    # Below the normal numbers of a dtype there are no relative errors.
    normal = np.abs(size) > float(jnp.finfo(got.dtype).tiny)
    error = np.abs(np.asarray(got, np.float64) - want)
    return float(np.max(np.where(normal, error / np.where(normal, size, 1), 0)))


@functools.cache
def _confident(num_classes: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Logits of order 1 whose labels lead by each of the margins, in nats."""
    rng = np.random.default_rng(num_classes)
    margins = np.repeat(MARGINS, _PER_MARGIN)
    logits = rng.normal(size=(margins.size, num_classes))
    labels = rng.integers(num_classes, size=margins.size)
    rows = np.arange(margins.size)
    logits[rows, labels] = -np.inf
    logits[rows, labels] = logits.max(-1) + margins
    return logits.astype(jnp.dtype(dtype)), labels


@functools.cache
def _exact(
    num_classes: int,
    dtype: str,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loss, its gradient, and the sum of the gradient's absolute terms, in float64.

    The options enter as the losses take them, rounded to the accumulation dtype.
    """
    logits, labels = _confident(num_classes, dtype)
    if dtype != "float64":
        label_smoothing, z_loss, logit_scale = (
            float(np.float32(x)) for x in (label_smoothing, z_loss, logit_scale)
        )
    z = logits.astype(np.float64)
    slope = np.full_like(z, logit_scale)
    if logit_softcap is not None:
        slope = slope / np.cosh(z / logit_softcap) ** 2
        z = logit_softcap * np.tanh(z / logit_softcap)
    z = logit_scale * z
    targets = np.full_like(z, label_smoothing / z.shape[-1])
    targets[np.arange(len(z)), labels] += 1 - label_smoothing
    # Sums over the other classes are taken without the largest, never by subtraction.
    top = z.max(-1, keepdims=True)
    weight = np.exp(z - top)
    others = _sum_of_others(weight)
    excess = np.take_along_axis(others, z.argmax(-1)[:, None], -1)
    surprise = np.log1p(excess) + (top - z)
    lse = top + np.log1p(excess)
    p, not_p = weight / (1 + excess), others / (1 + excess)
    loss = (targets * surprise).sum(-1) + z_loss * lse[:, 0] ** 2
    pull, push = _sum_of_others(targets) * p, targets * not_p
    penalty = 2 * z_loss * lse * p
    terms = (pull + push + np.abs(penalty)) * np.abs(slope)
    return loss, (pull - push + penalty) * slope, terms


def _sum_of_others(x: np.ndarray) -> np.ndarray:
    top = x.argmax(-1)[:, None]
    rest = x.copy()
    np.put_along_axis(rest, top, 0, -1)
    rest = rest.sum(-1, keepdims=True)
    others = np.take_along_axis(x, top, -1) + (rest - x)
    np.put_along_axis(others, top, rest, -1)
    return others


def _composed_with_optax(
    logits: jax.Array,
    labels: np.ndarray,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> jax.Array:
    """The same options, written around optax's losses as users write them."""
    if logit_softcap is not None:
        logits = logit_softcap * jnp.tanh(logits / logit_softcap)
    logits = logits * logit_scale
    if label_smoothing:
        targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
        targets = installed_optax().smooth_labels(targets, label_smoothing)
        loss = installed_optax().softmax_cross_entropy(logits, targets)
    else:
        loss = installed_optax().softmax_cross_entropy_with_integer_labels(
            logits, labels
        )
    return loss + z_loss * jax.nn.logsumexp(logits, axis=-1) ** 2


@functools.cache
def installed_optax() -> Any:
    try:
        import optax
    except ImportError:
        return None
    return optax
