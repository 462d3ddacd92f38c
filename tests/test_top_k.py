"""Labels of some classes: what they say, what the others are, and what cannot be."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import top_k
from helpers import STRATEGIES, assert_all_zero, fused, on_one_device, sweep, turns
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from top_k import RESTS

import jaxlosses as jl
from jaxlosses._math import top_k as parts

NAN, INF = np.nan, np.inf
Loss = Callable[..., Any]
NAMES = ("entropy", "rank", "confidence", "label_logit")
on_logits = jl.softmax_cross_entropy_with_top_k_labels


LOSSES: dict[str, Loss] = {"logits": on_logits}
LOSSES |= {
    f"fused, {strategy}": fused(
        strategy, jl.linear_softmax_cross_entropy_with_top_k_labels, 640
    )
    for strategy in STRATEGIES
}
OF_EACH = [name for name in LOSSES if "tokens" not in name]
by_rest = pytest.mark.parametrize("rest", RESTS)
KINDS = [(rest, False) for rest in RESTS] + [(rest, True) for rest in RESTS[1:]]
by_kind = pytest.mark.parametrize(("rest", "as_divergence"), KINDS)


@functools.cache
def labelled(
    classes: int, number: int, rows: int = 12, noise: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Students of several scales and what a teacher near them finds likeliest.

    Some ids are given twice and some are none.
    """
    rng = np.random.default_rng(classes)
    scale = np.resize([0.1, 1.0, 5.0, 15.0], (rows, 1))
    logits = (scale * rng.normal(size=(rows, classes))).astype(np.float32)
    teacher = logits + noise * rng.normal(size=logits.shape)
    p = np.exp(teacher - teacher.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    ids = np.argsort(-p, 1)[:, :number]
    probs = np.take_along_axis(p, ids, 1).astype(np.float32)
    if number > 2:
        ids[::4, 1] = ids[::4, 0]
        ids[1::4, 2] = -1
    return logits, ids, probs


def check(
    name: str, case: Any, bar: float = 4e-6, dtype: Any = np.float32, **options: Any
) -> None:
    """Values and gradients beside exact ones; those of a row by what cancels in it."""
    logits, ids, probs = case
    logits, probs = jnp.asarray(logits, dtype), jnp.asarray(probs)
    given = options
    if options.get("where") is not None:
        where = jnp.asarray(options["where"])
        if name == "logits" and where.ndim == 1:
            where = where[None]
        given = options | {"where": where}
    want, by_logits, by_probs = top_k.exact(
        np.asarray(logits, np.float64), ids, probs, **options
    )
    weights = jnp.asarray(np.resize([1.0, 0.5, 2.0], len(want)), jnp.float32)
    summed = "tokens" in name

    def run(z: Any, q: Any) -> Any:
        values = LOSSES[name](
            z, ids, q, weights=weights, reduction="sum" if summed else "none", **given
        )
        return jnp.sum(values), values

    run = jax.jit(jax.value_and_grad(run, (0, 1), has_aux=True))
    (_, found), gradients = run(logits, probs)
    of_rows = np.asarray(weights, np.float64)
    want = want * of_rows
    want = want.sum() if summed else want
    np.testing.assert_allclose(np.asarray(found, np.float64), want, bar, 1e-30)
    assert gradients[0].dtype == logits.dtype
    rounding = 2 * float(jnp.finfo(dtype).eps) if dtype != np.float32 else 0.0
    for d, exact in zip(gradients, (by_logits, by_probs), strict=True):
        exact = exact * of_rows[:, None]
        size = abs(exact).max(1, keepdims=True) + 0.02 * of_rows[:, None]
        error = abs(np.asarray(d, np.float64) - exact)
        assert np.all(error <= 1e-5 * size + rounding * abs(exact))


# What they say


@pytest.mark.alternate(16)
@by_kind
@pytest.mark.parametrize(("classes", "number"), [(7, 1), (7, 3), (7, 7), (311, 20)])
def test_losses_are_those_of_the_definition(
    rest: str, as_divergence: bool, classes: int, number: int
) -> None:
    case = labelled(classes, number, 12 if classes < 100 else 4)
    # Of labels that sum to one but for a rounding.
    bar = 2e-5 if as_divergence else 4e-6
    check("logits", case, bar, rest=rest, as_divergence=as_divergence)


@pytest.mark.alternate(24)
@pytest.mark.parametrize(
    ("name", "rest", "options"),
    turns(
        LOSSES,
        RESTS,
        [
            {"logit_softcap": 5.0, "z_loss": 0.01},
            {"logit_scale": -1.7},
            {"where": np.arange(23) % 5 != 2},
            {"where": "each", "logit_scale": "each"},
        ],
    ),
)
def test_options_are_those_of_the_definition(
    name: str, rest: str, options: Any
) -> None:
    logits, ids, probs = labelled(23, 4, 13)
    rng = np.random.default_rng(0)
    if "where" in options:
        where = options["where"]
        if isinstance(where, str):
            where = rng.random((13, 23)) < 0.8
        there = np.take_along_axis(np.broadcast_to(where, logits.shape), ids, 1)
        ids = np.where(there, ids, -1)
        options = options | {"where": where}
    if options.get("logit_scale") == "each":
        options = options | {"logit_scale": rng.uniform(0.5, 2, 13).astype(np.float32)}
    check(name, (logits, ids, probs), rest=rest, **options)


@pytest.mark.parametrize("rest", sweep(RESTS, lambda rest: rest == "bucket"))
def test_sixteen_bits_and_sixty_four(rest: str) -> None:
    case = labelled(7, 3)
    for dtype in (jnp.bfloat16, jnp.float16):
        check("logits", case, dtype=dtype, rest=rest)
    with jax.enable_x64(True):
        check("logits", case, 1e-12, np.float64, rest=rest)


@pytest.mark.without_llvm_passes
def test_all_classes_are_the_dense_loss_and_one_the_loss_of_ids() -> None:
    logits, _, _ = labelled(7, 7)
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.permuted(np.tile(np.arange(7), (12, 1)), axis=1))
    probs = jnp.asarray(rng.dirichlet(np.ones(7), size=12), jnp.float32)
    dense = jnp.zeros((12, 7)).at[jnp.arange(12)[:, None], ids].set(probs)
    for rest in RESTS:
        run = functools.partial(on_logits, ids=ids, probs=probs, rest=rest)
        found = jax.value_and_grad(lambda z, run=run: run(z).sum())(logits)
        labels = dense
        if rest == "renormalize":
            labels = dense / dense.sum(1, keepdims=True)
        want = jax.value_and_grad(
            lambda z, labels=labels: jl.softmax_cross_entropy(z, labels).sum()
        )(logits)
        np.testing.assert_allclose(found[0], want[0], rtol=2e-6)
        np.testing.assert_allclose(found[1], want[1], rtol=1e-5, atol=1e-6)
    one = jnp.ones((12, 1))
    for rest in ("ignore", "bucket"):
        run = functools.partial(on_logits, ids=ids[:, :1], probs=one, rest=rest)
        found = jax.value_and_grad(lambda z, run=run: run(z).sum())(logits)
        want = jax.value_and_grad(
            lambda z: jl.softmax_cross_entropy_with_integer_labels(z, ids[:, 0]).sum()
        )(logits)
        np.testing.assert_allclose(found[0], want[0], rtol=2e-6)
        np.testing.assert_allclose(found[1], want[1], rtol=1e-5, atol=1e-9)


@pytest.mark.alternate
@pytest.mark.parametrize("rest", ["ignore", "bucket"])
def test_what_is_left_keeps_its_digits(rest: str) -> None:
    """A student that is sure of its picks, and a label that is not."""
    logits = np.array([[50.0, 49.0, 0, 1], [80, 3, 0, -1], [95, 94, 0, 0]], np.float32)
    ids = np.array([[0, 1]] * 3)
    probs = np.array([[0.75, 0.25], [0.625, 0.25], [1 - 2**-20, 2**-21]], np.float32)
    check("logits", (logits, ids, probs), rest=rest)
    sure = np.array([[0.75, 0.25]], np.float32)
    found = on_logits(logits[:1], ids[:1], sure, rest=rest)
    want, _, _ = top_k.exact(logits[:1], ids[:1], sure, rest)
    assert abs(found[0] / want[0] - 1) < 1e-6


def test_what_probabilities_leave_of_one_is_not_rounded() -> None:
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(97), size=40) * (1 - 1e-6)
    probs = probs.astype(np.float32)
    left = 1 - probs.astype(np.float64).sum(-1, keepdims=True)
    found = jax.jit(parts._left)(probs)
    np.testing.assert_allclose(found, left, rtol=5e-4)


def test_labels_of_more_than_one_have_a_divergence_of_so_much_more() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20, 4)).astype(np.float32)
    probs = jl.softmax(logits + 1e-3 * rng.normal(size=logits.shape))
    probs = np.asarray(probs * (1 + 2e-6), np.float32)
    labels = np.tile(np.arange(4), (20, 1)), probs
    found = jax.jit(
        functools.partial(on_logits, rest="bucket", as_divergence=True),
    )(logits, *labels)
    want, _, _ = top_k.exact(logits, *labels, "bucket", as_divergence=True)
    np.testing.assert_allclose(found, want, rtol=1e-2)


def test_a_single_probability_that_is_renormalized_has_no_slope() -> None:
    logits, ids, probs = labelled(7, 1)

    def loss(probs: Any) -> Any:
        run = functools.partial(on_logits, rest="renormalize", as_divergence=True)
        return jnp.sum(run(logits, ids=ids, probs=probs))

    assert_all_zero(jax.jit(jax.grad(loss))(probs))


@pytest.mark.alternate
@pytest.mark.parametrize("rest", ["bucket", "renormalize"])
def test_divergences_are_not_negative_and_vanish(rest: str) -> None:
    rng = np.random.default_rng(0)
    scale = np.exp(rng.uniform(-5, 3, size=(10**5, 1)))
    noise = np.exp(rng.uniform(-16, 2, size=(10**5, 1)))
    logits = jnp.asarray(scale * rng.normal(size=(10**5, 6)), jnp.float32)
    teacher = logits + jnp.asarray(noise * rng.normal(size=logits.shape), jnp.float32)
    probs, ids = jax.lax.top_k(jl.softmax(teacher), 3)
    found = on_logits(logits, ids, probs, rest=rest, as_divergence=True)
    assert found.min() >= 0
    assert np.isfinite(found).all()
    probs, ids = jax.lax.top_k(jl.softmax(logits), 3)
    same = on_logits(logits, ids, probs, rest=rest, as_divergence=True)
    # What is left to one has the roundings of what is named.
    assert same.max() < (1e-12 if rest == "renormalize" else 5e-6)
    plain = on_logits(logits, ids, probs, rest=rest)
    both = [
        jax.grad(
            lambda z, d=d: on_logits(z, ids, probs, rest=rest, as_divergence=d).sum()
        )(logits)
        for d in (False, True)
    ]
    np.testing.assert_array_equal(*both)
    assert plain.max() > 0.1


# What cannot be


@pytest.mark.alternate(12)
@by_rest
@pytest.mark.parametrize("name", OF_EACH)
def test_bad_examples_are_loud_and_alone(name: str, rest: str) -> None:
    logits = np.random.default_rng(0).normal(size=(9, 6)).astype(np.float32)
    ids = np.tile([0, 3, -1], (9, 1))
    probs = np.tile(np.array([0.5, 0.25, 7.0], np.float32), (9, 1))
    ids[0, 2], probs[0, 2] = 6, 0  # no class, at probability 0
    ids[1, 1] = -2
    ids[2, 0] = 4  # masked
    logits[3, 5] = NAN  # not named
    logits[4, 0] = INF
    logits[5, 2], ids[6, 1] = NAN, 17  # of weight 0 and masked
    weights = np.ones(9, np.float32)
    weights[5] = 0
    where = np.ones((9, 6), bool)
    where[:, 4], where[6] = False, False

    def run(z: Any, q: Any) -> Any:
        return jnp.sum(
            values := LOSSES[name](z, ids, q, rest=rest, weights=weights, where=where)
        ), values

    run = jax.jit(jax.grad(run, (0, 1), has_aux=True))
    (by_logits, by_probs), values = run(logits, probs)
    bad = np.arange(9) < 5
    np.testing.assert_array_equal(np.isnan(values), bad)
    np.testing.assert_array_equal(np.isnan(by_logits).all(1), bad)
    np.testing.assert_array_equal(np.isnan(by_logits).any(1), bad)
    assert_all_zero(values[5:7], by_logits[5:7], by_probs[5:7], by_logits[7:, 4])
    assert_all_zero(by_probs[7:, 2])
    kept = [0, 1, 2, 3, 5]
    want, slope, _ = top_k.exact(logits[7:][:, kept], [[0, 3]] * 2, probs[7:, :2], rest)
    np.testing.assert_allclose(values[7:], want, rtol=4e-6)
    np.testing.assert_allclose(by_logits[7:][:, kept], slope, rtol=1e-5, atol=1e-7)


def test_ids_of_64_bits_are_looked_at_before_they_are_narrowed() -> None:
    logits = np.zeros((4, 5), np.float32)
    ids = np.array([[1, -1], [2**32 + 1, 2], [-(2**32) - 1, 2], [0, 1]])
    probs = np.full((4, 2), 0.5, np.float32)
    found = on_logits(logits, ids, probs)
    np.testing.assert_array_equal(np.isnan(found), [False, True, True, False])
    np.testing.assert_allclose(found[0], np.log(5) / 2, rtol=1e-6)
    unsigned = on_logits(logits, ids.astype(np.uint8), probs)
    np.testing.assert_array_equal(np.isnan(unsigned), [True, False, True, False])


@pytest.mark.alternate
@by_rest
def test_classes_of_no_probability(rest: str) -> None:
    """As a pick with a label, without one, and as all of the rest."""
    logits = np.array([[-INF, 0, 1, 2], [0, -INF, 1, 2], [0, 1, -INF, -INF]])
    logits = logits.astype(np.float32)
    ids, probs = np.array([[0, 1]] * 3), np.array([[0.5, 0.25], [0.5, 0], [0.5, 0.5]])
    run = functools.partial(
        on_logits, ids=ids, probs=probs.astype(np.float32), rest=rest
    )
    values, pull = jax.vjp(run, logits)
    (gradient,) = pull(jnp.ones(3))
    np.testing.assert_array_equal(np.isinf(values), [True, False, False])
    assert not np.isnan(values).any()
    assert np.isfinite(gradient).all()
    assert gradient[1, 1] == 0
    assert_all_zero(gradient[2, 2:])


@pytest.mark.alternate
@by_rest
def test_nothing_named_and_nothing_at_all(rest: str) -> None:
    logits, ids, probs = labelled(5, 2, 3)
    none = on_logits(logits, np.full_like(ids, -1), probs, rest=rest)
    # Where there is a bucket, it is everything.
    assert_all_zero(none)
    assert_all_zero(on_logits(logits, ids[:, :0], probs[:, :0], rest=rest))
    assert on_logits(logits[:0], ids[:0], probs[:0], rest=rest).shape == (0,)
    empty = on_logits(logits[:, :0], np.full_like(ids, -1), probs, rest=rest)
    assert_all_zero(empty)


# Around the loss


@pytest.mark.alternate
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize(
    "name", sweep(LOSSES, lambda name: "recompute" not in name and "dense" not in name)
)
def test_statistics_are_those_of_the_likeliest_class(name: str) -> None:
    logits, ids, probs = labelled(23, 4, 13)
    ids, probs = ids[:, ::-1].copy(), probs[:, ::-1].copy()
    ids[2] = -1
    weights = np.resize(np.float32([1, 2, 0]), 13)
    options = {"z_loss": 0.01, "logit_softcap": 9.0, "weights": weights}
    loss, stats = LOSSES[name](
        logits, ids, probs, return_stats=NAMES, reduction="mean", **options
    )
    distinct = [
        {j: q[i == j].sum() for j in i if j >= 0}
        for i, q in zip(ids, probs, strict=True)
    ]
    labels = np.array([max(d, key=d.get) if d else 0 for d in distinct])
    want_loss = on_logits(logits, ids, probs, **options)
    np.testing.assert_allclose(loss, want_loss.sum() / weights.sum(), rtol=1e-5)
    _, want = jl.softmax_cross_entropy_with_integer_labels(
        logits, labels, return_stats=NAMES, **options
    )
    nll = on_logits(logits, ids, probs, logit_softcap=9.0, weights=weights > 0)
    want = want._replace(nll=nll, correct=want.correct & (ids.max(1) >= 0))
    for a, b in zip(stats, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.without_llvm_passes
def test_axes_are_where_they_are_said_to_be() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 4)).astype(np.float32)
    axes: Any
    for axes in (0, 1, (2, 0)):
        order = [i for i in range(3) if i not in np.atleast_1d(axes)]
        flat = logits.transpose(order + list(np.atleast_1d(axes)))
        batch = flat.shape[: len(order)]
        flat = flat.reshape(*batch, -1)
        ids = rng.integers(0, flat.shape[-1], size=(*batch, 2))
        probs = rng.random((*batch, 2)).astype(np.float32)
        want = on_logits(flat, ids, probs, rest="bucket")
        mask = np.ones(logits.shape, bool)
        if axes == 0:  # of classes alone
            mask = mask[:, :1, :1]
        found = on_logits(logits, ids, probs, axes, mask, rest="bucket")
        np.testing.assert_array_equal(found, want)


@pytest.mark.alternate(4)
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize(
    ("strategy", "reduction"),
    [
        case
        for case in turns(STRATEGIES, ["none", "sum", "mean"])
        if case.values != ("tokens", "none")  # refused
    ],
)
def test_a_fused_loss_is_that_of_the_logits(strategy: str, reduction: str) -> None:
    rng = np.random.default_rng(0)
    shapes = ((13, 5), (23, 5), (23,))
    arrays = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]
    ids = jnp.asarray(rng.integers(-1, 23, size=(13, 4)))
    arrays.append(jnp.asarray(rng.dirichlet(np.ones(4), 13) * 0.8, jnp.float32))
    options = {
        "weights": jnp.asarray(rng.integers(0, 3, size=13), jnp.float32),
        "rest": "bucket",
        "reduction": reduction,
    }

    def of_logits(hidden: Any, kernel: Any, bias: Any, probs: Any) -> Any:
        z = hidden @ kernel.T + bias[None]
        return jnp.sum(jnp.square(on_logits(z, ids, probs, **options)))

    def ours(hidden: Any, kernel: Any, bias: Any, probs: Any) -> Any:
        values = jl.linear_softmax_cross_entropy_with_top_k_labels(
            hidden,
            kernel,
            ids,
            probs,
            bias,
            kernel_layout="vd",
            strategy=strategy,
            workspace_bytes=700,
            **options,
        )
        return jnp.sum(jnp.square(values))

    every = (0, 1, 2, 3)
    want = jax.jit(jax.value_and_grad(of_logits, every))(*arrays)
    found = jax.jit(on_one_device(jax.value_and_grad(ours, every)))(*arrays)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.max(abs(b)))


@pytest.mark.without_llvm_passes
@pytest.mark.parametrize(
    ("rest", "as_divergence", "cap"),
    sweep(
        [(*kind, cap) for kind in KINDS for cap in (None, 3.0)],
        lambda rest, d, cap: rest == "bucket" and d and cap is None,
    ),
)
def test_all_modes_serve_to_second_order(
    rest: str, as_divergence: bool, cap: float | None
) -> None:
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        logits = jnp.asarray(rng.normal(size=(3, 5)))
        ids = jnp.asarray([[0, 1, -1], [2, 2, 4], [1, 3, 0]])
        probs = jnp.asarray(rng.dirichlet(np.ones(3), 3) * 0.7)

        def run(z: Any, q: Any, s: Any, forward_mode: bool) -> Any:
            return on_logits(
                z,
                ids,
                q,
                rest=rest,
                as_divergence=as_divergence,
                logit_scale=s,
                logit_softcap=cap,
                z_loss=0.01,
                forward_mode=forward_mode,
            )

        args = (logits, probs, jnp.asarray(1.3))
        reverse = functools.partial(run, forward_mode=False)
        both = functools.partial(run, forward_mode=True)
        check_grads(jax.jit(reverse), args, 2, ["rev"], eps=1e-5)
        check_grads(jax.jit(both), args, 1, ["fwd", "rev"], eps=1e-5)
        alone = jax.vmap(lambda z, i, q: on_logits(z, i, q, rest=rest))
        want = on_logits(logits, ids, probs, rest=rest)
        np.testing.assert_allclose(alone(logits, ids, probs), want, rtol=1e-12)


@pytest.mark.alternate(4)
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@by_rest
def test_on_meshes_the_values_are_those_of_one_device(
    axis_type: AxisType, rest: str
) -> None:
    """Examples and classes split, and no array of all logits gathered."""
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    logits, ids, probs = labelled(128, 3, 8)
    arrays = (logits, jnp.asarray(ids), jnp.asarray(probs))

    def run(z: Any, ids: Any, probs: Any) -> Any:
        return on_logits(z, ids, probs, rest=rest, reduction="mean")

    run = jax.value_and_grad(run, (0, 2))
    want = jax.jit(run)(*arrays)
    splits = (P("data", "model"), P("data", None), P("data", None))
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(a, NamedSharding(mesh, s))
            for a, s in zip(arrays, splits, strict=True)
        ]
        compiled = jax.jit(run).lower(*placed).compile()
        found = compiled(*placed)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    assert "f32[8,128]" not in compiled.as_text()
    assert "f32[4,128]" not in compiled.as_text()


@pytest.mark.alternate(4)
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_classes_split_by_hand(strategy: str) -> None:
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(8, 5)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(5, 24)), jnp.float32)
    ids = jnp.asarray(rng.integers(-1, 24, size=(8, 3)))
    probs = jnp.asarray(rng.dirichlet(np.ones(3), 8) * 0.8, jnp.float32)

    def run(axis_name: Any, batch: Any, *args: Any) -> Any:
        return jl.linear_softmax_cross_entropy_with_top_k_labels(
            *args,
            rest="bucket",
            strategy=strategy,
            workspace_bytes=200,
            reduction="mean",
            axis_name=axis_name,
            batch_axis_name=batch,
        )

    split = jax.shard_map(
        functools.partial(run, "model", "data"),
        mesh=mesh,
        in_specs=(P("data"), P(None, "model"), P("data"), P("data")),
        out_specs=P(),
    )
    args = (hidden, kernel, ids, probs)
    found = jax.jit(jax.value_and_grad(split, (0, 1, 3)))(*args)
    want = jax.value_and_grad(functools.partial(run, None, None), (0, 1, 3))(*args)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.without_llvm_passes
def test_it_is_exported_for_any_sizes_and_platforms() -> None:
    b, d, v = jax.export.symbolic_shape("b, d, v")
    of = jax.ShapeDtypeStruct
    shapes = (
        of((b, d), np.float32),
        of((d, v), np.float32),
        of((b, 3), np.int32),
        of((b, 3), np.float32),
    )

    def run(hidden: Any, kernel: Any, ids: Any, probs: Any) -> Any:
        loss = functools.partial(
            jl.linear_softmax_cross_entropy_with_top_k_labels, rest="bucket"
        )
        alone = on_logits(hidden @ kernel, ids, probs, rest="bucket").sum()
        return alone, [
            loss(hidden, kernel, ids, probs, reduction="sum", strategy=strategy)
            for strategy in ("auto", "vocab")
        ]

    program = jax.export.export(jax.jit(run), platforms=["cpu", "cuda", "tpu"])(*shapes)
    logits, ids, probs = labelled(13, 3, 5)
    eye = np.eye(13, dtype=np.float32)
    alone, others = jax.jit(program.call)(logits, eye, ids.astype(np.int32), probs)
    want, _, _ = top_k.exact(logits, ids, probs, "bucket")
    np.testing.assert_allclose([alone, *others], want.sum(), rtol=1e-5)
