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
_LOG_2 = sum(map(fractions.Fraction, (math.log(2), 2.319046813846299558e-17)))


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


def multiply(a: Pair, b: Pair) -> Pair:
    (a1, a2), (b1, b2) = _halves(a.high), _halves(b.high)
    return Pair(a1 * b1, a1 * (b2 + b.low) + (a2 + a.low) * b.high)


def divide(a: Pair, b: Pair) -> Pair:
    reciprocal = 1 / b.high
    high = a.high * reciprocal
    (high1, high2), (b1, b2) = _halves(high), _halves(b.high)
    rest = ((a.high - high1 * b1) - high1 * b2) - high2 * b.high
    return Pair(high, (rest + (a.low - high * b.low)) * reciprocal)


def exp(x: Pair, factor: fractions.Fraction) -> Pair:
    """`exp(factor * x)` for exponents up to 80, to a tenth of the last place of `high`.

    With `n` the nearest whole number of `log(2)` in the exponent and `r` the rest of
    it, that is `2^n (1 + r + r^2 (1 / 2! + r / 3! + ...))`.
    """
    dtype = x.high.dtype
    info = jnp.finfo(dtype)
    step = constant(_LOG_2 / factor, dtype, info.nmant - 7)
    n = jnp.round(x.high * float(factor / _LOG_2))
    power = power_of_two(n, dtype)
    rest = add_to_larger(x.high - n * step.high, -n * step.low)
    one, two = constant(factor, dtype, info.nmant // 2 + 1)
    high1, high2 = _halves(rest.high)
    r1 = one * high1
    r2 = one * (high2 + (rest.low + x.low)) + two * rest.high
    r = r1 + r2
    series = series_of_exp(r, 2, 8 if dtype == jnp.float32 else 15)
    high, low = add_to_larger(power, power * r1)
    return add_to_larger(high, low + power * (r2 + r * r * series))


def power_of_two(n: Values | Integer[Array, "..."], dtype: DType) -> Values:
    """`2^n` for a whole `n` at which it is a normal number."""
    info = jnp.finfo(dtype)
    bits = (n.astype(_integer(dtype)) + (info.maxexp - 1)) << info.nmant
    return lax.bitcast_convert_type(bits, dtype)


def series_of_exp(r: Values, first: int, last: int) -> Values:
    """The sum of `r^(k - first) / k!` from `k = first` to `last`."""
    series = jnp.full_like(r, 1 / math.factorial(last))
    for k in range(last - 1, first - 1, -1):
        series = series * r + 1 / math.factorial(k)
    return series


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
