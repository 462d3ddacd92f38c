"""The exponential of what is not positive."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlosses import _exp


def arguments() -> np.ndarray:
    rng = np.random.default_rng(0)
    multiples = -np.log(2) / 2 * np.arange(252)  # where `n` changes, and halfway
    spread = [-rng.exponential(scale, 20011) for scale in (1e-6, 1e-2, 1, 10)]
    small = -rng.uniform(86, 87.3365, 20011)  # down to the smallest normal number
    whole = -rng.uniform(0, 86, 20011)
    a = np.concatenate([multiples, *spread, small, whole, [0.0]]).astype(np.float32)
    return a[a >= -87.3365]


@pytest.mark.parametrize("width", [1, 10, None])
def test_it_is_exact_to_one_unit_in_the_last_place(width: int | None) -> None:
    x = arguments()
    rows = x if width is None else x[: len(x) // width * width].reshape(-1, width)
    y = np.asarray(jax.jit(_exp.exp)(rows), np.float64)
    exact = np.exp(rows.astype(np.float64))
    unit = np.spacing(exact.astype(np.float32)).astype(np.float64)
    assert np.max(np.abs(y - exact) / unit) <= 1


def test_where_float32_ends() -> None:
    x = jnp.array([0.0, -0.0, -1e-30, -87.4, -104.0, -3e38, -jnp.inf, jnp.nan])
    y = jax.jit(_exp.exp)(x)
    np.testing.assert_array_equal(y, [1, 1, 1, 0, 0, 0, 0, np.nan])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_dtypes_are_those_of_jax(dtype: str) -> None:
    with jax.enable_x64(True):
        x = jnp.linspace(-20, 0, 37, dtype=dtype)
        y = _exp.exp(x)
        assert y.dtype == x.dtype
        np.testing.assert_array_equal(y, jnp.exp(x))


def test_it_is_its_own_derivative_in_every_mode() -> None:
    x = jnp.array([-3.0, -0.5, 0.0, -jnp.inf])
    y = _exp.exp(x)
    pushed, tangent = jax.jvp(_exp.exp, (x,), (jnp.full_like(x, 2),))
    np.testing.assert_array_equal(pushed, y)
    np.testing.assert_array_equal(tangent, 2 * y)
    pulled = jax.vmap(jax.grad(_exp.exp))(x)
    np.testing.assert_array_equal(pulled, y)
    np.testing.assert_array_equal(jax.vmap(jax.grad(jax.grad(_exp.exp)))(x), y)


def test_other_platforms_take_their_own() -> None:
    x = jax.ShapeDtypeStruct((8,), jnp.float32)
    traced = jax.jit(_exp.exp).trace(x)
    own = "stablehlo.exponential"
    assert own not in traced.lower(lowering_platforms=("cpu",)).as_text()
    for platform in ("cuda", "tpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert own in text
        assert "bitcast_convert" not in text
