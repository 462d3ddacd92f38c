"""The fused loss of `hidden @ kernel`, against the exact value.

The oracle takes the float64 product of the arguments as they were rounded, and the
chain rule through that product is NumPy's.
"""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import one_device
import oracle
import pytest
from helpers import (
    DIFFERENTIATED,
    STRATEGIES,
    assert_all_zero,
    compilations,
    exact_derivatives,
    on_one_device,
    sweep,
    turns,
)
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tolerances import accumulated

import jaxlosses as jl
from jaxlosses import testing
from jaxlosses._backends import plan

linear = jl.linear_softmax_cross_entropy

# Neither is divided by its chunks, of which there are several at these workspaces.
# With the smaller one the last of them are empty: 6 chunks of 3 examples, and 12 of 4
# classes.
B, D, V = 13, 8, 37
WORKSPACE = 800
SMALLER = 430

by_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
# Classes are cut in the same way everywhere.
PLACES = [
    ("tokens", False),
    ("tokens", True),
    ("recompute", False),
    ("recompute", True),
    ("vocab", False),
    ("dense", False),
]
by_strategy_and_place = pytest.mark.parametrize(("strategy", "local"), PLACES)

# A logit is a sum of 8 products, each rounded to float32, and has an absolute error
# of about 1e-6; probabilities have it as a relative one. It is measured by what is
# summed, since terms of both signs may cancel.
ERROR = {"float32": 1e-5, "float64": 1e-13}
# Cotangents of logits are rounded to the dtype of the matmuls, and every gradient to
# that of its argument.
ROUNDING = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 0.0, "float64": 0.0}


def head(
    size: tuple[Any, int, int] = (B, D, V),
    layout: str = "dv",
    dtypes: tuple[str, str] = ("float32", "float32"),
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Hidden states, a kernel and labels whose logits are of order 1."""
    rng = np.random.default_rng(seed)
    examples, features, classes = size
    batch = (examples,) if isinstance(examples, int) else examples
    hidden = rng.standard_normal((*batch, features))
    kernel = rng.standard_normal((features, classes)) / np.sqrt(features)
    if layout == "vd":
        kernel = kernel.T
    return {
        "hidden": hidden.astype(jnp.dtype(dtypes[0])),
        "kernel": kernel.astype(jnp.dtype(dtypes[1])),
        "labels": rng.integers(classes, size=batch, dtype=np.int32),
    }


def options_of(name: str, labels: np.ndarray, classes: int) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    exists = rng.uniform(size=classes) < 0.7
    exists[labels.ravel()] = True
    class_weights = rng.uniform(0.1, 3, classes)
    class_weights[::5] = 0
    weights = rng.uniform(0.1, 2, labels.shape)
    weights.ravel()[::6] = 0
    each: dict[str, dict[str, Any]] = {
        "none": {},
        "bias": {"bias": rng.standard_normal(classes)},
        "class_weights": {"class_weights": class_weights},
        "label_smoothing": {"label_smoothing": 0.1},
        "smoothed class_weights": {
            "class_weights": class_weights,
            "label_smoothing": 0.1,
        },
        "z_loss": {"z_loss": 0.01},
        "logit_softcap": {"logit_softcap": 2.0},
        "logit_scale": {"logit_scale": -0.7},
        "weights": {"weights": weights},
        "where": {"where": exists},
        "ignore_index": {"ignore_index": int(labels.ravel()[1])},
    }
    if name != "all":
        return each[name]
    return {k: v for option in each.values() for k, v in option.items()}


OPTIONS = [
    "none",
    "bias",
    "class_weights",
    "label_smoothing",
    "smoothed class_weights",
    "z_loss",
    "logit_softcap",
    "logit_scale",
    "weights",
    "where",
    "ignore_index",
    "all",
]


@functools.cache
def compiled(static: tuple[tuple[str, Any], ...], local: bool) -> Callable[..., Any]:
    """Value, what is returned beside it, and gradients as one program."""

    def value_and_gradients(
        differentiated: dict[str, jax.Array],
        fixed: dict[str, jax.Array],
        cotangent: jax.Array,
    ) -> Any:
        def loss(arrays: dict[str, jax.Array]) -> tuple[jax.Array, Any]:
            out = linear(**arrays, **fixed, **dict(static))
            return out if isinstance(out, tuple) else (out, ())

        value, pull, stats = jax.vjp(loss, differentiated, has_aux=True)
        return value, pull(cotangent)[0], stats

    if local:
        value_and_gradients = on_one_device(value_and_gradients)
    # These tests wait for compilation, not for results.
    fast = {"xla_backend_optimization_level": 0}
    return jax.jit(value_and_gradients, compiler_options=fast)


def check(
    strategy: str,
    given: dict[str, np.ndarray],
    *,
    local: bool = False,
    layout: str = "dv",
    workspace: int = WORKSPACE,
    forward_mode: bool = False,
    return_stats: bool = False,
    **options: Any,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Loss and all gradients, after a comparison with the exact ones."""
    hidden, kernel, labels = given["hidden"], given["kernel"], given["labels"]
    dtypes = {hidden.dtype, kernel.dtype}
    compute = kernel.dtype if len(dtypes) == 1 else np.dtype(np.float32)
    wide = accumulated(compute.name)
    arrays = {"hidden": hidden, "kernel": kernel}
    if "bias" in options:
        arrays["bias"] = np.asarray(options.pop("bias")).astype(kernel.dtype)
    for name in DIFFERENTIATED:
        if name in options:
            options[name] = arrays[name] = np.asarray(options[name], wide)
    fixed = {"labels": labels}
    if options.get("where") is not None:
        fixed["where"] = options["where"]
    static = {
        "strategy": strategy,
        "workspace_bytes": workspace,
        "kernel_layout": layout,
        "forward_mode": forward_mode,
        "return_stats": return_stats,
    }
    for name in ("ignore_index", "logit_softcap", "reduction"):
        if name in options:
            static[name] = options[name]

    h, k = hidden.astype(np.float64), kernel.astype(np.float64)
    k = k if layout == "dv" else k.T
    features, classes = k.shape
    bias = arrays.get("bias")
    logits = h @ k + (0 if bias is None else bias.astype(np.float64))
    on_logits = dict(options)
    if "where" in on_logits:
        on_logits["where"] = np.atleast_2d(on_logits["where"])
    exact = oracle.loss(logits, labels, **on_logits)
    cotangent = np.resize([1.0, -0.5, 2.0, -1.0, 0.25], exact.shape).astype(wide)

    run = compiled(tuple(static.items()), local)
    with jax.enable_x64(wide == np.float64):
        loss, gradients, stats = run(arrays, fixed, cotangent)
    assert loss.dtype == wide
    assert loss.shape == exact.shape
    error = ERROR[wide.name]
    assert_near(loss, exact, error * (abs(exact) + spread(exact)), "loss")

    derivatives = exact_derivatives(logits, labels, cotangent, on_logits)
    dz, terms = derivatives.pop("logits")
    derivatives["hidden"] = dz @ k.T, terms @ abs(k).T
    dz, terms = dz.reshape(-1, classes), terms.reshape(-1, classes)
    # Where nothing counts, neither do features that are NaN.
    h = np.where(np.isfinite(h), h, 0).reshape(-1, features)
    by_kernel = h.T @ dz, abs(h).T @ terms
    if layout == "vd":
        by_kernel = by_kernel[0].T, by_kernel[1].T
    derivatives["kernel"] = by_kernel
    derivatives["bias"] = dz.sum(0), terms.sum(0)
    if "weights" in options:
        # An example of weight 0 is left out, where the oracle has its loss.
        out = options["weights"] == 0
        derivatives["weights"] = tuple(
            np.where(out, 0, x) for x in derivatives["weights"]
        )
    assert gradients.keys() == arrays.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == arrays[name].dtype, name
        value, size = derivatives[name]
        # Which of the parameters a bad example spoils is not promised.
        if np.isnan(exact).any() and name not in ("hidden", "weights"):
            continue
        allowed = error * (size + spread(size))
        if name in ("hidden", "kernel"):
            allowed += ROUNDING[compute.name] * size
            if compute == np.float16:  # has no smaller steps
                allowed += 2.0**-24 * np.max(abs(h if name == "kernel" else k)) * 8
        allowed += ROUNDING[gradient.dtype.name] * abs(value)
        assert_near(gradient, value, allowed, f"gradient by {name}")
    if return_stats:
        check_stats(stats, logits, labels, error, on_logits)
    return np.asarray(loss), {k: np.asarray(v) for k, v in gradients.items()}


def spread(size: Any) -> Any:
    """Where the terms of one entry are small, those of the others count a little."""
    size = np.where(np.isfinite(size), abs(size), 0)
    return 0.1 * np.max(size, initial=0)


def assert_near(actual: Any, exact: Any, allowed: Any, what: str) -> None:
    actual, exact = np.asarray(actual).astype(np.float64), np.asarray(exact)
    assert actual.shape == exact.shape, (what, actual.shape, exact.shape)
    with np.errstate(invalid="ignore"):
        error = abs(actual - exact)
        fine = (error <= allowed) | (actual == exact)
    fine |= np.isnan(actual) & np.isnan(exact)
    if not np.all(fine):
        worst = np.where(fine, 0, np.nan_to_num(error / allowed, nan=np.inf))
        at = tuple(int(i) for i in np.unravel_index(worst.argmax(), worst.shape))
        raise AssertionError(
            f"{what} at {at}: got {actual[at]:.9g}, exact is {exact[at]:.17g}: "
            f"{worst[at]:.3g} times the error allowed. {(~fine).sum()} of {fine.size} "
            "entries are wrong."
        )


def check_stats(
    stats: jl.Stats,
    logits: np.ndarray,
    labels: np.ndarray,
    error: float,
    options: dict[str, Any],
) -> None:
    """Metrics of the examples that count; zero where one does not."""
    z, cap = logits, options.get("logit_softcap")
    if cap is not None:
        z = cap * np.tanh(z / cap)
    z = z * float(options.get("logit_scale", 1.0))
    z = np.where(options.get("where", True), z, -np.inf)
    counts = labels != options.get("ignore_index")
    counts &= np.asarray(options.get("weights", np.ones(labels.shape))) != 0
    lse = np.where(counts, np.log(np.exp(z).sum(-1)), 0)
    plain = {
        k: options[k]
        for k in ("where", "ignore_index", "logit_softcap", "logit_scale")
        if k in options
    }
    nll = np.where(counts, oracle.loss(logits, labels, **plain), 0)
    penalty = float(options.get("z_loss", 0.0)) * lse**2
    assert_near(stats.lse, lse, error * (abs(lse) + spread(lse)), "lse")
    assert_near(stats.nll, nll, error * (nll + spread(nll)), "nll")
    assert_near(stats.z_loss, penalty, error * (penalty + spread(penalty)), "z_loss")
    np.testing.assert_array_equal(
        np.asarray(stats.predicted)[counts], z.argmax(-1)[counts]
    )
    np.testing.assert_array_equal(stats.correct, counts & (z.argmax(-1) == labels))


# Value and gradients

REDUCTIONS = ["none", "sum", "mean"]


def turn(strategy: str, option: str) -> dict[str, Any]:
    """Layout, place, workspace and reduction, all of which come up."""
    i = OPTIONS.index(option)
    j = i + STRATEGIES.index(strategy)
    reductions = REDUCTIONS[1:] if strategy == "tokens" else REDUCTIONS
    return {
        "layout": ("dv", "vd")[j % 2],
        "local": (i // 2) % 2 == 1,
        "workspace": (WORKSPACE, SMALLER)[(i // 4) % 2],
        "reduction": reductions[j % len(reductions)],
        "return_stats": option == "all",
    }


# On all logits at once, options are those of the integer loss.
OF_DENSE = ("none", "bias", "weights", "where", "ignore_index", "all")


@pytest.mark.alternate(6)
@pytest.mark.parametrize(
    ("strategy", "option"),
    sweep(
        [(s, o) for s in STRATEGIES for o in OPTIONS if s != "dense" or o in OF_DENSE],
        # None by every strategy, all by those that have no strided chunks, which are
        # tested below, and the others by one.
        lambda strategy, option: (
            option == "none"
            or (option == "all" and strategy in ("vocab", "dense"))
            or OPTIONS.index(option) % 3 == STRATEGIES.index(strategy)
        ),
    ),
)
def test_value_and_every_gradient_are_exact(strategy: str, option: str) -> None:
    given = head(layout=turn(strategy, option)["layout"])
    check(
        strategy,
        given,
        **turn(strategy, option),
        **options_of(option, given["labels"], V),
    )


@pytest.mark.parametrize(
    "strategy", sweep(["tokens", "recompute"], lambda name: name == "tokens")
)
def test_strided_chunks_have_the_stats_of_their_examples(strategy: str) -> None:
    given = head(layout="vd")
    options = options_of("all", given["labels"], V) | {"reduction": "mean"}
    check(strategy, given, layout="vd", return_stats=True, **options)


@pytest.mark.without_llvm_passes
@pytest.mark.parametrize(
    "strategy", sweep(["recompute", "vocab"], lambda name: name == "vocab")
)
def test_the_forward_rule_has_the_same_value_and_gradients(strategy: str) -> None:
    given = head()
    options = options_of("all", given["labels"], V)
    check(strategy, given, local=True, forward_mode=True, **options)


SIZES: dict[str, tuple[Any, int, int]] = {
    "one example": (1, D, V),
    "one class": (5, D, 1),
    "one feature": (5, 1, V),
    "one chunk": (3, 2, 5),
    "no batch axis": ((), D, V),
    "two batch axes": ((2, 7), D, V),
}


@pytest.mark.alternate(4)
@pytest.mark.parametrize(("name", "strategy"), turns(SIZES, STRATEGIES[:-1]))
def test_sizes_at_the_edge_are_exact(name: str, strategy: str) -> None:
    i = list(SIZES).index(name) + STRATEGIES.index(strategy)
    given = head(SIZES[name], layout := ("dv", "vd")[i % 2])
    options: dict[str, Any] = {"reduction": "sum", "logit_scale": 0.7}
    if name != "one chunk":
        options["workspace"] = 100
    check(strategy, given, layout=layout, local=i % 3 == 0, **options)


@by_strategy
def test_no_example_is_a_loss_of_zero(strategy: str) -> None:
    given = head((0, D, V))
    bias, weights = np.ones(V), np.ones(0)
    options = {"bias": bias, "weights": weights, "reduction": "mean"}
    loss, gradients = check(strategy, given, **options)
    assert_all_zero(loss, *gradients.values())


DTYPES = {
    "bfloat16": ("bfloat16", "bfloat16"),
    "float16": ("float16", "float16"),
    "float64": ("float64", "float64"),
    "bfloat16 features": ("bfloat16", "float32"),
    "bfloat16 kernel": ("float32", "bfloat16"),
}


@pytest.mark.alternate(4)
@pytest.mark.parametrize(("name", "strategy"), turns(DTYPES, STRATEGIES))
def test_every_dtype_is_accumulated_in_a_wide_one(name: str, strategy: str) -> None:
    i = list(DTYPES).index(name) + STRATEGIES.index(strategy)
    layout = ("dv", "vd")[i % 2]
    given = head(layout=layout, dtypes=DTYPES[name])
    options = {"bias": np.linspace(-1, 1, V), "z_loss": 0.01, "reduction": "mean"}
    promotion = "standard" if " " in name else "strict"
    with jax.numpy_dtype_promotion(promotion):
        check(strategy, given, layout=layout, local=i % 3 == 0, **options)


@pytest.mark.without_llvm_passes
def test_sixteen_bits_serve_to_second_order() -> None:
    """The slices of 16-bit numbers, as integers, have no transpose."""
    given = head((6, 5, 40), dtypes=DTYPES["bfloat16"])
    point = jnp.asarray(given["hidden"]), jnp.asarray(given["kernel"])

    def products(strategy: str, point: tuple[jax.Array, jax.Array]) -> list[Any]:
        gradient = jax.grad(
            small_loss(strategy, given["labels"], workspace_bytes=600), (0, 1)
        )

        def slope(*point: jax.Array) -> jax.Array:
            return sum(jnp.sum(d.astype(jnp.float32)) for d in gradient(*point))

        ones = jax.tree.map(jnp.ones_like, point)
        _, forward = jax.jvp(gradient, point, ones)
        return [*forward, *jax.grad(slope, (0, 1))(*point)]

    wide = tuple(a.astype(jnp.float32) for a in point)
    exact = jax.jit(functools.partial(products, "dense"))(wide)
    found = jax.jit(functools.partial(products, "vocab"))(point)
    for got, want in zip(found, exact, strict=True):
        error = jnp.linalg.norm(got.astype(jnp.float32) - want)
        assert error < 0.02 * jnp.linalg.norm(want)


def test_two_dtypes_are_promoted_under_strict_promotion() -> None:
    check("dense", head(dtypes=("bfloat16", "float32")))


@pytest.mark.alternate
@by_strategy
def test_a_class_of_bias_minus_infinity_has_no_probability(strategy: str) -> None:
    given = head()
    given["labels"] %= 20
    # Whole chunks of them.
    bias = np.where(np.arange(V) < 20, 0, -np.inf)
    loss, gradients = check(strategy, given, bias=bias, z_loss=0.01, reduction="sum")
    assert np.isfinite(loss)
    assert_all_zero(gradients["bias"][20:], gradients["kernel"][:, 20:])


# Defects of peers


@pytest.mark.alternate
@pytest.mark.parametrize(
    ("strategy", "dtype"), turns(STRATEGIES, ["float32", "bfloat16"])
)
def test_ragged_chunks_carry_no_probability_and_lose_no_digits(
    strategy: str, dtype: str
) -> None:
    classes = 2049
    given = head((3, 4, classes), dtypes=(dtype, dtype))
    given["hidden"] = 0 * given["hidden"]
    options = {"reduction": "mean", "workspace": 10_000, "local": dtype == "bfloat16"}
    loss, _ = check(strategy, given, **options)
    # A padded column would count as a logit of zero.
    np.testing.assert_allclose(loss, np.log(classes), rtol=1e-6)


@pytest.mark.alternate(4)
@pytest.mark.parametrize(
    ("strategy", "local"),
    sweep(PLACES, lambda *case: case not in [("recompute", False), ("dense", False)]),
)
def test_no_example_of_the_last_chunk_counts_twice(strategy: str, local: bool) -> None:
    def by_bias(hidden: jax.Array, labels: jax.Array, bias: jax.Array) -> Any:
        def loss(bias: jax.Array) -> jax.Array:
            return linear(
                hidden,
                jnp.ones((D, 5)),
                labels,
                bias,
                strategy=strategy,
                workspace_bytes=4 * 5 * 4,
                reduction="sum",
            )

        return jax.value_and_grad(loss)(bias)

    run = jax.jit(on_one_device(by_bias) if local else by_bias)
    for examples in (5, 7):
        labels = np.arange(examples, dtype=np.int32) % 5
        loss, gradient = run(
            np.ones((examples, D), np.float32), labels, np.zeros(5, np.float32)
        )
        np.testing.assert_allclose(loss, examples * np.log(5), rtol=1e-6)
        expected = examples / 5 - np.bincount(labels, minlength=5)
        np.testing.assert_allclose(gradient, expected, atol=2e-6)


@pytest.mark.alternate
@pytest.mark.parametrize(
    ("strategy", "workspace"), [("tokens", 60), ("recompute", 60), ("vocab", 18)]
)
def test_a_last_chunk_that_only_overlaps_adds_nothing(
    strategy: str, workspace: int
) -> None:
    # Six chunks of two of ten classes, of the kernel's gradient or of the logits.
    local = strategy != "vocab"
    check(strategy, head((1, 1, 10)), workspace=workspace, reduction="sum", local=local)


@pytest.mark.parametrize("strategy", ["tokens", "recompute"])
def test_a_bfloat16_gradient_of_the_kernel_sums_in_float32(strategy: str) -> None:
    given = head((1000, 2, 3), dtypes=("bfloat16", "bfloat16"))
    given["hidden"] = (1 + 0.1 * given["hidden"]).astype(jnp.bfloat16)
    given["labels"][:] = 1
    # One example at a time: a sum in bfloat16 would stop at a quarter.
    check(strategy, given, reduction="sum", workspace=1)


def test_a_bfloat16_gradient_of_the_features_sums_in_float32() -> None:
    given = head((3, 2, 1000), dtypes=("bfloat16", "bfloat16"))
    given["kernel"] = (1 + 0.1 * given["kernel"]).astype(jnp.bfloat16)
    # One class at a time.
    check("vocab", given, workspace=1)


@pytest.mark.alternate
@pytest.mark.parametrize("strategy", ["tokens", "vocab"])
def test_a_saturated_cap_has_its_derivative(strategy: str) -> None:
    given = head(seed=3)
    given["hidden"] *= 3
    loss, gradients = check(strategy, given, logit_softcap=1.5, reduction="sum")
    _, uncapped = check(strategy, given, reduction="sum")
    assert loss < B * np.log(V * np.exp(3))
    size = {
        k: np.abs(g["kernel"]).sum() for k, g in (("cap", gradients), ("", uncapped))
    }
    assert size["cap"] < size[""]


IGNORED = np.arange(B) % 3 == 1


@pytest.mark.alternate(3)
@by_strategy_and_place
def test_an_ignored_example_leaves_no_trace(strategy: str, local: bool) -> None:
    given = head()
    given["labels"][IGNORED] = -100
    options = {"ignore_index": -100, "reduction": "sum", "z_loss": 0.01}
    loss, gradients = check(strategy, given, local=local, **options)
    assert_all_zero(gradients["hidden"][IGNORED])
    without = {k: v if k == "kernel" else v[~IGNORED] for k, v in given.items()}
    run = compiled(
        (("reduction", "sum"), ("z_loss", 0.01), ("strategy", "dense")), False
    )
    alone, alone_gradients, _ = run(
        {"hidden": without["hidden"], "kernel": without["kernel"]},
        {"labels": without["labels"]},
        np.ones((), np.float32),
    )
    np.testing.assert_allclose(loss, alone, rtol=2e-6)
    np.testing.assert_allclose(
        gradients["kernel"], alone_gradients["kernel"], rtol=1e-5, atol=1e-5
    )


@pytest.mark.alternate(3)
@by_strategy_and_place
def test_nan_features_of_an_example_that_does_not_count_are_harmless(
    strategy: str, local: bool
) -> None:
    given = head()
    # Seven count: the second chunk of four has one that does not.
    weights = np.where(np.isin(np.arange(B), [2, 3]), 0, 1.5)
    out = IGNORED | (weights == 0)
    given["labels"][IGNORED] = -100
    given["hidden"][out] = np.nan
    options = {"ignore_index": -100, "weights": weights, "reduction": "mean"}
    loss, gradients = check(strategy, given, local=local, **options)
    assert np.isfinite(loss)
    assert_all_zero(gradients["hidden"][out], gradients["weights"][out])
    assert np.all(np.isfinite(gradients["kernel"]))


@pytest.mark.alternate(4)
@by_strategy_and_place
def test_each_example_may_have_classes_of_its_own(strategy: str, local: bool) -> None:
    given = head()
    rng = np.random.default_rng(2)
    exists = rng.uniform(size=(B, V)) < 0.5
    exists[np.arange(B), given["labels"]] = True
    exists[4] = False  # without any class it does not count
    given["labels"][6] = -100
    options = {
        "where": exists,
        "label_smoothing": 0.1,
        "class_weights": rng.uniform(0.1, 3, V),
        "ignore_index": -100,
        "reduction": "mean",
    }
    loss, gradients = check(strategy, given, local=local, **options)
    assert np.isfinite(loss)
    assert_all_zero(gradients["hidden"][[4, 6]])
    # A label that only other examples have is one that cannot be.
    exists[2, given["labels"][2]] = False
    options["reduction"] = "sum" if strategy == "tokens" else "none"
    _, gradients = check(strategy, given, local=local, **options)
    bad = np.arange(B) == 2
    assert np.all(np.isnan(gradients["hidden"]) == bad[:, None])


@pytest.mark.alternate(6)
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@by_strategy
def test_classes_of_their_own_on_a_mesh(strategy: str, kind: AxisType) -> None:
    given, classes = head((8, D, 40)), 40
    exists = np.random.default_rng(3).uniform(size=(8, classes)) < 0.5
    exists[np.arange(8), given["labels"]] = True
    mesh = jax.make_mesh((2, 4), ("data", "model"), (kind,) * 2)

    def loss(hidden: Any, kernel: Any, labels: Any, where: Any) -> Any:
        return linear(
            hidden,
            kernel,
            labels,
            where=where,
            strategy=strategy,
            workspace_bytes=WORKSPACE,
            reduction="mean",
        )

    value_and_gradients = jax.value_and_grad(loss, (0, 1))
    arrays = (*given.values(), exists)
    exact = value_and_gradients(*arrays)
    splits = (P("data"), P(None, "model"), P("data"), P("data"))
    with jax.set_mesh(mesh):
        split = [
            jax.device_put(a, NamedSharding(mesh, spec))
            for a, spec in zip(arrays, splits, strict=True)
        ]
        got = jax.jit(value_and_gradients)(*split)
    for a, b in zip(*map(jax.tree.leaves, (got, exact)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.alternate
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize("shape", [(1, V), (B, 1), (V,), (B,)], ids=str)
def test_a_mask_broadcasts_to_the_logits_it_would_have(shape: Any) -> None:
    given = head()
    mask = np.random.default_rng(4).uniform(size=shape) < 0.5
    if shape[-1] == V:
        mask[..., given["labels"]] = True
    full = mask[:, None] if shape == (B,) else mask
    options = {"strategy": "recompute", "workspace_bytes": WORKSPACE}
    loss = linear(**given, where=mask, **options)
    logits = given["hidden"] @ given["kernel"]
    exact = oracle.loss(logits, given["labels"], where=np.broadcast_to(full, (B, V)))
    np.testing.assert_allclose(loss, exact, rtol=1e-5, atol=1e-6)


BAD = [0, 3, 12]


@pytest.mark.alternate(3)
@by_strategy_and_place
def test_an_invalid_label_is_nan_in_its_row_alone(strategy: str, local: bool) -> None:
    given = head()
    exists = np.arange(V) != 7
    given["labels"] = np.where(given["labels"] == 7, 8, given["labels"])
    given["labels"][BAD] = [-1, V, 7]
    given["labels"][5] = -100
    options = {"where": exists, "ignore_index": -100}
    reduction = "sum" if strategy == "tokens" else "none"
    loss, gradients = check(
        strategy, given, local=local, reduction=reduction, return_stats=False, **options
    )
    bad = np.isin(np.arange(B), BAD)
    assert np.all(np.isnan(gradients["hidden"]) == bad[:, None])
    assert np.array_equal(np.isnan(loss), bad if loss.ndim else True)


@pytest.mark.alternate
@by_strategy
def test_nan_features_of_a_counted_example_are_nan_in_its_row_alone(
    strategy: str,
) -> None:
    given = head()
    given["hidden"][4, 2] = np.nan
    reduction = "sum" if strategy == "tokens" else "none"
    loss, gradients = check(strategy, given, reduction=reduction, label_smoothing=0.1)
    bad = np.arange(B) == 4
    assert np.all(np.isnan(gradients["hidden"]) == bad[:, None])
    assert np.array_equal(np.isnan(loss), bad if loss.ndim else True)


# Distributions


@pytest.mark.alternate(8)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    ("strategy", "reduction"),
    [
        *(("dense", "none"), ("tokens", "sum"), ("tokens", "mean")),
        *(("recompute", "none"), ("recompute", "mean")),
    ],
)
def test_distributions_are_cut_with_their_examples(
    strategy: str, reduction: str, shared: bool
) -> None:
    given = head((13, D, 6))
    h, k = (given[name].astype(np.float64) for name in ("hidden", "kernel"))
    rng = np.random.default_rng(2)
    labels = rng.uniform(size=(1 if shared else 13, 6)).astype(np.float32)
    weights = rng.uniform(size=13).astype(np.float32)
    weights[3] = 0
    class_weights = rng.uniform(size=6).astype(np.float32)
    cotangent = rng.normal(size=13).astype(np.float32) if reduction == "none" else 1.0
    static = {"label_smoothing": 0.1, "z_loss": 0.05, "reduction": reduction}

    def loss(
        hidden: jax.Array,
        kernel: jax.Array,
        labels: jax.Array,
        weights: jax.Array,
        class_weights: jax.Array,
    ) -> tuple[jax.Array, Any]:
        value, stats = linear(
            hidden,
            kernel,
            labels,
            weights=weights,
            class_weights=class_weights,
            strategy=strategy,
            workspace_bytes=4 * 6 * 12,
            return_stats=True,
            **static,
        )
        return jnp.sum(cotangent * value), (value, stats)

    arguments = given["hidden"], given["kernel"], labels, weights, class_weights
    gradient = jax.value_and_grad(loss, (0, 1, 2, 3, 4), has_aux=True)
    (_, (value, stats)), gradients = jax.jit(gradient)(*arguments)
    options = static | {"weights": weights, "class_weights": class_weights}
    exact = oracle.gradients(h @ k, labels, cotangent=cotangent, **options)
    dz = exact["logits"]
    np.testing.assert_allclose(
        value, oracle.loss(h @ k, labels, **options), rtol=1e-5, atol=1e-6
    )
    plain = np.where(weights == 0, 0, oracle.loss(h @ k, labels))
    np.testing.assert_allclose(stats.nll, plain, rtol=1e-5)
    exact["weights"] = np.where(weights == 0, 0, exact["weights"])  # it is left out
    others = (exact[name] for name in ("labels", "weights", "class_weights"))
    for got, want in zip(gradients, (dz @ k.T, h.T @ dz, *others), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


@pytest.mark.alternate
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize("strategy", ["tokens", "recompute"])
def test_distributions_of_several_axes_are_shared_along_some(strategy: str) -> None:
    given = head((12, D, 6))
    hidden = given["hidden"].reshape(3, 4, D)
    labels = np.random.default_rng(2).uniform(size=(1, 4, 6)).astype(np.float32)

    def loss(strategy: str, labels: jax.Array) -> jax.Array:
        chunks = {"strategy": strategy, "workspace_bytes": 300}
        return linear(hidden, given["kernel"], labels, reduction="sum", **chunks)

    def second(strategy: str) -> Any:
        return jax.grad(lambda x: jnp.sum(jax.grad(loss, 1)(strategy, x) ** 2))(labels)

    plain = jax.value_and_grad(loss, 1)
    for got, want in zip(plain(strategy, labels), plain("dense", labels), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_allclose(second(strategy), second("dense"), rtol=1e-5)


# Transformations

SMALL = (5, 3, 7)
SMALL_OPTIONS = {"z_loss": 0.05, "label_smoothing": 0.1, "logit_scale": 1.3}


def small_loss(
    strategy: str, labels: Any, **static: Any
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A loss of hidden states and kernel, in several chunks."""
    static = {"workspace_bytes": 100, "reduction": "sum"} | SMALL_OPTIONS | static
    labels = jnp.asarray(labels)
    return lambda hidden, kernel: linear(
        hidden, kernel, labels, strategy=strategy, **static
    )


def exact_gradients(
    hidden: np.ndarray, kernel: np.ndarray, labels: np.ndarray, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    h, k = hidden.astype(np.float64), kernel.astype(np.float64)
    options = SMALL_OPTIONS | {"reduction": "sum"} | options
    dz = oracle.gradients(h @ k, labels, **options)["logits"]
    return dz @ k.T, h.T @ dz


def exact_product(
    given: dict[str, np.ndarray], vectors: tuple[np.ndarray, ...], **options: Any
) -> list[np.ndarray]:
    """The Hessian times vectors, by differences of exact gradients."""
    step = 1e-5
    point = [given[name].astype(np.float64) for name in ("hidden", "kernel")]
    ahead, behind = (
        exact_gradients(
            *(a + t * v for a, v in zip(point, vectors, strict=True)),
            given["labels"],
            **options,
        )
        for t in (step, -step)
    )
    return [(a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True)]


def tangents_of(*arrays: np.ndarray) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(7)
    return tuple(rng.standard_normal(a.shape).astype(a.dtype) for a in arrays)


@pytest.mark.alternate
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize(
    ("strategy", "local"),
    sweep(
        [case for case in PLACES if case != ("recompute", False)],
        lambda *case: case not in [("tokens", False), ("dense", False)],
    ),
)
def test_hessian_vector_products_match_exact_differences(
    strategy: str, local: bool
) -> None:
    given = head(SMALL)
    given["labels"][2] = -100
    labels, vectors = given["labels"], tangents_of(given["hidden"], given["kernel"])
    loss = small_loss(strategy, labels, ignore_index=-100)
    gradient = jax.grad(loss, (0, 1))

    def products(hidden: jax.Array, kernel: jax.Array, vectors: Any) -> Any:
        def along(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
            pairs = zip(gradient(hidden, kernel), vectors, strict=True)
            return sum(jnp.sum(g * v) for g, v in pairs)

        forward = jax.jvp(gradient, (hidden, kernel), vectors)[1]
        return forward, jax.grad(along, (0, 1))(hidden, kernel)

    run = jax.jit(on_one_device(products) if local else products)
    got = run(given["hidden"], given["kernel"], vectors)
    exact = exact_product(given, vectors, ignore_index=-100)
    for way, product in zip(
        ("forward over reverse", "reverse twice"), got, strict=True
    ):
        for have, want in zip(product, exact, strict=True):
            np.testing.assert_allclose(have, want, rtol=2e-5, atol=1e-5, err_msg=way)


@pytest.mark.alternate(4)
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize(
    ("strategy", "transform"), turns(STRATEGIES[:-1], ["vmap", "scan", "checkpoint"])
)
def test_transformed_losses_are_exact(strategy: str, transform: str) -> None:
    given = head(((2, 5), 3, 7))
    labels = jnp.asarray(given["labels"]).at[1, 3].set(-100)
    local = transform != "vmap" and strategy in ("tokens", "recompute")

    def loss(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
        return small_loss(strategy, labels, ignore_index=-100)(hidden, kernel)

    def total(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
        if transform == "vmap":
            return jnp.sum(jax.vmap(loss, (0, None, 0))(hidden, kernel, labels))
        if transform == "checkpoint":
            flat = hidden.reshape(-1, 3), kernel, labels.ravel()
            return jax.checkpoint(loss)(*flat)

        def body(so_far: jax.Array, step: Any) -> tuple[jax.Array, None]:
            return so_far + loss(step[0], kernel, step[1]), None

        return jax.lax.scan(
            body, loss(hidden[0], kernel, labels[0]), (hidden[1:], labels[1:])
        )[0]

    run = jax.value_and_grad(total, (0, 1))
    value, gradients = jax.jit(on_one_device(run) if local else run)(
        given["hidden"], given["kernel"]
    )
    h, k = given["hidden"].reshape(-1, 3), given["kernel"]
    ids = np.asarray(labels).ravel()
    options = SMALL_OPTIONS | {"ignore_index": -100, "reduction": "sum"}
    z = h.astype(np.float64) @ k.astype(np.float64)
    np.testing.assert_allclose(value, oracle.loss(z, ids, **options), rtol=1e-5)
    by_hidden, by_kernel = exact_gradients(h, k, ids, ignore_index=-100)
    np.testing.assert_allclose(
        gradients[0].reshape(-1, 3), by_hidden, rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(gradients[1], by_kernel, rtol=1e-5, atol=1e-5)


@pytest.mark.alternate(4)
@pytest.mark.parametrize(
    ("strategy", "traced"),
    [
        ("tokens", False),
        ("tokens", True),
        ("recompute", True),
        ("vocab", False),
        ("dense", True),
    ],
)
def test_other_values_of_options_compile_nothing(strategy: str, traced: bool) -> None:
    given = head((6, 3, 7))  # a size of its own

    def gradient(**options: float) -> jax.Array:
        options = {k: jnp.float32(x) if traced else x for k, x in options.items()}
        loss = small_loss(strategy, given["labels"], **options)
        return jax.grad(loss)(given["hidden"], given["kernel"])

    with compilations() as events:
        before = gradient(z_loss=1e-4, label_smoothing=0.1, logit_scale=0.5)
    assert events, "the listener must hear the first compilation"
    with compilations() as events:
        after = gradient(z_loss=1e-3, label_smoothing=0.2, logit_scale=2.0)
    assert events == []
    assert not np.allclose(before, after, rtol=1e-3)


# Work and memory


def dots(function: Callable[..., Any], *arguments: Any) -> list[str]:
    """Types of the results of all matmuls that the compiled function runs."""
    lowered = jax.jit(function).lower(*arguments)
    text = lowered.compile({"xla_backend_optimization_level": 0}).as_text()
    return re.findall(r"= (\w+\[[\d,]*\])\S* dot\(", text)


@pytest.mark.alternate(4)
@by_strategy
def test_a_frozen_kernel_costs_no_matmul(strategy: str) -> None:
    given = head((256, 64, 512))
    point = given["hidden"], given["kernel"]
    labels = given["labels"]
    loss = small_loss(strategy, labels, workspace_bytes=2**18)
    forward = 2 if strategy in ("recompute", "vocab") else 1
    both = dots(jax.grad(loss, (0, 1)), *point)
    assert len(both) == forward + 2, both
    by_hidden = dots(jax.grad(loss, 0), *point)
    assert len(by_hidden) == forward + 1, by_hidden
    by_kernel = dots(jax.grad(loss, 1), *point)
    assert len(by_kernel) == forward + 1, by_kernel


MEMORY = [
    (b, 64, v, strategy, workspace)
    for strategy in ("tokens", "recompute", "vocab")
    for b, v, workspace in [
        (2048, 8192, 2**22),
        (8192, 8192, 2**22),
        (2048, 32768, 2**22),
        (2048, 8192, 2**24),
    ]
    if strategy != "recompute" or workspace == 2**22
]


def temporary_bytes(b: int, d: int, v: int, strategy: str, workspace: int) -> int:
    """What XLA allocates for value and gradient of a float32 mean, beside them."""

    def loss(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
        static = {"strategy": strategy, "workspace_bytes": workspace}
        return linear(hidden, kernel, labels, reduction="mean", **static)

    arrays = [((b, d), jnp.float32), ((d, v), jnp.float32), ((b,), jnp.int32)]
    shapes = [jax.ShapeDtypeStruct(*a) for a in arrays]
    lowered = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes)
    return lowered.compile().memory_analysis().temp_size_in_bytes


@functools.cache
def temporaries() -> dict[tuple[int, int, int, str, int], int]:
    """`temporary_bytes` of each case."""
    sizes = one_device.results("test_linear", "temporary_bytes", MEMORY)
    return dict(zip(MEMORY, sizes, strict=True))


@pytest.mark.together
@pytest.mark.parametrize("case", MEMORY, ids=str)
def test_temporaries_fit_the_workspace(case: tuple[int, int, int, str, int]) -> None:
    examples, features, classes, strategy, workspace = case
    hidden, kernel = 4 * examples * features, 4 * features * classes
    # The gradient of the hidden states, and their copy where chunks do not divide the
    # examples; the sum of the kernel's gradient beside its result.
    accumulators = hidden if strategy == "vocab" else 2 * hidden + kernel
    held = temporaries()[case]
    assert held <= workspace + accumulators + 2**20
    # What is said to be held before anything is compiled is less on a CPU.
    size = examples, features, classes
    said = planned(size, workspace, strategy=strategy, platform="cpu").temporary_bytes
    assert 0.3 * held < said < held


@pytest.mark.together
def test_memory_does_not_grow_with_the_logits() -> None:
    size = temporaries()
    few, many = ((2048, 64, v, "vocab", 2**22) for v in (8192, 32768))
    assert size[many] <= size[few] + 2**18
    few, many = ((b, 64, 8192, "tokens", 2**22) for b in (2048, 8192))
    hidden = 4 * 64 * (8192 - 2048)
    assert size[many] <= size[few] + 2 * hidden + 2**18


def equations(
    jaxpr: Any, inside: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every operation, after its name and those of what is around it."""
    for equation in jaxpr.eqns:
        here = (*inside, equation.primitive.name)
        yield here, equation
        for parameter in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from equations(inner, here)


@pytest.mark.alternate
@pytest.mark.parametrize("ignore_index", [None, -100])
@pytest.mark.parametrize("strategy", ["tokens", "recompute"])
def test_matmuls_of_ignored_examples_can_be_skipped(
    strategy: str, ignore_index: int | None
) -> None:
    given = head()
    static = {"workspace_bytes": WORKSPACE, "ignore_index": ignore_index}
    loss = small_loss(strategy, given["labels"], **static)
    gradient = on_one_device(jax.grad(loss, (0, 1)))
    jaxpr = jax.make_jaxpr(gradient)(given["hidden"], given["kernel"])
    paths = [p for p, _ in equations(jaxpr.jaxpr) if p[-1] == "dot_general"]
    # Traced for a CPU, a GPU and a TPU.
    assert len(paths) == 3 * (4 if strategy == "recompute" else 3)
    for path in paths:
        assert "scan" in path
        assert ("cond" in path[path.index("scan") :]) == (ignore_index is not None)


@pytest.mark.alternate
@pytest.mark.parametrize(
    ("strategy", "counted"), turns(["tokens", "recompute"], [0, 1, 4, 5, B])
)
def test_any_number_of_examples_may_count(strategy: str, counted: int) -> None:
    given = head()
    order = np.random.default_rng(5).permutation(B)
    given["labels"][order[counted:]] = -100
    # Chunks of four examples.
    options = {"ignore_index": -100, "reduction": "mean", "return_stats": True}
    loss, gradients = check(strategy, given, local=True, **options)
    assert_all_zero(gradients["hidden"][order[counted:]])
    if not counted:
        assert_all_zero(loss, gradients["kernel"])


@pytest.mark.alternate(6)
@pytest.mark.parametrize("layout", ["dv", "vd"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_float32_kernel_may_be_multiplied_in_16_bits(
    strategy: str, layout: str
) -> None:
    given = head()
    static = {"kernel_layout": layout, "strategy": strategy, "reduction": "mean"}
    static |= {"workspace_bytes": WORKSPACE}
    kernel = given["kernel"] if layout == "dv" else given["kernel"].T
    wide = [np.asarray(a, np.float32) for a in (given["hidden"], kernel)]
    narrow = [a.astype(jnp.bfloat16) for a in wide]

    def loss(hidden: Any, kernel: Any, **more: Any) -> jax.Array:
        return linear(hidden, kernel, given["labels"], **static, **more)

    in_16 = functools.partial(loss, compute_dtype="bfloat16")
    value, gradients = jax.jit(jax.value_and_grad(in_16, (0, 1)))(*wide)
    want, rounded = jax.jit(jax.value_and_grad(loss, (0, 1)))(*narrow)
    assert value == want
    for exact, once in zip(gradients, rounded, strict=True):
        assert exact.dtype == np.float32
        np.testing.assert_array_equal(exact.astype(jnp.bfloat16), once)
        # It has the digits of its sums.
        assert np.mean(exact != exact.astype(jnp.bfloat16).astype(np.float32)) > 0.5


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_devices_add_up_gradients_of_16_bits_in_float32(strategy: str) -> None:
    cut = {"workspace_bytes": 1000}

    def loss(hidden: Any, kernel: Any, labels: Any) -> jax.Array:
        total = linear(
            hidden, kernel, labels, reduction="sum", strategy=strategy, **cut
        )
        return jax.lax.psum(total, "data")

    mesh = jax.make_mesh((8,), ("data",), (jax.sharding.AxisType.Auto,))
    split = jax.shard_map(
        loss, mesh=mesh, in_specs=(P("data"), P(), P("data")), out_specs=P()
    )
    shapes = ((16, 4), jnp.bfloat16), ((4, 300), jnp.bfloat16), ((16,), jnp.int32)
    arrays = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    jaxpr = jax.make_jaxpr(jax.grad(split, (0, 1)))(*arrays)
    summed = [
        variable.aval
        for _, equation in equations(jaxpr.jaxpr)
        if equation.primitive.name.startswith("psum")
        for variable in equation.invars
    ]
    of_kernel = [a for a in summed if a.shape and a.shape[0] == 4]
    assert of_kernel
    assert {a.dtype for a in summed} == {np.dtype(np.float32)}


def planned(
    size: tuple[int, int, int],
    workspace: int | None = None,
    *,
    local: bool = True,
    dtype: str = "float32",
    **options: Any,
) -> testing.Plan:
    examples, features, classes = size
    factors = (examples, features), (features, classes)
    head = [jax.ShapeDtypeStruct(shape, dtype) for shape in factors]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "is_local", lambda: local)
        return testing.plan(*head, workspace_bytes=workspace, **options)


def test_chunks_are_equal_where_an_accelerator_would_pad_them() -> None:
    size, logits = (512, 8, 1024), 4 * 512 * 1024
    tokens = functools.partial(planned, strategy="tokens")
    # With what else a chunk needs, 40 / 9 of the workspace.
    workspace = 3 * logits // 10
    assert tokens(size, workspace, platform="cpu").chunks == 5
    assert tokens(size, workspace, platform="gpu").chunks == 8
    # Padding would copy distributions.
    on_cpu = {"platform": "cpu", "distributions": True}
    assert tokens(size, workspace, **on_cpu).chunks == 8
    # On a CPU a third more are not too many: 20 / 3 of the workspace.
    assert tokens(size, logits // 5, platform="cpu").chunks == 8
    # A prime number of examples has no equal chunks.
    assert tokens((509, 8, 1024), workspace, platform="tpu").chunks == 5


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_a_chunk_on_an_accelerator_pays_for_the_sum_of_gradients(platform: str) -> None:
    tokens = functools.partial(
        planned, strategy="tokens", platform=platform, dtype="bfloat16"
    )
    # Without a given workspace, half as many examples as features or more.
    for size, number in (((8192, 4096, 128256), 4), ((2048, 4096, 128256), 1)):
        assert tokens(size).chunks == number
    assert tokens((8192, 4096, 128256), 2**30).chunks == 8


def test_auto_takes_the_strategy_that_is_documented() -> None:
    size, logits = (256, 8, 1024), 4 * 256 * 1024

    def auto(workspace: int | None, reduction: str = "none", **options: Any) -> str:
        return planned(size, workspace, reduction=reduction, **options).strategy

    assert auto(2 * logits) == auto(None) == "dense"
    assert auto(logits // 2, "sum") == "tokens"
    assert auto(logits // 2, "mean") == "tokens"
    assert auto(logits // 2) == "recompute"
    assert auto(logits // 2, "mean", forward_mode=True) == "recompute"
    # Not the logits of 64 examples.
    assert auto(logits // 5, "mean") == "vocab"
    assert auto(logits // 5, "mean", local=False) == "tokens"
    # Distributions are cut with their examples, or not at all.
    assert auto(logits // 5, "mean", distributions=True) == "tokens"
    assert auto(logits // 5, distributions=True, local=False) == "recompute"
    assert auto(logits // 5, distributions=True, forward_mode=True) == "dense"
    # Sums of 16-bit gradients, as many as logits.
    wide = (512, 512, 50304)
    assert planned(wide, dtype="bfloat16").strategy == "vocab"
    assert planned(wide, dtype="bfloat16", distributions=True).strategy == "dense"
    assert planned(wide, dtype="bfloat16", local=False).strategy == "tokens"
    assert planned(wide).strategy == "tokens"
    # Beside the sums a chunk of a quarter as many examples as features.
    few, more = (1400, 512, 50304), (1450, 512, 50304)
    assert planned(few, dtype="bfloat16").strategy == "vocab"
    assert planned(more, dtype="bfloat16").strategy == "tokens"


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("classes", [32000, 128256, 256000])
@pytest.mark.parametrize("features", [2048, 4096])
@pytest.mark.parametrize("examples", [16, 2048, 8192, 32768])
def test_auto_holds_less_than_all_logits(
    examples: int, features: int, classes: int, platform: str
) -> None:
    size = (examples, features, classes)
    found = planned(size, dtype="bfloat16", platform=platform)
    if examples == 16:  # next to nothing, beside the kernel
        assert found.strategy == "dense"
        assert found.temporary_bytes < features * classes
        return
    assert found.temporary_bytes < found.materialised_bytes
    if found.strategy == "vocab" and platform != "cpu":
        # No matmul has to pad it.
        assert found.chunk_shape[1] % 128 == 0


def test_the_strategy_knows_no_platform() -> None:
    for size in ((16, 64, 1024), (512, 512, 50304), (4096, 512, 50304)):
        for dtype in ("float32", "bfloat16"):
            names = ("cpu", "cuda", "tpu")
            found = {planned(size, dtype=dtype, platform=x).strategy for x in names}
            assert len(found) == 1


# Lowering

PLATFORMS = ("cpu", "cuda", "tpu")


@functools.cache
def exported(strategy: str, local: bool, platforms: tuple[str, ...] = PLATFORMS) -> str:
    """StableHLO of value and gradient, of bfloat16 features and kernel."""
    b, d, v = 64, 16, 256
    shapes = {
        "hidden": ((b, d), jnp.bfloat16),
        "kernel": ((v, d), jnp.bfloat16),
        "bias": ((v,), jnp.float32),
        "class_weights": ((v,), jnp.float32),
        "label_smoothing": ((), jnp.float32),
        "logit_scale": ((), jnp.float32),
        "weights": ((b,), jnp.float32),
    }
    arrays = {name: jax.ShapeDtypeStruct(*spec) for name, spec in shapes.items()}

    def loss(arrays: dict[str, jax.Array], labels: jax.Array) -> Any:
        return linear(
            **arrays,
            labels=labels,
            kernel_layout="vd",
            ignore_index=-100,
            logit_softcap=30.0,
            z_loss=1e-4,
            reduction="mean",
            return_stats=True,
            strategy=strategy,
            workspace_bytes=2**14,
        )

    gradient = jax.value_and_grad(loss, has_aux=True)
    gradient = on_one_device(gradient) if local else gradient
    lowered = jax.export.export(jax.jit(gradient), platforms=platforms)(
        arrays, jax.ShapeDtypeStruct((b,), jnp.int32)
    )
    assert lowered.platforms == platforms
    return lowered.mlir_module()


@pytest.mark.alternate(4)
@by_strategy_and_place
def test_matmuls_of_bfloat16_take_bfloat16_and_give_float32_on_every_platform(
    strategy: str, local: bool
) -> None:
    module = exported(strategy, local)
    operands = re.findall(
        r"stablehlo\.dot_general .*: \(tensor<[\dx]*x(\w+)>, tensor<[\dx]*x(\w+)>\) -> "
        r"tensor<[\dx]*x(\w+)>",
        module,
    )
    assert len(operands) >= (4 if strategy in ("recompute", "vocab") else 3)
    assert set(operands) == {("bf16", "bf16", "f32")}


@pytest.mark.parametrize("platform", PLATFORMS)
def test_slices_of_bfloat16_arrays_are_integers_on_a_cpu_alone(platform: str) -> None:
    module = exported("vocab", True, (platform,))
    assert ("ui16" in module) == (platform == "cpu")


@pytest.mark.parametrize("platform", PLATFORMS)
def test_a_program_has_the_chunks_of_the_platform_that_it_is_for(platform: str) -> None:
    size, workspace = (512, 8, 1024), 3 * 4 * 512 * 1024 // 10
    static = {"strategy": "tokens", "workspace_bytes": workspace}

    def loss(hidden: Any, kernel: Any, labels: Any) -> jax.Array:
        return linear(hidden, kernel, labels, reduction="sum", **static)

    b, d, v = size
    shapes = ((b, d), jnp.float32), ((d, v), jnp.float32), ((b,), jnp.int32)
    arrays = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    traced = jax.jit(on_one_device(jax.grad(loss, (0, 1)))).trace(*arrays)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    found = planned(size, workspace, strategy="tokens", platform=platform)
    assert found.chunks == (5 if platform == "cpu" else 8)
    cut = f"tensor<{found.chunks}x{found.chunk_shape[0]}x{d}xf32>"
    assert cut in text
    other = "tensor<8x64x8xf32>" if platform == "cpu" else "tensor<5x103x8xf32>"
    assert other not in text


# Contrastive learning


@pytest.mark.alternate
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize(
    "strategy",
    sweep(["auto", *STRATEGIES], lambda name: name in ("auto", "tokens", "vocab")),
)
def test_a_symmetric_contrastive_loss_is_two_calls(strategy: str) -> None:
    rng = np.random.default_rng(0)
    sides = rng.standard_normal((2, 9, 4))
    sides /= np.linalg.norm(sides, axis=-1, keepdims=True)
    images, texts = sides.astype(np.float32)
    scale = np.float32(14.0)
    ids = np.arange(9, dtype=np.int32)

    def loss(images: jax.Array, texts: jax.Array, scale: jax.Array) -> jax.Array:
        one_way = functools.partial(
            linear,
            labels=ids,
            kernel_layout="vd",
            logit_scale=scale,
            reduction="mean",
            strategy=strategy,
            workspace_bytes=200,
        )
        return (one_way(images, texts) + one_way(texts, images)) / 2

    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(
        images, texts, scale
    )
    x, y = images.astype(np.float64), texts.astype(np.float64)
    z = x @ y.T
    options = {"logit_scale": float(scale), "reduction": "mean"}
    rows = oracle.gradients(z, ids, **options)
    columns = oracle.gradients(z.T, ids, **options)
    dz = (rows["logits"] + columns["logits"].T) / 2
    exact = (oracle.loss(z, ids, **options) + oracle.loss(z.T, ids, **options)) / 2
    np.testing.assert_allclose(value, exact, rtol=1e-5)
    np.testing.assert_allclose(gradients[0], dz @ y, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(gradients[1], dz.T @ x, rtol=1e-5, atol=1e-5)
    by_scale = (rows["logit_scale"] + columns["logit_scale"]) / 2
    np.testing.assert_allclose(gradients[2], by_scale, rtol=1e-4, atol=1e-6)
