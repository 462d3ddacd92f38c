"""`softmax` and `log_softmax` against NumPy in long double, and their derivatives."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from tolerances import TABLE, accumulated, assert_gradient, assert_loss

import jaxlosses as jl

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "softmax": jl.softmax,
    "log_softmax": jl.log_softmax,
}
both = pytest.mark.parametrize("name", FUNCTIONS)
DTYPES = ["float32", "float64", "bfloat16", "float16"]
SHAPE = (2, 3, 4)


@np.errstate(all="ignore")
def exact(name: str, logits: Any, axis: Any = -1, where: Any = True) -> np.ndarray:
    """From the excess over the largest, as log p = -(log1p(excess) + (m - z))."""
    z = np.asarray(logits).astype(np.longdouble)
    axis = tuple(range(z.ndim)) if axis is None else axis
    if where is not True and where.ndim != z.ndim:
        where = np.expand_dims(where, axis)
    z = np.where(where, z, -np.inf)
    e = np.exp(z - z.max(axis, keepdims=True))
    # One class at the maximum is left out of the sum, not subtracted from it.
    order = list(np.atleast_1d(axis) % z.ndim)
    rest = [a for a in range(z.ndim) if a not in order]
    rows = e.transpose(rest + order).reshape(*[z.shape[a] for a in rest], -1)
    np.put_along_axis(rows, rows.argmax(-1)[..., None], 0, -1)
    spread = np.expand_dims(np.log1p(rows.sum(-1)), tuple(order))
    log_p = (z - z.max(axis, keepdims=True)) - spread
    nothing = np.broadcast_to(~np.any(where & (z == z), axis, keepdims=True), z.shape)
    masked = ~np.broadcast_to(where, z.shape) | (nothing & (where is not True))
    if name == "softmax":
        return np.where(masked, 0, np.exp(log_p)).astype(np.float64)
    return np.where(masked, -np.inf, log_p).astype(np.float64)


def assert_value(name: str, actual: Any, expected: np.ndarray, dtype: str) -> None:
    """A log-probability is a loss, a probability is a gradient; 16 bits are rounded."""
    row = TABLE[dtype]
    assert actual.dtype == jnp.dtype(dtype)
    assert actual.shape == expected.shape
    got, info = np.asarray(actual, np.float64), jnp.finfo(dtype)
    # A log-probability of -7e4 is none that float16 can hold.
    expected = np.where(np.abs(expected) > float(info.max), -np.inf, expected)
    infinite = np.isinf(expected) | np.isnan(expected)
    np.testing.assert_array_equal(got[infinite], expected[infinite])
    got, expected = got[~infinite], expected[~infinite]
    tolerance = row.loss if name == "log_softmax" else row.gradient
    tiny = float(info.smallest_subnormal if dtype == "float16" else info.tiny)
    allowed = (tolerance + row.rounding) * np.abs(expected) + tiny
    np.testing.assert_array_less(np.abs(got - expected), allowed)


def rows(classes: int, dtype: str) -> np.ndarray:
    rng = np.random.default_rng(classes)
    groups = [
        oracle.confident_logits(rng, 3, classes, margin, scale, jnp.dtype(dtype))[0]
        for margin in (0.0, 5.0, 20.0, 40.0, 80.0)
        for scale in (1e-3, 1.0, 30.0, 1e4)
    ]
    return np.concatenate(groups)


def order_one(shape: tuple[int, ...] = SHAPE, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(dtype)


def mask(shape: tuple[int, ...]) -> np.ndarray:
    where = np.random.default_rng(1).uniform(size=shape) < 0.7
    where.flat[0] = True
    return where


# Values


def test_published_example_has_its_probabilities() -> None:
    p = jl.softmax(jnp.array([0.1, 0.3, 0.5, 0.9]))
    np.testing.assert_allclose(
        p, [0.16838508, 0.205666, 0.25120102, 0.37474789], rtol=1e-6
    )


@pytest.mark.alternate(4)
@both
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_digit_is_right_up_to_80_nats(name: str, dtype: str) -> None:
    for classes in (1, 2, 10, 1000):
        logits = rows(classes, dtype)
        with jax.enable_x64(dtype == "float64"):
            actual = FUNCTIONS[name](logits)
        assert_value(name, actual, exact(name, logits), dtype)


@both
def test_every_digit_is_right_for_50257_classes(name: str) -> None:
    logits, _ = oracle.confident_logits(np.random.default_rng(0), 6, 50257, 30.0)
    assert_value(name, FUNCTIONS[name](logits), exact(name, logits), "float32")


def test_log_probability_of_a_confident_class_keeps_its_digits() -> None:
    logits = np.float32([[30.0, 0.0]])
    assert jax.nn.log_softmax(logits)[0, 0] == 0
    np.testing.assert_allclose(
        jl.log_softmax(logits)[0, 0], -np.log1p(np.exp(-30)), rtol=4e-6
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_probabilities_sum_to_one(dtype: str) -> None:
    logits = rows(1000, dtype)
    with jax.enable_x64(dtype == "float64"):
        p = np.asarray(jl.softmax(logits), np.float64)
    row, info = TABLE[dtype], jnp.finfo(dtype)
    atol = 1000 * float(info.smallest_subnormal) if dtype == "float16" else 0
    np.testing.assert_allclose(
        p.sum(-1), 1, rtol=row.gradient + row.rounding, atol=atol
    )


@pytest.mark.alternate(3)
@pytest.mark.without_llvm_passes
@both
@pytest.mark.parametrize(
    "axis", [-1, 0, 1, (1, 2), (2, 0), (-1, 0), (0, 1, 2), None], ids=str
)
def test_classes_are_any_axes(name: str, axis: Any) -> None:
    logits = order_one()
    assert_value(
        name, FUNCTIONS[name](logits, axis), exact(name, logits, axis), "float32"
    )
    theirs = getattr(jax.nn, name)(logits, axis)
    np.testing.assert_allclose(FUNCTIONS[name](logits, axis), theirs, rtol=1e-5)


# Masks


@pytest.mark.alternate(4)
@both
@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 1, 4), (2, 1, 1), (2, 3)], ids=str)
def test_masked_class_has_no_probability_and_no_gradient(
    name: str, shape: tuple[int, ...]
) -> None:
    logits, where = order_one(), mask(shape)
    masked = ~np.broadcast_to(where[..., None] if where.ndim == 2 else where, SHAPE)
    logits[masked] = np.nan  # what does not exist may hold anything
    function = functools.partial(FUNCTIONS[name], where=where)
    value, pull = jax.vjp(function, logits)
    assert_value(name, value, exact(name, logits, where=where), "float32")
    none = 0 if name == "softmax" else -np.inf
    assert masked.any()
    assert np.all(np.asarray(value)[masked] == none)
    (gradient,) = pull(jnp.float32(np.random.default_rng(2).standard_normal(SHAPE)))
    assert np.all(np.isfinite(gradient))
    assert np.all(np.asarray(gradient)[masked] == 0)
    assert np.any(np.asarray(gradient)[~masked] != 0)
    _, tangent = jax.jvp(function, (logits,), (jnp.ones_like(logits),))
    assert np.all(np.asarray(tangent)[masked] == 0)


@both
@pytest.mark.parametrize("axis", [0, (2, 0)], ids=str)
def test_mask_applies_along_any_axis(name: str, axis: Any) -> None:
    logits, where = order_one(), mask(SHAPE)
    actual = FUNCTIONS[name](logits, axis, where)
    assert_value(name, actual, exact(name, logits, axis, where), "float32")


@both
def test_where_no_class_is_left_there_is_no_probability_and_no_gradient(
    name: str,
) -> None:
    logits, where = order_one((3, 4)), np.ones((3, 4), bool)
    where[1] = False
    logits[1] = np.nan
    value, pull = jax.vjp(functools.partial(FUNCTIONS[name], where=where), logits)
    assert np.all(value[1] == (0 if name == "softmax" else -np.inf))
    (gradient,) = pull(jnp.ones_like(value))
    assert np.all(gradient[1] == 0)
    assert np.all(np.isfinite(gradient))


@both
def test_no_class_and_no_example_are_empty_arrays(name: str) -> None:
    for shape in ((3, 0), (0, 4)):
        logits = jnp.zeros(shape)
        value, pull = jax.vjp(FUNCTIONS[name], logits)
        assert value.shape == pull(value)[0].shape == shape


# Logits that are not finite


@both
def test_minus_infinity_is_a_class_of_probability_zero(name: str) -> None:
    logits = np.float32([[-np.inf, 0.0, 1.0]])
    value, pull = jax.vjp(FUNCTIONS[name], logits)
    assert value[0, 0] == (0 if name == "softmax" else -np.inf)
    assert_value(name, value[:, 1:], exact(name, logits[:, 1:]), "float32")
    (gradient,) = pull(jnp.float32([[0.0, 1.0, 2.0]]))
    assert gradient[0, 0] == 0
    assert np.all(np.isfinite(gradient))


@both
@pytest.mark.parametrize(
    "row", [[np.nan, 0, 1], [np.inf, 0, 1], [-np.inf] * 3], ids=str
)
def test_a_diverged_example_is_nan_and_no_other(name: str, row: list[float]) -> None:
    logits = np.float32([row, [0, 1, 2]])
    value, pull = jax.vjp(FUNCTIONS[name], logits)
    np.testing.assert_array_equal(np.isnan(value), [[True] * 3, [False] * 3])
    (gradient,) = pull(jnp.ones_like(value))
    assert np.all(np.isnan(gradient[0]))
    assert np.all(np.isfinite(gradient[1]))


# Derivatives


@pytest.mark.alternate
@both
@pytest.mark.parametrize("masked", [False, True])
def test_derivatives_of_both_modes_and_orders_are_those_of_jax_nn(
    name: str, masked: bool
) -> None:
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        logits = rng.standard_normal((3, 4))
        a, b, c = (rng.standard_normal((3, 4)) for _ in range(3))
        where = None
        if masked:
            # By a mask JAX has NaN derivatives of log_softmax, by a large negative
            # number none; what a masked output would weigh is dropped.
            where = np.array([[True, False, True, True]])
            c = np.where(where, c, 0)

        def ours(z: jax.Array) -> jax.Array:
            out = FUNCTIONS[name](z, where=where)
            out = out if where is None else jnp.where(where, out, 0)
            return jnp.sum(c * out)

        def theirs(z: jax.Array) -> jax.Array:
            z = z if where is None else jnp.where(where, z, -1e30)
            out = getattr(jax.nn, name)(z)
            return jnp.sum(c * (out if where is None else jnp.where(where, out, 0)))

        def derivatives(f: Callable[..., Any]) -> tuple[Any, ...]:
            def along(z: jax.Array) -> jax.Array:
                return jnp.vdot(jax.grad(f)(z), b)

            return (
                jax.grad(f)(logits),
                jax.jvp(f, (logits,), (a,))[1],
                jax.grad(along)(logits),
                jax.jvp(jax.grad(f), (logits,), (a,))[1],
                jax.grad(lambda z: jax.jvp(f, (z,), (a,))[1])(logits),
                jax.jvp(along, (logits,), (a,))[1],
                jax.jacfwd(jax.jacfwd(f))(logits),
            )

        both_derivatives = jax.jit(lambda: (derivatives(ours), derivatives(theirs)))()
        for got, expected in zip(*both_derivatives, strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.alternate
@both
def test_derivatives_match_differences(name: str) -> None:
    rng = np.random.default_rng(4)
    with jax.enable_x64(True):
        logits, direction = rng.standard_normal((2, 3, 4))
        function = functools.partial(FUNCTIONS[name], axis=(1, 0))
        h = 1e-3

        def difference(f: Callable[..., Any]) -> Any:
            near = f(logits + h * direction) - f(logits - h * direction)
            far = f(logits + 2 * h * direction) - f(logits - 2 * h * direction)
            return (8 * near - far) / (12 * h)

        def tangent(z: jax.Array) -> jax.Array:
            return jax.jvp(function, (z,), (direction,))[1]

        np.testing.assert_allclose(tangent(logits), difference(function), atol=1e-10)
        second = jax.jvp(tangent, (logits,), (direction,))[1]
        np.testing.assert_allclose(second, difference(tangent), atol=1e-10)


@pytest.mark.alternate
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_a_log_probability_keeps_its_digits(dtype: str) -> None:
    logits, ids = oracle.confident_logits(
        np.random.default_rng(5), 8, 10, 5.0, 1.0, jnp.dtype(dtype)
    )
    cotangent = -np.eye(10)[ids]
    with jax.enable_x64(dtype == "float64"):
        value, pull = jax.vjp(jl.log_softmax, jnp.asarray(logits))
        (gradient,) = pull(jnp.asarray(cotangent, dtype))
    assert gradient.dtype == value.dtype == jnp.dtype(dtype)
    # 1 - p_y is a difference here, unlike in the losses: relative to one.
    assert_gradient(
        gradient, oracle.gradients(logits, ids)["logits"], dtype, np.ones((8, 10))
    )


@pytest.mark.alternate(4)
@both
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_results_are_rounded_once(name: str, dtype: str) -> None:
    logits = jnp.asarray(order_one((16, 300)), dtype)
    value, pull = jax.vjp(FUNCTIONS[name], logits)
    wide = FUNCTIONS[name](logits.astype(jnp.float32))
    np.testing.assert_array_equal(value, wide.astype(dtype))
    (gradient,) = pull(jnp.ones_like(value).at[:, ::2].set(-1))
    assert gradient.dtype == jnp.dtype(dtype)
    _, wide_pull = jax.vjp(FUNCTIONS[name], logits.astype(jnp.float32))
    (wide_gradient,) = wide_pull(jnp.ones_like(wide).at[:, ::2].set(-1))
    np.testing.assert_array_equal(gradient, wide_gradient.astype(dtype))


@pytest.mark.alternate
@pytest.mark.without_llvm_passes
@both
def test_outer_transforms_change_nothing(name: str) -> None:
    logits = jnp.asarray(order_one((3, 4)))
    value = FUNCTIONS[name](logits)
    np.testing.assert_allclose(jax.jit(FUNCTIONS[name])(logits), value, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(FUNCTIONS[name])(logits), value, rtol=1e-6)
    checkpointed = jax.checkpoint(FUNCTIONS[name])
    np.testing.assert_allclose(
        jax.grad(lambda z: checkpointed(z)[:, 0].sum())(logits),
        jax.grad(lambda z: FUNCTIONS[name](z)[:, 0].sum())(logits),
        rtol=1e-6,
        atol=1e-7,
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_loss_is_minus_the_log_probability_of_the_label(dtype: str) -> None:
    logits, ids = oracle.confident_logits(
        np.random.default_rng(6), 8, 10, 25.0, dtype=dtype
    )
    with jax.enable_x64(dtype == "float64"):
        log_p = jl.log_softmax(logits)
        assert log_p.dtype == accumulated(dtype)
        assert_loss(-log_p[np.arange(8), ids], oracle.loss(logits, ids), dtype)
