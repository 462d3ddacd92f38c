"""`exp`, `expm1`, `log1p` and `1 - exp(-x)` for the range that a softmax needs.

XLA:CPU's own are slow in short rows, and `expm1` and `log1p` everywhere. Ours are of
operations that any loop vectorises, for float32 on a CPU; other dtypes, other platforms
and a few numbers have what JAX has. For these, on a CPU, `log1p` is right to 2.5 units,
and `expm1` to six.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Integer

from jaxlosses._math import pairs
from jaxlosses._platform import by_platform, is_local, traced_once
from jaxlosses._types import Shape, Size, are_numbers

Values = Float[Array, "..."]
Ids = Integer[Array, "..."]

# Of so few numbers no loop is long. XLA:CPU runs a program of less than 1000 operations
# in the thread that waits for it, and does not count what its own functions do
# (benchmarks/NOTES.md, "Calls of a few numbers").
_FEW = 64

# Of whole numbers from zero on, float32 has so many.
_MOST_IDS = 2**24

# Added to a float32 of up to 2^22, it leaves the nearest integer in the last bits.
_ROUND = np.float32(1.5 * 2**23)
# log(2), of which a multiple up to 2^7 of the first part is exact.
_LOG_2 = (355 / 512, math.log(2) - 355 / 512)
# Below, float32 has only subnormal numbers, which XLA takes for zero.
_LOWEST = np.float32(math.log(np.finfo(np.float32).tiny))
_MANTISSA = 23
# exp(r) for |r| up to log(2) / 2: of the polynomials that begin with 1 + r + r^2 / 2,
# the one of the least relative error, 4e-9.
_SERIES = (1, 1, 1 / 2, 0.16666534543, 0.041667237878, 0.0083675095816, 0.0013863756322)

# (log(1 + f) - f + f^2 / 2) / f^3 for 1 + f between sqrt(1/2) and sqrt(2), likewise of
# the least error relative to log(1 + f), 6e-9.
_SERIES_OF_LOG = (
    *(0.3333333171, -0.2500082104, 0.2000122687, -0.166233573),
    *(0.1420175823, -0.1316018306, 0.1276157564, -0.07634493024),
)


@jax.custom_jvp
def exp(x: Values) -> Values:
    """`exp(x)` of any floating dtype, to one unit in the last place; `inf` above 88."""
    return _chosen((_exp, jnp.exp), x)


@jax.custom_jvp
def expm1(x: Values) -> Values:
    """`exp(x) - 1` for `x <= 0`, likewise to 1.2 units."""
    return _chosen((_expm1, jnp.expm1), x)


@jax.custom_jvp
def log1p(x: Values) -> Values:
    """`log(1 + x)` for `x > -1`, likewise to one unit, or to two below 0."""
    return _chosen((_log1p, jnp.log1p), x)


@jax.custom_jvp
def one_minus_exp(x: Values) -> Values:
    """`1 - exp(-x)` for `x >= 0`, likewise to three units."""
    return _chosen((_one_minus_exp, _minus_expm1), x)


def exp_of_row(x: Values, logits: Values) -> Values:
    """`exp(x)` of numbers of the shape of some logits.

    16-bit rows too short for a vector are converted one by one by XLA:CPU. Nothing that
    saves operations per vector is of use there, and its own exponential is as fast.
    """
    size = logits.shape[-1]
    is_tiny = logits.dtype.itemsize == 2 and are_numbers(size) and size < 16
    return jnp.exp(x) if is_tiny else exp(x)


def same(ids: Ids, labels: Ids, count: Size) -> Bool[Array, "..."]:
    """Whether ids below some count are those of labels.

    On a CPU as float32, where that has all ids: XLA:CPU is faster at it
    (benchmarks/NOTES.md, "Labels compared as float32").
    """

    def as_float32(ids: Ids, labels: Ids) -> Bool[Array, "..."]:
        return ids.astype(jnp.float32) == labels.astype(jnp.float32)

    if is_local() and are_numbers(count) and count <= _MOST_IDS:
        return by_platform(as_float32, jnp.equal, ids, labels)
    return ids == labels


def kept_per_example(x: Values) -> Values:
    """`1 / (1 + x)`: NaN where `x` is, and a quotient.

    What each class needs of its example, XLA:CPU computes anew for each class, unless
    it is a quotient (benchmarks/NOTES.md, "What a row needs, as quotients").
    """
    return 1 / (1 + x)


def _with_slope(
    f: Callable[[Values], Values], slope: Callable[[Values, Values], Values]
) -> Callable[[tuple[Values], tuple[Values]], tuple[Values, Values]]:
    """The forward rule of a function whose slope at `x`, of value `y`, is known."""

    def rule(primals: tuple[Values], tangents: tuple[Values]) -> tuple[Values, Values]:
        (x,), (dx,) = primals, tangents
        y = f(x)
        return y, slope(x, y) * dx

    return rule


exp.defjvp(_with_slope(exp, lambda x, y: y))
expm1.defjvp(_with_slope(expm1, lambda x, y: exp(x)))
log1p.defjvp(_with_slope(log1p, lambda x, y: 1 / (1 + x)))
one_minus_exp.defjvp(_with_slope(one_minus_exp, lambda x, y: exp(-x)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def fused_sum(a: Values, axes: Shape) -> Values:
    """The sum along axes, which stay, of numbers that are made for it.

    For a plain sum XLA:CPU calls a library, to which all terms are written first
    (benchmarks/NOTES.md, "A sum that is not written"). Where devices may have parts of
    the axes, no other sum can be added up.
    """

    def unwritten(a: Values) -> Values:
        zero = np.zeros((), a.dtype)
        found = lax.reduce(
            a,
            zero,
            lambda x, y: x + lax.select(lax.eq(y, y), y, jnp.full_like(y, jnp.nan)),
            axes,
        )
        return jnp.expand_dims(found, axes)

    def plain(a: Values) -> Values:
        return jnp.sum(a, axes, keepdims=True)

    return by_platform(unwritten, plain, a) if is_local() else plain(a)


@fused_sum.defjvp
def _fused_sum_jvp(
    axes: Shape, primals: tuple[Values], tangents: tuple[Values]
) -> tuple[Values, Values]:
    return fused_sum(*primals, axes), jnp.sum(*tangents, axes, keepdims=True)


# On a CPU, and elsewhere.
Choice = tuple[Callable[[Values], Values], Callable[[Values], Values]]


def _choose(choice: Choice, x: Values) -> Values:
    on_cpu, general = choice
    is_short = are_numbers(*x.shape) and x.size <= _FEW
    if x.dtype != jnp.float32 or is_short:
        return general(x)
    return by_platform(on_cpu, general, x)


# Nearly a quarter of the tracing was this, for shapes that come again and again.
_chosen = traced_once(_choose, inline=True)


def _exp(x: Values) -> Values:
    """`2^n exp(r)`."""
    power, r = _reduced(x)
    return jnp.where(x < _LOWEST, 0, power * _series(r))


def _expm1(x: Values) -> Values:
    """`2^n (exp(r) - 1) + (2^n - 1)`, in which the second term is exact or -1."""
    power, r = _reduced(x)
    beyond = r * pairs.series_of_exp(r, 1, 7)
    return jnp.where(x < _LOWEST, -1, power * beyond + (power - 1))


def _minus_expm1(x: Values) -> Values:
    return -jnp.expm1(-x)


def _one_minus_exp(x: Values) -> Values:
    """`t / (1 + t)` with `t = exp(x) - 1`. XLA:CPU keeps a quotient for later use."""
    t = _expm1(jnp.minimum(x, 40))
    return t / (1 + t)


def _log1p(x: Values) -> Values:
    """`n log(2) + log(1 + f)` with `2^n (1 + f) = 1 + x`, and `f` near zero.

    What a rounding of `1 + x` has lost is divided by it, about. Without a quotient, for
    which XLA:CPU would take a loop of its own, but in the end, where that is wanted
    (benchmarks/NOTES.md, "Logarithms without a quotient").
    """
    near, lost = pairs.add(x, jnp.ones_like(x))
    # 1 + f is between sqrt(1/2) and sqrt(2).
    bits = lax.bitcast_convert_type(near, jnp.int32)
    lowest = np.float32(math.sqrt(0.5)).view(np.int32)
    n = (bits - lowest) >> _MANTISSA
    f = lax.bitcast_convert_type(bits - (n << _MANTISSA), jnp.float32) - 1
    one = np.float32(1).view(np.int32)
    power = lax.bitcast_convert_type(one - (n << _MANTISSA), jnp.float32)
    square, multiple = f * f, n.astype(jnp.float32)
    lost = jnp.where(x < 2**24, lost * power * (1 - f + square), 0)
    series = jnp.full_like(x, _SERIES_OF_LOG[-1])
    for coefficient in reversed(_SERIES_OF_LOG[:-1]):
        series = series * f + np.float32(coefficient)
    small = multiple * np.float32(_LOG_2[1]) + lost
    y = (small - square * (0.5 - f * series)) + f + multiple * np.float32(_LOG_2[0])
    y = jnp.where(jnp.isfinite(x), y, x)
    # A number of an example is kept, as a quotient.
    return y / jnp.where(jnp.isnan(x), jnp.nan, 1.0) if x.shape[-1:] == (1,) else y


def _reduced(x: Values) -> tuple[Values, Values]:
    """`2^n`, up to infinity, and `r` of `x = n log(2) + r` with `|r| <= log(2) / 2`."""
    shifted = x * np.float32(1 / math.log(2)) + _ROUND
    # Its last bits are n. More than 128 would be the bits of another power.
    bits = lax.bitcast_convert_type(shifted, jnp.int32)
    bits = jnp.minimum(bits, _ROUND.view(np.int32) + np.int32(128))
    one = np.float32(1).view(np.int32)
    power = lax.bitcast_convert_type((bits << _MANTISSA) + one, jnp.float32)
    n = lax.bitcast_convert_type(bits, jnp.float32) - _ROUND
    high, low = (n * np.float32(part) for part in _LOG_2)
    return power, (x - high) - low


def _series(r: Values) -> Values:
    """`exp(r)`."""
    *others, last = _SERIES
    series = jnp.full_like(r, last)
    for coefficient in reversed(others):
        series = series * r + np.float32(coefficient)
    return series
