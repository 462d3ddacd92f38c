"""Log-probabilities and entropies: every digit, both signs, and the loss to the bit."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import (
    LOG_PROBS,
    TAKE_IDS,
    assert_all_zero,
    confident,
    on_one_device,
    sweep,
)
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from tolerances import TABLE, assert_loss

import jaxlosses as jl
from jaxlosses._backends import blocks

by_function = pytest.mark.parametrize("name", LOG_PROBS)
NAN, INF = np.nan, np.inf


def entropy_of_ids(name: str) -> Callable[..., Any]:
    """The entropy that comes beside log-probabilities, of labels that rotate."""

    def entropy(logits: Any, **options: Any) -> Any:
        labels = jnp.arange(logits.shape[0], dtype=jnp.int32) % min(3, logits.shape[1])
        out = LOG_PROBS[name](logits, labels, return_entropy=True, **options)
        return out[1]

    return entropy


ENTROPIES = {"alone": jl.softmax_entropy} | {n: entropy_of_ids(n) for n in LOG_PROBS}
by_entropy = pytest.mark.parametrize("name", ENTROPIES)


def _of_rows(options: dict[str, Any]) -> dict[str, Any]:
    """Options as functions of logits take them."""
    where = options.get("where")
    if where is None or where.ndim == 2:
        return options
    return options | {"where": where[None]}


def check(name: str, logits: Any, local: bool = False, **options: Any) -> None:
    """Value and gradients of an entropy against the exact ones."""
    dtype = np.asarray(logits).dtype.name
    rows = np.resize([1.0, -0.5, 2.0, -1.0, 0.25], len(logits))
    exact = oracle.entropy(logits, cotangent=rows, **_of_rows(options))

    def run(z: Any) -> Any:
        value, pull = jax.vjp(lambda z: ENTROPIES[name](z, **options), z)
        return value, *pull(jnp.asarray(rows, value.dtype))

    with jax.enable_x64(dtype == "float64"):
        value, gradient = jax.jit(on_one_device(run) if local else run)(logits)
    row, kept = TABLE[dtype], np.asarray(gradient, np.float64)
    # Below normal numbers a class has probability 0.
    tiny = 1e3 * float(jnp.finfo(value.dtype).tiny)
    assert np.all(np.asarray(value) >= 0)
    error = abs(np.asarray(value, np.float64) - exact["entropy"])
    assert np.all(error <= row.loss * exact["entropy"] + tiny)
    assert gradient.dtype == logits.dtype
    allowed = row.gradient * exact["largest"] + row.rounding * abs(exact["logits"])
    tiny = 1e3 * float(jnp.finfo(gradient.dtype).tiny)
    error = abs(kept - exact["logits"]) / (allowed + tiny)
    assert np.isfinite(kept).all()
    assert error.max() <= 1


@pytest.mark.alternate(16)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@by_entropy
def test_every_digit_of_an_entropy_and_its_gradient_is_right(
    name: str, dtype: str
) -> None:
    for classes in (2, 50):
        check(name, confident(classes, dtype)[0])


@pytest.mark.alternate(4)
@by_entropy
def test_every_digit_is_right_in_blocks_of_a_cpu(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_SIZE", 2**12)
    for classes in (601, 1024):  # of which the first divides no fold
        check(name, confident(classes, "float32", 1)[0], local=True)
    check(name, confident(601, "bfloat16", 1)[0], local=True)


def test_what_people_write_loses_the_digits() -> None:
    logits, _ = oracle.confident_logits(np.random.default_rng(0), 20, 1000, 22.0)
    exact = oracle.entropy(logits)["entropy"]
    log_p = jax.nn.log_softmax(logits)
    p = jnp.exp(log_p)
    lse = jax.nn.logsumexp(logits, axis=-1)
    worst = {
        "lse - sum p z": lse - jnp.sum(p * logits, -1),
        "-sum p log p": -jnp.sum(p * log_p, -1),
        "ours": jl.softmax_entropy(logits),
    }
    errors = {n: np.max(abs(h / exact - 1)) for n, h in worst.items()}
    assert errors["lse - sum p z"] > 0.3
    assert errors["-sum p log p"] > 0.01
    assert errors["ours"] < 4e-6


@pytest.mark.alternate(10)
@by_entropy
@pytest.mark.parametrize(
    "options",
    [
        {"logit_softcap": 5.0},
        {"logit_scale": -0.7},
        {"where": "classes"},
        {"where": "both", "logit_scale": 1.5, "logit_softcap": 30.0},
    ],
    ids=str,
)
def test_options_transform_the_logits_of_an_entropy(name: str, options: Any) -> None:
    rng = np.random.default_rng(0)
    logits = (3 * rng.normal(size=(11, 7))).astype(np.float32)
    if "where" in options:
        mask = rng.random((1, 7) if options["where"] == "classes" else (11, 7)) < 0.8
        mask[:, :3] = True  # with every label
        if name.startswith("fused"):
            mask = mask[0]
        options = options | {"where": mask}
    check(name, logits, **options)


def test_an_entropy_of_any_axes_and_shapes_is_that_of_its_classes() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 4, 5)).astype(np.float32)
    axes: Any
    for axes in (0, 1, (2, 0), None):
        found = jl.softmax_entropy(logits, axes)
        np.testing.assert_allclose(
            found, oracle.entropy(logits, axes)["entropy"], rtol=4e-6
        )
    where = np.arange(12).reshape(3, 4) % 3 > 0
    found = jl.softmax_entropy(logits, where=where)
    np.testing.assert_array_equal(found == 0, ~where)
    assert jl.softmax_entropy(logits[..., :0]).shape == (3, 4)
    assert_all_zero(jl.softmax_entropy(logits[..., :1]))


# Log-probabilities


@pytest.mark.alternate(16)
@pytest.mark.parametrize("rows", [7, 64], ids=["whole", "blocks"])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
@by_function
def test_log_probabilities_are_minus_the_loss_to_the_bit(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: Any, rows: int
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_SIZE", 2**12)
    loss = TAKE_IDS["integer" if name == "logits" else name]
    rng = np.random.default_rng(0)
    for classes in (5, 640):
        logits = jnp.asarray(9 * rng.normal(size=(rows, classes)), dtype)
        labels = rng.integers(-1, classes, size=rows).astype(np.int32)
        for options in ({}, {"logit_scale": 0.7}):
            calls = {"ignore_index": 3} | options

            @on_one_device
            def run(z: Any, y: Any, calls: Any = calls) -> Any:
                both = LOG_PROBS[name](z, y, return_entropy=True, **calls)
                return loss(z, y, **calls), LOG_PROBS[name](z, y, **calls), both[0]

            nll, alone, beside = jax.jit(run)(logits, labels)
            np.testing.assert_array_equal(alone, -nll)
            np.testing.assert_array_equal(beside, -nll)
            assert np.all((alone <= 0) | np.isnan(alone))
            assert np.isnan(alone).sum() == (labels == -1).sum()


@pytest.mark.alternate(4)
@by_function
def test_what_does_not_count_is_zero_and_what_cannot_be_is_nan(name: str) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(8, 6)).astype(np.float32)
    logits[0], logits[1, 2] = NAN, NAN
    labels = np.array([-100, 2, 2, 6, -1, 1, 2, 5], np.int32)
    where = np.ones(8, bool)
    where[7] = False
    logits[5, 2] = NAN
    if name == "logits":  # a matmul makes NaN of an infinity
        logits[5, 2], logits[2, 3] = INF, -INF
    for pick in (lambda a: a[0], lambda a: a[1], lambda a: a[0] + 2 * a[1]):

        def run(z: Any, pick: Any = pick) -> Any:
            out = LOG_PROBS[name](
                z, labels, where=where, ignore_index=-100, return_entropy=True
            )
            return pick(out)

        value, pull = jax.vjp(jax.jit(run), logits)
        (gradient,) = pull(jnp.ones(8))
        bad = [False, True, False, True, True, True, False, False]
        np.testing.assert_array_equal(np.isnan(value), bad)
        np.testing.assert_array_equal(np.isnan(gradient).all(1), bad)
        np.testing.assert_array_equal(np.isnan(gradient).any(1), bad)
        assert_all_zero(value[jnp.array([0, 7])], gradient[0], gradient[7])
        assert (gradient[2, 3] == 0) == (name == "logits")
        # What no cotangent asks for is zero whatever it holds.
        assert_all_zero(*pull(jnp.zeros(8)))


def test_gradients_are_finite_where_probabilities_are_zero() -> None:
    for logits in ([[0.0, -INF, 1.0]], [[300.0, 0.0, -400.0]], [[0.0, 0.0, -INF]]):
        z = jnp.array(logits)
        gradient = jax.grad(lambda z: jl.softmax_entropy(z).sum())(z)
        assert np.isfinite(gradient).all()
        assert np.all((np.asarray(gradient) == 0) | (np.asarray(jl.softmax(z)) > 0))
    for z in (jnp.full((1, 4), 7.0), jnp.array([[-INF, 2.0]])):
        np.testing.assert_allclose(
            jl.softmax_entropy(z)[0], np.log(np.isfinite(z).sum()), rtol=1e-7
        )


# How JAX runs it


@pytest.mark.without_llvm_passes
@pytest.mark.parametrize(
    ("name", "forward_mode", "cap"),
    sweep(
        itertools.product(LOG_PROBS, (False, True), (None, 3.0)),
        lambda *case: case == ("logits", True, None),
    ),
)
def test_all_modes_serve_both_results_to_second_order(
    name: str, forward_mode: bool, cap: float | None
) -> None:
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        logits, scale = jnp.asarray(rng.normal(size=(4, 3))), jnp.asarray(0.8)
        labels = jnp.array([0, 2, 1, 1], jnp.int32)

        rows = jnp.arange(1.0, 5)

        def mixed(z: Any, s: Any) -> Any:
            log_p, entropy = LOG_PROBS[name](
                z,
                labels,
                return_entropy=True,
                logit_scale=s,
                logit_softcap=cap,
                forward_mode=forward_mode,
            )
            return jnp.sum(rows * jnp.sin(log_p) * jnp.cos(entropy))

        modes = ("fwd", "rev") if forward_mode else ("rev",)
        check_grads(
            jax.jit(mixed), (logits, scale), 2, modes=modes, rtol=1e-6, atol=1e-6
        )
        batch = jnp.stack([logits, -logits])
        slope = jax.jit(jax.grad(mixed))
        mapped = jax.jit(jax.vmap(slope, (0, None)))(batch, scale)
        one = [slope(z, scale) for z in batch]
        np.testing.assert_allclose(mapped, jnp.stack(one), rtol=1e-12)


@pytest.mark.without_llvm_passes
def test_an_entropy_by_itself_has_all_modes() -> None:
    with jax.enable_x64(True):
        z = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)))
        for forward_mode, modes in ((False, ("rev",)), (True, ("fwd", "rev"))):

            def total(z: Any, forward_mode: bool = forward_mode) -> Any:
                return jnp.sum(jl.softmax_entropy(z, forward_mode=forward_mode) ** 2)

            check_grads(jax.jit(total), (z,), 2, modes=modes, rtol=1e-6, atol=1e-6)


def value_and_gradient(name: str, labels: Any, **options: Any) -> Callable[..., Any]:
    def run(z: Any) -> Any:
        def total(z: Any) -> Any:
            out = LOG_PROBS[name](z, labels, return_entropy=True, **options)
            return jnp.sum(out[0]) + jnp.sum(out[1] ** 2), out

        return jax.value_and_grad(total, has_aux=True)(z)

    return run


@pytest.mark.alternate
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize("margin", [1.0, 40.0])
def test_classes_and_examples_split_over_devices_give_the_same(margin: float) -> None:
    logits, _ = oracle.confident_logits(np.random.default_rng(0), 8, 24, margin)
    labels = np.arange(8, dtype=np.int32) * 3
    labels[0] = 24  # of no device
    (_, want), gradient = value_and_gradient("logits", labels)(jnp.asarray(logits))
    outs = []
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)
        place = functools.partial(NamedSharding, mesh)
        z = jax.device_put(logits, place(P("data", "model")))
        y = jax.device_put(labels, place(P("data")))
        outs.append(jax.jit(value_and_gradient("logits", y))(z))
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def total(z: Any, y: Any) -> Any:
        @functools.partial(
            jax.shard_map,
            mesh=mesh,
            in_specs=(P("data", "model"), P("data")),
            out_specs=P("data"),
        )
        def pair(z: Any, y: Any) -> Any:
            return jl.softmax_log_probs(z, y, return_entropy=True, axis_name="model")

        out = pair(z, y)
        return jnp.sum(out[0]) + jnp.sum(out[1] ** 2), out

    outs.append(
        jax.jit(jax.value_and_grad(total, has_aux=True))(jnp.asarray(logits), labels)
    )
    for (_, found), d in jax.tree.map(np.asarray, outs):
        for a, b in zip(found, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=4e-6)
        size = np.max(abs(np.nan_to_num(gradient)), 1, keepdims=True)
        np.testing.assert_allclose(d / size, gradient / size, rtol=0, atol=1e-5)
        assert np.isnan(d[0]).all()


def test_both_are_exported_for_any_sizes_and_platforms() -> None:
    b, v = jax.export.symbolic_shape("b, v")
    shapes = (
        jax.ShapeDtypeStruct((b, v), np.float32),
        jax.ShapeDtypeStruct((b,), np.int32),
    )

    def run(z: Any, y: Any) -> Any:
        return value_and_gradient("logits", y)(z), jl.softmax_entropy(z)

    program = jax.export.export(jax.jit(run), platforms=["cpu", "cuda", "tpu"])(*shapes)
    logits, labels = oracle.confident_logits(np.random.default_rng(0), 5, 13, 20.0)
    ((_, (log_p, entropy)), _), alone = jax.jit(program.call)(logits, labels)
    exact = oracle.entropy(logits)["entropy"]
    assert_loss(-log_p, oracle.loss(logits, labels), "float32")
    for found in (entropy, alone):
        assert_loss(found, exact, "float32")
