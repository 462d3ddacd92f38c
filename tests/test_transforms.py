"""The losses under jit, vmap, scan, checkpoint and every kind of differentiation."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import one_device
import oracle
import pytest
from helpers import LOSSES, STRATEGIES, compilations, sweep, turns
from jax.test_util import check_grads

import jaxlosses as jl

B, V = 4, 6
IDS = np.array([0, 5, 2, 1], np.int32)
EXISTS = np.array([[True, True, True, False, True, True]])

# The same sums in another order, by another fusion: a few units in the last place.
REORDERED = {"rtol": 2e-6, "atol": 1e-7}
# Central differences in float64 with JAX's steps: truncation is about 1e-8.
DIFFERENCES = {"rtol": 1e-6, "atol": 1e-6}

KINDS = ["integer", "dense"]

# Arrays are differentiated, the rest is fixed.
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "where": {"where": EXISTS},
    "ignore_index": {"ignore_index": 5},
    "class_weights": {"class_weights": np.array([0.5, 2.0, 1.0, 1.5, 0.25, 3.0])},
    "label_smoothing": {"label_smoothing": np.array(0.1)},
    "z_loss": {"z_loss": np.array(0.01)},
    "logit_softcap": {"logit_softcap": 3.0},
    "logit_scale": {"logit_scale": np.array(-0.8)},
    "weights": {"weights": np.array([0.5, 2.0, 0.0, 1.0])},
}
OPTIONS["all"] = {k: v for option in OPTIONS.values() for k, v in option.items()}
OPTIONS["all, mean"] = OPTIONS["all"] | {"reduction": "mean"}
OPTIONS["smoothed class_weights"] = (
    OPTIONS["class_weights"] | OPTIONS["label_smoothing"]
)
CASES = [
    (kind, option)
    for kind in KINDS
    for option in OPTIONS
    if (kind, option) != ("dense", "ignore_index")
]
# All options at once have a part each in every derivative.
by_case = pytest.mark.parametrize(
    ("kind", "option"), sweep(CASES, lambda kind, option: option in ("none", "all"))
)
by_kind_and_registration = pytest.mark.parametrize(
    ("kind", "forward_mode"), turns(KINDS, [False, True])
)
# Lighter than all of them.
OPTIONS["smooth"] = {
    name: value
    for option in ("label_smoothing", "z_loss", "logit_scale")
    for name, value in OPTIONS[option].items()
}
OPTIONS["smooth, mean"] = OPTIONS["smooth"] | {"reduction": "mean"}
# Over all logits at once the fused loss is the integer one.
FUSED = [f"fused, {strategy}" for strategy in STRATEGIES]
IN_CHUNKS = FUSED[:-1]
WITH_FORWARD_MODE = FUSED[1:]


class Problem(NamedTuple):
    """A loss of one pytree, and the pytree to differentiate it at."""

    loss: Callable[[dict[str, jax.Array]], jax.Array]
    arguments: dict[str, jax.Array]


def problem(
    kind: str,
    option: str = "none",
    *,
    dtype: Any = np.float32,
    batch: int = B,
    **static: Any,
) -> Problem:
    rng = np.random.default_rng(0)
    arguments = {"logits": rng.standard_normal((batch, V))}
    fixed, given = dict(static), dict(OPTIONS[option])
    ids = np.resize(IDS, batch)
    if kind.startswith("fused"):
        strategy = kind.removeprefix("fused, ")
        return fused_problem(strategy, given, arguments["logits"], dtype, fixed)
    if kind == "dense":
        # Does not sum to one, and has a zero.
        labels = rng.uniform(0, 1, (batch, V))
        labels[0, 2] = 0
        arguments["labels"] = labels
        function = jl.softmax_cross_entropy
        given.pop("ignore_index", None)
    else:
        fixed["labels"] = jnp.asarray(ids)
        function = jl.softmax_cross_entropy_with_integer_labels
    if "weights" in given:
        given["weights"] = np.resize(given["weights"], batch)
    return of_arrays(function, arguments, given, fixed, dtype)


def fused_problem(
    strategy: str,
    given: dict[str, Any],
    logits: np.ndarray,
    dtype: Any,
    fixed: dict[str, Any],
) -> Problem:
    """The fused loss of features that have these logits, in several chunks."""
    kernel = np.random.default_rng(4).standard_normal((3, V))
    arguments = {
        "hidden": logits[:, :3],
        "kernel": kernel,
        "bias": np.linspace(-1, 1, V),
    }
    fixed |= {"strategy": strategy, "workspace_bytes": 60}
    fixed["labels"] = jnp.asarray(np.resize(IDS, len(logits)))
    if strategy == "tokens":
        fixed.setdefault("reduction", "sum")
    if "where" in given:
        given["where"] = given["where"][0]
    if "weights" in given:  # where it is 0 there is no example, and no derivative
        weights = np.resize(given["weights"], len(logits))
        given["weights"] = np.where(weights == 0, 0.7, weights)
    function = jl.linear_softmax_cross_entropy
    return of_arrays(function, arguments, given, fixed, dtype)


def of_arrays(
    function: Callable[..., jax.Array],
    arguments: dict[str, np.ndarray],
    given: dict[str, Any],
    fixed: dict[str, Any],
    dtype: Any,
) -> Problem:
    """Options that are floating arrays are arguments as well."""
    floating = {
        name: value
        for name, value in given.items()
        if isinstance(value, np.ndarray) and value.dtype == np.float64
    }
    fixed = fixed | {k: v for k, v in given.items() if k not in floating}
    arrays = {n: jnp.asarray(a, dtype) for n, a in (arguments | floating).items()}
    return Problem(lambda tree: function(**tree, **fixed), arrays)


def summed(loss: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The loss contracted with a cotangent that is not constant."""

    def scalar(*args: Any) -> jax.Array:
        out = loss(*args)
        factors = jnp.arange(1, out.size + 1, dtype=out.dtype).reshape(out.shape)
        return jnp.sum(out * factors)

    return scalar


def value_and_gradients(loss: Callable[[Any], jax.Array]) -> Callable[[Any], Any]:
    """The loss, and the gradient of its contraction, as one compiled function."""
    return jax.jit(lambda *args: (loss(*args), jax.grad(summed(loss))(*args)))


def assert_trees_close(actual: Any, expected: Any, **tolerance: float) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.shape(a) == np.shape(e)
        np.testing.assert_allclose(a, e, **tolerance)


# Differentiation


@pytest.mark.alternate(4)
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize(
    ("kind", "option"),
    sweep(
        [*CASES, *itertools.product(IN_CHUNKS, ["smooth, mean", "all, mean"])],
        lambda kind, option: option in ("none", "smooth, mean", "all"),
    ),
)
def test_gradients_match_differences_to_second_order(kind: str, option: str) -> None:
    with jax.enable_x64(True):
        loss, arguments = problem(kind, option, dtype=np.float64)
        loss = jax.jit(loss)
        check_grads(loss, (arguments,), order=2, modes=("rev",), **DIFFERENCES)


# Option by option, forward mode is compared with reverse mode below.
@pytest.mark.alternate
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize(
    ("kind", "option"),
    sweep(
        [
            ("integer", "smooth"),
            *itertools.product(KINDS, ["none", "all"]),
            *itertools.product(WITH_FORWARD_MODE, ["smooth"]),
        ],
        lambda *case: (
            case
            in [("dense", "none"), ("integer", "smooth"), ("fused, vocab", "smooth")]
        ),
    ),
)
def test_every_mix_of_modes_matches_differences_to_second_order(
    kind: str, option: str
) -> None:
    with jax.enable_x64(True):
        loss, arguments = problem(kind, option, dtype=np.float64, forward_mode=True)
        loss = jax.jit(loss)
        check_grads(loss, (arguments,), order=2, modes=("fwd", "rev"), **DIFFERENCES)


@pytest.mark.alternate(4)
@by_case
def test_both_registrations_agree_to_two_units_in_the_last_place(
    kind: str, option: str
) -> None:
    results = []
    for forward_mode in (False, True):
        loss, arguments = problem(kind, option, batch=32, forward_mode=forward_mode)
        value, gradients = value_and_gradients(loss)(arguments)
        results.append({"loss": value, **gradients})
    options = {k: v for k, v in OPTIONS[option].items() if k not in arguments}
    given = {"labels": np.resize(IDS, 32)} | options | arguments
    if kind == "dense":
        given.pop("ignore_index", None)
    cotangent = None if "reduction" in options else np.arange(1, 33)
    # Where smoothing or z-loss cancel, the last place is that of the terms.
    terms = oracle.gradients(**given, cotangent=cotangent)["logits_terms"]
    for name, reverse in results[0].items():
        reverse, forward = np.asarray(reverse), np.asarray(results[1][name])
        if name == "logits":
            unit = np.spacing(terms.astype(np.float32))
            assert np.max(np.abs(reverse - forward) / unit) <= 2
        elif name in ("loss", "labels"):
            np.testing.assert_array_max_ulp(reverse, forward, maxulp=2)
        else:  # a sum over all entries, taken in another order
            np.testing.assert_allclose(reverse, forward, **REORDERED)


@pytest.mark.alternate(3)
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize(
    ("way", "kind", "forward_mode"),
    turns(["hessian", "reverse_over_reverse", "product"], KINDS, [False, True]),
)
def test_hessian_is_the_covariance_of_the_softmax(
    way: str, kind: str, forward_mode: bool
) -> None:
    arguments = problem(kind).arguments
    logits, mass = arguments["logits"][0], 1.0
    function, labels = jl.softmax_cross_entropy_with_integer_labels, IDS[0]
    if kind == "dense":
        function, labels = jl.softmax_cross_entropy, arguments["labels"][0]
        mass = np.asarray(labels, np.float64).sum()

    def loss(logits: jax.Array) -> jax.Array:
        return function(logits, labels, forward_mode=forward_mode)

    def product(vector: jax.Array) -> jax.Array:
        return jax.jvp(jax.grad(loss), (logits,), (vector,))[1]

    if way == "hessian":
        hessian = jax.hessian(loss)(logits)
    elif way == "reverse_over_reverse":
        hessian = jax.jacrev(jax.grad(loss))(logits)
    else:
        hessian = jax.vmap(product)(jnp.eye(V))
    p = np.exp(np.asarray(logits, np.float64))
    p /= p.sum()
    expected = mass * (np.diag(p) - np.outer(p, p))
    np.testing.assert_allclose(hessian, expected, rtol=2e-6, atol=2e-7)


def test_hessian_keeps_the_digits_of_a_confident_row() -> None:
    logits = jnp.array([20.0, 0.0, 1.0, -1.0, 0.5, 0.0])
    hessian = jax.hessian(jl.softmax_cross_entropy_with_integer_labels)(logits, 0)
    e = np.exp(np.asarray(logits, np.float64) - 20)
    p, others = e / e.sum(), e[1:].sum() / e.sum()
    expected = np.diag(p) - np.outer(p, p)
    expected[0, 0] = p[0] * others
    np.testing.assert_allclose(hessian, expected, rtol=1e-5)


@pytest.mark.alternate
@by_kind_and_registration
def test_gradient_by_a_weight_of_zero_is_the_gradient_of_its_row(
    kind: str, forward_mode: bool
) -> None:
    # Learning to reweight examples (Ren et al. 2018) starts at weights of zero.
    loss, arguments = problem(kind, forward_mode=forward_mode)

    def row_gradients(weights: jax.Array) -> jax.Array:
        def total(logits: jax.Array) -> jax.Array:
            return jnp.sum(weights * loss(arguments | {"logits": logits}))

        return jax.grad(total)(arguments["logits"])

    def weighted_gradients(weights: jax.Array) -> jax.Array:
        def total(logits: jax.Array) -> jax.Array:
            given = arguments | {"logits": logits, "weights": weights}
            return jnp.sum(loss(given))

        return jax.grad(total)(arguments["logits"])

    mixed = jax.jit(jax.jacrev(weighted_gradients))(jnp.zeros(B))
    rows = jax.jit(row_gradients)(jnp.ones(B))
    for i in range(B):
        np.testing.assert_allclose(mixed[i, :, i], rows[i], **REORDERED)
        assert not np.any(np.delete(mixed[i], i, axis=1))


def test_reweighting_raises_the_examples_that_help_the_validation_loss() -> None:
    rng = np.random.default_rng(1)
    features = jnp.asarray(rng.standard_normal((B, 3)), jnp.float32)
    kernel = jnp.asarray(rng.standard_normal((3, V)), jnp.float32)
    clean = jnp.asarray(rng.standard_normal((2, 3)), jnp.float32)
    cross_entropy = jl.softmax_cross_entropy_with_integer_labels

    def validation_loss(weights: jax.Array, rate: float = 0.1) -> jax.Array:
        def training_loss(kernel: jax.Array) -> jax.Array:
            logits = features @ kernel
            return cross_entropy(logits, IDS, weights=weights, reduction="sum")

        updated = kernel - rate * jax.grad(training_loss)(kernel)
        return cross_entropy(clean @ updated, IDS[:2], reduction="sum")

    def kernel_gradient(x: jax.Array, ids: np.ndarray) -> np.ndarray:
        return np.asarray(x).T @ oracle.gradients(x @ kernel, ids)["logits"]

    step = np.asarray(jax.grad(validation_loss)(jnp.zeros(B)))
    target = kernel_gradient(clean, IDS[:2])
    expected = [
        -0.1 * np.sum(target * kernel_gradient(features[i : i + 1], IDS[i : i + 1]))
        for i in range(B)
    ]
    np.testing.assert_allclose(step, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.alternate(4)
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize(
    ("kind", "option"),
    sweep(
        [*CASES, *itertools.product(WITH_FORWARD_MODE, ["smooth"])],
        lambda kind, option: (
            option in ("none", "smooth") or (kind, option) == ("dense", "all")
        ),
    ),
)
def test_forward_mode_serves_jvp_jacfwd_and_linearize(kind: str, option: str) -> None:
    loss, arguments = problem(kind, option, forward_mode=True)
    reverse, _ = problem(kind, option)
    rng = np.random.default_rng(2)
    tangents = {
        name: jnp.asarray(rng.standard_normal(a.shape), a.dtype)
        for name, a in arguments.items()
    }
    result, jacobian = jax.jit(lambda a: (reverse(a), jax.jacrev(reverse)(a)))(
        arguments
    )
    rows = jax.tree.map(lambda j, t: jnp.tensordot(j, t, t.ndim), jacobian, tangents)
    expected = jnp.sum(jnp.stack(jax.tree.leaves(rows)), 0)
    value, tangent = jax.jit(functools.partial(jax.jvp, loss))(
        (arguments,), (tangents,)
    )
    np.testing.assert_allclose(value, result, **REORDERED)
    np.testing.assert_allclose(tangent, expected, rtol=1e-5, atol=1e-5)
    if option in ("none", "all", "smooth"):
        value, push = jax.linearize(loss, arguments)
        np.testing.assert_allclose(value, result, **REORDERED)
        np.testing.assert_allclose(push(tangents), expected, rtol=1e-5, atol=1e-5)
        by_column = jax.jit(jax.jacfwd(loss))(arguments)
        assert_trees_close(by_column, jacobian, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_jvp_without_forward_mode_is_an_error_that_names_it(kind: str) -> None:
    loss, arguments = problem(kind)
    with pytest.raises(TypeError, match="Pass forward_mode=True"):
        jax.jvp(loss, (arguments,), (arguments,))


# What is kept for the backward pass


@pytest.mark.alternate(6)
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize("forward_mode", [False, True])
@by_case
def test_backward_pass_keeps_only_the_inputs_and_a_number_per_example(
    kind: str, option: str, forward_mode: bool
) -> None:
    loss, arguments = problem(kind, option, forward_mode=forward_mode)

    def of_logits(logits: jax.Array) -> jax.Array:
        return loss(arguments | {"logits": logits})

    held = [*arguments.values(), jnp.asarray(EXISTS)]
    pullbacks = [jax.vjp(of_logits, arguments["logits"])[1]]
    if option in ("none", "all"):
        pullbacks.append(jax.vjp(loss, arguments)[1])
    for pullback in pullbacks:
        for kept in jax.tree.leaves(pullback):
            is_input = any(
                kept.dtype == a.dtype and np.array_equal(kept.ravel(), a.ravel())
                for a in held
            )
            fine = is_input or kept.size <= B
            assert fine, f"kept {kept.dtype} of shape {kept.shape}"


MEMORY_SHAPE = (4096, 8192)
LOGITS_BYTES = 2 * 4096 * 8192


def temporary_bytes(kind: str, option: str, forward_mode: bool) -> int:
    """What XLA allocates for value and gradient of a bfloat16 mean, beside them."""
    rows, classes = MEMORY_SHAPE
    shapes = {
        "where": ((1, classes), jnp.bool_),
        "class_weights": ((classes,), jnp.float32),
        "label_smoothing": ((), jnp.float32),
        "z_loss": ((), jnp.float32),
        "logit_scale": ((), jnp.float32),
        "weights": ((rows,), jnp.float32),
    }
    given = {name: shapes[name] for name in OPTIONS[option] if name in shapes}
    static = {k: v for k, v in OPTIONS[option].items() if k not in shapes}
    static |= {"reduction": "mean", "forward_mode": forward_mode}
    if kind == "dense":
        static.pop("ignore_index", None)
        function = jl.softmax_cross_entropy
        given["labels"] = (MEMORY_SHAPE, jnp.bfloat16)
    else:
        function = jl.softmax_cross_entropy_with_integer_labels
        given["labels"] = ((rows,), jnp.int32)

    def loss(logits: jax.Array, arrays: dict[str, jax.Array]) -> jax.Array:
        return function(logits, **arrays, **static)

    arrays = {name: jax.ShapeDtypeStruct(*spec) for name, spec in given.items()}
    logits = jax.ShapeDtypeStruct(MEMORY_SHAPE, jnp.bfloat16)
    lowered = jax.jit(jax.value_and_grad(loss)).lower(logits, arrays)
    return lowered.compile().memory_analysis().temp_size_in_bytes


def temporaries(cases: list[tuple[str, str, bool]]) -> list[int]:
    """`temporary_bytes` of each case."""
    return one_device.results("test_transforms", "temporary_bytes", cases)


@pytest.mark.parametrize(
    ("kind", "at_once"),
    sweep(
        [(kind, at_once) for kind in KINDS for at_once in (True, False)],
        lambda kind, at_once: at_once and kind == "integer",
    ),
)
def test_options_cost_no_memory_of_the_size_of_the_logits(
    kind: str, at_once: bool
) -> None:
    # All at once, or option by option; with both registrations.
    each = [o for k, o in CASES if k == kind and not o.startswith(("all", "none"))]
    options = ["all"] if at_once else each
    cases = [(kind, "none", False), (kind, "none", True)]
    cases += [(kind, option, False) for option in options]
    cases += [(kind, option, True) for option in options]
    plain, *others = temporaries(cases)
    # Vectors and blocks are allowed, a mask of the size of the logits is not.
    allowed = plain + 3 * LOGITS_BYTES // 8
    too_much = [
        f"{case}: {size / LOGITS_BYTES:.2f} x logits"
        for case, size in zip(cases[1:], others, strict=True)
        if size > allowed
    ]
    without = f"without options: {plain / LOGITS_BYTES:.2f} x logits"
    assert not too_much, "\n".join([without, *too_much])


def test_bfloat16_logits_are_not_copied_to_float32_in_memory() -> None:
    (size,) = temporaries([("integer", "none", False)])
    assert size < 2 * LOGITS_BYTES


# Transformations


@pytest.mark.alternate
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize(("option", "kind"), turns(["none", "all, mean"], KINDS))
def test_outer_jit_returns_what_the_call_returns(kind: str, option: str) -> None:
    loss, arguments = problem(kind, option)
    assert_trees_close(jax.jit(loss)(arguments), loss(arguments), **REORDERED)
    gradient = jax.grad(summed(loss))
    assert_trees_close(jax.jit(gradient)(arguments), gradient(arguments), **REORDERED)


@pytest.mark.alternate(6)
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize(
    ("axis", "kind", "forward_mode"), turns([0, 1, 2], KINDS, [False, True])
)
def test_vmap_over_any_axis_is_the_batched_call(
    axis: int, kind: str, forward_mode: bool
) -> None:
    rng = np.random.default_rng(3)
    logits = jnp.asarray(rng.standard_normal((3, B, V)), jnp.float32)
    if kind == "dense":
        function = jl.softmax_cross_entropy
        labels = jnp.asarray(rng.dirichlet(np.ones(V), (3, B)), jnp.float32)
        labels_axis = 2 - axis
    else:
        function = jl.softmax_cross_entropy_with_integer_labels
        labels = jnp.asarray(rng.integers(0, V, (3, B)), jnp.int32)
        labels_axis = axis % 2
    loss = functools.partial(function, forward_mode=forward_mode)
    value_and_vjp = jax.jit(jax.value_and_grad(summed(loss)))

    moved = jnp.moveaxis(logits, 0, axis), jnp.moveaxis(labels, 0, labels_axis)
    in_axes = (axis, labels_axis)
    batched = jax.vmap(loss, in_axes, out_axes=1)(*moved)
    assert_trees_close(batched, loss(logits, labels).T, **REORDERED)
    values, gradients = jax.vmap(value_and_vjp, in_axes, out_axes=(0, axis))(*moved)
    expected = [value_and_vjp(z, y) for z, y in zip(logits, labels, strict=True)]
    np.testing.assert_allclose(values, [v for v, _ in expected], **REORDERED)
    stacked = jnp.stack([g for _, g in expected], axis)
    assert_trees_close(gradients, stacked, **REORDERED)


MAPPED: dict[str, np.ndarray] = {
    "labels": np.stack([IDS, IDS[::-1]]),
    "where": np.stack([EXISTS, ~EXISTS | (np.arange(V) < 3)]),
    "class_weights": np.linspace(0.25, 3, 2 * V).reshape(2, V),
    "weights": np.linspace(0, 2, 2 * B).reshape(2, B),
    "label_smoothing": np.array([0.0, 0.3]),
    "z_loss": np.array([0.0, 0.1]),
    "logit_scale": np.array([-0.5, 2.0]),
}


@pytest.mark.alternate(4)
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize(("name", "forward_mode"), turns(MAPPED, [False, True]))
def test_vmap_over_one_argument_is_a_loop_over_it(
    name: str, forward_mode: bool
) -> None:
    mapped = MAPPED[name]
    if mapped.dtype == np.float64:
        mapped = mapped.astype(np.float32)
    logits = problem("integer").arguments["logits"]

    def value_and_gradient(
        logits: jax.Array, value: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        arguments = {"labels": IDS, name: value}
        return jax.value_and_grad(
            lambda z: jl.softmax_cross_entropy_with_integer_labels(
                z, forward_mode=forward_mode, reduction="mean", **arguments
            )
        )(logits)

    batched = jax.jit(jax.vmap(value_and_gradient, (None, 0)))(logits, mapped)
    single = jax.jit(value_and_gradient)
    one_by_one = [single(logits, m) for m in mapped]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *one_by_one)
    assert_trees_close(batched, stacked, **REORDERED)


@pytest.mark.alternate
@pytest.mark.without_llvm_passes
@by_kind_and_registration
def test_scan_over_steps_is_the_loss_of_the_whole_sequence(
    kind: str, forward_mode: bool
) -> None:
    loss, arguments = problem(kind, "all", forward_mode=forward_mode)
    steps = jnp.stack([factor * arguments["logits"] for factor in (1.0, -0.5, 2.0)])

    def of_step(step: jax.Array, scale: jax.Array) -> jax.Array:
        given = arguments | {"logits": step, "logit_scale": scale}
        return jnp.sum(loss(given))

    def scanned(steps: jax.Array, scale: jax.Array) -> jax.Array:
        def body(total: jax.Array, step: jax.Array) -> tuple[jax.Array, None]:
            return total + of_step(step, scale), None

        return jax.lax.scan(body, jnp.zeros(()), steps)[0]

    scale = arguments["logit_scale"]
    result = jax.jit(jax.value_and_grad(scanned, (0, 1)))(steps, scale)
    one = jax.jit(jax.value_and_grad(of_step, (0, 1)))
    values, gradients = zip(*[one(step, scale) for step in steps], strict=True)
    by_step, by_scale = zip(*gradients, strict=True)
    expected = sum(values), (jnp.stack(by_step), sum(by_scale))
    assert_trees_close(result, expected, **REORDERED)


@pytest.mark.alternate
@pytest.mark.without_llvm_passes
@by_kind_and_registration
def test_checkpoint_changes_nothing(kind: str, forward_mode: bool) -> None:
    loss, arguments = problem(kind, "all", forward_mode=forward_mode)
    plain = value_and_gradients(loss)(arguments)
    checkpointed = value_and_gradients(jax.checkpoint(loss))(arguments)
    assert_trees_close(checkpointed, plain, **REORDERED)


# JAX keeps what it has traced of a rule for each choice of differentiated arguments,
# but only the last tree of its residuals.
@pytest.mark.alternate(6)
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize(
    "name", ["dense", "integer", *FUSED, "log_probs", "linear_softmax_loss"]
)
def test_a_rule_knows_what_is_differentiated_whatever_was_before(name: str) -> None:
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(2, 5, 7)).astype(np.float32)
    ids = jnp.arange(5)
    options: dict[str, Any] = {"strategy": "tokens", "workspace_bytes": 64}
    kernel = np.eye(7, dtype=np.float32)

    def scalar(x: Any, scale: Any) -> Any:
        both = {"logit_scale": scale, "reduction": "sum"}
        if name == "dense":
            return jl.softmax_cross_entropy(x, jax.nn.softmax(b), **both)
        if name == "log_probs":
            return jl.softmax_log_probs(x, ids, logit_scale=scale).sum()
        if name == "linear_softmax_loss":
            return jl.linear_softmax_loss(
                lambda rows: rows.nll**2, x, kernel, ids, **both, **options
            )
        return LOSSES[name](x, ids, **both)

    given = jnp.asarray(a), jnp.float32(1.5)
    exact = [jax.grad(scalar, i)(*given) for i in (0, 1)]
    for i in (0, 1, 0):
        again = jax.grad(jax.checkpoint(scalar), i)(*given)
        np.testing.assert_allclose(again, exact[i], **REORDERED)


@pytest.mark.alternate
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_changes_no_second_derivative(kind: str) -> None:
    loss, arguments = problem(kind)
    logits = arguments["logits"]

    def of_logits(logits: jax.Array) -> jax.Array:
        return loss(arguments | {"logits": logits})

    hessian = jax.jit(jax.hessian(summed(of_logits)))(logits)
    again = jax.checkpoint(of_logits)
    checkpointed = jax.jit(jax.hessian(summed(again)))(logits)
    assert_trees_close(checkpointed, hessian, **REORDERED)


# Compilation


SCHEDULED = {
    "label_smoothing": (0.1, 0.2),
    "z_loss": (1e-4, 1e-3),
    "logit_scale": (0.5, 2.0),
}


@pytest.mark.alternate(3)
@pytest.mark.parametrize("traced", [False, True], ids=["float", "array"])
@pytest.mark.parametrize("name", SCHEDULED)
def test_another_value_of_an_option_compiles_nothing(name: str, traced: bool) -> None:
    # A batch size of its own, so that no other test has compiled these shapes.
    loss, arguments = problem("integer", batch=7)
    first, second = SCHEDULED[name]
    if traced:
        first, second = jnp.asarray(first), jnp.asarray(second)

    @jax.jit
    def gradient(logits: jax.Array, value: Any) -> jax.Array:
        return jax.grad(lambda z: jnp.sum(loss({"logits": z, name: value})))(logits)

    logits = arguments["logits"]
    with compilations() as events:
        before = loss({"logits": logits, name: first}), gradient(logits, first)
    assert events, "the listener must hear the first compilation"
    with compilations() as events:
        after = loss({"logits": logits, name: second}), gradient(logits, second)
    assert events == []
    for a, b in zip(before, after, strict=True):
        assert not np.allclose(a, b, rtol=1e-4)


@pytest.mark.alternate
@pytest.mark.parametrize("name", ["label_smoothing", "z_loss"])
def test_a_traced_zero_is_the_python_zero(name: str) -> None:
    loss, arguments = problem("integer")
    plain = jax.value_and_grad(summed(loss))(arguments)

    def with_option(logits: jax.Array, value: jax.Array) -> jax.Array:
        return summed(loss)({"logits": logits, name: value})

    value, gradient = jax.jit(jax.value_and_grad(with_option))(
        arguments["logits"], jnp.zeros(())
    )
    assert_trees_close((value, {"logits": gradient}), plain, **REORDERED)


LEFT_OUT: dict[str, dict[str, Any]] = {
    "ignored": {"ignore_index": 2},
    "weight 0": {"weights": np.float32([1, 0, 2])},
    "masked": {"where": np.array([True, False, True])},
}


@pytest.mark.alternate(4)
@pytest.mark.parametrize(
    ("compiled", "how"),
    sweep(
        itertools.product([False, True], LEFT_OUT),
        lambda compiled, how: compiled or how == "weight 0",
    ),
)
def test_debug_nans_finds_none_where_a_nan_does_not_count(
    how: str, compiled: bool
) -> None:
    clean = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    bad = jnp.asarray(clean).at[1, 2].set(jnp.nan)
    ids, q = np.array([0, 2, 1]), np.full((3, 4), 0.25, np.float32)
    kernel = np.random.default_rng(1).normal(size=(4, 5)).astype(np.float32)
    options = LEFT_OUT[how]
    integer = functools.partial(
        jl.softmax_cross_entropy_with_integer_labels, labels=ids, **options
    )
    losses: dict[str, Any] = {"integer": integer}
    if how != "ignored":
        losses["dense"] = functools.partial(
            jl.softmax_cross_entropy, labels=q, **options
        )
    if how == "masked":
        for function in (jl.softmax, jl.log_softmax):
            # Without classes, a log-probability is -inf.
            losses[function.__name__] = lambda z, f=function: jnp.where(
                jnp.asarray(options["where"])[:, None], f(z, where=options["where"]), 0
            )
    else:
        for strategy in ("tokens", "recompute", "vocab", "dense"):
            losses[strategy] = functools.partial(
                jl.linear_softmax_cross_entropy,
                kernel=kernel,
                labels=ids,
                strategy=strategy,
                reduction="mean",
                **options,
            )
    for name, loss in losses.items():
        total = lambda z, f=loss: jnp.sum(f(z))  # noqa: E731
        value, gradient = loss, jax.grad(total)
        if compiled:
            value, gradient = jax.jit(value), jax.jit(gradient)
        with jax.debug_nans(True):
            got, slope = value(bad), gradient(bad)
            both, again = jax.value_and_grad(total)(bad)
        np.testing.assert_allclose(got, loss(clean), rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(both, jnp.sum(got), rtol=1e-6, err_msg=name)
        exact = np.asarray(jax.grad(total)(clean))
        exact = np.where(np.arange(3)[:, None] == 1, 0, exact)
        for found in (slope, again):
            np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-7, err_msg=name)


def test_debug_nans_finds_one_where_it_counts() -> None:
    logits = jnp.asarray([[0.0, np.nan], [1.0, 2.0]])
    loss = jl.softmax_cross_entropy_with_integer_labels
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        jax.grad(lambda z: jnp.sum(loss(z, jnp.array([0, 1]))))(logits)
