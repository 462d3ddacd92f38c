"""Every loss lowers for CPU, CUDA and TPU, and its gradient needs no gather.

Nothing is compiled or run: `jax.export` writes StableHLO for platforms that this
machine does not have.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import pytest

import jaxlosses as jl

# Each gradient is written once, for all tests.
pytestmark = pytest.mark.together

B, V = 8, 128
PLATFORMS = ["cpu", "cuda", "tpu"]


def array(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


LABELS = {"integer": array((B,), jnp.int32), "dense": array((B, V), jnp.bfloat16)}
ARRAYS = {
    "where": array((1, V), jnp.bool_),
    "class_weights": array((V,)),
    "label_smoothing": array(()),
    "z_loss": array(()),
    "logit_scale": array(()),
    "weights": array((B,)),
}
STATIC: dict[str, Any] = {
    "logit_softcap": 30.0,
    "reduction": "mean",
    "return_stats": True,
}
LOSSES = {
    "integer": jl.softmax_cross_entropy_with_integer_labels,
    "dense": jl.softmax_cross_entropy,
}
KINDS = list(LOSSES)


def loss_of(kind: str, options: bool, forward_mode: bool) -> Callable[..., jax.Array]:
    static = dict(STATIC) if options else {}
    if options and kind == "integer":
        static["ignore_index"] = -100

    def loss(logits: jax.Array, labels: jax.Array, arrays: dict[str, Any]) -> jax.Array:
        out = LOSSES[kind](
            logits, labels, forward_mode=forward_mode, **static, **arrays
        )
        return out[0] if options else jnp.sum(out)

    return loss


@functools.cache
def exported_gradient(kind: str, options: bool, forward_mode: bool) -> str:
    """StableHLO of value and every gradient, of bfloat16 logits."""
    loss = loss_of(kind, options, forward_mode)

    def value_and_gradients(
        logits: jax.Array, labels: jax.Array, arrays: dict[str, Any]
    ) -> Any:
        def of_floats(floats: dict[str, Any]) -> jax.Array:
            floats = dict(floats)
            given = floats.pop("logits"), floats.pop("labels", labels)
            return loss(*given, arrays | floats)

        floats = {k: v for k, v in arrays.items() if v.dtype != jnp.bool_}
        floats["logits"] = logits
        if kind == "dense":
            floats["labels"] = labels
        return jax.value_and_grad(of_floats)(floats)

    arguments = (
        array((B, V), jnp.bfloat16),
        LABELS[kind],
        ARRAYS if options else {},
    )
    exported = jax.export.export(jax.jit(value_and_gradients), platforms=PLATFORMS)
    lowered = exported(*arguments)
    assert lowered.platforms == tuple(PLATFORMS)
    return lowered.mlir_module()


cases = pytest.mark.parametrize(
    ("kind", "options", "forward_mode"),
    [(k, o, f) for k in KINDS for o in (False, True) for f in (False, True)],
)


@pytest.mark.alternate
@cases
def test_value_and_gradient_lower_for_every_platform(
    kind: str, options: bool, forward_mode: bool
) -> None:
    module = exported_gradient(kind, options, forward_mode)
    assert re.search(rf"tensor<{B}x{V}xbf16>.*->.*tensor<{B}x{V}xbf16>", module)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [False, True], ids=["plain", "options"])
def test_losses_with_stats_lower_for_every_platform(kind: str, options: bool) -> None:
    static = dict(STATIC) if options else {"return_stats": True}

    def loss(logits: jax.Array, labels: jax.Array, arrays: dict[str, Any]) -> Any:
        return LOSSES[kind](logits, labels, **static, **arrays)

    exported = jax.export.export(jax.jit(loss), platforms=PLATFORMS)
    arrays = ARRAYS if options else {}
    lowered = exported(array((B, V), jnp.bfloat16), LABELS[kind], arrays)
    dtypes = [str(out.dtype) for out in lowered.out_avals]
    assert dtypes == ["float32"] * 4 + ["int32", "bool", "float32"]


@pytest.mark.parametrize("function", [jl.softmax, jl.log_softmax])
def test_softmax_and_its_gradient_lower_for_every_platform(
    function: Callable[..., jax.Array],
) -> None:
    def value_and_gradient(logits: jax.Array, where: jax.Array) -> Any:
        out, pullback = jax.vjp(lambda z: function(z, where=where), logits)
        return out, pullback(out)

    exported = jax.export.export(jax.jit(value_and_gradient), platforms=PLATFORMS)
    lowered = exported(array((B, V), jnp.bfloat16), array((B, V), jnp.bool_))
    assert [str(out.dtype) for out in lowered.out_avals] == ["bfloat16"] * 2
    assert indexing(lowered.mlir_module()) == []


# The types come after the attributes, and after the region of a scatter.
INDEXING = re.compile(
    r"stablehlo\.(gather|scatter|dynamic_gather|dynamic_slice|dynamic_update_slice|"
    r"select_and_scatter|sort)\b.*?: \((tensor[^)]*)\) ->",
    re.DOTALL,
)


def indexing(module: str) -> list[str]:
    """Operations that address elements by an index, with their operands."""
    return [f"{name}({types})" for name, types in INDEXING.findall(module)]


@cases
def test_no_logits_are_gathered_or_scattered(
    kind: str, options: bool, forward_mode: bool
) -> None:
    module = exported_gradient(kind, options, forward_mode)
    # On a class axis they are slow, and an explicitly sharded axis refuses them. A
    # class weight is looked up by its label: a gather of B numbers from V, whose
    # transpose is a scatter of B numbers; its operand is a vector.
    found = indexing(module)
    assert [op for op in found if f"{B}x{V}" in op or f"{V}x{B}" in op] == []
    if not options:
        assert found == []


def test_a_gather_of_the_logits_would_be_found() -> None:
    def textbook(logits: jax.Array, labels: jax.Array) -> jax.Array:
        at_label = jnp.take_along_axis(logits, labels[:, None], -1)[:, 0]
        return jnp.sum(jax.nn.logsumexp(logits, axis=-1) - at_label)

    value_and_gradient = jax.jit(jax.value_and_grad(textbook))
    exported = jax.export.export(value_and_gradient, platforms=PLATFORMS)
    module = exported(array((B, V)), LABELS["integer"]).mlir_module()
    found = {op.split("(")[0] for op in indexing(module) if f"{B}x{V}" in op}
    assert found == {"gather", "scatter"}


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_of_bfloat16_logits_calls_no_library(kind: str) -> None:
    module = exported_gradient(kind, True, False)
    assert re.findall(r"stablehlo\.custom_call\s*@(\w+)", module) == []
