"""A drop-in for Optax where Optax is right, and right where it and other peers err.

A test of a defect also shows the defect, so that the claim ends when the peer is fixed.
Peers that are not installed are reproduced by what they compute.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from helpers import turns
from tolerances import assert_gradient, assert_loss

import jaxlosses as jl

SHAPE = (2, 3, 4)
# Two correct losses of order one differ by their rounding.
SAME = {"rtol": 1e-6, "atol": 1e-6}

ours_integer = jl.softmax_cross_entropy_with_integer_labels
ours_dense = jl.softmax_cross_entropy
optax_integer = optax.softmax_cross_entropy_with_integer_labels
optax_dense = optax.softmax_cross_entropy
integer_pair = pytest.mark.parametrize(
    ("loss", "right"),
    [(optax_integer, False), (ours_integer, True)],
    ids=["optax", "ours"],
)


def make_logits(shape: tuple[int, ...] = SHAPE) -> jax.Array:
    return jnp.float32(2 * np.random.default_rng(0).standard_normal(shape))


def batch_and_classes(
    shape: tuple[int, ...], axis: Any
) -> tuple[tuple[int, ...], list[int]]:
    axes = range(len(shape)) if axis is None else np.atleast_1d(axis)
    axes = [int(a) % len(shape) for a in axes]
    batch = tuple(n for i, n in enumerate(shape) if i not in axes)
    return batch, axes


def make_mask(kind: str, shape: tuple[int, ...], axis: Any) -> np.ndarray | None:
    """A mask that leaves class 0, and the first example, as they are."""
    rng = np.random.default_rng(2)
    batch, axes = batch_and_classes(shape, axis)
    if kind == "none":
        return None
    if kind == "examples":
        mask = rng.uniform(size=batch) < 0.7
        mask.flat[:1] = True
        return mask
    mask_shape = list(shape)
    if kind == "one for all":
        mask_shape = [n if i in axes else 1 for i, n in enumerate(shape)]
    mask = rng.uniform(size=mask_shape) < 0.7
    mask[
        tuple(slice(0, 1) if i in axes else slice(None) for i in range(len(shape)))
    ] = 1
    return mask


def value_and_gradients(
    loss: Callable[..., Any], argnums: tuple[int, ...], *args: Any
) -> tuple[Any, Any]:
    """Of a cotangent that is not constant."""
    args = tuple(jnp.asarray(a) if isinstance(a, np.ndarray) else a for a in args)

    def of_differentiated(*differentiated: jax.Array) -> jax.Array:
        full = list(args)
        for i, x in zip(argnums, differentiated, strict=True):
            full[i] = x
        return loss(*full)

    @jax.jit
    def run(*differentiated: jax.Array) -> tuple[Any, Any]:
        value, pull = jax.vjp(of_differentiated, *differentiated)
        cotangent = jnp.float32(np.resize([1.0, -0.5, 2.0], value.shape))
        return value, pull(cotangent)

    return run(*(args[i] for i in argnums))


MASKS = ["none", "examples", "all classes", "one for all"]


@pytest.mark.alternate(6)
@pytest.mark.parametrize(
    ("axis", "mask"), turns([-1, 0, 1, (1, 2), (2, 0), (0, 1, 2)], MASKS), ids=str
)
def test_integer_loss_is_optax_positionally(axis: Any, mask: str) -> None:
    if mask == "one for all" and isinstance(axis, tuple):
        pytest.skip("optax needs the whole mask for several axes")
    if mask == "examples" and isinstance(axis, tuple) and len(axis) == 3:
        pytest.skip("no examples")
    batch, axes = batch_and_classes(SHAPE, axis)
    logits, where = make_logits(), make_mask(mask, SHAPE, axis)
    ids = np.random.default_rng(2).integers(
        math.prod(SHAPE[a] for a in axes), size=batch
    )
    if where is not None and mask != "examples":
        ids = np.zeros_like(ids)  # the class that no mask takes away
    args = (logits, jnp.asarray(ids, jnp.int32), axis, where)
    theirs, (their_gradient,) = value_and_gradients(optax_integer, (0,), *args)
    ours, (our_gradient,) = value_and_gradients(ours_integer, (0,), *args)
    np.testing.assert_allclose(ours, theirs, **SAME)
    np.testing.assert_allclose(our_gradient, their_gradient, **SAME)
    assert np.any(ours > 0.1)


@pytest.mark.alternate(4)
@pytest.mark.parametrize(
    ("axis", "mask"), turns([-1, 0, 1, (1, 2), (2, 0), (0, 1, 2), None], MASKS), ids=str
)
def test_dense_loss_is_optax_positionally(axis: Any, mask: str) -> None:
    if axis is None and mask == "examples":
        pytest.skip("optax cannot expand a mask along axis=None")
    logits, where = make_logits(), make_mask(mask, SHAPE, axis)
    # Optax has the gradient -inf · 0 = NaN by the labels of a class that is masked.
    argnums = (0, 1) if mask == "none" else (0,)
    labels = np.float32(np.random.default_rng(3).uniform(0, 1, SHAPE))
    args = (logits, labels, axis, where)
    theirs, their_gradients = value_and_gradients(optax_dense, argnums, *args)
    ours, our_gradients = value_and_gradients(ours_dense, argnums, *args)
    np.testing.assert_allclose(ours, theirs, **SAME)
    for our_gradient, their_gradient in zip(
        our_gradients, their_gradients, strict=True
    ):
        np.testing.assert_allclose(our_gradient, their_gradient, **SAME)


@pytest.mark.alternate
@pytest.mark.parametrize("shape", [(5,), (4, 5), (1, 1), (3, 1), (2, 3, 300)], ids=str)
def test_losses_are_optax_for_every_shape(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(4)
    logits = make_logits(shape)
    ids = rng.integers(shape[-1], size=shape[:-1], dtype=np.int32)
    labels = np.float32(rng.dirichlet(np.ones(shape[-1]), size=shape[:-1]))
    np.testing.assert_allclose(
        ours_integer(logits, ids), optax_integer(logits, ids), **SAME
    )
    np.testing.assert_allclose(
        ours_dense(logits, labels), optax_dense(logits, labels), **SAME
    )


def test_shared_labels_are_those_of_optax() -> None:
    logits = make_logits((4, 5))
    labels = np.float32([[0.5, 0.25, 0.25, 0, 0]])
    np.testing.assert_allclose(
        ours_dense(logits, labels), optax_dense(logits, labels), **SAME
    )


def test_smoothing_is_that_of_optax() -> None:
    logits = make_logits((4, 5))
    labels = jnp.eye(5)[jnp.array([0, 3, 1, 4])]
    np.testing.assert_allclose(
        ours_dense(logits, labels, label_smoothing=0.1),
        optax_dense(logits, optax.smooth_labels(labels, 0.1)),
        **SAME,
    )


# Optax

LOGITS = np.float32([[1.0, 2.0, 3.0], [0.5, 0.0, -0.5]])


@pytest.mark.alternate
@integer_pair
def test_label_minus_one_is_not_the_last_class(loss: Any, right: bool) -> None:
    labels = jnp.array([-1, 0])
    value, (gradient,) = value_and_gradients(loss, (0,), LOGITS, labels)
    wraps = np.allclose(value[0], loss(LOGITS, jnp.array([2, 0]))[0])
    assert wraps != right
    assert np.all(np.isnan(gradient[0])) == np.isnan(value[0]) == right
    assert np.all(np.isfinite(gradient[1]))


@integer_pair
@pytest.mark.parametrize("label", [3, -100])
def test_nan_of_a_label_that_is_no_class_reaches_the_gradient(
    loss: Any, right: bool, label: int
) -> None:
    labels = jnp.array([label, 0])
    value, (gradient,) = value_and_gradients(loss, (0,), LOGITS, labels)
    assert np.isnan(value[0])
    assert np.all(np.isnan(gradient[0])) == right
    assert np.all(np.isfinite(gradient[1]))


@integer_pair
def test_label_of_a_masked_class_has_no_negative_loss(loss: Any, right: bool) -> None:
    where = jnp.array([[True, True, False]])
    value = loss(LOGITS, jnp.array([2, 0]), where=where)
    assert np.isnan(value[0]) == right
    assert (value[0] < 0) == (not right)


@pytest.mark.parametrize("shape", [(2, 1), (3,)])
def test_labels_of_another_shape_do_not_broadcast(shape: tuple[int, ...]) -> None:
    with jax.numpy_rank_promotion("allow"):
        logits = jnp.zeros((2, 3))
        if shape == (2, 1):
            labels = jnp.zeros(shape, jnp.int32)
            with pytest.raises(ValueError, match="labels: got shape"):
                ours_integer(logits, labels)
        else:
            labels = jnp.ones(shape) / 3
            assert optax_dense(logits, labels).shape == (2,)
        with pytest.raises(ValueError, match="labels: got shape"):
            ours_dense(logits, labels.astype(jnp.float32))
        if shape == (2, 1):
            assert optax_dense(logits, labels.astype(jnp.float32)).shape == (2,)


@pytest.mark.alternate
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_loss_of_16_bit_logits_is_not_rounded_to_16_bits(dtype: str) -> None:
    logits = make_logits((64, 300)).astype(dtype)
    ids = np.arange(64, dtype=np.int32)
    exact = oracle.loss(logits, ids)
    theirs = optax_integer(logits, ids)
    assert theirs.dtype == logits.dtype
    error = np.abs(np.asarray(theirs, np.float64) / exact - 1).max()
    assert error > 100 * 4e-6
    assert_loss(ours_integer(logits, ids), exact, dtype)


def test_a_margin_of_20_nats_is_not_85_percent_wrong() -> None:
    logits, ids = np.float32([[20.0, 0.0]]), np.array([0])
    exact = math.log1p(math.exp(-20))
    error = abs(float(optax_integer(logits, ids)[0]) / exact - 1)
    assert error > 0.5
    assert abs(float(ours_integer(logits, ids)[0]) / exact - 1) < 4e-6


def test_a_margin_of_30_nats_has_a_loss_and_a_gradient() -> None:
    logits, ids = np.float32([[30.0, 0.0]]), np.array([0])
    theirs, (their_gradient,) = value_and_gradients(optax_integer, (0,), logits, ids)
    assert theirs[0] == 0
    assert their_gradient[0, 0] == 0
    ours, (gradient,) = value_and_gradients(ours_integer, (0,), logits, ids)
    np.testing.assert_allclose(ours, math.log1p(math.exp(-30)), rtol=4e-6)
    np.testing.assert_allclose(gradient[0, 0], -math.exp(-30), rtol=1e-5)


def test_gradients_through_a_mask_are_those_of_the_classes_that_exist() -> None:
    # optax 1335: with a mask, integer and dense losses have different gradients;
    # jax 19490: NaN, where the mask leaves no class.
    where = jnp.array([[True, False, True], [False, False, False]])
    ids, labels = jnp.array([0, 1]), jnp.float32([[1, 0, 0], [0, 1, 0]])
    exact = oracle.gradients(LOGITS, labels, where=where)
    for loss, target in ((ours_integer, ids), (ours_dense, labels)):
        gradient = jax.grad(lambda z: loss(z, target, where=where).sum())(LOGITS)  # noqa: B023
        assert_gradient(gradient, exact["logits"], "float32")
        assert np.all(gradient[1] == 0)


def test_a_logit_of_minus_infinity_spoils_no_gradient() -> None:
    # optax 1762: 0 · (-inf) is NaN.
    logits = jnp.float32([[-math.inf, 2.0, 3.0]])
    labels = jnp.float32([[0, 1, 0]])

    def total(loss: Callable[..., Any], logits: jax.Array) -> jax.Array:
        return loss(logits, labels).sum()

    assert np.isnan(total(optax_dense, logits))
    value, gradient = jax.value_and_grad(functools.partial(total, ours_dense))(logits)
    np.testing.assert_allclose(value, math.log(1 + math.e), rtol=1e-6)
    assert_gradient(gradient, oracle.gradients(logits, labels)["logits"], "float32")


# PyTorch


def test_a_mean_over_no_counted_example_is_zero_and_not_nan() -> None:
    # torch.nn.functional.cross_entropy divides zero by zero.
    labels = jnp.array([-100, -100])

    def mean(logits: jax.Array) -> jax.Array:
        return ours_integer(logits, labels, ignore_index=-100, reduction="mean")

    value, gradient = jax.value_and_grad(mean)(LOGITS)
    assert value == 0
    assert np.all(gradient == 0)


def test_smoothing_is_divided_by_the_class_weights_of_the_labels() -> None:
    # As in PyTorch, whose users expect another denominator: issues 104776 and 70348.
    w, alpha = np.array([1.0, 2.0, 4.0]), 0.3
    nll = np.log(np.exp(LOGITS).sum(-1, keepdims=True)) - LOGITS
    labels = np.array([2, 0])
    terms = (1 - alpha) * w[labels] * nll[[0, 1], labels] + alpha * (w * nll).mean(-1)
    mean = ours_integer(
        LOGITS,
        labels,
        class_weights=jnp.float32(w),
        label_smoothing=alpha,
        reduction="mean",
    )
    np.testing.assert_allclose(mean, terms.sum() / w[labels].sum(), rtol=2e-6)


# T5X and MaxText

TARGETS = np.float32([[0.2, 0.5, 0.3], [0.0, 2.0, 0.5]])


def test_targets_get_a_gradient() -> None:
    # `cross_entropy_with_logits` of T5X returns zeros.
    gradient = jax.grad(lambda q: ours_dense(LOGITS, q).sum())(TARGETS)
    exact = oracle.gradients(LOGITS, TARGETS)["labels"]
    assert np.all(exact > 0)
    assert_gradient(gradient, exact, "float32")


def test_gradient_does_not_assume_that_labels_sum_to_one() -> None:
    gradient = jax.grad(lambda z: ours_dense(z, TARGETS).sum())(LOGITS)
    exact = oracle.gradients(LOGITS, TARGETS)
    assert_gradient(gradient, exact["logits"], "float32", exact["logits_terms"])
    # Theirs is the softmax less the targets.
    p = np.exp(LOGITS) / np.exp(LOGITS).sum(-1, keepdims=True)
    assert np.abs(p - TARGETS - exact["logits"])[1].max() > 0.3
    np.testing.assert_allclose(gradient.sum(-1), 0, atol=1e-6)


@pytest.mark.alternate
@pytest.mark.parametrize("dense", [False, True])
def test_z_loss_has_its_cotangent(dense: bool) -> None:
    # T5X drops the cotangent of the z-loss that it returns beside the loss.
    labels = TARGETS if dense else np.array([2, 0])
    loss = ours_dense if dense else ours_integer

    def part(logits: jax.Array) -> jax.Array:
        return (loss(logits, labels, z_loss=0.5) - loss(logits, labels)).sum()

    gradient = jax.grad(part)(LOGITS)
    total = np.exp(LOGITS).sum(-1, keepdims=True)
    exact = 2 * 0.5 * np.log(total) * np.exp(LOGITS) / total
    np.testing.assert_allclose(gradient, exact, rtol=1e-5, atol=1e-6)


# Levanter


@pytest.mark.alternate
@pytest.mark.parametrize("dense", [False, True])
def test_gradient_through_the_cap_has_the_derivative_of_tanh(dense: bool) -> None:
    # Levanter's backward pass of a capped loss leaves it out.
    labels = TARGETS if dense else np.array([2, 0])
    loss = ours_dense if dense else ours_integer
    gradient = jax.grad(lambda z: loss(z, labels, logit_softcap=2.0).sum())(LOGITS)
    exact = oracle.gradients(LOGITS, labels, logit_softcap=2.0)
    assert_gradient(gradient, exact["logits"], "float32", exact["logits_terms"])
    slope = 1 - np.tanh(LOGITS / 2) ** 2
    assert np.abs(exact["logits"] / slope - exact["logits"]).max() > 0.1
