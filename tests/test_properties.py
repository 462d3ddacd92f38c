"""Random calls against the oracle, and what has to hold between two calls.

`make test` draws a few examples, the same each time, `make test-long` more of them, and
`make fuzz` others until one fails. What ever failed is a named test, at the end.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import (
    DIFFERENTIATED,
    LOG_PROBS,
    LOSSES,
    MARGINS,
    SCALES,
    STRATEGIES,
    TAKE_IDS,
    check,
)
from tolerances import TABLE

import jaxlosses as jl

pytestmark = pytest.mark.without_llvm_passes

BATCHES = [(), (1,), (5,), (2, 3), (0,)]
CLASSES = [1, 2, 3, 7, 17, 33]
DTYPES = list(TABLE)
DIVERGENCES = ("forward", "reverse", "jensen_shannon")
# Of the gradient by a row, of its sum of absolute terms.
GRADIENT = TABLE["float32"].gradient


class Problem(NamedTuple):
    """Arguments of a loss. The classes are the last axis of the logits."""

    logits: np.ndarray
    labels: np.ndarray
    dtype: str
    options: dict[str, Any]


@st.composite
def problems(
    draw: st.DrawFn,
    *,
    dtypes: list[str] = DTYPES,
    dense: bool | None = None,
    special: bool = True,
) -> Problem:
    """Logits of every size and margin, labels good and bad, and some of the options.

    `dense` says of which kind the labels are. With `special` some logits are not
    finite, some labels name no class, and some examples do not count.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch, classes = draw(st.sampled_from(BATCHES)), draw(st.sampled_from(CLASSES))
    dtype = draw(st.sampled_from(dtypes))
    rows = (rng, batch, classes, draw(st.sampled_from(MARGINS)))
    logits, ids = oracle.confident_logits(*rows, draw(st.sampled_from(SCALES)))
    logits = logits.astype(jnp.dtype(dtype)).astype(np.float64)
    dense = draw(st.booleans()) if dense is None else dense
    options: dict[str, Any] = {}
    if special:
        for value in draw(st.sets(st.sampled_from([-np.inf, np.inf, np.nan]))):
            logits[rng.uniform(size=logits.shape) < 0.05] = value
        if draw(st.booleans()):
            options["where"] = _mask(draw, rng, batch, classes)
    if dense:
        labels = rng.dirichlet(np.ones(classes), batch)
        labels *= draw(st.sampled_from([0.0, 1.0, 3.0]))
        labels[rng.uniform(size=labels.shape) < 0.2] = 0
    else:
        labels = ids
        if special:
            bad = rng.choice([-1, -100, classes, 2**31 - 1], batch)
            labels = np.where(rng.uniform(size=batch) < 0.2, bad, ids)
            ignored = draw(st.sampled_from([None, -100, -1, 0]))
            options |= {} if ignored is None else {"ignore_index": ignored}
    given = st.booleans()
    if draw(given):
        options["class_weights"] = rng.choice([0.0, 0.5, 1.0, 3.0], classes)
    if draw(given):
        options["weights"] = rng.choice([0.0, 0.5, 1.0, 2.0], batch)
    if draw(given):
        # At 0, where a class of no probability costs nothing, the slope is infinite
        # and said to be that of the others.
        none = [] if np.isneginf(logits).any() else [0.0]
        options["label_smoothing"] = draw(st.sampled_from([0.1, 0.9, *none]))
    if draw(given):
        options["z_loss"] = draw(st.sampled_from([0.0, 1e-4, 0.1]))
    if draw(given):
        # The cap's own rounding is of a float32 near it.
        options["logit_softcap"] = draw(st.sampled_from([2.0, 30.0]))
    if draw(given):
        # Of a product that is not exact nothing could be said at 1e4.
        options["logit_scale"] = draw(st.sampled_from([0.5, 1.0, -2.0]))
    options["reduction"] = draw(st.sampled_from(["none", "sum", "mean"]))
    return Problem(logits, labels, dtype, options)


def _mask(
    draw: st.DrawFn, rng: np.random.Generator, batch: tuple[int, ...], classes: int
) -> np.ndarray:
    shapes = [(*batch, classes), (*(1 for _ in batch), classes)]
    if batch:
        shapes += [batch, (*batch, 1)]
    return rng.uniform(size=draw(st.sampled_from(shapes))) < 0.8


def finite(**arguments: Any) -> st.SearchStrategy[Problem]:
    """Problems in float32 whose loss is finite, and whose examples all count."""
    return problems(dtypes=["float32"], special=False, **arguments)


def value_and_gradient(loss: Callable[..., Any], logits: Any) -> tuple[Any, Any]:
    """The value, and the gradient of its sum, in NumPy."""

    @jax.jit
    def both(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        value, pull = jax.vjp(loss, logits)
        return value, *pull(jnp.ones_like(value))

    value, gradient = both(np.asarray(logits, np.float32))
    return np.asarray(value), np.asarray(gradient)


def arrays(options: dict[str, Any]) -> dict[str, Any]:
    """Options whose arrays are float32."""
    return {
        name: np.asarray(value, np.float32)
        if isinstance(value, np.ndarray) and value.dtype == np.float64
        else value
        for name, value in options.items()
    }


def assert_close(actual: Any, wanted: Any, terms: Any = None, of: float = 1.0) -> None:
    """Two float32 results of one function, each within its tolerance."""
    bound = 2 * of * GRADIENT * np.maximum(abs(np.asarray(wanted)), terms or 0.0)
    error = abs(np.asarray(actual) - np.asarray(wanted))
    same = np.asarray(actual) == np.asarray(wanted)
    np.testing.assert_array_less(np.where(same, 0, error), bound + 1e-30)


def terms_of(problem: Problem) -> float:
    """The largest sum of absolute terms of an entry of the gradient."""
    found = oracle.gradients(problem.logits, problem.labels, **problem.options)
    return float(np.max(found["logits_terms"], initial=0.0))


# Against the exact value


@hypothesis.given(problems(), st.booleans(), st.data())
def test_any_loss_of_logits_is_exact(
    problem: Problem, forward_mode: bool, data: st.DataObject
) -> None:
    logits, labels, dtype, options = problem
    axis = data.draw(st.integers(-logits.ndim, -1))
    alone = options | {"reduction": "none", "weights": None}
    # Of a row that is NaN it is not said whether it is in a class of weight 0, nor
    # whether its own weight of 0 has that gradient.
    bad = np.isnan(oracle.loss(logits, labels, **alone)).any()
    compared = ("logits", *(() if bad else ("labels", *DIFFERENTIATED)))
    axes = functools.partial(np.moveaxis, source=-1, destination=axis)
    if np.ndim(options.get("where", 0)) == logits.ndim:
        options = options | {"where": axes(options["where"])}
    check(
        axes(logits),
        axes(labels) if labels.ndim == logits.ndim else labels,
        dtype=dtype,
        axis=axis,
        forward_mode=forward_mode,
        compared=compared,
        **options,
    )


@hypothesis.given(
    problems(dtypes=["float32"], dense=False), st.sampled_from(STRATEGIES)
)
def test_any_fused_loss_is_exact(problem: Problem, strategy: str) -> None:
    logits, labels, dtype, options = problem
    # A product with an identity is exact where every logit is finite.
    logits = np.nan_to_num(logits, posinf=9.0, neginf=-9.0)
    if strategy == "tokens" and options["reduction"] == "none":
        options = options | {"reduction": "sum"}
    check(logits, labels, name=f"fused, {strategy}", dtype=dtype, **options)


# Between two calls


@hypothesis.given(finite(), st.sampled_from([-64.0, 0.5, 1024.0]))
def test_a_shift_of_all_logits_changes_nothing(problem: Problem, shift: float) -> None:
    _, labels, _, options = problem
    options = arrays(options) | {"z_loss": 0.0, "logit_softcap": None}
    # Multiples of 1/64 up to 2^13 are moved without a rounding.
    logits = np.clip(np.round(64 * problem.logits) / 64, -4096, 4096)
    loss = functools.partial(LOSSES[kind(problem)], labels=labels, **options)
    before, gradient = value_and_gradient(loss, logits)
    after, moved = value_and_gradient(loss, logits + shift)
    assert_close(after, before)
    assert_close(moved, gradient, terms_of(problem._replace(logits=logits)))


@hypothesis.given(finite(), st.randoms(use_true_random=False))
def test_classes_have_no_order(problem: Problem, random: Any) -> None:
    logits, labels, _, options = problem
    options = arrays(options)
    order = list(range(logits.shape[-1]))
    random.shuffle(order)
    place = np.argsort(order)
    permuted = dict(options)
    if "class_weights" in options:
        permuted["class_weights"] = options["class_weights"][order]
    dense = labels.ndim == logits.ndim
    both = []
    for z, y, given in (
        (logits, labels, options),
        (logits[..., order], labels[..., order] if dense else place[labels], permuted),
    ):
        y = y.astype(np.float32) if dense else y.astype(np.int32)
        loss = functools.partial(LOSSES[kind(problem)], labels=y, **given)
        both.append(value_and_gradient(loss, z))
    (before, gradient), (after, moved) = both
    assert_close(after, before)
    assert_close(moved, gradient[..., order], terms_of(problem))


@hypothesis.given(finite())
def test_the_gradient_of_a_row_sums_to_zero(problem: Problem) -> None:
    logits, labels, _, options = problem
    options = arrays(options) | {"z_loss": 0.0, "logit_softcap": None}
    loss = functools.partial(LOSSES[kind(problem)], labels=labels, **options)
    _, gradient = value_and_gradient(loss, logits)
    wide = gradient.astype(np.float64)
    size = abs(wide).sum(-1)
    assert np.all(abs(wide.sum(-1)) <= 1e-4 * size + 1e-30)


@hypothesis.given(finite(dense=False))
def test_a_class_id_is_a_one_hot_distribution(problem: Problem) -> None:
    logits, ids, _, options = problem
    # Their means with class weights are different by definition.
    options = {k: v for k, v in arrays(options).items() if k != "class_weights"}
    one_hot = np.eye(logits.shape[-1], dtype=np.float32)[ids]
    found = [
        value_and_gradient(functools.partial(LOSSES[name], labels=y, **options), logits)
        for name, y in (("integer", ids), ("dense", one_hot))
    ]
    (of_ids, by_ids), (of_rows, by_rows) = found
    assert_close(of_rows, of_ids)
    terms = terms_of(problem._replace(options=options))
    assert_close(by_rows, by_ids, terms)


@hypothesis.given(
    finite(dense=False), st.sampled_from(STRATEGIES[1:]), st.sampled_from([1, 64, 4096])
)
def test_neither_strategy_nor_chunks_matter(
    problem: Problem, strategy: str, workspace: int
) -> None:
    logits, labels, _, options = problem
    rng = np.random.default_rng(logits.size)
    hidden = rng.standard_normal((*logits.shape[:-1], 3)).astype(np.float32)
    kernel = rng.standard_normal((3, logits.shape[-1])).astype(np.float32)
    loss = functools.partial(
        jl.linear_softmax_cross_entropy, labels=labels, **arrays(options)
    )

    @functools.partial(jax.jit, static_argnames=("strategy", "workspace_bytes"))
    def gradients(hidden: jax.Array, kernel: jax.Array, **how: Any) -> Any:
        value, pull = jax.vjp(functools.partial(loss, **how), hidden, kernel)
        return value, *pull(jnp.ones_like(value))

    factors = (hidden, kernel)
    found = gradients(*factors, strategy=strategy, workspace_bytes=workspace)
    for a, b in zip(found, gradients(*factors, strategy="dense"), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@hypothesis.given(finite(), st.integers(0, 2**32 - 1))
def test_a_masked_class_is_one_that_was_deleted(problem: Problem, seed: int) -> None:
    logits, labels, _, options = problem
    options = arrays(options)
    classes = logits.shape[-1]
    exists = np.random.default_rng(seed).uniform(size=classes) < 0.6
    dense = labels.ndim == logits.ndim
    if not dense:
        exists[labels.ravel()] = True
    exists[0] |= not exists.any()
    fewer = dict(options)
    if "class_weights" in options:
        fewer["class_weights"] = options["class_weights"][exists]
    place = np.cumsum(exists) - 1
    kept = labels[..., exists] if dense else place[labels]
    mask = np.broadcast_to(exists, logits.shape)
    function = LOSSES[kind(problem)]
    holes = np.where(exists, logits, np.nan)
    masked = functools.partial(function, labels=labels, where=mask, **options)
    before, gradient = value_and_gradient(masked, holes)
    deleted = functools.partial(function, labels=kept, **fewer)
    after, short = value_and_gradient(deleted, logits[..., exists])
    terms = terms_of(problem._replace(options=problem.options | {"where": mask}))
    assert np.all(gradient[..., ~exists] == 0)
    assert_close(before, after)
    assert_close(gradient[..., exists], short, terms)


@hypothesis.given(finite(dense=False), st.integers(0, 2**32 - 1), st.booleans())
def test_an_ignored_example_is_one_that_was_deleted(
    problem: Problem, seed: int, by_weight: bool
) -> None:
    logits, labels, _, options = problem
    options = arrays(options)
    logits = logits.reshape(-1, logits.shape[-1])
    ids = labels.ravel()
    kept = np.random.default_rng(seed).uniform(size=len(ids)) < 0.6
    weights = np.ravel(options.pop("weights", np.ones(len(ids), np.float32)))
    few = functools.partial(
        LOSSES["integer"], labels=ids[kept], weights=weights[kept], **options
    )
    if by_weight:
        more = {"labels": ids, "weights": np.where(kept, weights, 0)}
    else:
        marked = np.where(kept, ids, -100)
        more = {"labels": marked, "weights": weights, "ignore_index": -100}
    many = functools.partial(LOSSES["integer"], **more, **options)
    after, gradient = value_and_gradient(many, np.where(kept[:, None], logits, np.nan))
    wanted, short = value_and_gradient(few, logits[kept])
    if np.ndim(after):
        assert np.all(after[~kept] == 0)
        after = after[kept]
    assert np.all(gradient[~kept] == 0)
    assert_close(after, wanted)
    terms = terms_of(Problem(logits, ids, "float32", problem.options | _flat(problem)))
    assert_close(gradient[kept], short, terms * len(ids))


def _flat(problem: Problem) -> dict[str, Any]:
    """The weights of all examples in one axis."""
    weights = problem.options.get("weights")
    return {} if weights is None else {"weights": np.ravel(weights)}


@hypothesis.given(finite(), st.sampled_from([0.25, 2.0, 1024.0]))
def test_a_weight_is_a_factor(problem: Problem, factor: float) -> None:
    logits, labels, _, options = problem
    options = arrays(options)
    weights = options.pop("weights", np.ones(logits.shape[:-1], np.float32))
    loss = functools.partial(LOSSES[kind(problem)], labels=labels, **options)
    before, gradient = value_and_gradient(
        functools.partial(loss, weights=weights), logits
    )
    after, scaled = value_and_gradient(
        functools.partial(loss, weights=np.float32(factor) * weights), logits
    )
    # A mean has them in its denominator as well.
    factor = 1.0 if options["reduction"] == "mean" else factor
    assert_close(after, factor * before)
    assert_close(scaled, factor * gradient, terms_of(problem), of=max(factor, 1.0))


@hypothesis.given(finite(), finite(), st.sampled_from(DIVERGENCES), st.booleans())
def test_no_divergence_is_negative_and_that_of_equals_is_zero(
    problem: Problem, other: Problem, direction: str, same: bool
) -> None:
    student = jnp.asarray(problem.logits, jnp.float32)
    teacher = np.resize(other.logits, student.shape).astype(np.float32)
    teacher = student if same else jnp.asarray(teacher)
    loss = functools.partial(
        jl.softmax_kl_divergence, teacher_logits=teacher, direction=direction
    )
    value, gradient = value_and_gradient(loss, student)
    assert np.all(value >= 0)
    if same:
        assert np.all(value == 0)
        assert np.all(gradient == 0)
    if direction == "jensen_shannon":
        assert np.all(value <= np.log(2) * (1 + 1e-6))


@hypothesis.given(finite(dense=False), st.sampled_from(sorted(LOG_PROBS)))
def test_an_entropy_is_at_most_that_of_the_uniform_distribution(
    problem: Problem, name: str
) -> None:
    logits = jnp.asarray(problem.logits, jnp.float32)
    both = jax.jit(functools.partial(LOG_PROBS[name], return_entropy=True))
    log_probs, entropy = both(logits, problem.labels)
    assert np.all(log_probs <= 0)
    assert np.all(entropy >= 0)
    assert np.all(entropy <= np.log(logits.shape[-1]) * (1 + 1e-6))


def kind(problem: Problem) -> str:
    return "dense" if problem.labels.ndim == problem.logits.ndim else "integer"


# What was found


@pytest.mark.parametrize("forward_mode", [False, True])
def test_a_class_of_no_probability_that_no_label_has_weighs_nothing(
    forward_mode: bool,
) -> None:
    """The gradients by its weight and by its labels were 0 * inf."""
    logits = np.array([[-np.inf, -0.5], [-np.inf, 1.0]])
    labels = np.array([[0.0, 0.0], [0.0, 2.0]])
    for reduction in ("none", "sum", "mean"):
        options = {"class_weights": np.array([0.0, 1.0]), "reduction": reduction}
        _, gradients = check(logits, labels, forward_mode=forward_mode, **options)
        assert np.all(np.isfinite(gradients["class_weights"]))


@pytest.mark.parametrize("name", TAKE_IDS)
def test_a_label_that_is_masked_weighs_what_its_class_weighs(name: str) -> None:
    """The mean is NaN; the oracle divided the gradient of other rows by less."""
    logits, labels = np.zeros((3, 2)), np.array([0, 1, 1])
    where = np.array([[True, True], [True, True], [True, False]])
    options = {"where": where, "class_weights": np.array([3.0, 1.0])}
    loss, gradients = check(logits, labels, name=name, reduction="mean", **options)
    assert np.isnan(loss)
    np.testing.assert_allclose(gradients["logits"][:2, 0], [-0.3, 0.1], rtol=1e-6)


@pytest.mark.alternate(2)
@pytest.mark.parametrize("name", TAKE_IDS)
def test_the_surprise_of_a_certain_class_that_is_no_label(name: str) -> None:
    """The gradient by its weight, 2e-9, was wrong by half of it."""
    logits = np.array([[18.0, 0.0, -1e-3]])
    options = {"label_smoothing": 0.1, "class_weights": np.array([0.0, 1.0, 1.0])}
    labels = np.array([2])
    weights = {"weights": np.ones(1), "reduction": "sum"}
    _, gradients = check(logits, labels, name=name, **options, **weights)
    exact = oracle.gradients(logits, labels, **options)["class_weights"]
    np.testing.assert_allclose(gradients["class_weights"], exact, rtol=1e-5)
