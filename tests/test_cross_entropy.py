"""The losses on given logits, against the exact value.

Every check compares the loss and each gradient with the oracle, with a cotangent that
is not constant.
"""

import functools
import itertools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import (
    LOSSES,
    MARGINS,
    TAKE_IDS,
    assert_all_zero,
    check,
    compiled,
    confident,
    on_one_device,
    sweep,
    turns,
)
from tolerances import TABLE, accumulated, assert_gradient

import jaxlosses as jl
from jaxlosses._backends import blocks

dense = jl.softmax_cross_entropy
integer = jl.softmax_cross_entropy_with_integer_labels
KINDS = ["dense", "integer"]
both_kinds = pytest.mark.parametrize("kind", KINDS)
both_registrations = pytest.mark.parametrize(
    "forward_mode", [False, True], ids=["vjp", "jvp"]
)
# The registrations take turns between the kinds.
kinds_and_registrations = pytest.mark.parametrize(
    ("kind", "forward_mode"), turns(KINDS, [True, False])
)

NAN, INF = math.nan, math.inf


# Accuracy


def distributions(ids: np.ndarray, classes: int) -> np.ndarray:
    """One-hot, nearly so, spread out, and with a sum other than one, in turns."""
    rng = np.random.default_rng(0)
    one_hot = (
        np.eye(classes)[ids]
        if classes < 10**4
        else 1.0 * (ids[:, None] == np.arange(classes))
    )
    spread = rng.exponential(size=one_hot.shape)
    spread /= spread.sum(-1, keepdims=True)
    turns = [one_hot, 0.999 * one_hot + 0.001 * spread, spread, 3 * spread + one_hot]
    turn = (np.arange(len(ids)) % 4)[:, None]
    return np.select([turn == i for i in range(4)], turns)


def make_options(name: str, kind: str, ids: np.ndarray, classes: int) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    exists = rng.uniform(size=(ids.size, classes)) < 0.7
    exists[np.arange(ids.size), ids] = True
    class_weights = rng.uniform(0.1, 3, classes)
    class_weights[::5] = 0
    weights = rng.uniform(0.1, 2, ids.size)
    weights[::7] = 0
    each: dict[str, dict[str, Any]] = {
        "none": {},
        "class_weights": {"class_weights": class_weights},
        "label_smoothing": {"label_smoothing": 0.1},
        "smoothed class_weights": {
            "class_weights": class_weights,
            "label_smoothing": 0.1,
        },
        "z_loss": {"z_loss": 1e-3},
        "logit_softcap": {"logit_softcap": 30.0},
        "logit_scale": {"logit_scale": 0.7},
        "negative logit_scale": {"logit_scale": -1.3},
        "weights": {"weights": weights},
        "where": {"where": exists},
    }
    if name != "all":
        return each[name]
    out = {k: v for option in each.values() for k, v in option.items()}
    if kind.startswith("fused"):
        del out["where"]  # is one for all examples there, see `test_linear.py`
    return out | ({} if kind == "dense" else {"ignore_index": int(ids[1])})


OPTIONS = [
    "none",
    "class_weights",
    "label_smoothing",
    "smoothed class_weights",
    "z_loss",
    "logit_softcap",
    "logit_scale",
    "negative logit_scale",
    "weights",
    "where",
    "all",
]
DTYPES = ["float32", "float64", "bfloat16", "float16"]


def check_confident(
    name: str, classes: int, option: str, dtype: str, repeat: int = 2
) -> None:
    logits, ids = confident(classes, dtype, repeat)
    labels = distributions(ids, classes) if name == "dense" else ids
    options = make_options(option, name, ids, classes)
    if name != "fused, tokens":
        check(logits, labels, name=name, dtype=dtype, **options)
        return
    # It has sums alone: row by row, or the largest would hide the others.
    for i in range(len(ids)):
        row = slice(i, i + 1)
        of_row = {k: options[k][row] for k in ("weights",) if k in options}
        given = options | of_row | {"reduction": "sum", "compared": ("logits",)}
        check(logits[row], labels[row], name=name, dtype=dtype, **given)


# What is short has every option in float32, and every dtype and number of classes with
# none and with all; the kinds take turns where all are costly, and so do the
# registrations (`test_options_act_together`).
CONFIDENT = [
    (dtype, classes, option, kind)
    for dtype in DTYPES
    for classes in ((2, 10, 1000) if dtype == "float32" else (10,))
    for option in OPTIONS
    for kind in KINDS
]
CONFIDENT += [
    ("float32", 10, option, name)
    for option in ("none", "smoothed class_weights", "z_loss", "all")
    for name in TAKE_IDS
    if name != "integer"
]
TURNS = [("float64", "dense"), ("bfloat16", "integer")]


@pytest.mark.alternate(16)
@pytest.mark.parametrize(
    ("dtype", "classes", "option", "kind"),
    sweep(
        CONFIDENT,
        lambda dtype, classes, option, kind: (
            ((dtype, classes) == ("float32", 10) and kind in KINDS)
            or option == "none"
            or (option == "all" and (dtype, kind) in TURNS)
            or (option, classes, kind) == ("all", 1000, "integer")
            or (option == "smoothed class_weights" and kind.startswith("fused"))
        ),
    ),
)
def test_every_digit_is_right_up_to_80_nats(
    dtype: str, classes: int, option: str, kind: str
) -> None:
    check_confident(kind, classes, option, dtype)


@pytest.mark.alternate
@pytest.mark.parametrize(
    ("option", "kind"),
    turns(["none", "z_loss", "all", "smoothed class_weights"], KINDS),
)
def test_every_digit_is_right_for_confident_mistakes(option: str, kind: str) -> None:
    for classes in (2, 10):
        logits, ids = confident(classes)
        # Another class leads, also where the class weight of the label is zero.
        ids = (ids + 1) % classes
        labels = ids if kind == "integer" else distributions(ids, classes)
        check(logits, labels, **make_options(option, kind, ids, classes))


@pytest.mark.alternate
@pytest.mark.parametrize(
    ("dtype", "option", "kind"),
    sweep(
        [
            (dtype, option, kind)
            for dtype, option in (
                ("float32", "none"),
                ("float32", "all"),
                ("bfloat16", "all"),
            )
            for kind in KINDS
        ],
        lambda dtype, option, kind: option == "none",
    ),
)
def test_every_digit_is_right_for_50257_classes(
    dtype: str, option: str, kind: str
) -> None:
    check_confident(kind, 50257, option, dtype, repeat=1)


def in_blocks() -> tuple[np.ndarray, np.ndarray]:
    """More rows than a block has, in a number that blocks do not divide."""
    logits, ids = confident(50257, repeat=2)
    rows = blocks.rows_of_block(50257)
    assert len(ids) > rows
    assert len(ids) % rows != 0
    return logits, ids


@pytest.mark.alternate
@pytest.mark.parametrize(
    ("kind", "dtype", "option"),
    sweep(
        [
            ("integer", "float32", "all"),
            ("integer", "bfloat16", "none"),
            ("dense", "float32", "none"),
        ],
        lambda kind, dtype, option: option == "none",
    ),
)
def test_every_digit_is_right_in_blocks_of_rows(
    kind: str, dtype: str, option: str
) -> None:
    logits, ids = in_blocks()
    labels = ids if kind == "integer" else distributions(ids, 50257)
    options = make_options(option, kind, ids, 50257) | {"logit_scale": 0.7}
    check(logits, labels, dtype=dtype, local=True, **options)


@pytest.mark.alternate
@pytest.mark.parametrize(
    ("kind", "classes", "option"),
    sweep(
        itertools.product(KINDS, [1, 10], ["none", "all"]),
        lambda *case: case[2] == "none" or case == ("integer", 10, "all"),
    ),
)
def test_every_digit_is_right_in_one_block_in_cache(
    kind: str, classes: int, option: str
) -> None:
    logits, ids = confident(classes)
    labels = ids if kind == "integer" else distributions(ids, classes)
    options = make_options(option, kind, ids, classes) | {"logit_scale": 0.7}
    check(logits, labels, local=True, **options)
    check(logits[:0], labels[:0], local=True)


@pytest.mark.alternate
@pytest.mark.parametrize(("classes", "dtype"), [(27, "float32"), (1003, "bfloat16")])
def test_every_digit_is_right_by_exponentials_of_both_passes(
    classes: int, dtype: str
) -> None:
    check(*confident(classes, dtype), dtype=dtype, local=True)


def test_value_and_gradient_of_one_block_take_exponentials_once() -> None:
    def mean(logits: Any, labels: Any) -> jax.Array:
        return jl.softmax_cross_entropy_with_integer_labels(
            logits, labels, reduction="mean"
        )

    shapes = jax.ShapeDtypeStruct((32, 1000), jnp.float32), jnp.arange(32)
    run = jax.jit(on_one_device(jax.value_and_grad(mean)))
    text = run.lower(*shapes).compile().as_text()
    # XLA's, and the one of `_elementary`, which shifts bits.
    found = re.findall(r"\w32\[([\d,]+)\]\S* (exponential|shift-left)\(", text)
    of_all = [op for size, op in found if math.prod(map(int, size.split(","))) == 32000]
    assert of_all == ["exponential"]


def test_a_mapped_loss_keeps_no_exponentials() -> None:
    def mean(logits: Any, labels: Any) -> jax.Array:
        return jax.vmap(jl.softmax_cross_entropy_with_integer_labels)(
            logits, labels
        ).mean()

    shapes = jax.ShapeDtypeStruct((64, 32, 1000), jnp.float32), jnp.zeros((64, 32), int)
    run = jax.jit(on_one_device(jax.value_and_grad(mean)))
    memory = run.lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2**20  # of 8 MB of logits


def test_policies_hold_by_exponentials_of_both_passes() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(8, 3, 28)).astype(np.float32)
    ids = rng.integers(28, size=(8, 3)).astype(np.int32)
    logits[0], ids[0] = np.nan, -100  # ignored
    logits[1, :, 5], ids[1] = np.nan, 7
    ids[2] = 28  # no class
    logits[3, :, 5], ids[3] = -np.inf, 5  # impossible
    logits[4], logits[4, :, 9], ids[4] = -np.inf, -300, 9  # certain
    logits[5] = np.nan  # of weight 0
    weights = np.ones((8, 3), np.float32)
    weights[5] = 0

    def losses(logits: Any) -> jax.Array:
        return jl.softmax_cross_entropy_with_integer_labels(
            logits, ids, ignore_index=-100, weights=weights
        )

    found = jax.jit(on_one_device(losses))(logits)
    run = jax.jit(on_one_device(jax.grad(lambda z: losses(z).sum())))
    gradient = np.asarray(run(logits))
    assert_all_zero(found[0], found[4], found[5], gradient[0], gradient[4], gradient[5])
    assert np.isnan(found[1:3]).all()
    assert np.isnan(gradient[1:3]).all()
    assert (np.asarray(found[3]) == np.inf).all()
    exact = oracle.gradients(logits[6:], ids[6:], cotangent=np.ones((2, 3)))["logits"]
    np.testing.assert_allclose(gradient[6:], exact, rtol=1e-5, atol=1e-9)

    # What is not there stays away from the second derivative.
    hessian = jax.hessian(lambda z: losses(logits.at[7, 2].set(z)).sum())
    logits = jnp.asarray(logits).at[1:4].set(0)
    second = np.asarray(jax.jit(on_one_device(hessian))(logits[7, 2]))
    p = np.asarray(jl.softmax(logits[7, 2]), np.float64)
    np.testing.assert_allclose(second, np.diag(p) - np.outer(p, p), atol=1e-7)


def test_policies_hold_in_blocks_of_rows() -> None:
    logits, ids = in_blocks()
    logits, ids = logits.copy(), ids.copy()
    where = np.arange(50257)[None, :] < 50000
    # In the first block, in the last, and where they overlap.
    bad, diverged, ignored = [0, 9, 23], [1, 10, 22], [2, 11, 21]
    ids %= 50000
    ids[bad] = [-1, 50257, 50001]
    logits[diverged, 7] = [NAN, INF, NAN]
    logits[ignored, 3] = NAN
    ids[ignored] = -100
    logits[5, 0] = -INF
    loss, gradient = check_logits(
        logits, ids, where=where, ignore_index=-100, z_loss=0.01, local=True
    )
    np.testing.assert_array_equal(np.where(np.isnan(loss))[0], sorted(bad + diverged))
    assert np.all(np.isnan(gradient[bad]))
    assert_all_zero(loss[ignored], gradient[ignored])


def test_a_single_process_loops_over_blocks_of_rows() -> None:
    logits = jax.ShapeDtypeStruct((100, 50257), jnp.float32)
    ids, weights = (jax.ShapeDtypeStruct((100,), t) for t in (jnp.int32, jnp.float32))
    text = {
        local: compiled("integer", (), local)
        .lower({"logits": logits}, {"labels": ids}, weights)
        .as_text()
        for local in (False, True)
    }
    # A loop over an axis that may be sharded would gather it.
    assert "stablehlo.while" in text[True]
    assert "stablehlo.while" not in text[False]


@pytest.mark.alternate(4)
@pytest.mark.parametrize(
    ("dtype", "kind"),
    sweep(
        [(dtype, kind) for dtype in DTYPES for kind in KINDS],
        lambda *case: (
            case not in [*TURNS, ("float32", "dense"), ("float16", "integer")]
        ),
    ),
)
def test_options_act_together_in_every_dtype_and_registration(
    dtype: str, kind: str
) -> None:
    logits, ids = confident(10, dtype)
    labels = ids if kind == "integer" else distributions(ids, 10)
    options = make_options("all", kind, ids, 10) | {"logit_scale": 0.7}
    check(logits, labels, dtype=dtype, forward_mode=True, **options)


@pytest.mark.alternate(4)
@pytest.mark.parametrize(
    ("case", "kind"),
    turns(
        [
            ("float32", 30.0, 1.0),
            ("float32", 50.0, 1.0),
            ("float32", 300.0, 1.0),
            ("float32", 1e4, 1.0),
            ("float32", 30.0, 2.0),
            ("float32", 5.0, -20.0),
            ("float64", 50.0, 1.0),
            ("float64", 30.0, 2.0),
            ("bfloat16", 30.0, 1.0),
        ],
        KINDS,
    ),
    ids=str,
)
def test_capped_margins_up_to_80_nats_keep_their_digits(
    case: tuple[str, float, float], kind: str
) -> None:
    dtype, cap, scale = case
    rng = np.random.default_rng(0)
    logits, ids = [], []
    for margin in MARGINS:
        if margin / abs(scale) < 1.95 * cap:
            capped, y = oracle.confident_logits(rng, 40, 10, margin, dtype=np.float64)
            label = np.take_along_axis(capped, y[:, None], -1)
            capped = (capped - label + margin / 2) / scale
            logits.append(cap * np.arctanh(np.clip(capped / cap, -0.999, 0.999)))
            ids.append(y)
    y = np.concatenate(ids)
    labels = y if kind == "integer" else np.eye(10)[y]
    check(
        np.concatenate(logits),
        labels,
        dtype=dtype,
        logit_softcap=cap,
        logit_scale=scale,
    )


def test_gradient_by_the_scale_is_right_for_each_confident_row() -> None:
    logits, labels = confident(10)
    scale = np.float32(0.7)

    def loss(logits: jax.Array, label: jax.Array, scale: jax.Array) -> jax.Array:
        return integer(logits, label, logit_scale=scale)

    by_row = jax.jit(jax.vmap(jax.grad(loss, argnums=2), in_axes=(0, 0, None)))
    got = by_row(logits, labels, scale)
    # Differences to the label's logit: their probabilities sum to 1 - p_y exactly.
    z = logits.astype(np.longdouble)
    gap = z - np.take_along_axis(z, labels[:, None], -1)
    lead = np.maximum((np.longdouble(scale) * gap).max(-1, keepdims=True), 0)
    p = np.exp(np.longdouble(scale) * gap - lead)
    p /= p.sum(-1, keepdims=True)
    exact, terms = (p * gap).sum(-1), (p * abs(gap)).sum(-1)
    assert_gradient(got, exact, "float32", terms)


@pytest.mark.alternate
@both_kinds
def test_gradient_of_a_row_sums_to_zero(kind: str) -> None:
    logits, ids = confident(1000)
    labels = ids if kind == "integer" else distributions(ids, 1000)
    gradient = jax.grad(lambda z: LOSSES[kind](z, labels, reduction="sum"))(logits)
    gradient = np.asarray(gradient, np.float64)
    # Each entry is off by 1e-5 of itself.
    size = np.abs(gradient).sum(-1)
    np.testing.assert_array_less(np.abs(gradient.sum(-1)), 1e-5 * size + 1e-37)


def test_loss_and_gradient_are_right_where_float32_has_no_digits_left() -> None:
    margin = np.array([20.0, 30.0, 50.0, 80.0])
    logits = np.stack([margin, 0 * margin], -1).astype(np.float32)
    loss, pull = jax.vjp(lambda z: integer(z, np.zeros(4, np.int32)), logits)
    np.testing.assert_allclose(loss, np.log1p(np.exp(-margin)), rtol=4e-6)
    gradient = pull(jnp.ones(4))[0]
    np.testing.assert_allclose(gradient[:, 0], -np.exp(-margin), rtol=1e-5)
    np.testing.assert_allclose(gradient[:, 1], np.exp(-margin), rtol=1e-5)


@pytest.mark.alternate(4)
@pytest.mark.parametrize(("dtype", "kind"), turns(DTYPES, KINDS))
def test_loss_of_one_class_is_zero_with_gradient_zero(kind: str, dtype: str) -> None:
    logits = np.array([[0.0], [-3.0], [1e4]])
    labels = np.zeros(3, np.int32) if kind == "integer" else np.array([[1], [0], [2.5]])
    loss, gradients = check(logits, labels, dtype=dtype)
    assert_all_zero(loss, gradients["logits"])
    smoothed = {"label_smoothing": 0.3, "class_weights": [2.0], "logit_scale": 0.7}
    loss, gradients = check(logits, labels, dtype=dtype, **smoothed)
    assert_all_zero(loss, gradients["logits"])
    check(logits, labels, dtype=dtype, z_loss=0.01, reduction="mean")


# Options

REDUCTIONS = ("none", "sum", "mean")
GRID = [
    (kind, weighted, smoothing, ignored, reduction)
    for kind in KINDS
    for weighted in (False, True)
    for smoothing in (0.0, 0.2)
    for ignored in ((None,) if kind == "dense" else (None, -100, 3))
    for reduction in REDUCTIONS
]


def small(
    kind: str, shape: tuple[int, ...] = (6, 5), axis: Any = -1, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Logits of order 1, with class ids or weights that do not sum to one."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.standard_normal(shape)
    if kind == "dense":
        labels = rng.uniform(0, 1, shape)
        labels[labels < 0.3] = 0
        return logits, labels
    axes = range(len(shape)) if axis is None else np.atleast_1d(axis)
    axes = [int(a) % len(shape) for a in axes]
    batch = tuple(n for i, n in enumerate(shape) if i not in axes)
    classes = math.prod(shape[a] for a in axes)
    return logits, rng.integers(classes, size=batch, dtype=np.int32)


@pytest.mark.alternate(4)
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize(
    ("kind", "weighted", "smoothing", "ignored", "reduction"),
    # One reduction each, in turns.
    sweep(GRID, lambda *case: GRID.index(case) // 3 % 3 == GRID.index(case) % 3),
)
def test_options_combine_as_in_pytorch(
    kind: str, weighted: bool, smoothing: float, ignored: int | None, reduction: str
) -> None:
    logits, labels = small(kind)
    options: dict[str, Any] = {"reduction": reduction}
    if kind == "integer":
        labels = np.array([3, 0, 4, 1, 3, 2], np.int32)
        if ignored is not None:
            labels[2] = labels[3] = ignored
            options["ignore_index"] = ignored
    if weighted:
        options["class_weights"] = [0.5, 2.0, 0.0, 1.0, 3.0]
    if smoothing:
        options["label_smoothing"] = smoothing
    loss, _ = check(logits, labels, **options)
    by_hand = pytorch_cross_entropy(logits, labels, **options)
    np.testing.assert_allclose(loss, by_hand, rtol=1e-5)


def pytorch_cross_entropy(
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    reduction: str,
    class_weights: Any = (1, 1, 1, 1, 1),
    label_smoothing: float = 0.0,
    ignore_index: int | None = None,
) -> Any:
    """The formulas of `torch.nn.CrossEntropyLoss`, example by example."""
    w, alpha, classes = np.asarray(class_weights), label_smoothing, logits.shape[-1]
    losses, denominators = [], []
    for z, label in zip(logits, labels, strict=True):
        nll = np.log(np.exp(z).sum()) - z
        if np.ndim(label):
            q = (1 - alpha) * label + alpha / classes
            losses.append((w * q * nll).sum())
            denominators.append(1.0)
        elif label == ignore_index:
            losses.append(0.0)
            denominators.append(0.0)
        else:
            smooth = (w * nll).sum() / classes
            losses.append((1 - alpha) * w[label] * nll[label] + alpha * smooth)
            denominators.append(w[label])
    if reduction == "none":
        return losses
    return sum(losses) / (sum(denominators) if reduction == "mean" else 1)


@pytest.mark.alternate
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize(("reduction", "kind"), turns(REDUCTIONS, reversed(KINDS)))
def test_example_weights_enter_every_reduction(kind: str, reduction: str) -> None:
    logits, labels = small(kind)
    options = {
        "weights": [0.5, 2.0, 0.0, 1.0, 0.25, 3.0],
        "class_weights": [0.5, 2.0, 0.0, 1.0, 3.0],
        "label_smoothing": 0.1,
        "z_loss": 0.01,
        "logit_scale": 1.3,
        "reduction": reduction,
    }
    check(logits, labels, **options)
    if kind == "integer":
        check(logits, labels, **options, ignore_index=int(labels[1]))


@pytest.mark.alternate
@pytest.mark.without_llvm_passes
@both_kinds
def test_python_numbers_are_the_same_options_as_arrays(kind: str) -> None:
    logits, labels = small(kind)
    logits, labels = (
        jnp.float32(logits),
        jnp.asarray(labels).astype(jnp.float32 if kind == "dense" else jnp.int32),
    )
    numbers = {"label_smoothing": 0.1, "z_loss": 0.01, "logit_scale": -0.7}
    arrays = {name: jnp.float32(x) for name, x in numbers.items()}
    loss = LOSSES[kind]
    np.testing.assert_array_equal(
        loss(logits, labels, **numbers), loss(logits, labels, **arrays)
    )


def test_mean_of_weighted_examples_is_over_the_weights_that_count() -> None:
    logits = np.zeros((3, 4), np.float32)
    mean = integer(
        logits,
        np.array([0, 1, -100]),
        ignore_index=-100,
        weights=np.array([1.0, 3.0, 5.0], np.float32),
        reduction="mean",
    )
    np.testing.assert_allclose(mean, math.log(4), rtol=1e-6)


# Axes and masks

SHAPE = (2, 3, 4)
AXES: list[Any] = [-1, 1, -3, (0, 2), (2, 0), (-1, 1), (0, 1, 2), (2, 1, 0), None]


@pytest.mark.alternate(4)
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize(("axis", "kind"), turns(AXES, KINDS), ids=str)
def test_classes_are_the_flattened_axes_in_the_order_given(
    kind: str, axis: Any
) -> None:
    if axis is None and kind == "integer":
        pytest.skip("class ids have no axis=None")
    rng = np.random.default_rng(1)
    logits, labels = small(kind, SHAPE, axis)
    axes = range(3) if axis is None else np.atleast_1d(axis)
    classes = math.prod(SHAPE[a] for a in axes)
    options: dict[str, Any] = {
        "axis": axis,
        "class_weights": rng.uniform(0.5, 2, classes),
        "label_smoothing": 0.1,
    }
    check(logits, labels, **options)
    where = rng.uniform(size=SHAPE) < 0.7
    if kind == "integer":
        rows = oracle._Layout(SHAPE, axis).rows(where)
        labels = valid_ids(labels.ravel(), rows).reshape(labels.shape)
    check(logits, labels, **options, where=where, reduction="sum")


@pytest.mark.alternate
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize(
    ("shape", "kind"),
    turns([(2, 3, 4), (1, 1, 4), (2, 1, 4), (1, 3, 1), (2, 3)], KINDS),
    ids=str,
)
def test_mask_broadcasts_to_the_logits_or_has_the_shape_of_the_batch(
    kind: str, shape: tuple[int, ...]
) -> None:
    logits, labels = small(kind, SHAPE)
    where = np.random.default_rng(3).uniform(size=shape) < 0.7
    if kind == "integer":
        labels = valid_ids(labels, np.broadcast_to(exists(where), SHAPE))
    for reduction in ("none", "mean"):
        options = {"label_smoothing": 0.1, "z_loss": 0.01, "reduction": reduction}
        loss, gradients = check(logits, labels, where=where, **options)
        masked = ~np.broadcast_to(exists(where), SHAPE)
        assert_all_zero(gradients["logits"][masked])
        assert np.all(np.isfinite(loss))
        if kind == "dense":
            assert_all_zero(gradients["labels"][masked])


def exists(where: np.ndarray) -> np.ndarray:
    return where[..., None] if where.ndim == 2 else where


def valid_ids(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The ids, moved to a class that exists where there is one."""
    found = np.take_along_axis(mask, ids[..., None], -1)[..., 0]
    return np.where(found, ids, mask.argmax(-1)).astype(ids.dtype)


@pytest.mark.alternate(3)
@both_kinds
@pytest.mark.parametrize("axis", [0, (2, 0), (0, 2)], ids=str)
def test_mask_of_the_batch_masks_examples_for_any_axis(kind: str, axis: Any) -> None:
    logits, labels = small(kind, SHAPE, axis)
    batch = oracle.loss(logits, labels, axis).shape
    where = np.arange(math.prod(batch)).reshape(batch) % 2 == 0
    loss, _ = check(logits, labels, axis=axis, where=where)
    assert_all_zero(loss[~where])
    assert np.all(loss[where] > 0)


@pytest.mark.alternate
@pytest.mark.parametrize("shape", [(1, 3, 4), (2, 1, 4), (1, 1, 4)])
def test_a_distribution_is_shared_along_batch_axes_of_size_one(
    shape: tuple[int, ...],
) -> None:
    rng = np.random.default_rng(2)
    logits, _ = small("dense", SHAPE)
    labels = rng.uniform(0, 1, shape)
    loss, gradients = check(logits, labels, label_smoothing=0.1)
    assert loss.shape == (2, 3)
    assert gradients["labels"].shape == shape
    where = rng.uniform(size=(2, 1, 4)) < 0.7
    weights = rng.uniform(0, 2, (2, 3))
    check(logits, labels, where=where, weights=weights, reduction="mean")
    check(logits[..., :1, :], labels[..., :1, :], axis=-1)


def test_a_distribution_is_shared_before_a_class_axis_in_the_middle() -> None:
    logits, labels = small("dense", SHAPE)
    check(logits, labels[:1, :, :1], axis=1, class_weights=[0.5, 2.0, 1.0])


def test_labels_on_a_masked_class_are_dropped() -> None:
    logits, labels = small("dense")
    where = np.array([[True, True, False, True, False]])
    kept = np.where(where, labels, 0)
    loss, gradients = check(logits, labels, where=where)
    assert np.all(labels[:, ~where[0]].any(-1))
    np.testing.assert_array_equal(loss, check(logits, kept, where=where)[0])
    assert_all_zero(gradients["labels"][:, ~where[0]])


def test_padding_classes_carry_no_probability() -> None:
    logits, ids = small("integer")
    padded = np.concatenate([logits, np.full((6, 3), 50.0)], -1)
    where = np.arange(8)[None, :] < 5
    options = {"label_smoothing": 0.1, "z_loss": 0.01}
    loss, gradients = check(logits, ids, **options)
    masked, masked_gradients = check(padded, ids, where=where, **options)
    np.testing.assert_allclose(masked, loss, rtol=1e-6)
    np.testing.assert_allclose(
        masked_gradients["logits"][:, :5], gradients["logits"], rtol=1e-5, atol=1e-7
    )
    assert_all_zero(masked_gradients["logits"][:, 5:])


def test_labels_at_zero_have_the_gradient_of_their_class() -> None:
    logits, _ = small("dense")
    _, gradients = check(logits, np.zeros((6, 5)))
    z = logits.astype(np.float32).astype(np.float64)
    nll = np.log(np.exp(z).sum(-1, keepdims=True)) - z
    cotangent = np.resize([1.0, -0.5, 2.0, -1.0, 0.25], 6)[:, None]
    np.testing.assert_allclose(gradients["labels"], cotangent * nll, rtol=1e-5)


@pytest.mark.without_llvm_passes
def test_integer_loss_is_the_dense_loss_of_one_hot_labels() -> None:
    logits, ids = small("integer")
    options = {
        "where": np.array([[True, True, True, True, False]]),
        "class_weights": [0.5, 2.0, 0.25, 1.0, 3.0],
        "label_smoothing": 0.1,
        "z_loss": 0.01,
        "logit_softcap": 3.0,
        "logit_scale": -0.7,
        "weights": [0.5, 2.0, 0.0, 1.0, 0.25, 3.0],
    }
    ids = np.where(ids == 4, 0, ids)
    ours, gradients = check(logits, ids, **options)
    hot, hot_gradients = check(logits, np.eye(5)[ids], **options)
    np.testing.assert_allclose(ours, hot, rtol=2e-6)
    for name in gradients:
        np.testing.assert_allclose(
            gradients[name], hot_gradients[name], rtol=2e-5, atol=1e-6, err_msg=name
        )


# What cannot be

# One label of each that is no class, among others that are.
BAD_LABELS = [
    ("int32", 5, -1),
    ("int32", 5, 5),
    ("int32", 5, -100),
    ("int32", 5, 2**31 - 1),
    ("int32", 5, -(2**31)),
    ("int8", 5, -1),
    ("int8", 5, -128),
    ("int8", 300, -1),
    ("uint8", 200, 255),
    ("int16", 300, 300),
    ("uint32", 5, 2**31 + 1),
    ("uint32", 5, 2**32 - 1),
]
EVERYTHING: dict[str, Any] = {
    "label_smoothing": 0.1,
    "z_loss": 0.01,
    "logit_softcap": 30.0,
    "logit_scale": 0.7,
}
EVERYTHING["class_weights"] = [1.0, 2.0, 3.0, 4.0, 5.0]
# All at once, `test_policies_hold_beside_each_other` has them in one program.
by_options = pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="none"),
        pytest.param(EVERYTHING, id="everything", marks=pytest.mark.long),
    ],
)


@pytest.mark.alternate(3)
@pytest.mark.parametrize(("dtype", "classes", "label"), BAD_LABELS)
def test_a_label_that_is_no_class_is_nan_in_loss_and_in_its_whole_gradient_row(
    dtype: str, classes: int, label: int
) -> None:
    logits, _ = small("integer", (4, classes))
    labels = np.array([1, label, 0, 4], dtype)
    assert_only_row_1_is_nan(logits, labels)


@pytest.mark.parametrize("label", [2**32, 2**32 + 1, -(2**32), 2**63 - 1, -(2**63)])
def test_a_64_bit_label_does_not_wrap_into_a_class(label: int) -> None:
    logits, _ = small("integer", (4, 5))
    labels = np.array([1, label, 0, 4], np.int64)
    assert_only_row_1_is_nan(logits, labels, dtype="float64")


def test_an_unsigned_64_bit_label_does_not_wrap_into_a_class() -> None:
    logits, _ = small("integer", (4, 5))
    with jax.enable_x64(True):
        loss = integer(logits, np.array([1, 2**64 - 1, 2**32, 4], np.uint64))
    np.testing.assert_array_equal(np.isnan(loss), [False, True, True, False])


SMOOTH = {k: v for k, v in EVERYTHING.items() if k != "class_weights"}
OF_CLASSES = {"class_weights": EVERYTHING["class_weights"]}


@pytest.mark.alternate
@pytest.mark.parametrize("label", [-1, 5, 3], ids=["negative", "V", "masked"])
@pytest.mark.parametrize(
    ("options", "forward_mode"),
    sweep(
        itertools.product(({}, SMOOTH, OF_CLASSES), (False, True)),
        lambda options, forward_mode: options is not SMOOTH and not forward_mode,
    ),
)
def test_a_label_that_is_no_class_is_nan_whatever_the_options(
    label: int, forward_mode: bool, options: dict[str, Any]
) -> None:
    logits, _ = small("integer", (4, 5))
    labels = np.array([1, label, 0, 4], np.int32)
    where = np.array([[True, True, True, False, True]])
    assert_only_row_1_is_nan(
        logits, labels, where=where, forward_mode=forward_mode, **options
    )
    if not options and not forward_mode:
        for reduction in ("sum", "mean"):
            loss, _ = check_logits(logits, labels, where=where, reduction=reduction)
            assert np.isnan(loss)


def assert_only_row_1_is_nan(logits: Any, labels: Any, **options: Any) -> None:
    loss, gradient = check_logits(logits, labels, **options)
    np.testing.assert_array_equal(np.isnan(loss), [False, True, False, False])
    # Masked classes included.
    assert np.all(np.isnan(gradient[1]))
    assert np.all(np.isfinite(gradient[[0, 2, 3]]))


def check_logits(logits: Any, labels: Any, **options: Any) -> tuple[Any, Any]:
    loss, gradients = check(logits, labels, **options)
    return loss, gradients["logits"]


def test_labels_of_8_bits_name_classes_below_256_of_300() -> None:
    logits, _ = small("integer", (4, 300))
    loss, _ = check(logits, np.array([0, 127, 128, 255], np.uint8))
    assert np.all(np.isfinite(loss))


@pytest.mark.alternate
@by_options
@pytest.mark.parametrize(
    ("ignored", "forward_mode"),
    sweep(
        itertools.product([-100, 2, 7], [False, True]),
        lambda ignored, forward_mode: not forward_mode or ignored == 7,
    ),
)
def test_an_ignored_example_has_loss_and_gradient_exactly_zero(
    ignored: int, forward_mode: bool, options: dict[str, Any]
) -> None:
    logits, _ = small("integer", (4, 5))
    logits[1] = [NAN, INF, -INF, 0, 1]
    given = options | OF_CLASSES
    assert_ignored(logits, ignored, ignored, forward_mode=forward_mode, **given)


def assert_ignored(logits: Any, label: int, ignored: int, **options: Any) -> None:
    labels = np.array([1, label, 0, 4], np.int32)
    for reduction in ("none", "mean"):
        loss, gradients = check(
            logits,
            labels,
            ignore_index=ignored,
            reduction=reduction,
            **options,
        )
        assert np.all(np.isfinite(loss))
        assert_all_zero(gradients["logits"][1])
        if reduction == "none":
            assert_all_zero(loss[1])
        for gradient in gradients.values():
            assert np.all(np.isfinite(gradient))


def test_a_label_that_its_dtype_cannot_hold_ignores_nothing() -> None:
    logits, _ = small("integer", (4, 5))
    labels = np.array([0, 1, 2, 156], np.uint8)
    # As uint8, -100 is 156.
    loss, _ = check_logits(logits, labels, ignore_index=-100)
    np.testing.assert_array_equal(np.isnan(loss), [False, False, False, True])
    loss, _ = check_logits(logits, labels, ignore_index=156)
    assert loss[3] == 0
    # As int32, 2**32 is 0.
    loss, _ = check_logits(logits, np.array([0, 1, 2, 3]), ignore_index=2**32)
    assert np.all(loss > 0)


@pytest.mark.alternate
@both_kinds
@by_options
def test_an_example_of_weight_zero_has_loss_and_gradient_exactly_zero(
    kind: str, options: dict[str, Any]
) -> None:
    logits, labels = small(kind, (4, 5))
    logits[1] = [NAN, INF, -INF, 0, 1]
    weights = np.array([1.0, 0.0, 0.0, 2.0])
    for reduction in ("none", "mean"):
        arrays = {
            name: jnp.float32(value)
            for name, value in options.items()
            if name != "logit_softcap"
        }
        static = {"reduction": reduction}
        if "logit_softcap" in options:
            static["logit_softcap"] = options["logit_softcap"]
        arrays |= {"logits": jnp.float32(logits), "weights": jnp.float32(weights)}
        fixed = {}
        if kind == "dense":
            arrays["labels"] = jnp.float32(labels)
        else:
            fixed["labels"] = labels
        run = compiled(kind, tuple(static.items()))
        ones = jnp.ones(4 if reduction == "none" else ())
        loss, gradients = run(arrays, fixed, ones)
        assert np.all(np.isfinite(loss))
        if reduction == "none":
            assert_all_zero(loss[1:3])
        assert_all_zero(gradients["logits"][1:3])
        for name, gradient in gradients.items():
            assert np.all(np.isfinite(gradient)), name
        finite = logits.copy()
        finite[1] = 0
        exact = oracle.gradients(
            finite, labels, weights=weights, reduction=reduction, **options
        )
        # Where it is finite, the derivative by the weight is the loss.
        np.testing.assert_allclose(
            gradients["weights"][2:], exact["weights"][2:], rtol=1e-4
        )


@both_kinds
def test_an_invalid_example_of_weight_zero_does_not_count(kind: str) -> None:
    logits, labels = small(kind, (4, 5))
    if kind == "integer":
        labels[1] = -1
    else:
        logits[1, 0], labels[1, 0] = -INF, 1.0
    weights = np.array([1.0, 0.0, 0.5, 2.0], np.float32)

    def mean(logits: jax.Array) -> jax.Array:
        return LOSSES[kind](
            logits, np.asarray(labels), weights=weights, reduction="mean"
        )

    value, gradient = jax.value_and_grad(mean)(jnp.float32(logits))
    assert np.isfinite(value)
    assert_all_zero(gradient[1])
    assert np.all(np.isfinite(gradient))


@pytest.mark.alternate
@kinds_and_registrations
def test_minus_infinity_is_a_class_of_probability_zero(
    kind: str, forward_mode: bool
) -> None:
    logits, labels = small(kind, (4, 5))
    if kind == "integer":
        labels = np.array([1, 2, 0, 4], np.int32)
    else:
        labels = np.array(
            [[0, 1, 0.5, 1, 2], [0, 0, 1, 0, 0], [1, 0, 0, 0, 0], [0.0, 0, 0, 0, 1]]
        )
    logits[0, 0] = logits[2, 3] = logits[3, 1] = -INF
    # The label itself: loss infinite, gradient that of a certain error.
    logits[1, 2] = -INF
    loss, gradient = check_logits(logits, labels, forward_mode=forward_mode)
    np.testing.assert_array_equal(np.isinf(loss), [False, True, False, False])
    assert loss[1] > 0
    assert gradient[0, 0] == gradient[2, 3] == gradient[3, 1] == 0
    assert np.all(np.isfinite(gradient))
    assert gradient[1, 2] == 0.5
    for cap in (30.0, 1e4):
        loss, gradient = check_logits(
            logits, labels, logit_softcap=cap, forward_mode=forward_mode
        )
        np.testing.assert_array_equal(np.isinf(loss), [False, True, False, False])
        assert gradient[0, 0] == 0
    check_logits(logits[[0, 2, 3]], labels[[0, 2, 3]], z_loss=0.01)


@by_options
@kinds_and_registrations
@pytest.mark.parametrize("value", [NAN, INF])
def test_a_diverged_example_is_nan_and_no_other(
    kind: str, value: float, forward_mode: bool, options: dict[str, Any]
) -> None:
    logits, labels = small(kind, (4, 5))
    logits[1, 2] = value
    assert_only_row_1_is_nan(logits, labels, forward_mode=forward_mode, **options)
    # Also where no label looks at it.
    if kind == "dense":
        labels[1] = 0
    else:
        labels[1] = 3
    assert_only_row_1_is_nan(logits, labels, forward_mode=forward_mode)


@pytest.mark.alternate
@both_registrations
def test_a_class_weight_of_zero_hides_no_bad_example(forward_mode: bool) -> None:
    logits, _ = small("integer", (4, 5))
    where = np.array([[True, True, True, False, True]])
    options = {"class_weights": [1.0, 2.0, 0.0, 0.0, 5.0]}
    diverged = logits.copy()
    diverged[1, 4] = NAN
    labels = np.array([1, 2, 0, 4], np.int32)
    assert_only_row_1_is_nan(diverged, labels, forward_mode=forward_mode, **options)
    masked = np.array([1, 3, 0, 4], np.int32)
    assert_only_row_1_is_nan(
        logits, masked, where=where, forward_mode=forward_mode, **options
    )


@pytest.mark.alternate
@kinds_and_registrations
def test_policies_hold_beside_each_other_with_every_option(
    kind: str, forward_mode: bool
) -> None:
    logits, labels = small(kind, (7, 5))
    where = np.ones((7, 5), bool)
    diverged, masked, empty, weightless, ignored, invalid = range(1, 7)
    logits[diverged, 2] = NAN
    logits[masked, 3], where[masked, 3] = INF, False
    logits[empty], where[empty] = NAN, False
    given = EVERYTHING | {"weights": np.where(np.arange(7) == weightless, 0, 1.5)}
    bad, zero = [diverged], [empty, weightless]
    if kind == "integer":
        labels[[masked, ignored, invalid]] = [1, -100, -1]
        logits[ignored, 0] = NAN
        given["ignore_index"] = -100
        bad, zero = [diverged, invalid], [*zero, ignored]
    loss, gradient = check_logits(
        logits, labels, where=where, forward_mode=forward_mode, **given
    )
    assert_all_zero(loss[zero], gradient[zero], gradient[masked, 3])
    is_bad = np.isin(np.arange(7), bad)
    np.testing.assert_array_equal(np.isnan(loss), is_bad)
    np.testing.assert_array_equal(np.isnan(gradient), is_bad[:, None].repeat(5, 1))


@both_kinds
def test_an_example_in_which_every_class_is_minus_infinity_is_nan(kind: str) -> None:
    logits, labels = small(kind, (4, 5))
    logits[1] = -INF
    assert_only_row_1_is_nan(logits, labels)


@by_options
@kinds_and_registrations
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_masked_class_may_hold_anything(
    kind: str, value: float, forward_mode: bool, options: dict[str, Any]
) -> None:
    logits, labels = small(kind, (4, 5))
    if kind == "integer":
        labels = np.array([1, 2, 0, 4], np.int32)
    where = np.array([[True, True, True, False, True]])
    logits[:, 3] = value
    loss, gradients = check(
        logits, labels, where=where, forward_mode=forward_mode, **options
    )
    assert np.all(np.isfinite(loss))
    assert_all_zero(gradients["logits"][:, 3])
    for name, gradient in gradients.items():
        assert np.all(np.isfinite(gradient)), name


@pytest.mark.alternate
@by_options
@kinds_and_registrations
def test_an_example_without_a_class_has_loss_and_gradient_zero(
    kind: str, forward_mode: bool, options: dict[str, Any]
) -> None:
    logits, labels = small(kind, (4, 5))
    logits[1] = NAN
    if kind == "integer":
        labels[1] = -1  # whatever the label
    where = np.ones((4, 5), bool)
    where[1] = False
    for mask in (where, where[:, 0]):
        loss, gradient = check_logits(
            logits, labels, where=mask, forward_mode=forward_mode, **options
        )
        assert_all_zero(loss[1], gradient[1])
        assert np.all(loss[[0, 2, 3]] != 0)


@pytest.mark.alternate
@kinds_and_registrations
def test_mean_over_nothing_is_zero_with_gradient_zero(
    kind: str, forward_mode: bool
) -> None:
    logits, labels = small(kind, (4, 5))
    nothing: list[dict[str, Any]] = [
        {"where": np.zeros((4, 5), bool)},
        {"where": np.zeros((1, 1), bool)},
        {"where": np.zeros(4, bool)},
        {"weights": np.zeros(4)},
    ]
    if kind == "integer":
        labels = np.full(4, 2, np.int32)
        nothing.append({"ignore_index": 2})
        nothing.append({"class_weights": [1.0, 1.0, 0.0, 1.0, 1.0]})
    for options in nothing:
        loss, gradients = check(
            logits, labels, reduction="mean", forward_mode=forward_mode, **options
        )
        assert loss.shape == ()
        assert_all_zero(loss, gradients["logits"])
        assert all(np.all(np.isfinite(gradient)) for gradient in gradients.values())


def test_mean_of_nothing_but_bad_examples_is_nan() -> None:
    logits, _ = small("integer", (4, 5))
    labels = np.full(4, -1, np.int32)
    loss = integer(
        jnp.float32(logits), labels, class_weights=jnp.ones(5), reduction="mean"
    )
    assert np.isnan(loss)


@pytest.mark.alternate(3)
@both_kinds
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_example_is_no_loss_and_a_mean_of_zero(kind: str, dtype: str) -> None:
    logits, labels = small(kind, (0, 5))
    weights = np.zeros(0)
    for reduction, shape in (("none", (0,)), ("sum", ()), ("mean", ())):
        options = {"label_smoothing": 0.1, "weights": weights, "reduction": reduction}
        loss, gradients = check(logits, labels, dtype=dtype, **options)
        assert loss.shape == shape
        assert_all_zero(loss)
        assert gradients["logits"].shape == (0, 5)


@pytest.mark.alternate
@both_kinds
def test_no_class_is_a_loss_of_zero(kind: str) -> None:
    logits = np.zeros((3, 0), np.float32)
    labels = np.zeros((3, 0), np.float32) if kind == "dense" else np.zeros(3, np.int32)
    for reduction, shape in (("none", (3,)), ("sum", ()), ("mean", ())):
        run = functools.partial(LOSSES[kind], labels=labels, reduction=reduction)
        loss, pull = jax.vjp(run, logits)
        assert loss.shape == shape
        assert_all_zero(loss)
        assert pull(jnp.ones(shape))[0].shape == (3, 0)
    options = {"label_smoothing": 0.1, "class_weights": np.zeros(0, np.float32)}
    assert_all_zero(LOSSES[kind](logits, labels, **options, return_stats=True)[0])


@both_kinds
def test_a_label_without_a_batch_is_one_example(kind: str) -> None:
    logits, labels = small(kind, (5,))
    loss, _ = check(logits, labels, label_smoothing=0.1)
    assert loss.shape == ()


# Stats


def exact_stats(
    z: np.ndarray, ids: np.ndarray, where: Any = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    z = np.where(where, z, -np.inf)
    lse = np.log(np.exp(z).sum(-1))
    nll = lse - np.take_along_axis(z, ids[:, None], -1)[:, 0]
    return lse, nll, z.argmax(-1)


@pytest.mark.alternate(4)
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize(("dtype", "kind"), turns(DTYPES, KINDS))
def test_stats_are_metrics_before_smoothing_and_weights(kind: str, dtype: str) -> None:
    logits, ids = small("integer", (6, 5))
    ids[0], ids[1] = logits[0].argmax(), logits[1].argmin()
    labels = ids if kind == "integer" else np.eye(5, dtype=np.float32)[ids]
    options = {
        "class_weights": jnp.float32([0.5, 2.0, 0.0, 1.0, 3.0]),
        "label_smoothing": 0.1,
        "z_loss": 0.01,
        "logit_softcap": 3.0,
        "logit_scale": -0.75,
        "weights": jnp.float32([0.5, 2.0, 0.0, 1.0, 0.25, 3.0]),
    }
    with jax.enable_x64(dtype == "float64"):
        array = jnp.asarray(logits, dtype)
        if kind == "dense" and dtype == "float64":
            labels = labels.astype(np.float64)
        loss, stats = LOSSES[kind](array, labels, **options, return_stats=True)
        np.testing.assert_array_equal(loss, LOSSES[kind](array, labels, **options))
    assert isinstance(stats, jl._combine.Stats)
    z = np.asarray(array, np.float64)
    z = -0.75 * 3 * np.tanh(z / 3)
    lse, nll, predicted = exact_stats(z, ids)
    on = np.asarray(options["weights"]) != 0
    for got, exact in ((stats.lse, lse), (stats.nll, nll), (stats.z_loss, lse**2)):
        assert got.dtype == accumulated(dtype)
        factor = 0.01 if got is stats.z_loss else 1
        np.testing.assert_allclose(got, np.where(on, factor * exact, 0), rtol=3e-6)
    np.testing.assert_array_equal(stats.predicted, np.where(on, predicted, 0))
    np.testing.assert_array_equal(stats.correct, on & (predicted == ids))
    assert stats.correct.dtype == bool
    assert np.issubdtype(stats.predicted.dtype, np.integer)


@both_kinds
def test_stats_of_what_does_not_count_are_zero_but_for_the_prediction(
    kind: str,
) -> None:
    logits = np.array([[3.0, 1, 0], [1, 3, 0], [0, 1, 3], [0, 1, 3]], np.float32)
    ids, weights = np.array([0, 1, 2, 2]), np.array([1.0, 2, 1, 1], np.float32)
    where = np.array([[1, 1, 1], [1, 1, 1], [1, 1, 0], [0, 0, 0]], bool)
    if kind == "integer":
        options = {"ignore_index": 0, "where": where}
        ids[2] = 1
        _, stats = integer(logits, ids, **options, weights=weights, return_stats=True)
    else:
        where[0] = False
        where[2, 1] = True
        ids[2] = 1
        _, stats = dense(
            logits,
            np.eye(3, dtype=np.float32)[ids],
            where=where,
            weights=weights,
            return_stats=True,
        )
    lse, nll, _ = exact_stats(logits[1:3], ids[1:3], where[1:3])
    np.testing.assert_allclose(stats.lse, [0, *lse, 0], rtol=1e-6)
    np.testing.assert_allclose(stats.nll, [0, *nll, 0], rtol=1e-6)
    assert_all_zero(stats.z_loss)
    first = 0 if kind == "integer" else -1
    np.testing.assert_array_equal(stats.predicted, [first, 1, 1, -1])
    np.testing.assert_array_equal(stats.correct, [False, True, True, False])


@both_kinds
def test_prediction_is_the_lowest_id_of_a_tie_and_minus_one_for_nan(kind: str) -> None:
    logits = np.array([[0, 2, 2, 1], [NAN, 0, 1, 2], [5, 0, 0, 5]], np.float32)
    ids = np.array([1, 3, 3])
    labels = ids if kind == "integer" else np.eye(4, dtype=np.float32)[ids]
    _, stats = LOSSES[kind](logits, labels, return_stats=True)
    np.testing.assert_array_equal(stats.predicted, [1, -1, 0])
    np.testing.assert_array_equal(stats.correct, [True, False, False])


def test_an_invalid_label_is_not_correct_and_its_nll_is_nan() -> None:
    logits = np.array([[0, 1.0, 2], [2, 1, 0]], np.float32)
    _, stats = integer(logits, np.array([-1, 0]), return_stats=True)
    np.testing.assert_array_equal(stats.predicted, [2, 0])
    np.testing.assert_array_equal(stats.correct, [False, True])
    np.testing.assert_array_equal(np.isnan(stats.nll), [True, False])


@pytest.mark.alternate
@both_kinds
@pytest.mark.parametrize("axis", [1, (0, 2), (2, 0)], ids=str)
def test_prediction_is_the_flattened_class(kind: str, axis: Any) -> None:
    logits, ids = small("integer", SHAPE, axis)
    axes = list(np.atleast_1d(axis))
    rest = [a for a in range(3) if a not in axes]
    rows = logits.transpose(rest + axes).reshape(*[SHAPE[a] for a in rest], -1)
    predicted = rows.argmax(-1)
    ids = np.where(np.arange(ids.size).reshape(ids.shape) % 2, predicted, ids)
    labels = ids.astype(np.int32)
    if kind == "dense":
        hot = np.eye(rows.shape[-1])[ids].reshape([SHAPE[a] for a in rest + axes])
        labels = hot.transpose(np.argsort(rest + axes)).astype(np.float32)
    _, stats = LOSSES[kind](np.float32(logits), labels, axis, return_stats=True)
    np.testing.assert_array_equal(stats.predicted, predicted)
    np.testing.assert_array_equal(stats.correct, predicted == ids)


@pytest.mark.alternate
@pytest.mark.without_llvm_passes
@both_kinds
def test_stats_change_no_gradient_and_have_none(kind: str) -> None:
    logits, labels = small(kind)
    logits = jnp.float32(logits)
    labels = jnp.asarray(labels, jnp.float32 if kind == "dense" else jnp.int32)

    def loss(logits: jax.Array, factor: float, **options: Any) -> jax.Array:
        out = LOSSES[kind](logits, labels, z_loss=0.01, reduction="sum", **options)
        if not options:
            return out
        value, stats = out
        metrics = stats.lse + stats.nll + stats.z_loss
        return value + factor * metrics.sum()

    plain = jax.grad(loss)(logits, 0.0)
    for factor in (0.0, 1.0):
        with_stats = jax.grad(loss)(logits, factor, return_stats=True)
        np.testing.assert_allclose(with_stats, plain, rtol=1e-6)


def test_every_dtype_of_the_table_has_a_reason() -> None:
    assert set(TABLE) == set(DTYPES)
    assert all(row.why.endswith(".") for row in TABLE.values())


@pytest.mark.alternate(12)
@pytest.mark.parametrize(
    ("classes", "dtype", "local", "kind"),
    turns([10, 100, 1003], ["float32", "bfloat16"], [False, True], KINDS),
)
def test_a_nan_anywhere_in_a_row_is_shown_in_every_path(
    classes: int, dtype: str, local: bool, kind: str
) -> None:
    rng = np.random.default_rng(0)
    rows = np.arange(200)
    ids = rng.integers(classes, size=rows.size)
    logits = rng.normal(size=(rows.size, classes))
    # At the label in every third row, elsewhere in the others; not in every fourth.
    bad = rows % 4 != 3
    at = np.where(rows % 3 == 0, ids, rng.integers(classes, size=rows.size))
    logits[rows[bad], at[bad]] = np.nan
    labels = ids if kind == "integer" else np.eye(classes)[ids]
    loss, gradients = check(logits, labels, dtype=dtype, local=local)
    assert np.isnan(loss).tolist() == bad.tolist()
    assert np.isnan(gradients["logits"].astype(np.float32)).all(1).tolist() == (
        bad.tolist()
    )
