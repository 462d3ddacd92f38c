"""Numbers of twice the digits: what a difference of two of them loses is still there.

A `Pair` is the unevaluated sum of two floating-point numbers. The operations are the
classical error-free transformations; products are split in halves, so that it does
not matter whether a compiler fuses a multiplication with an addition.

References:
    Dekker, A floating-point technique for extending the available precision, 1971.
    Shewchuk, Adaptive precision floating-point arithmetic, 1997.
"""

import fractions
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Integer

from jaxlosses._types import DType

Values = Float[Array, "..."]

# log(2) to 107 bits.
LOG_2 = fractions.Fraction(math.log(2)) + fractions.Fraction(2.319046813846299558e-17)


class Pair(NamedTuple):
    """A number as the sum of two, the second one small."""

    high: Values
    low: Values


def of(a: Values) -> Pair:
    return Pair(a, jnp.zeros_like(a))


def add(a: Values, b: Values) -> Pair:
    """`a + b`, exactly."""
    total = a + b
    back = total - a
    return Pair(total, (a - (total - back)) + (b - back))


def add_to_larger(a: Values, b: Values) -> Pair:
    """`a + b`, exactly, for `|a| >= |b|` or `a = 0`."""
    total = a + b
    return Pair(total, b - (total - a))


def add_pairs(a: Pair, b: Pair) -> Pair:
    """`a + b`; `low` may be larger than a rounding of `high`."""
    high, low = add(a.high, b.high)
    return Pair(high, low + (a.low + b.low))


def halved(a: Pair) -> Pair:
    """The same number, with half the digits in `high`."""
    high, low = _halves(a.high)
    return Pair(high, low + a.low)


def multiply(a: Pair, b: Pair) -> Pair:
    """`a * b`, for an `a` that is halved."""
    b1, b2 = _halves(b.high)
    return Pair(a.high * b1, a.high * (b2 + b.low) + a.low * b.high)


def divide(a: Pair, b: Pair) -> Pair:
    """`a / b`, halved."""
    reciprocal = 1 / b.high
    high, _ = _halves(a.high * reciprocal)
    b1, b2 = _halves(b.high)
    rest = ((a.high - high * b1) - high * b2) + (a.low - high * b.low)
    return Pair(high, rest * reciprocal)


def exp(x: Pair, factor: fractions.Fraction) -> tuple[Pair, Pair]:
    """`exp(factor * x)`, and that less one, for exponents between -80 and 80.

    To a tenth of the last place of `high`, or to half of it where the first is below
    `2^-24` of one. With `n` the nearest whole number of `log(2)` in the exponent and
    `r` the rest of it, they are `2^n (1 + m)` and `(2^n - 1) + 2^n m` of one
    `m = r + r^2 (1 / 2! + r / 3! + ...)`.
    """
    dtype = x.high.dtype
    info = jnp.finfo(dtype)
    step = constant(LOG_2 / factor, dtype, info.nmant - 7)
    n = jnp.round(x.high * float(factor / LOG_2))
    power = power_of_two(n, dtype)
    rest = add_to_larger(x.high - n * step.high, -n * step.low)
    one, two = constant(factor, dtype, info.nmant // 2 + 1)
    high1, high2 = _halves(rest.high)
    r1 = one * high1
    r2 = one * (high2 + (rest.low + x.low)) + two * rest.high
    r = r1 + r2
    series = series_of_exp(r, 2, last_term(dtype))
    high, low = add_to_larger(r1, r2 + r * r * series)
    beyond = Pair(power * high, power * low)

    def plus(whole: Values) -> Pair:
        found = add_to_larger(whole, beyond.high)
        return found._replace(low=found.low + beyond.low)

    return plus(power), plus(power - 1)


def power_of_two(n: Values | Integer[Array, "..."], dtype: DType) -> Values:
    """`2^n` for a whole `n` at which it is a normal number."""
    info = jnp.finfo(dtype)
    bits = (n.astype(_integer(dtype)) + (info.maxexp - 1)) << info.nmant
    return lax.bitcast_convert_type(bits, dtype)


def exponent_of(a: Values) -> tuple[Values, Values]:
    """`n` and `m` from 1 to 2 of a number `2^n m` that is positive and normal."""
    info, kind = jnp.finfo(a.dtype), _integer(a.dtype)
    bits = lax.bitcast_convert_type(a, kind)
    n = (bits >> info.nmant) - (info.maxexp - 1)
    return n.astype(a.dtype), lax.bitcast_convert_type(
        bits - (n << info.nmant), a.dtype
    )


def series_of_exp(r: Values, first: int, last: int) -> Values:
    """The sum of `r^(k - first) / k!` from `k = first` to `last`."""
    series = jnp.full_like(r, 1 / math.factorial(last))
    for k in range(last - 1, first - 1, -1):
        series = series * r + 1 / math.factorial(k)
    return series


def last_term(dtype: DType) -> int:
    """Of the series of `exp(r)`, for `|r|` up to `log(2) / 2`."""
    return 8 if dtype == jnp.float32 else 15


def constant(value: fractions.Fraction, dtype: DType, num_bits: int) -> Pair:
    """A number known exactly, as a pair whose `high` has so many bits."""
    mantissa, exponent = math.frexp(float(value))
    high = math.ldexp(round(math.ldexp(mantissa, num_bits)), exponent - num_bits)
    low = float(value - fractions.Fraction(high))
    return Pair(*(jnp.asarray(a, dtype) for a in (high, low)))


def _halves(a: Values) -> Pair:
    """A number as the sum of two of half as many digits."""
    half = (jnp.finfo(a.dtype).nmant + 2) // 2
    bits = lax.bitcast_convert_type(a, _integer(a.dtype)) & -(1 << half)
    high = lax.bitcast_convert_type(bits, a.dtype)
    return Pair(high, a - high)


def _integer(dtype: DType) -> Any:
    return jnp.int32 if dtype == jnp.float32 else jnp.int64
