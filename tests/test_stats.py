"""Statistics by name, against float64: entropy, rank, confidence, label_logit."""

import types
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import LOSSES, TAKE_IDS, fused
from jax.sharding import PartitionSpec as P

import jaxlosses as jl

METRICS = ("entropy", "rank", "confidence", "label_logit")
pytestmark = pytest.mark.without_llvm_passes


def exact_of(
    z: np.ndarray, ids: np.ndarray, where: Any = True
) -> dict[str, np.ndarray]:
    """Of float64 logits after cap and scale, and labels that exist."""
    z = np.where(where, z, -np.inf)
    at_label = np.take_along_axis(z, ids[:, None], -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = z - z.max(-1, keepdims=True)
        p = np.exp(gap) / np.exp(gap).sum(-1, keepdims=True)
        entropy = -np.where(p == 0, 0, p * np.log(p)).sum(-1)
    return {
        "entropy": entropy,
        "rank": (z > at_label).sum(-1),
        "confidence": p.max(-1),
        "label_logit": at_label[:, 0],
    }


def assert_are(stats: Any, exact: dict[str, np.ndarray], counted: Any = True) -> None:
    for name, value in exact.items():
        got = np.asarray(getattr(stats, name))
        wanted = np.where(counted, value, 0)
        if name == "rank":
            assert got.dtype == np.int32
            np.testing.assert_array_equal(got, wanted)
        else:
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, wanted, rtol=3e-6, err_msg=name)


def labels_of(kind: str, ids: np.ndarray, classes: int) -> np.ndarray:
    if kind != "dense":
        return ids
    # Not one-hot: the label of a distribution is its arg max.
    hot = np.eye(classes, dtype=np.float32)[np.clip(ids, 0, classes - 1)]
    return (0.8 * hot + 0.2 / classes).astype(np.float32)


@pytest.mark.alternate(6)
@pytest.mark.parametrize("kind", LOSSES)
def test_metrics_are_of_the_probabilities_with_every_option(kind: str) -> None:
    rng = np.random.default_rng(1)
    logits = 3 * rng.normal(size=(9, 37)).astype(np.float32)
    logits[4, 11:20] = logits[4, 3]  # ties are not ahead
    ids = rng.integers(37, size=9)
    ids[4] = 12
    weights = np.array([1, 2, 0, 1, 1, 3, 1, 1, 0.5], np.float32)
    where = rng.uniform(size=37) < 0.7
    where[ids] = True
    options = {
        "where": where if kind.startswith("fused") else where[None],
        "class_weights": rng.uniform(0.5, 2, 37).astype(np.float32),
        "label_smoothing": 0.1,
        "z_loss": 0.01,
        "logit_softcap": 4.0,
        "logit_scale": -1.25,
        "weights": weights,
    }
    if "tokens" in kind:
        options["reduction"] = "sum"
    labels = labels_of(kind, ids, 37)
    _, stats = LOSSES[kind](logits, labels, **options, return_stats=METRICS)
    z = -1.25 * 4 * np.tanh(np.float64(logits) / 4)
    assert_are(stats, exact_of(z, ids, where), weights != 0)


@pytest.mark.parametrize("margin", [0.0, 5.0, 30.0, 80.0])
def test_a_confident_row_keeps_the_digits_of_its_metrics(margin: float) -> None:
    rng = np.random.default_rng(2)
    logits, ids = oracle.confident_logits(
        rng, 3, 1000, margin, 1.0, jnp.dtype("float32")
    )
    _, stats = jl.softmax_cross_entropy_with_integer_labels(
        logits, ids, return_stats=METRICS
    )
    gap = np.float64(logits) - np.float64(logits).max(-1, keepdims=True)
    # The largest probability is one of those beside it that are left out of the sum.
    rest = np.sort(np.exp(gap), -1)[:, :-1].sum(-1)
    p = np.exp(gap) / (1 + rest)[:, None]
    entropy = np.log1p(rest) - (p * gap).sum(-1)
    np.testing.assert_allclose(stats.entropy, entropy, rtol=2e-6)
    np.testing.assert_allclose(stats.confidence, p.max(-1), rtol=3e-7)


@pytest.mark.alternate
@pytest.mark.parametrize("kind", TAKE_IDS)
def test_a_label_that_cannot_be_is_behind_all_classes(kind: str) -> None:
    logits = np.array([[0, 1.0, 2], [2, 1, 0], [3, -3, 1]], np.float32)
    ids = np.array([3, -100, 1])
    reduction = "sum" if "tokens" in kind else "none"
    _, stats = TAKE_IDS[kind](
        logits, ids, ignore_index=-100, return_stats=METRICS, reduction=reduction
    )
    # Of what does not count all metrics are zero.
    np.testing.assert_array_equal(stats.rank, [3, 0, 2])
    np.testing.assert_allclose(stats.label_logit, [np.nan, 0, -3], rtol=1e-6)
    assert np.isnan(stats.confidence).tolist() == [False, False, False]
    assert np.isnan(stats.entropy).tolist() == [True, False, False]


def test_metrics_of_infinite_logits_and_of_nan() -> None:
    logits = np.array([[3, -np.inf, 1], [1, np.nan, 2]], np.float32)
    _, stats = jl.softmax_cross_entropy_with_integer_labels(
        logits, np.array([1, 2]), return_stats=METRICS
    )
    np.testing.assert_array_equal(stats.rank, [2, 3])
    np.testing.assert_array_equal(stats.label_logit, [-np.inf, np.nan])
    assert np.isnan(stats.confidence).tolist() == [False, True]
    assert np.isnan(stats.entropy).tolist() == [False, True]


@pytest.mark.parametrize("name", METRICS)
def test_only_what_is_named_is_there(name: str) -> None:
    logits = jnp.float32([[0, 1, 2], [2, 1, 0]])
    ids = jnp.array([2, 2])
    loss = jl.softmax_cross_entropy_with_integer_labels
    _, plain = loss(logits, ids, return_stats=True)
    _, named = loss(logits, ids, return_stats=(name,))
    assert all(getattr(plain, metric) is None for metric in METRICS)
    found = [metric for metric in METRICS if getattr(named, metric) is not None]
    assert found == [name]
    _, none_named = loss(logits, ids, return_stats=())
    assert len(jax.tree.leaves(none_named)) == len(jax.tree.leaves(plain))


@pytest.mark.alternate
@pytest.mark.parametrize("kind", ["dense", "integer", "fused, tokens"])
def test_metrics_are_not_differentiated(kind: str) -> None:
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(5, 7)).astype(np.float32)
    labels = labels_of(kind, rng.integers(7, size=5), 7)

    def loss(logits: jax.Array, factor: float) -> jax.Array:
        value, stats = LOSSES[kind](
            logits, labels, reduction="mean", return_stats=METRICS
        )
        metrics = [getattr(stats, name).astype(logits.dtype) for name in METRICS]
        return value + factor * jnp.sum(jnp.stack(metrics))

    def plain(logits: jax.Array) -> jax.Array:
        return LOSSES[kind](logits, labels, reduction="mean")

    exact = jax.grad(plain)(logits)
    for factor in (0.0, 1.0):
        np.testing.assert_allclose(
            jax.grad(loss)(logits, factor), exact, rtol=1e-5, atol=1e-8
        )


@pytest.mark.parametrize("axis", [1, (0, 2), (2, 0)], ids=str)
def test_ranks_are_along_any_class_axes(axis: Any) -> None:
    rng = np.random.default_rng(4)
    logits = rng.normal(size=(3, 5, 4)).astype(np.float32)
    axes = list(np.atleast_1d(axis))
    rest = [a for a in range(3) if a not in axes]
    batch = [logits.shape[a] for a in rest]
    rows = logits.transpose(rest + axes).reshape(*batch, -1)
    ids = rng.integers(rows.shape[-1], size=batch)
    _, stats = jl.softmax_cross_entropy_with_integer_labels(
        logits, ids, axis, return_stats=("rank",)
    )
    at_label = np.take_along_axis(rows, ids[..., None], -1)
    np.testing.assert_array_equal(stats.rank, (rows > at_label).sum(-1))


@pytest.mark.alternate
@pytest.mark.parametrize("kind", ["dense", "integer", "fused"])
def test_metrics_of_classes_that_devices_share_are_those_of_all(kind: str) -> None:
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(6, 32)).astype(np.float32)
    ids = rng.integers(32, size=6)
    ids[2] = -100
    labels = labels_of(kind, np.maximum(ids, 0), 32) if kind == "dense" else ids
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("v",))
    options: dict[str, Any] = {} if kind == "dense" else {"ignore_index": -100}
    by_class, whole = P(None, "v"), P()

    def local(a: jax.Array, labels: jax.Array, b: jax.Array) -> Any:
        if kind == "fused":
            return jl.linear_softmax_cross_entropy(
                b,
                a,
                labels,
                strategy="vocab",
                workspace_bytes=64,
                axis_name="v",
                return_stats=METRICS,
                **options,
            )[1]
        loss = LOSSES[kind]
        return loss(a, labels, axis_name="v", return_stats=METRICS, **options)[1]

    # As a kernel, they are the logits of an identity.
    split = by_class if kind == "dense" else whole
    stats = jax.jit(
        jax.shard_map(
            local, mesh=mesh, in_specs=(by_class, split, whole), out_specs=whole
        )
    )(logits, labels, np.eye(6, dtype=np.float32))
    counted = np.full(6, True) if kind == "dense" else ids >= 0
    exact = exact_of(np.float64(logits), np.maximum(ids, 0))
    assert_are(stats, exact, counted)


def test_metrics_follow_vmap_and_an_exported_symbolic_batch() -> None:
    rng = np.random.default_rng(6)
    logits = rng.normal(size=(4, 6, 9)).astype(np.float32)
    ids = rng.integers(9, size=(4, 6))
    loss = fused("recompute")

    def metrics(logits: jax.Array, ids: jax.Array) -> Any:
        return loss(logits, ids, return_stats=METRICS)[1]

    stats = jax.vmap(metrics)(logits, ids)
    flat = exact_of(np.float64(logits).reshape(24, 9), ids.reshape(24))
    assert_are(stats, {name: a.reshape(4, 6) for name, a in flat.items()})

    def of_logits(logits: jax.Array, ids: jax.Array) -> tuple[jax.Array, ...]:
        stats = jl.softmax_cross_entropy_with_integer_labels(
            logits, ids, return_stats=METRICS
        )[1]
        return tuple(getattr(stats, name) for name in METRICS)

    batch, classes = jax.export.symbolic_shape("b, v")
    exported = jax.export.export(jax.jit(of_logits))(
        jax.ShapeDtypeStruct((batch, classes), jnp.float32),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
    )
    got = exported.call(logits[0], ids[0].astype(np.int32))
    found = types.SimpleNamespace(**dict(zip(METRICS, got, strict=True)))
    assert_are(found, exact_of(np.float64(logits[0]), ids[0]))


def test_a_named_metric_in_forward_mode_has_no_tangent() -> None:
    logits = jnp.float32([[0, 1, 2], [2, 1, 0]])

    def loss(logits: jax.Array) -> Any:
        return jl.softmax_cross_entropy_with_integer_labels(
            logits, jnp.array([2, 2]), forward_mode=True, return_stats=METRICS
        )

    _, (d, d_stats) = jax.jvp(loss, (logits,), (jnp.ones_like(logits),))
    helpers.assert_all_zero(d_stats.entropy, d_stats.confidence, d_stats.label_logit)
    np.testing.assert_allclose(d, 0, atol=1e-6)
