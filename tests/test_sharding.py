"""Classes and batch split by hand, inside `shard_map`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxlosses as jl

B, V = 8, 24
MESHES = [(8, 1), (1, 8), (2, 4)]


def make_mesh(shape: tuple[int, int]) -> jax.sharding.Mesh:
    return jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def make_arguments(dense: bool) -> tuple[tuple[Any, ...], tuple[P, ...]]:
    rng = np.random.default_rng(0)
    logits = (3 * rng.normal(size=(B, V))).astype(np.float32)
    ids = rng.integers(0, V, B).astype(np.int32)
    mask = rng.random((B, V)) < 0.8
    mask[np.arange(B), ids] = True
    arguments = (
        logits,
        rng.dirichlet(np.ones(V), B).astype(np.float32) if dense else ids,
        mask,
        rng.random(V).astype(np.float32),
        rng.random(B).astype(np.float32),
        np.float32(-1.3),
    )
    both = P("data", "model")
    labels = both if dense else P("data")
    return arguments, (both, labels, both, P("model"), P("data"), P())


def loss(dense: bool, forward_mode: bool, axis_name: Any = None) -> Any:
    function = jl.softmax_cross_entropy
    if not dense:
        function = jl.softmax_cross_entropy_with_integer_labels

    def with_options(
        logits: Any,
        labels: Any,
        where: Any,
        class_weights: Any,
        weights: Any,
        scale: Any,
    ) -> Any:
        return function(
            logits,
            labels,
            where=where,
            class_weights=class_weights,
            weights=weights,
            logit_scale=scale,
            label_smoothing=0.1,
            z_loss=0.01,
            logit_softcap=5.0,
            forward_mode=forward_mode,
            axis_name=axis_name,
        )

    return with_options


@pytest.mark.parametrize("forward_mode", [False, True])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_split_classes_give_the_loss_and_gradients_of_one_device(
    shape: tuple[int, int], dense: bool, forward_mode: bool
) -> None:
    arguments, specs = make_arguments(dense)
    floating = (0, 1, 3, 4, 5) if dense else (0, 3, 4, 5)

    def total(function: Any) -> Any:
        return lambda *args: jnp.sum(jnp.sin(function(*args)))

    single = loss(dense, forward_mode)
    sharded = jax.shard_map(
        loss(dense, forward_mode, "model"),
        mesh=make_mesh(shape),
        in_specs=specs,
        out_specs=P("data"),
    )
    want = jax.value_and_grad(total(single), floating)(*arguments)
    got = jax.jit(jax.value_and_grad(total(sharded), floating))(*arguments)
    # Sums over classes are taken in another order.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6), want, got
    )


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_a_gradient_taken_inside_is_the_one_taken_outside(
    shape: tuple[int, int],
) -> None:
    arguments, specs = make_arguments(dense=False)
    floating = (0, 3, 4, 5)
    split = loss(False, False, "model")

    def inside(*args: Any) -> Any:
        def total(*args: Any) -> jax.Array:
            return jax.lax.psum(jnp.sum(jnp.sin(split(*args))), "data")

        return jax.grad(total, floating)(*args)

    got = jax.jit(
        jax.shard_map(
            inside,
            mesh=make_mesh(shape),
            in_specs=specs,
            out_specs=tuple(specs[i] for i in floating),
        )
    )(*arguments)
    single = loss(False, False)
    want = jax.grad(lambda *args: jnp.sum(jnp.sin(single(*args))), floating)(*arguments)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6), want, got
    )


@pytest.mark.parametrize("axis_name", ["model", ("data", "model")], ids=str)
def test_confident_rows_keep_their_digits_over_devices(axis_name: Any) -> None:
    rng = np.random.default_rng(0)
    split = jax.jit(
        jax.shard_map(
            lambda z, y: jl.softmax_cross_entropy_with_integer_labels(
                z, y, axis_name=axis_name
            ),
            mesh=make_mesh((2, 4)),
            in_specs=(P(None, axis_name), P()),
            out_specs=P(),
        )
    )
    for margin in (0.0, 20.0, 80.0):
        logits, ids = oracle.confident_logits(rng, 16, 800, margin)
        want, gradient = oracle.loss(logits, ids), oracle.gradients(logits, ids)
        np.testing.assert_allclose(split(logits, ids), want, rtol=4e-6)
        got = jax.grad(lambda z, y: jnp.sum(split(z, y)))(logits, ids)
        np.testing.assert_allclose(got, gradient["logits"], rtol=1e-5, atol=1e-37)


def test_a_label_of_no_device_is_nan_on_all() -> None:
    split = jax.shard_map(
        lambda z, y: jl.softmax_cross_entropy_with_integer_labels(
            z, y, axis_name="model"
        ),
        mesh=make_mesh((1, 8)),
        in_specs=(P(None, "model"), P()),
        out_specs=P(),
    )
    logits, labels = jnp.zeros((3, V)), jnp.array([-1, V, V - 1])
    value, pull = jax.vjp(lambda z: split(z, labels), logits)
    assert np.isnan(value).tolist() == [True, True, False]
    (gradient,) = pull(jnp.ones(3))
    assert np.isnan(gradient).all(1).tolist() == [True, True, False]
    assert np.isfinite(gradient[2]).all()
