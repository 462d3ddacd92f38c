"""Checks for labels, and for losses that somebody writes or ports."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jaxtyping import ArrayLike

from jaxlosses import _checks
from jaxlosses._planned import Plan as Plan
from jaxlosses._planned import plan as plan


def check_labels(
    labels: ArrayLike, num_classes: int, ignore_index: int | None = None
) -> None:
    """Raises if an integer label names no class.

    A label `y` is valid if `0 <= y < num_classes` or `y == ignore_index`. The losses
    turn an invalid label into NaN, in value and in gradient; this says where it is.

    Args:
        labels: integer labels of any shape and integer dtype.
        num_classes: number of classes.
        ignore_index: a label that does not count, as in the losses.

    Raises:
        ValueError: a concrete label is invalid; names the first position and value.
        TypeError: the labels are not integers.
        jax.experimental.checkify.JaxRuntimeError: from `error.throw()`, for traced
            labels in a function under `checkify.checkify`. Traced labels outside of
            `checkify` are an error of JAX at compile time.

    Differentiation:
        None: it returns nothing, and integers have no derivative.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxlosses.testing import check_labels
        >>> check_labels(jnp.array([0, 2, -100]), 3, ignore_index=-100)
        >>> check_labels(jnp.array([0, 3, 1]), 3)
        Traceback (most recent call last):
            ...
        ValueError: labels: got 3 at position (1,), expected class ids from 0 to 2. \
Give padding one label and pass it as ignore_index, or correct the data.

    Source:
        The label policy of this package; `chex` and `checkify` for its two halves.
    """
    labels = labels if isinstance(labels, jax.core.Tracer) else np.asarray(labels)
    _checks.is_integer("labels", labels)
    expected = f"class ids from 0 to {num_classes - 1}"
    if ignore_index is not None:
        expected += f", or ignore_index {ignore_index}"
    fix = "Give padding one label and pass it as ignore_index, or correct the data."
    # Compared in their own dtype, a narrow one cannot hold the number of classes.
    invalid = labels < 0
    if num_classes <= np.iinfo(labels.dtype).max:
        invalid |= labels >= num_classes
    if ignore_index is not None and _holds(labels.dtype, ignore_index):
        invalid &= labels != np.asarray(ignore_index).astype(labels.dtype)
    if isinstance(labels, jax.core.Tracer):
        flat = invalid.reshape(-1)
        index = jnp.argmax(flat) if flat.size else 0
        value = labels.reshape(-1)[index] if flat.size else jnp.zeros((), labels.dtype)
        checkify.check(
            ~jnp.any(invalid),
            f"labels: got {{value}} at flat position {{index}}, expected {expected}. "
            f"{fix}",
            value=value,
            index=jnp.asarray(index),
        )
    elif invalid.any():
        position = tuple(int(i) for i in np.argwhere(invalid)[0])
        raise ValueError(
            f"labels: got {labels[position]} at position {position}, expected "
            f"{expected}. {fix}"
        )


class Check(NamedTuple):
    """One comparison that `check_loss` made.

    Attributes:
        dtype: dtype of the floating arguments.
        scale: factor of the first argument.
        quantity: what was compared, such as `"gradient of argument 0"`.
        against: what it was compared with.
        error: largest absolute difference, in units of what is allowed.
        position: where that was.
        got: the value there.
        expected: what it should have been.
    """

    dtype: str
    scale: float
    quantity: str
    against: str
    error: float
    position: tuple[int, ...]
    got: float
    expected: float

    @property
    def holds(self) -> bool:
        """Whether the difference is within what is allowed."""
        return self.error <= 1


def check_loss(
    loss_fn: Callable[..., Any],
    *args: Any,
    reference: Callable[..., Any] | None = None,
    dtypes: Sequence[str] = ("float64", "float32", "bfloat16"),
    scales: Sequence[float] = (1.0, 30.0, 1e3),
    strict: bool = False,
    rtol: float | None = None,
    seed: int = 0,
) -> list[Check]:
    """Compares a loss and each of its gradients with what they should be.

    For every dtype and scale, with `x` the arguments rounded to the dtype:

    - the value, and the gradient by every floating argument, against `reference` in
      float64 at the same `x`;
    - in float64, every gradient against central differences of fourth order,
      `(8 (f(x+h) - f(x-h)) - (f(x+2h) - f(x-2h))) / 12h`, along random directions;
    - where forward mode works, `jvp` against `vjp` along the same directions.

    Args:
        loss_fn: takes `args`, returns a floating array of any shape. It has to run in
            every dtype of `dtypes`.
        *args: arrays; all floating ones are differentiated, the first is scaled.
            By default logits `(6, 11)` of order 1 and integer labels.
        reference: evaluated in float64; `loss_fn` itself by default. Pass one to
            check the value too: a loss that is wrong in the same way in every dtype
            agrees with itself.
        dtypes: of the floating arguments.
        scales: factors of the first argument: logits of order 1, confident examples,
            and extreme logits.
        strict: allow an error relative to each entry alone, as a loss deserves that
            is exact for confident examples. By default the error may also be
            relative to the largest entry, for a gradient, or to the largest entry of
            the first argument, for a value, as rounding in `logsumexp(z) - z[y]` is.
        rtol: relative error allowed; by default, in units in the last place, 34 for a
            value and 84 for a gradient in float32 (4e-6 and 1e-5) or float64, and 4
            in 16-bit types.
        seed: of directions and cotangents.

    Returns:
        Every comparison made, all of which hold.

    Raises:
        AssertionError: something disagrees; the message is a table of what and by how
            much.

    Differentiation:
        Uses reverse mode, and forward mode where `loss_fn` has it; is not itself
        differentiable.

    Example:
        >>> import jax
        >>> from jaxlosses.testing import check_loss
        >>> def loss(logits, labels):
        ...     return -jax.nn.log_softmax(logits)[jax.numpy.arange(6), labels]
        >>> checks = check_loss(loss)
        >>> all(check.holds for check in checks)
        True

    Source:
        Central differences: Fornberg, "Generation of finite difference formulas on
        arbitrarily spaced grids", 1988, table 1. Compare `jax.test_util.check_grads`.
    """
    args = args or _default_arguments(seed)
    reference = loss_fn if reference is None else reference
    checks: list[Check] = []
    for dtype in dtypes:
        for scale in scales:
            scaled = _scaled(args, scale, dtype)
            checks += _check_one(
                loss_fn, reference, scaled, dtype, scale, strict, rtol, seed
            )
    failed = [check for check in checks if not check.holds]
    if failed:
        raise AssertionError(
            f"{len(failed)} of {len(checks)} comparisons fail. The error is in units "
            f"of what is allowed.\n{_table(failed)}"
        )
    return checks


def _table(checks: Iterable[Check]) -> str:
    """The checks as aligned text, one line each."""
    lines = [Check._fields] + [
        (
            check.dtype,
            f"{check.scale:g}",
            check.quantity,
            check.against,
            f"{check.error:.3g}",
            str(check.position),
            f"{check.got:.9g}",
            f"{check.expected:.9g}",
        )
        for check in checks
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(Check._fields))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) for cell, width in zip(line, widths, strict=True)
        ).rstrip()
        for line in lines
    )


def _check_one(
    loss_fn: Any,
    reference: Any,
    args: tuple[Any, ...],
    dtype: str,
    scale: float,
    strict: bool,
    rtol: float | None,
    seed: int,
) -> list[Check]:
    with jax.enable_x64(True):
        wide = _cast(args, "float64")
        value_64, gradients_64, cotangent = _evaluate(reference, wide, None, seed)
    with jax.enable_x64(dtype == "float64"):
        value, gradients, _ = _evaluate(loss_fn, args, cotangent, seed)
    compare = functools.partial(_compare, dtype, scale, strict=strict)
    size = max(1.0, _largest(np.asarray(wide[0], np.float64)))
    tolerance = _tolerance(value.dtype.name, 34) if rtol is None else rtol
    checks = [compare("value", "float64", value, value_64, tolerance, size)]
    tolerance = _tolerance(dtype, 84) if rtol is None else rtol
    for i, got in gradients.items():
        expected = gradients_64[i]
        size, quantity = _largest(expected), f"gradient of argument {i}"
        checks.append(compare(quantity, "float64", got, expected, tolerance, size))
    if dtype == "float64":
        with jax.enable_x64(True):
            checks += _check_directions(loss_fn, wide, cotangent, compare, seed)
    return checks


def _check_directions(
    loss_fn: Any, args: tuple[Any, ...], cotangent: np.ndarray, compare: Any, seed: int
) -> list[Check]:
    """Derivatives along random directions: by differences, reverse and forward."""
    rng = np.random.default_rng(seed + 1)
    checks = []
    for i in _floating(args):

        def along(x: Any, i: int = i) -> Any:
            out = loss_fn(*args[:i], x, *args[i + 1 :])
            return jnp.vdot(jnp.asarray(cotangent), out)

        x = jnp.asarray(args[i])
        value, gradient = jax.value_and_grad(along)(x)
        directions = rng.choice([-1.0, 1.0], size=(4, *x.shape))
        reverse = np.array([np.vdot(d, gradient) for d in directions])
        h = 1e-3
        stencil = ((8, h), (-8, -h), (-1, 2 * h), (1, -2 * h))
        differences = np.array(
            [sum(c * float(along(x + s * d)) for c, s in stencil) for d in directions]
        )
        differences /= 12 * h
        # Rounding of the values, and the fifth derivative.
        size = max(1.0, abs(float(value)), float(np.abs(gradient).sum()))
        quantity = f"derivative by argument {i}"
        checks.append(
            compare(
                quantity, "differences", reverse, differences, 1e-8, size, strict=False
            )
        )
        try:
            forward = [jax.jvp(along, (x,), (jnp.asarray(d),))[1] for d in directions]
        except TypeError:  # a custom_vjp has no forward mode
            continue
        checks.append(
            compare(
                quantity,
                "forward mode",
                reverse,
                np.array(forward),
                1e-12,
                size,
                strict=False,
            )
        )
    return checks


def _evaluate(
    loss_fn: Any, args: tuple[Any, ...], cotangent: np.ndarray | None, seed: int
) -> tuple[np.ndarray, dict[int, np.ndarray], np.ndarray]:
    """Value, gradient by each floating argument, and the cotangent that was used."""
    indices = _floating(args)

    def of_floating(*floating: Any) -> Any:
        full = list(args)
        for i, x in zip(indices, floating, strict=True):
            full[i] = x
        return loss_fn(*full)

    arrays = [jnp.asarray(args[i]) for i in indices]
    value, pull = jax.vjp(jax.jit(of_floating), *arrays)
    if cotangent is None:
        # Not constant, and exact in every dtype.
        rng = np.random.default_rng(seed)
        cotangent = rng.choice([-1.0, -0.5, 0.5, 1.0, 2.0], size=value.shape)
    gradients = pull(jnp.asarray(cotangent).astype(value.dtype))
    gradients = dict(zip(indices, map(np.asarray, gradients), strict=True))
    return np.asarray(value), gradients, cotangent


def _compare(
    dtype: str,
    scale: float,
    quantity: str,
    against: str,
    got: np.ndarray,
    expected: np.ndarray,
    rtol: float,
    size: float,
    *,
    strict: bool,
) -> Check:
    if got.shape != expected.shape:
        raise AssertionError(
            f"{quantity}: got shape {got.shape}, expected {expected.shape} as in "
            f"{against}."
        )
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    if got.size == 0:
        return Check(dtype, scale, quantity, against, 0.0, (), 0.0, 0.0)
    tiny = float(jnp.finfo(dtype).tiny)
    with np.errstate(invalid="ignore", over="ignore"):
        allowed = rtol * (np.abs(expected) + (0.0 if strict else size)) + tiny
        error = np.abs(got - expected) / allowed
    # Infinities and NaN agree with themselves, and with nothing else.
    same = (got == expected) | (np.isnan(got) & np.isnan(expected))
    error = np.where(same, 0.0, np.where(np.isnan(error), np.inf, error))
    index = tuple(int(i) for i in np.unravel_index(np.argmax(error), error.shape))
    return Check(
        dtype,
        scale,
        quantity,
        against,
        float(error[index]),
        index,
        float(got[index]),
        float(expected[index]),
    )


def _default_arguments(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(6, 11))
    return logits, rng.integers(0, 11, size=6).astype(np.int32)


def _floating(args: tuple[Any, ...]) -> list[int]:
    return [i for i, x in enumerate(args) if jnp.issubdtype(_dtype(x), jnp.floating)]


def _dtype(x: Any) -> Any:
    return x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype


def _scaled(args: tuple[Any, ...], scale: float, dtype: str) -> tuple[Any, ...]:
    first = np.asarray(args[0], np.float64) * scale
    return _cast((first, *args[1:]), dtype)


def _cast(args: tuple[Any, ...], dtype: str) -> tuple[Any, ...]:
    floating = _floating(args)
    return tuple(
        np.asarray(x).astype(jnp.dtype(dtype)) if i in floating else x
        for i, x in enumerate(args)
    )


def _largest(x: np.ndarray) -> float:
    finite = np.abs(x[np.isfinite(x)])
    return float(finite.max()) if finite.size else 0.0


def _tolerance(dtype: str, last_places: int) -> float:
    info = jnp.finfo(dtype)
    return (4 if info.bits == 16 else last_places) * float(info.eps)


def _holds(dtype: Any, value: int) -> bool:
    info = np.iinfo(dtype)
    return bool(info.min <= value <= info.max)
