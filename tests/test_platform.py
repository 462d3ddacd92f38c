"""A program has what its platform wants, traced when it is lowered for that one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlosses as jl
from jaxlosses._platform import by_platform

OTHERS = ["cuda", "tpu"]

X = jnp.linspace(0.1, 0.9, 5)


class Calls:
    """A choice between functions, which notes which of them were called."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def __call__(self, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        def noted(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
            def branch(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
                self.made.append(name)
                return run(x) * y, x + y

            return branch

        cpu, gpu, tpu = (noted(*pair) for pair in CHOICES.items())
        return by_platform(cpu, gpu, x, y, on_tpu=tpu)


CHOICES = {"cpu": jnp.sin, "cuda": jnp.cos, "tpu": jnp.tanh}
OPERATIONS = {"cpu": "sine", "cuda": "cosine", "tpu": "tanh"}


@pytest.mark.parametrize("platform", CHOICES)
def test_a_program_has_its_own_function_and_no_other(platform: str) -> None:
    calls = Calls()
    traced = jax.jit(calls).trace(X, X)
    assert calls.made == ["cpu"]
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert calls.made == ["cpu"] + [platform] * (platform != "cpu")
    for name, operation in OPERATIONS.items():
        assert (f"stablehlo.{operation} " in text) is (name == platform)


def test_one_program_may_be_for_all_platforms() -> None:
    exported = jax.export.export(jax.jit(Calls()), platforms=list(CHOICES))(X, X)
    for operation in OPERATIONS.values():
        assert f"stablehlo.{operation} " in exported.mlir_module()
    out = jax.jit(exported.call)(X, X)
    np.testing.assert_allclose(out[0], jnp.sin(X) * X, rtol=1e-6)


def nonlinear(x: jax.Array) -> jax.Array:
    return Calls()(x, x * x)[0]


def linear(x: jax.Array) -> jax.Array:
    (d,) = jax.linear_transpose(lambda y: Calls()(X, y), x)((x, 2 * x))
    return d


TRANSFORMED: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "value": (nonlinear, lambda x: jnp.sin(x) * x * x),
    "grad": (
        jax.grad(lambda x: nonlinear(x).sum()),
        lambda x: jnp.cos(x) * x * x + 2 * x * jnp.sin(x),
    ),
    "jacfwd": (
        jax.jacfwd(nonlinear),
        lambda x: jnp.diag(jnp.cos(x) * x * x + 2 * x * jnp.sin(x)),
    ),
    "vmap": (jax.vmap(nonlinear), lambda x: jnp.sin(x) * x * x),
    "vmap of one": (
        jax.vmap(Calls(), (None, 0)),
        lambda x: (jnp.outer(x, jnp.sin(x)), x[:, None] + x[None]),
    ),
    "transpose": (linear, lambda x: jnp.sin(X) * x + 2 * x),
}


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("name", TRANSFORMED)
def test_a_choice_is_transformed_as_its_function_is(name: str, jit: bool) -> None:
    function, expected = TRANSFORMED[name]
    args = (X, X) if name == "vmap of one" else (X,)
    out = (jax.jit(function) if jit else function)(*args)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), out, expected(X)
    )


def test_a_choice_runs_where_nothing_is_compiled() -> None:
    with jax.disable_jit():
        np.testing.assert_allclose(Calls()(X, X)[0], jnp.sin(X) * X, rtol=1e-6)


@pytest.mark.parametrize("platform", OTHERS)
def test_what_is_lowered_later_has_the_settings_of_its_trace(platform: str) -> None:
    def loss(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        return jl.linear_softmax_cross_entropy(
            hidden,
            kernel,
            jnp.zeros(len(hidden), jnp.int32),
            reduction="mean",
            strategy="tokens",
            workspace_bytes=2**22,
        )

    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        factors = [jax.ShapeDtypeStruct(s, "float64") for s in ((300, 8), (8, 40_000))]
        traced = jax.jit(jax.grad(loss)).trace(*factors)
        inside = traced.lower(lowering_platforms=(platform,)).as_text()
    outside = traced.lower(lowering_platforms=(platform,)).as_text()
    for text in (inside, outside):
        assert text.count("dot_general") == text.count("HIGHEST, HIGHEST") == 2
        assert "tensor<300x8xf64>" in text
        assert "f32" not in text


@pytest.mark.parametrize("platform", OTHERS)
def test_what_closes_over_a_trace_is_exported_for_other_platforms(
    platform: str,
) -> None:
    def loss(hidden: jax.Array, kernel: jax.Array, factor: jax.Array) -> jax.Array:
        twice = 2 * factor
        labels = jnp.zeros(len(hidden), jnp.int32)
        return jl.linear_softmax_loss(
            lambda rows: rows.nll * twice,
            hidden,
            kernel,
            labels,
            strategy="tokens",
        )

    arguments = jnp.ones((300, 8)), jnp.ones((8, 40_000)), jnp.float32(3)
    gradient = jax.jit(jax.grad(loss, (0, 1, 2)))
    exported = jax.export.export(gradient, platforms=[platform])(*arguments)
    assert exported.out_avals[2].shape == ()
