"""Recipes of the page, beside the same written out on all logits in float64."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import page

import jaxlosses as jl

# Every function that the page defines here.
RECIPES = {"distilled", "two_hot", "contrastive", "contrastive_in_pieces", "of_depths"}
T, D, V = 26, 6, 33


def arrays(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def assert_alike(
    ours: Callable[..., Any], textbook: Callable[..., Any], *given: Any
) -> None:
    """Values and gradients by all that is given."""
    every = tuple(range(len(given)))
    found = jax.jit(jax.value_and_grad(ours, every))(*given)
    with jax.enable_x64(True):
        wide = [np.asarray(a, np.float64) for a in given]
        want = jax.tree.map(np.asarray, jax.value_and_grad(textbook, every)(*wide))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * np.max(abs(b)))


@pytest.mark.without_llvm_passes
def test_a_student_learns_from_the_text_and_from_a_teacher() -> None:
    hidden, kernel, wide, of_teacher = arrays((T, D), (D, V), (T, 9), (9, V))
    labels = np.random.default_rng(1).integers(0, V, T)
    labels[::5] = -100

    def ours(hidden: Any, kernel: Any) -> Any:
        teacher = (wide, of_teacher)
        return page()["distilled"]((hidden, kernel), teacher, labels)

    def textbook(hidden: Any, kernel: Any) -> Any:
        on, z = labels >= 0, hidden @ kernel
        hard = jnp.where(on, -jax.nn.log_softmax(z)[jnp.arange(T), labels], 0)
        t = jax.nn.log_softmax(np.float64(wide) @ np.float64(of_teacher) / 2)
        soft = jnp.sum(jnp.exp(t) * (t - jax.nn.log_softmax(z / 2)), -1)
        return jnp.sum(jnp.where(on, hard + 4 * soft, 0)) / 2 / float(on.sum())

    assert_alike(ours, textbook, hidden, kernel)


@pytest.mark.without_llvm_passes
def test_two_hot_targets_have_the_mean_of_their_value() -> None:
    atoms = jnp.linspace(-2, 2, 9)
    values = jnp.array([-2.0, -1.9, 0.0, 0.33, 2.0])
    ids, probs = page()["two_hot"](values, atoms)
    np.testing.assert_allclose((atoms[ids] * probs).sum(-1), values, atol=1e-6)
    (logits,) = arrays((5, 9))
    dense = jnp.zeros((5, 9)).at[jnp.arange(5)[:, None], ids].add(probs)
    found = jl.softmax_cross_entropy_with_top_k_labels(logits, ids, probs)
    want = jl.softmax_cross_entropy(logits, dense)
    np.testing.assert_allclose(found, want, rtol=2e-6)


@pytest.mark.without_llvm_passes
def test_a_contrastive_loss_is_that_of_both_axes() -> None:
    def textbook(left: Any, right: Any, scale: Any) -> Any:
        scores = scale * left @ right.T
        both = (jax.nn.log_softmax(scores, axis) for axis in (0, 1))
        return -sum(jnp.trace(log_p) for log_p in both) / 2 / len(left)

    given = *arrays((T, D), (T, D)), np.float32(1.7)
    assert_alike(page()["contrastive"], textbook, *given)
    assert_alike(page()["contrastive_in_pieces"], textbook, *given)


@pytest.mark.without_llvm_passes
def test_depths_in_one_call_are_the_sum_of_calls() -> None:
    hidden, kernel = arrays((3, T, D), (D, V))
    labels = np.random.default_rng(1).integers(0, V, (3, T))
    labels[0, ::5], labels[2, 20:] = -100, -100
    weights = np.array([1.0, 0.3, 0.1], np.float32)

    def ours(hidden: Any, kernel: Any, weights: Any) -> Any:
        return page()["of_depths"](hidden, kernel, labels, weights)[0]

    def calls(hidden: Any, kernel: Any, weights: Any) -> Any:
        each = [
            jl.linear_softmax_cross_entropy(
                h, kernel, y, ignore_index=-100, reduction="sum"
            )
            for h, y in zip(hidden, labels, strict=True)
        ]
        return jnp.sum(weights * jnp.stack(each))

    # By the weights, too, though a sum of examples takes one for each of them.
    assert_alike(ours, calls, hidden, kernel, weights)
    _, stats = page()["of_depths"](hidden, kernel, labels, weights)
    assert stats.nll.shape == (3, T)
    np.testing.assert_allclose(stats.weight, weights[:, None] * (labels >= 0))
