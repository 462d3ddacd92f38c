"""Differences of capped logits, and the pairs of numbers that they are made of."""

import fractions

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mpmath import mp

from jaxlosses._math import pairs, softcap

dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])

# Bounds of the relative error of a difference, of the same as a pair, and for a sum.
BOUNDS = {"float32": (1.3e-7, 8e-8, 1.2e-6), "float64": (4e-16, 3e-16, 3e-15)}


def exact(cap: float, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """`cap tanh(a / cap) - cap tanh(b / cap)`, each rounded once, to float64."""

    def one(a: float, b: float) -> float:
        x, y = (mp.tanh(mp.mpf(float(z)) / cap) for z in (a, b))
        return float(mp.mpf(cap) * (x - y))

    with mp.workdps(100):
        return np.array([one(*ab) for ab in zip(a, b, strict=True)])


def logits_within(cap: float, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Logits from far inside the cap to beyond it, and others near and far."""
    rng = np.random.default_rng(0)
    size = min(cap, 40.0)
    b = rng.normal(size=600) * size * rng.choice([0.1, 1.0, 1.5], size=600)
    a = b + rng.normal(size=600) * size * rng.choice([1e-5, 0.05, 1.0], size=600)
    return a.astype(dtype), b.astype(dtype)


@pytest.mark.alternate(4)
@dtypes
@pytest.mark.parametrize("cap", [1e-6, 1e-3, 1.0, 5.0, 50.0, 333.0, 1e4, 1e8])
def test_a_difference_has_all_its_digits(dtype: str, cap: float) -> None:
    a, b = logits_within(cap, dtype)
    want = exact(cap, a, b)
    with jax.enable_x64(dtype == "float64"):
        got = jax.jit(softcap.difference, static_argnums=0)(cap, a, b)
        pair = jax.jit(softcap.exact_difference, static_argnums=0)(cap, a, b)
        rough = jax.jit(softcap.rough_difference, static_argnums=0)(cap, a, b)
        got, high, low, rough = (np.asarray(x) for x in (got, *pair, rough))
    of_one, of_pair, of_sum = BOUNDS[dtype]
    assert got.dtype == high.dtype == low.dtype == rough.dtype == dtype
    np.testing.assert_array_less(abs(rough - want), of_sum * abs(want) + 1e-300)
    np.testing.assert_array_less(abs(got - want), of_one * abs(want) + 1e-300)
    both = high.astype(np.longdouble) + low
    np.testing.assert_array_less(abs(both - want), of_pair * abs(want) + 1e-300)


@pytest.mark.alternate(4)
@dtypes
@pytest.mark.parametrize("cap", [1e-30, 3.0, 3e38])
def test_the_cap_holds_at_the_ends_of_the_numbers(dtype: str, cap: float) -> None:
    largest = float(np.finfo(np.float32).max)
    a = np.array([-largest, -1.0, 0.0, 1.0, largest, np.inf, -np.inf, np.nan])
    with jax.enable_x64(dtype == "float64"):
        logits = jnp.asarray(a, dtype)
        got = np.asarray(softcap.difference(cap, logits, jnp.zeros_like(logits)))
        rough = softcap.rough_difference(cap, logits, jnp.zeros_like(logits))
        slope = np.asarray(softcap.slope(cap, logits))
    # 1e30 stands for any larger cap.
    limit = min(cap, 1e30)
    want = [-limit, limit * np.tanh(-1 / limit), 0, limit * np.tanh(1 / limit), limit]
    np.testing.assert_allclose(got[:5], want, rtol=1e-6)
    np.testing.assert_array_equal(got[5:], a[5:])
    np.testing.assert_allclose(rough, got, rtol=2e-6)
    assert np.all(np.isfinite(slope))
    np.testing.assert_array_equal(slope[[2, 5, 6, 7]], 1)


@pytest.mark.alternate
@dtypes
def test_the_slope_is_exact_where_the_cap_is_reached(dtype: str) -> None:
    a = np.concatenate([np.linspace(-60, 60, 481), [1e-4, 1e-12]]).astype(dtype)
    with mp.workdps(60):
        want = [float(mp.sech(mp.mpf(float(z)) / 5) ** 2) for z in a]
    with jax.enable_x64(dtype == "float64"):
        got = jax.jit(softcap.slope, static_argnums=0)(5.0, jnp.asarray(a))
        _, tangent = jax.jvp(
            lambda z: softcap.difference(5.0, z, jnp.zeros_like(z)),
            (jnp.asarray(a),),
            (jnp.ones(a.shape, dtype),),
        )
    rounding = {"float32": 4e-6, "float64": 1e-14}[dtype]
    np.testing.assert_allclose(np.asarray(got), want, rtol=rounding)
    np.testing.assert_allclose(np.asarray(tangent), want, rtol=rounding)


@dtypes
def test_a_sum_of_two_is_exact(dtype: str) -> None:
    rng = np.random.default_rng(0)
    a = (rng.normal(size=500) * 10.0 ** rng.integers(-8, 8, 500)).astype(dtype)
    b = (rng.normal(size=500) * 10.0 ** rng.integers(-8, 8, 500)).astype(dtype)
    with jax.enable_x64(dtype == "float64"):
        high, low = map(np.asarray, jax.jit(pairs.add)(jnp.asarray(a), jnp.asarray(b)))
    assert np.all(np.abs(low) <= np.spacing(np.abs(high)) / 2)
    for numbers in zip(a, b, high, low, strict=True):
        x, y, h, low_part = (fractions.Fraction(float(n)) for n in numbers)
        assert x + y == h + low_part
