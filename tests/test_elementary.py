"""`exp`, `expm1`, `log1p` and `1 - exp(-x)` against numpy in float64."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from jaxlosses import _elementary

LOWEST = -87.3365  # the logarithm of the smallest normal number


def not_positive() -> np.ndarray:
    rng = np.random.default_rng(0)
    multiples = -np.log(2) / 2 * np.arange(252)  # where `n` changes, and halfway
    spread = [-rng.exponential(scale, 20011) for scale in (1e-30, 1e-6, 1e-2, 1, 10)]
    small = -rng.uniform(86, -LOWEST, 20011)
    whole = -rng.uniform(0, 86, 20011)
    a = np.concatenate([multiples, *spread, small, whole, [0.0]]).astype(np.float32)
    return a[a >= LOWEST]


def not_negative() -> np.ndarray:
    rng = np.random.default_rng(1)
    powers = 2.0 ** np.arange(-100, 127)
    turns = 2.0 ** (np.arange(127) + 0.5) - 1  # where `n` changes
    scales = (1e-30, 1e-6, 1e-2, 1, 10, 1e3, 1e7, 1e30)
    spread = [rng.exponential(scale, 20011) for scale in scales]
    a = np.concatenate([powers, turns, *spread, [0.0]]).astype(np.float32)
    beside = np.nextafter(a, np.float32(np.inf))
    return np.concatenate([a, beside, np.abs(a - np.float32(1))])


def one_minus_exp(x: np.ndarray) -> np.ndarray:
    return -np.expm1(-x)


# The logarithm of a sum of exponentials, of which the backward pass takes `exp`.
UP_TO_88 = np.random.default_rng(2).uniform(0, 88, 20011).astype(np.float32)

# The function, what it approximates, arguments, and units in the last place.
Case = tuple[Callable[[Array], Array], Callable[..., np.ndarray], np.ndarray, float]
CASES: dict[str, Case] = {
    "exp": (_elementary.exp, np.exp, np.append(not_positive(), UP_TO_88), 1.0),
    "expm1": (_elementary.expm1, np.expm1, not_positive(), 1.2),
    "log1p": (_elementary.log1p, np.log1p, not_negative(), 1.0),
    "one_minus_exp": (_elementary.one_minus_exp, one_minus_exp, not_negative(), 3.0),
}


def of_jax(name: str) -> Callable[[Array], Array]:
    return getattr(jnp, name, lambda x: -jnp.expm1(-x))


@pytest.mark.parametrize("width", [1, 10, None])
@pytest.mark.parametrize("name", CASES)
def test_error_in_units_of_the_last_place(name: str, width: int | None) -> None:
    function, reference, x, units = CASES[name]
    rows = x if width is None else x[: len(x) // width * width].reshape(-1, width)
    y = np.asarray(jax.jit(function)(rows), np.float64)
    exact = reference(rows.astype(np.float64))
    unit = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    normal = np.abs(exact) >= np.finfo(np.float32).tiny
    assert np.all(y[exact == 0] == 0)
    assert np.max(np.abs(y - exact)[normal] / unit[normal]) <= units


@pytest.mark.parametrize(
    ("name", "x", "y"),
    [
        ("exp", [0.0, -0.0, -1e-30, -87.4, -104.0, -3e38], [1, 1, 1, 0, 0, 0]),
        ("exp", [-np.inf, np.nan], [0, np.nan]),
        ("exp", [89.0, 100.0, 178.0, 3e38, np.inf], [np.inf] * 5),
        ("expm1", [0.0, -0.0, -20.0, -87.4, -104.0, -3e38], [0, 0, -1, -1, -1, -1]),
        ("expm1", [-np.inf, np.nan], [-1, np.nan]),
        ("log1p", [0.0, -0.0, np.inf, np.nan], [0, 0, np.inf, np.nan]),
        ("one_minus_exp", [0.0, -0.0, 40.0, 90.0, 3e38], [0, 0, 1, 1, 1]),
        ("one_minus_exp", [np.inf, np.nan], [1, np.nan]),
    ],
)
def test_where_float32_ends(name: str, x: list[float], y: list[float]) -> None:
    found = jax.jit(CASES[name][0])(jnp.array(x, jnp.float32))
    np.testing.assert_array_equal(found, np.array(y, np.float32))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_other_dtypes_are_those_of_jax(name: str, dtype: str) -> None:
    with jax.enable_x64(True):
        x = jnp.linspace(-20, 0, 37, dtype=dtype)
        x = -x if name in ("log1p", "one_minus_exp") else x
        y = CASES[name][0](x)
        assert y.dtype == x.dtype
        np.testing.assert_array_equal(y, of_jax(name)(x))


@pytest.mark.parametrize(
    ("name", "x", "slope", "curvature"),
    [
        ("exp", -3.0, np.exp(-3), np.exp(-3)),
        ("exp", 0.0, 1, 1),
        ("exp", -np.inf, 0, 0),
        ("expm1", -3.0, np.exp(-3), np.exp(-3)),
        ("expm1", 0.0, 1, 1),
        ("expm1", -np.inf, 0, 0),
        ("log1p", 3.0, 1 / 4, -1 / 16),
        ("log1p", 0.0, 1, -1),
        ("log1p", np.inf, 0, 0),
        ("one_minus_exp", 3.0, np.exp(-3), -np.exp(-3)),
        ("one_minus_exp", 60.0, np.exp(-60), -np.exp(-60)),
        ("one_minus_exp", 0.0, 1, -1),
        ("one_minus_exp", np.inf, 0, 0),
    ],
)
def test_derivatives_in_every_mode(
    name: str, x: float, slope: float, curvature: float
) -> None:
    function, at = CASES[name][0], jnp.asarray(x, jnp.float32)
    value, tangent = jax.jvp(function, (at,), (jnp.full_like(at, 2),))
    assert value == function(at)
    assert tangent == pytest.approx(2 * slope, rel=2e-7)
    assert jax.grad(function)(at) == pytest.approx(slope, rel=2e-7)
    assert jax.grad(jax.grad(function))(at) == pytest.approx(curvature, rel=4e-7)
    assert jax.jacfwd(jax.grad(function))(at) == pytest.approx(curvature, rel=4e-7)


@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("exp", "exponential"),
        ("expm1", "exponential_minus_one"),
        ("log1p", "log_plus"),
        ("one_minus_exp", "exponential_minus_one"),
    ],
)
def test_other_platforms_take_their_own(name: str, operation: str) -> None:
    for number in (8, 80):
        x = jax.ShapeDtypeStruct((number,), jnp.float32)
        traced = jax.jit(CASES[name][0]).trace(x)
        for platform in ("cpu", "cuda", "tpu"):
            text = traced.lower(lowering_platforms=(platform,)).as_text()
            # A few numbers are not worth a vector of a CPU.
            is_ours = platform == "cpu" and number == 80
            assert (f"stablehlo.{operation}" in text) is not is_ours
            assert ("bitcast_convert" in text) is is_ours


@pytest.mark.parametrize("count", [10, 2**24, 2**24 + 2])
def test_ids_are_the_same_as_labels_where_they_are(count: int) -> None:
    """Of more classes than float32 has whole numbers, too."""
    ids = np.array([[0, 1, count - 3, count - 2, count - 1]], np.int32)
    others = [-1, 5, count, count + 1, 2**31 - 1]
    labels = np.array([*ids[0], *others], np.int32)[:, None]
    found = _elementary.same(jnp.asarray(ids), jnp.asarray(labels), count)
    np.testing.assert_array_equal(found, ids == labels)
