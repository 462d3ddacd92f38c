"""Means over more than one call: accumulated steps, and examples of all devices."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import LOSSES
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxlosses as jl

pytestmark = pytest.mark.without_llvm_passes

B, V = 24, 7
OPTIONS = {
    "plain": {},
    "z-loss": {"z_loss": 0.1},
    "all": {"z_loss": 0.1, "label_smoothing": 0.2, "class_weights": True},
}


class Problem:
    """Logits and labels, of which few examples count, and some devices have none."""

    def __init__(self, name: str, options: dict[str, Any]) -> None:
        rng = np.random.default_rng(0)
        self.logits = rng.normal(size=(B, V)).astype(np.float32)
        ids = rng.integers(0, V, B)
        self.weights = rng.uniform(0.5, 2, B).astype(np.float32)
        self.weights[:6] = 0  # two devices of eight
        self.weights[9::5] = 0
        self.labels = np.eye(V, dtype=np.float32)[ids] if name == "dense" else ids
        self.options = dict(options)
        if self.options.pop("class_weights", False):
            self.options["class_weights"] = np.arange(1, V + 1, dtype=np.float32)
        self.function = functools.partial(LOSSES[name], **self.options)

    def mean(self, logits: Any, labels: Any, weights: Any, **more: Any) -> jax.Array:
        return self.function(logits, labels, weights=weights, reduction="mean", **more)

    def exact(self) -> tuple[np.ndarray, np.ndarray]:
        given = self.options | {"weights": self.weights, "reduction": "mean"}
        value = oracle.loss(self.logits, self.labels, **given)
        return value, oracle.gradients(self.logits, self.labels, **given)["logits"]


def assert_exact(problem: Problem, value: Any, gradient: Any) -> None:
    exact, by_logits = problem.exact()
    np.testing.assert_allclose(value, exact, rtol=3e-6)
    np.testing.assert_allclose(gradient, by_logits, rtol=1e-5, atol=1e-8)


def on_eight_devices(run: Callable[..., Any]) -> Callable[..., Any]:
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    return jax.shard_map(run, mesh=mesh, in_specs=P("data"), out_specs=P())


@pytest.mark.alternate(8)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_a_mean_over_devices_is_the_mean_of_one_call(name: str, options: str) -> None:
    problem = Problem(name, OPTIONS[options])
    local = functools.partial(problem.mean, batch_axis_name="data")
    arguments = problem.logits, problem.labels, problem.weights
    # The gradient of all from outside, and that of its part inside each device.
    outside = jax.jit(jax.value_and_grad(on_eight_devices(local)))
    assert_exact(problem, *outside(*arguments))
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    inside = jax.shard_map(
        jax.value_and_grad(local),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=(P(), P("data")),
    )
    assert_exact(problem, *jax.jit(inside)(*arguments))


@pytest.mark.alternate(3)
@pytest.mark.parametrize("name", LOSSES)
def test_a_sum_over_devices_is_the_sum_of_one_call(name: str) -> None:
    problem = Problem(name, {})
    options = {"reduction": "sum", "batch_axis_name": ("data",)}

    def total(logits: Any, labels: Any, weights: Any) -> jax.Array:
        return problem.function(logits, labels, weights=weights, **options)

    value = on_eight_devices(total)(problem.logits, problem.labels, problem.weights)
    given = {"weights": problem.weights, "reduction": "sum"}
    exact = oracle.loss(problem.logits, problem.labels, **given)
    np.testing.assert_allclose(value, exact, rtol=3e-6)


@pytest.mark.alternate(3)
@pytest.mark.parametrize("name", LOSSES)
def test_means_of_steps_add_up_to_the_mean_of_all(name: str) -> None:
    problem = Problem(name, {"z_loss": 0.1})
    arguments = problem.logits, problem.labels, problem.weights
    # Three steps of eight examples, the first of which has one that counts.
    steps = jax.tree.map(lambda a: a.reshape(3, 8, *a.shape[1:]), arguments)
    tokens = problem.weights.sum()

    @jax.jit
    def step(tokens: Any, *arguments: Any) -> Any:
        return jax.value_and_grad(problem.mean)(*arguments, normalizer=tokens)

    values, gradients = zip(
        *(step(tokens, *(a[i] for a in steps)) for i in range(3)), strict=True
    )
    assert_exact(problem, sum(values), np.concatenate(gradients))


@pytest.mark.alternate(4)
@pytest.mark.parametrize("name", LOSSES)
def test_a_given_denominator_divides_all_and_zero_gives_zero(name: str) -> None:
    problem = Problem(name, OPTIONS["all"])
    arguments = problem.logits, problem.labels, problem.weights
    total = problem.function(*arguments[:2], weights=problem.weights, reduction="sum")
    for four in (4, 4.0, jnp.array(4), np.float32(4)):
        mean = problem.mean(*arguments, normalizer=four)
        np.testing.assert_allclose(mean, total / 4, rtol=2e-7)
    for zero in (0, jnp.zeros(())):
        value, gradient = jax.value_and_grad(problem.mean)(*arguments, normalizer=zero)
        assert value == 0
        np.testing.assert_array_equal(gradient, 0)


@pytest.mark.alternate
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "dense"])
def test_statistics_have_the_weight_of_each_example(name: str) -> None:
    problem = Problem(name, OPTIONS["all"])
    ids = np.array(problem.labels)
    ids[10] = -1
    options = {"weights": problem.weights, "ignore_index": -1, "return_stats": True}
    _, stats = problem.function(problem.logits, ids, reduction="sum", **options)
    exact = problem.weights * problem.options["class_weights"][ids]
    exact[10] = 0
    np.testing.assert_array_equal(stats.weight, exact.astype(np.float32))


def test_statistics_of_distributions_have_their_weight() -> None:
    problem = Problem("dense", OPTIONS["all"])
    given = {"weights": problem.weights, "return_stats": True}
    _, stats = problem.function(problem.logits, problem.labels, **given)
    np.testing.assert_array_equal(stats.weight, problem.weights)


def test_examples_and_classes_are_split_at_once() -> None:
    problem = Problem("integer", {})
    mesh = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Auto,) * 2)
    logits = np.pad(problem.logits, ((0, 0), (0, 1)), constant_values=-np.inf)

    def mean(z: Any, y: Any, w: Any) -> jax.Array:
        return jl.softmax_cross_entropy_with_integer_labels(
            z,
            y,
            weights=w,
            reduction="mean",
            axis_name="model",
            batch_axis_name="data",
        )

    split = jax.shard_map(
        mean,
        mesh=mesh,
        in_specs=(P("data", "model"), P("data"), P("data")),
        out_specs=P(),
    )
    value, gradient = jax.jit(jax.value_and_grad(split))(
        logits, problem.labels, problem.weights
    )
    assert_exact(problem, value, gradient[:, :V])


@pytest.mark.alternate(3)
@pytest.mark.parametrize("name", LOSSES)
def test_weights_that_devices_share_have_one_gradient(name: str) -> None:
    """Some devices have nothing to do, while others work through their chunks."""
    problem = Problem(name, {})
    weights, scale = np.full(3, 2, np.float32), np.float32(0.5)
    where = problem.weights != 0

    def local(weights: Any, scale: Any, logits: Any, labels: Any, where: Any) -> Any:
        given = {"weights": weights, "logit_scale": scale, "where": where}
        return problem.function(
            logits, labels, reduction="sum", batch_axis_name="data", **given
        )

    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    specs = (P(), P(), P("data"), P("data"), P("data"))
    total = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
    got = jax.jit(jax.grad(total, (0, 1)))(
        weights, scale, problem.logits, problem.labels, where
    )
    given = {"logit_scale": scale, "weights": np.where(where, 2, 0)}
    given["reduction"] = "sum"
    exact = oracle.gradients(problem.logits, problem.labels, **given)
    each = np.where(where, exact["weights"], 0).reshape(8, 3).sum(0)
    np.testing.assert_allclose(got[0], each, rtol=1e-5)
    np.testing.assert_allclose(got[1], exact["logit_scale"], rtol=1e-5)


@pytest.mark.alternate(3)
@pytest.mark.parametrize("name", LOSSES)
def test_examples_are_split_by_hand_beside_explicit_axes(name: str) -> None:
    """The caller splits by one axis, and the mesh has another."""
    problem = Problem(name, {"z_loss": 0.1})
    mesh = jax.make_mesh((4, 2), ("data", "model"), (AxisType.Explicit,) * 2)
    rows = NamedSharding(mesh, P("data"))
    mean = functools.partial(problem.mean, batch_axis_name="data")
    arguments = jax.device_put(
        (problem.logits, problem.labels, problem.weights), (rows,) * 3
    )
    with jax.set_mesh(mesh):
        split = jax.shard_map(
            mean, in_specs=P("data"), out_specs=P(), axis_names={"data"}
        )
        # Of a shard_map within another JAX (0.10.2, 0.12) lowers no gradient.
        value = jax.jit(split)(*arguments)
    np.testing.assert_allclose(value, problem.exact()[0], rtol=3e-6)


def refusal(run: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(ValueError, match=r"^batch_axis_name: ") as raised:
        jax.make_jaxpr(run)(*arguments)
    return str(raised.value)


@pytest.mark.parametrize("name", LOSSES)
def test_examples_that_are_split_over_nothing_are_refused(name: str) -> None:
    problem = Problem(name, {})
    arguments = problem.logits, problem.labels, problem.weights
    local = functools.partial(problem.mean, batch_axis_name="data")
    assert refusal(local, *arguments) == (
        "batch_axis_name: got 'data', expected a mesh axis of an enclosing shard_map. "
        "Outside of shard_map, shard the arrays and pass None."
    )
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    same = jax.shard_map(local, mesh=mesh, in_specs=P(), out_specs=P())
    assert "is the same everywhere, expected a mesh axis that splits the examples" in (
        refusal(same, *arguments)
    )
    unchecked = jax.shard_map(
        local, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=False
    )
    assert "The gradient could not be right. Leave out check_vma=False" in (
        refusal(unchecked, *arguments)
    )
    alone = functools.partial(problem.function, batch_axis_name="data")
    split = jax.shard_map(alone, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    assert refusal(split, *arguments[:2]) == (
        "batch_axis_name: got 'data' with reduction=\"none\", expected "
        'reduction="sum" or "mean". One loss per example stays where the example is.'
    )


def test_an_axis_that_splits_both_examples_and_classes_is_refused() -> None:
    problem = Problem("integer", {})
    local = functools.partial(problem.mean, axis_name="data", batch_axis_name="data")
    arguments = problem.logits, problem.labels, problem.weights
    assert refusal(on_eight_devices(local), *arguments) == (
        "batch_axis_name: got 'data', expected other mesh axes than "
        "axis_name=('data',). An axis splits the classes or the examples."
    )


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_a_weight_of_zero_has_no_slope_where_the_loss_is_infinite(
    reduction: str,
) -> None:
    logits = jnp.array([[-jnp.inf, 0.0, 1.0], [0.0, 1.0, 2.0]])

    def total(weights: jax.Array) -> jax.Array:
        options = {"weights": weights, "reduction": reduction}
        labels = jnp.array([0, 1])
        loss = jl.softmax_cross_entropy_with_integer_labels(logits, labels, **options)
        return jnp.sum(loss)

    value, slope = jax.value_and_grad(total)(jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(value, 1.4076059, rtol=1e-6)
    np.testing.assert_allclose(slope, [0, 1.4076059], rtol=1e-6)
