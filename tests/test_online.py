"""Statistics in one read, as accelerators take them: merged in any order, exactly."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from tolerances import assert_loss

import jaxlosses as jl
from jaxlosses._math import online, statistics
from jaxlosses._math.classes import Inputs, Spec
from jaxlosses._math.statistics import Statistics

# 701 classes are four slices, the last of which overlaps the one before.
SIZES = [(1, 1), (7, 1), (203, 1), (701, 4)]


def nll(slices: int, logits: Any, ids: Any) -> Any:
    spec = Spec((1,), dense=False)
    inputs = Inputs(jnp.asarray(logits), jnp.asarray(ids)[:, None])
    return online.evaluate(spec, inputs, slices).nll[:, 0]


@pytest.mark.alternate
@pytest.mark.parametrize(("classes", "slices"), SIZES)
@pytest.mark.parametrize("margin", [0.0, 1.0, 20.0, 80.0])
def test_every_digit_of_a_confident_example_is_right(
    classes: int, slices: int, margin: float
) -> None:
    rng = np.random.default_rng(0)
    logits, ids = oracle.confident_logits(rng, 23, classes, margin)
    value = jax.jit(functools.partial(nll, slices))(logits, ids)
    assert_loss(value, oracle.loss(logits, ids), "float32")


@pytest.mark.alternate(6)
@pytest.mark.parametrize(("classes", "slices"), SIZES)
@pytest.mark.parametrize("margin", [0.0, 1.0, 20.0, 80.0])
@pytest.mark.parametrize("ahead", [True, False, None])
def test_every_digit_of_an_entropy_is_right(
    classes: int, slices: int, margin: float, ahead: bool | None
) -> None:
    rng = np.random.default_rng(0)
    logits, ids = oracle.confident_logits(rng, 23, classes, margin, scale=0.5)
    ids = ids if ahead else (ids + 1) % classes
    labels = None if ahead is None else jnp.asarray(ids)[:, None]
    spec = Spec((1,), dense=labels is None, entropy=True)
    run = jax.jit(functools.partial(online.evaluate, spec, slices=slices))
    value = run(Inputs(jnp.asarray(logits), labels)).entropy
    assert_loss(value[:, 0], oracle.entropy(logits)["entropy"], "float32")


@pytest.mark.parametrize("read", [online.evaluate, statistics.evaluate])
def test_a_class_that_is_no_label_has_every_digit_of_the_spread(read: Any) -> None:
    """Of its surprise is made the gradient by its weight, with smoothing."""
    rng = np.random.default_rng(0)
    logits, ids = oracle.confident_logits(rng, 23, 203, 20.0)
    labels = jnp.asarray((ids + 1) % 203)[:, None]
    weights = jnp.ones((1, 203))
    inputs = Inputs(jnp.asarray(logits), labels, class_weights=weights)
    spec = Spec((1,), dense=False, smooth=True)
    found = jax.jit(functools.partial(read, spec))(inputs)
    assert_loss(found.spread[:, 0], oracle.loss(logits, ids), "float32")
    assert found.entropy is None


def merged(z: np.ndarray, order: np.ndarray, lanes: int) -> float:
    """The spread of a row whose classes are dealt to lanes, in float32 of NumPy."""

    def both(a: Any, b: Any) -> Any:
        (top, excess), (other, more) = sorted((a, b), key=lambda x: -x[0])
        with np.errstate(over="ignore", under="ignore"):
            return top, np.float32(excess + np.exp(other - top) * (1 + more))

    nothing = (np.finfo(np.float32).min, np.float32(-1))
    parts = [
        functools.reduce(both, ((z[i], np.float32(0)) for i in lane), nothing)
        for lane in np.array_split(order, lanes)
    ]
    while len(parts) > 1:  # as threads of a warp hand over what they have
        half = -(-len(parts) // 2)
        pairs = itertools.zip_longest(parts[:half], parts[half:], fillvalue=nothing)
        parts = list(itertools.starmap(both, pairs))
    return float(np.log1p(np.float64(parts[0][1])))


@pytest.mark.parametrize("lanes", [1, 32, 128])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 30.0])
def test_a_merge_in_any_grouping_keeps_the_digits(lanes: int, spread: float) -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        z = (spread * rng.standard_normal(3001)).astype(np.float32)
        gaps = np.sort(z.astype(np.float64) - z.max())[:-1]
        exact = np.log1p(np.sum(np.exp(gaps)))
        found = merged(z, rng.permutation(len(z)), lanes)
        # One lane adds up thousands of terms, one by one.
        np.testing.assert_allclose(found, exact, rtol=2e-5 if lanes == 1 else 1e-6)


def test_the_reduction_gives_what_two_reads_give() -> None:
    rng = np.random.default_rng(0)
    z = (10 * rng.standard_normal((37, 701))).astype(np.float32)
    z[3, 5], z[4, 7], z[5, :8] = np.nan, np.inf, -np.inf
    z[6], z[7], z[8] = -np.inf, 0, np.finfo(np.float32).min
    ids = rng.integers(701, size=(37, 1)).astype(np.int32)
    ids[5], ids[9], ids[10] = 3, -1, 701
    where = rng.random(z.shape) < 0.8
    where[11, ids[11]], where[12] = False, False
    options: Any = itertools.product((False, True), (None, np.float32(-0.7)), (1, 4))
    for dense, scale, slices in options:
        labels = rng.random(z.shape).astype(np.float32) * (z > 0) if dense else ids
        spec = Spec((1,), dense, None, True, True, True, True)
        weights = jnp.asarray(rng.random((1, 701)), jnp.float32)
        counted = (rng.random((37, 1)) < 0.9) & where.any(1, keepdims=True)
        arrays = (z, labels, where, counted, weights, scale)
        inputs = jax.tree.map(jnp.asarray, Inputs(*arrays))
        found = jax.jit(functools.partial(online.evaluate, spec, slices=slices))(inputs)
        two = jax.jit(functools.partial(statistics.evaluate, spec))(inputs)
        # Of a row with a NaN the peak is not asked for.
        rows = np.arange(37) != 3
        # Rank and picks are reads of their own.
        for name in set(Statistics._fields) - {"rank", "picks"}:
            a, b = (np.asarray(getattr(x, name))[rows] for x in (found, two))
            np.testing.assert_allclose(a, b, rtol=5e-6, atol=4e-7, err_msg=name)


@pytest.mark.parametrize(
    ("platform", "local"), [("cuda", True), ("tpu", True), ("tpu", False)]
)
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "where": True}])
def test_accelerators_reduce_given_logits_once(
    platform: str, local: bool, options: Any
) -> None:
    """In slices on a TPU, but where an automatic axis may have split the classes.

    The slices moved between devices then, as many bytes as there are logits.
    """
    if "where" in options:
        options = options | {"where": (jnp.arange(1024) % 7 > 0)[None]}

    def loss(logits: jax.Array, ids: jax.Array) -> Any:
        return jl.softmax_cross_entropy_with_integer_labels(
            logits, ids, return_stats=True, **options
        )

    assert jax.device_count() > 1
    if local:
        mesh, all_of_it = jax.make_mesh((1,), ("x",)), jax.sharding.PartitionSpec()
        loss = jax.shard_map(
            loss, mesh=mesh, in_specs=all_of_it, out_specs=all_of_it, check_vma=False
        )
    shapes = jax.ShapeDtypeStruct((8, 1024), np.float32), jnp.zeros(8, jnp.int32)
    text = jax.jit(loss).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()
    columns = 256 if platform == "tpu" and local else 1024  # four slices
    reduced = [
        line
        for line in text.splitlines()
        if "stablehlo.reduce" in line and f"tensor<8x{columns}xf32>" in line
    ]
    assert len(reduced) == 1, text
    assert reduced[0].count(" init: ") >= 3


def test_no_class_is_minus_infinity() -> None:
    spec = Spec((1,), dense=False)
    part = online.partial(spec, Inputs(jnp.zeros((2, 1)), jnp.zeros((2, 1), int)), None)
    np.testing.assert_array_equal(part.rival, np.full((2, 1), -np.inf))
    np.testing.assert_array_equal(part.mass, np.zeros((2, 1)))
