"""How far from the exact value a result may be, and why. One table for all tests."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np


class Tolerance(NamedTuple):
    """Errors allowed, by dtype of the logits.

    Attributes:
        loss: of a loss, relative to its exact value.
        gradient: of a gradient, relative to the sum of its absolute terms. Where no
            terms cancel (no smoothing, no z-loss) that is its exact value.
        rounding: of a gradient, relative to its exact value, on top.
        why: where the numbers come from.
    """

    loss: float
    gradient: float
    rounding: float
    why: str


TABLE = {
    "float32": Tolerance(
        4e-6,
        1e-5,
        0.0,
        "A difference of two logits at 80 nats is rounded by up to 3.8e-6, which is "
        "the relative error of its exponential. A gradient is rounded so twice.",
    ),
    "float64": Tolerance(
        1e-14,
        2e-13,
        0.0,
        "At 80 nats the rounding of a difference is 7e-15. A gradient is a normal "
        "number up to 700 nats, where it is 6e-14, and is rounded so up to three "
        "times.",
    ),
    "bfloat16": Tolerance(
        4e-6,
        1e-5,
        2.0**-8,
        "Computed in float32 from inputs that are exact there; the gradient is then "
        "rounded to 8 significant bits.",
    ),
    "float16": Tolerance(
        4e-6,
        1e-5,
        2.0**-11,
        "As bfloat16, with 11 significant bits.",
    ),
}


def assert_loss(
    actual: Any,
    exact: Any,
    dtype: str,
    what: str = "loss",
) -> None:
    """A loss of logits of `dtype` is within its tolerance; NaN and inf agree."""
    row = TABLE[dtype]
    assert np.asarray(actual).dtype == accumulated(dtype), what
    _assert_within(actual, exact, row.loss * np.abs(exact), what)


def assert_gradient(
    actual: Any,
    exact: Any,
    dtype: str,
    terms: Any = None,
    what: str = "gradient",
) -> None:
    """A gradient is within the tolerance of a loss of logits of `dtype`.

    `terms` are the sums of absolute terms, by default the exact values. The gradient
    is rounded if its own dtype has 16 bits.
    """
    row, terms = TABLE[dtype], exact if terms is None else terms
    allowed = row.gradient * np.abs(terms)
    if np.asarray(actual).dtype.itemsize == 2:
        allowed = allowed + TABLE[np.asarray(actual).dtype.name].rounding * np.abs(
            exact
        )
    _assert_within(actual, exact, allowed, what)


def accumulated(dtype: str) -> np.dtype:
    return np.dtype("float64" if dtype == "float64" else "float32")


def _assert_within(actual: Any, exact: Any, allowed: Any, what: str) -> None:
    actual, exact = np.asarray(actual), np.asarray(exact)
    assert actual.shape == exact.shape, (what, actual.shape, exact.shape)
    info = jnp.finfo(actual.dtype)
    # XLA flushes subnormal numbers to zero, maybe before a factor of up to 16; those
    # of float16 it keeps, in steps of 6e-8.
    half = actual.dtype == np.float16
    tiny = float(info.smallest_subnormal if half else 16 * info.tiny)
    got = actual.astype(np.float64)
    with np.errstate(invalid="ignore"):
        error = np.abs(got - exact) / (allowed + tiny)
    same = (got == exact) | (np.isnan(got) & np.isnan(exact))
    error = np.where(same, 0, np.where(np.isnan(error), np.inf, error))
    if error.size and error.max() > 1:
        at = tuple(int(i) for i in np.unravel_index(error.argmax(), error.shape))
        raise AssertionError(
            f"{what} at {at}: got {got[at]:.9g}, exact is {exact[at]:.17g}: "
            f"{error[at]:.3g} times the error allowed. {(error > 1).sum()} of "
            f"{error.size} entries are wrong."
        )
