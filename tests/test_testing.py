"""`check_loss` finds what is wrong, `check_labels` says where."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import sweep
from jax.experimental import checkify

import jaxlosses as jl
from jaxlosses.testing import check_labels, check_loss

integer = jl.softmax_cross_entropy_with_integer_labels


def with_gradient(gradient: Callable[..., Any]) -> Callable[..., Any]:
    """Our integer loss with another gradient by the logits."""

    @jax.custom_vjp
    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        return integer(logits, labels)

    def backward(residuals: Any, g: jax.Array) -> tuple[jax.Array, None]:
        logits, labels = residuals
        right = jl.softmax(logits) - jax.nn.one_hot(labels, 11, dtype=logits.dtype)
        return gradient(g[:, None].astype(logits.dtype) * right), None

    loss.defvjp(lambda *args: (loss(*args), args), backward)
    return loss


@pytest.mark.long
def test_the_public_losses_hold_entry_by_entry() -> None:
    checks = check_loss(integer, strict=True)
    assert {check.dtype for check in checks} == {"float64", "float32", "bfloat16"}
    assert {check.scale for check in checks} == {1.0, 30.0, 1000.0}
    assert {check.against for check in checks} == {"float64", "differences"}
    forward = check_loss(functools.partial(integer, forward_mode=True), strict=True)
    assert "forward mode" in {check.against for check in forward}
    rng = np.random.default_rng(0)
    dense = check_loss(
        jl.softmax_cross_entropy,
        rng.normal(size=(6, 11)),
        rng.dirichlet(np.ones(11), size=6),
    )
    assert {"gradient of argument 0", "gradient of argument 1"} <= {
        check.quantity for check in dense
    }


@pytest.mark.without_llvm_passes
def test_a_rule_of_the_right_gradient_passes() -> None:
    check_loss(with_gradient(lambda g: g))


WRONG: dict[str, Callable[..., Any]] = {
    "scaled": lambda g: 0.99 * g,
    "negated": lambda g: -g,
    "dropped": lambda g: jnp.zeros_like(g),
    "one entry": lambda g: g.at[2, 3].add(jnp.asarray(1e-4, g.dtype)),
    "of another row": lambda g: jnp.roll(g, 1, axis=0),
}


@pytest.mark.without_llvm_passes
@pytest.mark.parametrize(
    "name", sweep(WRONG, lambda name: name in ("one entry", "of another row"))
)
def test_a_planted_wrong_gradient_is_found(name: str) -> None:
    with pytest.raises(AssertionError, match="derivative by argument 0") as error:
        check_loss(with_gradient(WRONG[name]))
    message = str(error.value)
    assert "differences" in message
    assert all(word in message for word in ("got", "expected", "error", "position"))


@pytest.mark.without_llvm_passes
def test_a_gradient_wrong_in_one_dtype_only_is_found() -> None:
    def wrong(g: jax.Array) -> jax.Array:
        return g * (0.9 if g.dtype == jnp.bfloat16 else 1.0)

    with pytest.raises(AssertionError, match="gradient of argument 0") as error:
        check_loss(with_gradient(wrong))
    rows = str(error.value).splitlines()[2:]
    assert rows
    assert all(row.startswith("bfloat16") for row in rows)


@pytest.mark.without_llvm_passes
def test_a_wrong_value_is_found_by_a_reference() -> None:
    def wrong(logits: jax.Array, labels: jax.Array) -> jax.Array:
        return integer(logits, labels) + 1e-3

    check_loss(wrong)  # it agrees with itself
    with pytest.raises(AssertionError, match="value"):
        check_loss(wrong, reference=integer)


@pytest.mark.without_llvm_passes
def test_a_wrong_forward_rule_is_found() -> None:
    @jax.custom_jvp
    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        return integer(logits, labels, forward_mode=True)

    @loss.defjvp
    def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        logits, labels = primals
        right = jl.softmax(logits) - jax.nn.one_hot(labels, 11, dtype=logits.dtype)
        out = loss(*primals)
        return out, 1.01 * jnp.sum(right * tangents[0], -1).astype(out.dtype)

    with pytest.raises(AssertionError, match="differences"):
        check_loss(loss)


@pytest.mark.without_llvm_passes
def test_strict_tells_a_loss_that_cancels_from_one_that_does_not() -> None:
    logits = np.zeros((2, 11))
    logits[0, 4] = 25.0
    labels = np.array([4, 4])
    theirs = optax.softmax_cross_entropy_with_integer_labels
    check_loss(integer, logits, labels, scales=(1.0,), strict=True)
    check_loss(theirs, logits, labels, scales=(1.0,), dtypes=("float64", "float32"))
    with pytest.raises(AssertionError, match="value"):
        check_loss(theirs, logits, labels, scales=(1.0,), strict=True)


def test_a_loss_of_another_shape_than_its_reference_is_named() -> None:
    def summed(logits: jax.Array, labels: jax.Array) -> jax.Array:
        return jnp.sum(integer(logits, labels), keepdims=True)

    with pytest.raises((AssertionError, ValueError), match="shape"):
        check_loss(summed, reference=integer)


LABELS = [
    (np.array([0, 3, 1]), "got 3 at position (1,), expected class ids from 0 to 2. "),
    (np.array([[0, 1], [-1, 7]]), "got -1 at position (1, 0), expected"),
    (np.array([0, 255], np.uint8), "got 255 at position (1,)"),
    (np.array([2**32], np.int64), "got 4294967296 at position (0,)"),
]


@pytest.mark.parametrize(("labels", "message"), LABELS)
def test_the_first_bad_label_is_named(labels: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match="labels: ") as error:
        check_labels(labels, 3)
    assert message in str(error.value)
    assert "ignore_index" in str(error.value)


def test_good_labels_and_the_ignored_one_pass() -> None:
    check_labels(jnp.array([0, 2, -100]), 3, ignore_index=-100)
    check_labels(np.array([], np.int32), 3)
    check_labels(np.array([0, 255], np.uint8), 300)
    with pytest.raises(ValueError, match=r"or ignore_index -100"):
        check_labels(jnp.array([-1]), 3, ignore_index=-100)


def test_labels_of_floats_are_refused() -> None:
    with pytest.raises(TypeError, match="labels: got dtype float32"):
        check_labels(jnp.array([0.0]), 3)


@pytest.mark.parametrize("bad", [-1, 3])
def test_traced_labels_are_checked_under_checkify(bad: int) -> None:
    checked = checkify.checkify(
        jax.jit(lambda y: check_labels(y, 3, ignore_index=-100))
    )
    error, _ = checked(jnp.array([[0, -100], [2, 1]]))
    assert error.get() is None
    error, _ = checked(jnp.array([[0, 1], [bad, 2]]))
    assert f"labels: got {bad} at flat position 2, expected" in error.get()
    error, _ = checked(jnp.zeros((0,), jnp.int32))
    assert error.get() is None
