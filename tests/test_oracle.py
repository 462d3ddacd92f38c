"""The oracle agrees with mpmath, with finite differences and with values by hand.

The chain: `mp_loss` is the definition, central differences of it certify
`mp_gradient`, the two certify `loss` and `gradients` row by row, and differences of
`loss` certify what only whole arrays have: reductions, weights, axes, broadcasting.
"""

import ast
import functools
import math
import pathlib
from typing import Any

import numpy as np
import oracle
import pytest
from mpmath import mp

# Rounding to float64 costs 1e-16 and the sums are long double: four digits to spare.
EXACT = 1e-12
# Fourth-order differences with step 1e-3: truncation and rounding are both 1e-12.
DIFFERENCES = 1e-10

MARGINS = [0.0, 1.0, 10.0, 20.0, 30.0, 80.0]
CLASSES = 6
CLASS_WEIGHTS = [0.5, 2.0, 0.0, 1.0, 0.25, 3.0]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-3},
    "softcap": {"logit_softcap": 30.0},
    "scale": {"logit_scale": -0.7},
    "class_weights": {"class_weights": CLASS_WEIGHTS},
    "where": {"where": [True, True, False, True, False, True]},
    "all": {
        "where": [True, True, False, True, True, True],
        "class_weights": CLASS_WEIGHTS,
        "label_smoothing": 0.25,
        "z_loss": 0.01,
        "logit_softcap": 50.0,
        "logit_scale": 1.5,
    },
}
KINDS = ["id", "one_hot", "near_one_hot", "distribution", "not_summing_to_one"]


def make_labels(rng: np.random.Generator, kind: str, ids: np.ndarray) -> np.ndarray:
    one_hot = np.eye(CLASSES)[ids]
    return {
        "id": ids,
        "one_hot": one_hot,
        "near_one_hot": (1 - 1e-9) * one_hot + 1e-9 / CLASSES,
        "distribution": rng.dirichlet(np.ones(CLASSES), ids.shape),
        "not_summing_to_one": rng.uniform(0, 3, (*ids.shape, CLASSES)) + one_hot,
    }[kind]


def make_rows(
    kind: str, margin: float, options: dict[str, Any], scale: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(int(margin) + 100 * KINDS.index(kind))
    logits, ids = oracle.confident_logits(rng, 4, CLASSES, margin, scale)
    if options.get("logit_scale", 1) < 0:
        logits = -logits
    elif kind == "id" and not options.get("label_smoothing"):
        # A class of probability zero, where it is neither a label nor smoothed over.
        logits[0, (ids[0] + 1) % CLASSES] = -np.inf
    if "where" in options:
        ids = np.where(np.array(options["where"])[ids], ids, 0)
    return logits, make_labels(rng, kind, ids)


def assert_exact(actual: Any, exact: Any, yardstick: Any = None) -> None:
    """Errors below `EXACT` times `yardstick`, by default the exact value."""
    actual, exact = np.ravel(actual), np.ravel(np.array(exact, dtype=object))
    yardstick = exact if yardstick is None else np.ravel(yardstick)
    assert actual.shape == exact.shape
    for i, (a, e, y) in enumerate(zip(actual, exact, yardstick, strict=True)):
        if mp.isinf(e):
            assert a == float(e), (i, a, e)
        else:
            # What float64 cannot hold at all is allowed to be zero.
            assert abs(mp.mpf(float(a)) - e) <= EXACT * abs(y) + 1e-300, (i, a, e, y)


def differences(function: Any, x: np.ndarray) -> np.ndarray:
    """Central differences of fourth order, entry by entry."""
    out, step = np.zeros(x.shape), 1e-3
    for i in np.ndindex(x.shape):

        def at(d: float, i: tuple[int, ...] = i) -> float:
            moved = np.array(x, np.float64)
            moved[i] += d
            return float(function(moved))

        near, far = at(step) - at(-step), at(2 * step) - at(-2 * step)
        out[i] = (8 * near - far) / (12 * step)
    return out


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("name", ["plain", "softcap", "scale", "where"])
def test_entropy_and_its_gradient_are_those_of_mpmath(name: str, margin: float) -> None:
    options = OPTIONS[name]
    logits, _ = make_rows("id", margin, options)
    found = oracle.entropy(logits, **(options | _mask_of_rows(options, logits)))
    for i, row in enumerate(logits):
        value, gradient = oracle.mp_entropy(row, **options)
        assert_exact(found["entropy"][i], value)
        assert_exact(found["logits"][i], gradient, found["largest"][i])
    shifted = np.where(np.isfinite(logits), logits, 0.0)[0]
    one = functools.partial(oracle.mp_entropy, **options)
    slope = differences(lambda x: one(x)[0], shifted)
    np.testing.assert_allclose(
        slope, np.array(one(shifted)[1], float), rtol=0, atol=DIFFERENCES
    )


def _mask_of_rows(options: dict[str, Any], logits: np.ndarray) -> dict[str, Any]:
    """A mask of one row as one of all of them."""
    if "where" not in options:
        return {}
    return {"where": np.broadcast_to(np.array(options["where"]), logits.shape)}


@pytest.mark.parametrize("margin", [0.0, 20.0, 80.0])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", ["id", "near_one_hot", "not_summing_to_one"])
def test_mp_gradient_is_the_central_difference_of_mp_loss(
    kind: str, name: str, margin: float
) -> None:
    options = OPTIONS[name]
    logits, labels = make_rows(kind, margin, options)
    arguments = {"class_weights": np.ones(CLASSES), "logit_scale": 1.0, **options}
    arguments |= {"logits": logits[0], "label": labels[0]}
    gradient = oracle.mp_gradient(**arguments)
    assert ("labels" in gradient) == (kind != "id")
    with mp.workdps(oracle.DIGITS):
        step = mp.mpf(10) ** -30
        for key, entries in gradient.items():
            key = "label" if key == "labels" else key
            value = [mp.mpf(float(v)) for v in np.ravel(arguments[key])]
            for j, entry in enumerate(np.ravel(entries)):
                moved = []
                for sign in (1, -1):
                    x = [*value[:j], value[j] + sign * step, *value[j + 1 :]]
                    x = x[0] if key == "logit_scale" else x
                    moved.append(oracle.mp_loss(**{**arguments, key: x}))
                exact = (moved[0] - moved[1]) / (2 * step)
                # Truncation is 1e-60 of a term of order one, entries are above 1e-45.
                assert abs(entry - exact) <= abs(exact) * EXACT + 1e-57, (key, j)


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_float64_equals_mpmath(kind: str, name: str, margin: float) -> None:
    check_against_mpmath(*make_rows(kind, margin, OPTIONS[name]), OPTIONS[name])


@pytest.mark.parametrize("scale", [1e-3, 1e2, 1e4])
@pytest.mark.parametrize("name", ["plain", "smoothing", "z_loss", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_float64_equals_mpmath_at_every_magnitude(
    kind: str, name: str, scale: float
) -> None:
    check_against_mpmath(*make_rows(kind, 5.0, OPTIONS[name], scale), OPTIONS[name])


def check_against_mpmath(
    logits: np.ndarray, labels: np.ndarray, options: dict[str, Any]
) -> None:
    where = options.get("where")
    given = {**options, "where": None if where is None else np.array(where)[None]}
    values = oracle.loss(logits, labels, **given)
    for i, value in enumerate(values):
        assert_exact(value, oracle.mp_loss(logits[i], labels[i], **options))
        exact = oracle.mp_gradient(logits[i], labels[i], **options)
        row = oracle.gradients(logits[i : i + 1], labels[i : i + 1], **given)
        assert_exact(row["logits"], exact["logits"], row["logits_terms"])
        for key in exact.keys() & row.keys() - {"logits"}:
            assert_exact(row[key], exact[key])


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("name", ["plain", "softcap", "scale", "class_weights"])
def test_without_smoothing_and_z_loss_every_gradient_entry_is_exact(
    name: str, margin: float
) -> None:
    logits, ids = make_rows("id", margin, OPTIONS[name])
    out = oracle.gradients(logits, ids, **OPTIONS[name])
    np.testing.assert_array_equal(out["logits_terms"], abs(out["logits"]))


def test_softmax_by_hand() -> None:
    probabilities = [0.16838508, 0.205666, 0.25120102, 0.37474789]
    logits, ids = np.tile([0.1, 0.3, 0.5, 0.9], (4, 1)), np.arange(4)
    value = oracle.loss(logits, ids)
    gradient = oracle.gradients(logits, ids)["logits"]
    # The values are given to eight digits.
    np.testing.assert_allclose(np.exp(-value), probabilities, rtol=1e-7)
    np.testing.assert_allclose(gradient, probabilities - np.eye(4), rtol=1e-7)


@pytest.mark.parametrize("classes", [1, 2, 7])
def test_equal_logits_lose_the_logarithm_of_the_number_of_classes(classes: int) -> None:
    logits, expected = np.full((1, classes), 3.25), np.log(classes)
    dense = np.full((1, classes), 1 / classes)
    for labels in (np.array([0]), dense):
        value = oracle.loss(logits, labels, label_smoothing=0.3)
        np.testing.assert_allclose(value, [expected], rtol=1e-15)
    value = oracle.loss(logits - 3.25, dense, z_loss=0.5)
    np.testing.assert_allclose(value, [expected + 0.5 * expected**2], rtol=1e-15)


def test_confident_losses_by_hand() -> None:
    logits, ids = np.array([[0.0, -80.0], [0.0, -80.0]]), np.array([0, 1])
    small = math.exp(-80)
    np.testing.assert_allclose(oracle.loss(logits, ids), [small, 80], rtol=1e-15)
    gradient = oracle.gradients(logits, ids)["logits"]
    expected = [[-small, small], [1.0, -1.0]]
    np.testing.assert_allclose(gradient, expected, rtol=1e-15)


def torch_formula(
    logits: np.ndarray,
    ids: np.ndarray,
    w: np.ndarray,
    alpha: float,
    ignore_index: int,
    reduction: str,
) -> np.ndarray:
    """`torch.nn.functional.cross_entropy`, as its source computes it."""
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    counted = ids != ignore_index
    safe = np.where(counted, ids, 0)
    nll = -w[safe] * np.take_along_axis(log_p, safe[:, None], -1)[:, 0] * counted
    smooth = -(w * log_p).sum(-1) * counted
    rows = (1 - alpha) * nll + alpha / logits.shape[-1] * smooth
    total = {"none": 1, "sum": 1, "mean": (w[safe] * counted).sum()}[reduction]
    return (rows if reduction == "none" else rows.sum()) / total


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("alpha", [0.0, 0.2])
def test_pytorch_formulas_come_out(alpha: float, reduction: str) -> None:
    rng = np.random.default_rng(0)
    logits, w = rng.standard_normal((9, 5)), rng.uniform(0.5, 2, 5)
    ids = rng.integers(5, size=9)
    ids[[2, 7]] = -100
    given = {"class_weights": w, "label_smoothing": alpha, "reduction": reduction}
    actual = oracle.loss(logits, ids, ignore_index=-100, **given)
    expected = torch_formula(logits, ids, w, alpha, -100, reduction)
    np.testing.assert_allclose(actual, expected, rtol=1e-13)

    q = rng.dirichlet(np.ones(5), 9)
    smoothed = (1 - alpha) * q + alpha / 5
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rows = -(w * smoothed * log_p).sum(-1)
    expected = {"none": rows, "sum": rows.sum(), "mean": rows.mean()}[reduction]
    np.testing.assert_allclose(oracle.loss(logits, q, **given), expected, rtol=1e-13)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("axis", [1, (2, 0), -1])
def test_gradients_are_the_differences_of_the_loss(
    axis: int | tuple[int, ...], dense: bool, reduction: str
) -> None:
    rng = np.random.default_rng(1)
    logits = 2 * rng.standard_normal((3, 2, 4))
    batch = {1: (3, 4), (2, 0): (2,), -1: (3, 2)}[axis]
    classes = logits.size // math.prod(batch)
    where = rng.uniform(size=logits.shape) < 0.8
    spread = {1: (1, 2, 4), (2, 0): (3, 1, 4), -1: (3, 1, 4)}[axis]
    given = {
        "axis": axis,
        "where": where if dense else None,
        "ignore_index": None if dense else 0,
        "label_smoothing": 0.1,
        "z_loss": 0.05,
        "logit_softcap": 5.0,
        "reduction": reduction,
    }
    labels = rng.uniform(size=spread) if dense else rng.integers(classes, size=batch)
    arguments = {
        "logits": logits,
        "labels": labels,
        "class_weights": rng.uniform(0.5, 2, classes),
        "weights": rng.uniform(0.5, 2, batch),
        "logit_scale": np.array(0.7),
    }
    arguments["weights"].flat[0] = 0
    shape = np.shape(oracle.loss(**arguments, **given))
    cotangent = rng.standard_normal(shape)
    out = oracle.gradients(**arguments, **given, cotangent=cotangent)
    expected = arguments.keys() - (set() if dense else {"labels"})
    assert out.keys() - {"logits_terms"} == expected
    for key in expected:

        def pulled(x: np.ndarray, key: str = key) -> float:
            return (cotangent * oracle.loss(**{**arguments, key: x}, **given)).sum()

        assert np.shape(out[key]) == np.shape(arguments[key])
        slope = differences(pulled, arguments[key])
        np.testing.assert_allclose(out[key], slope, atol=DIFFERENCES, err_msg=key)


def test_axes_are_flattened_in_the_order_given() -> None:
    rng = np.random.default_rng(2)
    logits, ids = rng.standard_normal((3, 2, 4)), rng.integers(12, size=2)
    flat = logits.transpose(1, 2, 0).reshape(2, 12)
    expected = oracle.loss(flat, ids)
    np.testing.assert_array_equal(oracle.loss(logits, ids, axis=(2, 0)), expected)
    np.testing.assert_array_equal(oracle.loss(logits, ids, axis=(-1, -3)), expected)
    out = oracle.gradients(logits, ids, axis=(2, 0))["logits"]
    d_flat = oracle.gradients(flat, ids)["logits"]
    np.testing.assert_array_equal(out.transpose(1, 2, 0).reshape(2, 12), d_flat)
    q = rng.dirichlet(np.ones(24)).reshape(logits.shape)
    whole = oracle.loss(logits.reshape(1, 24), q.reshape(1, 24))[0]
    np.testing.assert_array_equal(oracle.loss(logits, q, axis=None), whole)


def test_a_masked_class_is_as_good_as_absent() -> None:
    rng = np.random.default_rng(3)
    logits, ids = rng.standard_normal((4, 5)), np.array([0, 1, 2, 0])
    keep = np.array([True, True, True, False, False])
    q = rng.dirichlet(np.ones(5), 4)
    masked = np.where(keep, logits, np.nan)
    options = {"label_smoothing": 0.2, "z_loss": 0.1, "logit_scale": 2.0}
    for labels, fewer in ((ids, ids), (q, q[:, :3])):
        actual = oracle.loss(masked, labels, where=keep[None], **options)
        expected = oracle.loss(logits[:, :3], fewer, **options)
        np.testing.assert_allclose(actual, expected, rtol=1e-15)
        out = oracle.gradients(masked, labels, where=keep[None], **options)
        fewer_out = oracle.gradients(logits[:, :3], fewer, **options)
        d_logits = np.pad(fewer_out["logits"], ((0, 0), (0, 2)))
        np.testing.assert_allclose(out["logits"], d_logits, rtol=1e-15, atol=1e-15)
        np.testing.assert_allclose(
            out["logit_scale"], fewer_out["logit_scale"], rtol=1e-14
        )


NOT_COUNTED = {
    "ignored": {"ignore_index": 3},
    "example masked": {"where": np.array([True, False, True])},
    "no class left": {"where": np.array([[True], [False], [True]])},
    "weight zero": {"weights": np.array([1.0, 0.0, 1.0])},
}


@pytest.mark.parametrize("name", NOT_COUNTED)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_an_example_that_does_not_count_is_exactly_absent(
    name: str, reduction: str
) -> None:
    rng = np.random.default_rng(4)
    logits, w = rng.standard_normal((3, 5)), rng.uniform(0.5, 2, 5)
    logits[1] = np.nan
    ids = np.array([0, 3, 2])
    given = {"class_weights": w, "z_loss": 0.1, "reduction": reduction}
    full = {"weights": np.ones(3), **given, **NOT_COUNTED[name]}
    actual = oracle.loss(logits, ids, **full)
    expected = oracle.loss(logits[::2], ids[::2], **given)
    if reduction == "none":
        expected = np.insert(expected, 1, 0)
    np.testing.assert_array_equal(actual, expected)
    out = oracle.gradients(logits, ids, **full)
    few = oracle.gradients(logits[::2], ids[::2], weights=np.ones(2), **given)
    for key in ("logits", "logits_terms"):
        np.testing.assert_array_equal(out[key], np.insert(few[key], 1, 0, axis=0))
    for key in ("class_weights", "logit_scale"):
        np.testing.assert_array_equal(out[key], few[key])
    np.testing.assert_array_equal(out["weights"][::2], few["weights"])
    if name == "weight zero":  # its derivative is the row's own loss
        assert np.isnan(out["weights"][1])
    else:
        assert out["weights"][1] == 0


def test_the_derivative_of_a_zero_weight_is_the_loss_of_its_row() -> None:
    logits, ids = np.random.default_rng(5).standard_normal((3, 5)), np.array([0, 3, 2])
    out = oracle.gradients(logits, ids, weights=np.array([1.0, 0.0, 1.0]))
    np.testing.assert_array_equal(out["weights"], oracle.loss(logits, ids))


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_when_nothing_counts_everything_is_zero(reduction: str) -> None:
    logits, ids = np.full((2, 3), np.nan), np.array([-1, 7])
    given = {"class_weights": np.ones(3), "reduction": reduction}
    for nothing in ({"where": np.zeros(2, bool)}, {"where": np.zeros((2, 3), bool)}):
        full = {**given, **nothing, "weights": np.ones(2)}
        assert not np.any(oracle.loss(logits, ids, **full))
        out = oracle.gradients(logits, ids, **full)
        assert not any(np.any(entry) for entry in out.values())
    assert not np.any(oracle.loss(np.zeros((0, 3)), np.zeros(0, int), **given))
    for weights, w in ((np.zeros(2), np.ones(3)), (np.ones(2), np.zeros(3))):
        given = {"weights": weights, "class_weights": w, "reduction": "mean"}
        assert oracle.loss(np.eye(2, 3), np.array([0, 1]), **given) == 0
        out = oracle.gradients(np.eye(2, 3), np.array([0, 1]), **given)
        assert not any(np.any(entry) for entry in out.values())


BAD = {
    "label below": (-1, 0.0, True),
    "label above": (3, 0.0, True),
    "label masked": (2, 0.0, False),
    "nan": (0, np.nan, True),
    "plus infinity": (0, np.inf, True),
}


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_nan_and_no_other_is(name: str, softcap: float | None) -> None:
    label, logit, last_exists = BAD[name]
    logits, ids = np.array([[0.5, 1.0, 0.0]] * 3), np.array([0, label, 1])
    logits[1, 1] = logit
    where = np.array([[True, True, last_exists]])
    value = oracle.loss(logits, ids, where=where, logit_softcap=softcap)
    assert np.isnan(value).tolist() == [False, True, False]
    for reduction in ("sum", "mean"):
        given = {"reduction": reduction, "class_weights": np.ones(3)}
        assert np.isnan(oracle.loss(logits, ids, where=where, **given))
        out = oracle.gradients(logits, ids, where=where, **given)["logits"]
        assert np.isnan(out[1]).all()
        assert np.isfinite(out[[0, 2]]).all()
        assert last_exists or not out[[0, 2], 2].any()


def test_a_row_of_minus_infinity_is_nan() -> None:
    logits = np.full((1, 3), -np.inf)
    for labels in (np.array([0]), np.full((1, 3), 1 / 3), np.zeros((1, 3))):
        assert np.isnan(oracle.loss(logits, labels)).all()
        assert np.isnan(oracle.gradients(logits, labels)["logits"]).all()


def test_minus_infinity_is_a_class_of_probability_zero() -> None:
    logits, ids = np.array([[0.0, 0.0, -np.inf]] * 2), np.array([0, 2])
    np.testing.assert_allclose(oracle.loss(logits, ids), [np.log(2), np.inf])
    dense = oracle.loss(logits, np.array([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]]))
    np.testing.assert_allclose(dense, [np.log(2), np.inf])
    assert oracle.loss(logits[:1], ids[:1], label_smoothing=0.1) == np.inf
    gradient = oracle.gradients(logits, ids)["logits"]
    np.testing.assert_array_equal(gradient, [[-0.5, 0.5, 0], [0.5, 0.5, -1]])
    dense = oracle.gradients(logits[:1], np.array([[1.0, 0.0, 0.0]]))
    np.testing.assert_allclose(dense["labels"], [[np.log(2), np.log(2), np.inf]])


@pytest.mark.parametrize("margin", [0.0, 20.0, 80.0])
@pytest.mark.parametrize("batch", [3, (2, 5), ()])
def test_confident_logits_have_the_margin(batch: Any, margin: float) -> None:
    rng = np.random.default_rng(6)
    logits, ids = oracle.confident_logits(rng, batch, 11, margin)
    assert logits.shape == (*ids.shape, 11)
    assert logits.dtype == np.float32
    assert ids.shape == (batch if isinstance(batch, tuple) else (batch,))
    ordered = np.sort(logits, -1)
    # The logits are rounded to float32 once: half a unit in the last place of 80.
    np.testing.assert_allclose(ordered[..., -1] - ordered[..., -2], margin, atol=8e-6)
    assert (logits.argmax(-1) == ids).all() or margin == 0
    assert abs(ordered[..., :-1]).max() < 5


def test_confident_logits_are_the_same_for_the_same_seed() -> None:
    first, second = (
        oracle.confident_logits(np.random.default_rng(7), 4, 1, 80.0, dtype=np.float16)
        for _ in range(2)
    )
    assert first[0].dtype == np.float16
    assert not first[1].any()
    np.testing.assert_array_equal(first[0], second[0])


def test_the_oracle_imports_no_jax() -> None:
    tree = ast.parse(pathlib.Path(oracle.__file__).read_text(encoding="utf-8"))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(str(node.module).split(".")[0])
    assert imported == {"collections", "math", "mpmath", "numpy", "types", "typing"}
