"""Blocking by rows on CPU: the same values as in one piece, and only where sound."""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import on_one_device
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from tolerances import assert_gradient, assert_loss

import jaxlosses as jl
from jaxlosses import softmax_cross_entropy_with_integer_labels as loss_fn
from jaxlosses._backends import blocks, choose, cpu, direct, folds
from jaxlosses._math import statistics
from jaxlosses._math.classes import Inputs, Spec
from jaxlosses._math.tails import Tail

CLASSES = 13


def make_inputs(batch: tuple[int, ...], where: str) -> Inputs:
    rng = np.random.default_rng(sum(batch))
    logits = (3 * rng.normal(size=(*batch, CLASSES))).astype(np.float32)
    labels = rng.integers(-1, CLASSES, size=(*batch, 1)).astype(np.int32)
    shape = {"none": None, "shared": (1,) * len(batch), "full": batch}[where]
    mask = None if shape is None else jnp.asarray(rng.random((*shape, CLASSES)) < 0.8)
    return Inputs(
        jnp.asarray(logits),
        jnp.asarray(labels),
        mask,
        jnp.asarray(rng.random((*batch, 1)) < 0.8),
        jnp.asarray(rng.random((1,) * len(batch) + (CLASSES,)), np.float32),
        jnp.float32(0.7),
    )


@pytest.mark.alternate(10)
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize(
    ("batch", "rows", "where"),
    [
        ((), 1, "none"),
        ((1,), 1, "full"),
        ((15,), 1, "none"),
        ((15,), 2, "full"),
        ((3, 5), 7, "shared"),
        ((3, 5), 5, "full"),
        ((15,), 100, "shared"),
        ((0,), 1, "none"),
    ],
    ids=str,
)
@pytest.mark.parametrize("smooth", [True, False])
def test_blocks_give_the_statistics_of_the_whole(
    monkeypatch: pytest.MonkeyPatch,
    batch: tuple[int, ...],
    rows: int,
    where: str,
    smooth: bool,
) -> None:
    inputs = make_inputs(batch, where)
    spec = Spec((len(batch),), False, 5.0, smooth, True, True, True)
    whole = jax.jit(lambda x: statistics.evaluate(spec, x))(inputs)
    assert (whole.smooth is None) == (not smooth)
    for longest in (CLASSES, 5, 7):
        monkeypatch.setattr(blocks, "LONGEST_ROW", longest)
        blocked = jax.jit(lambda x: cpu.evaluate(spec, x, rows=rows))(inputs)
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(blocked), strict=True):
            assert a.shape == b.shape == (*batch, 1)
            np.testing.assert_allclose(a, b, rtol=3e-7, atol=3e-7)


@pytest.mark.alternate
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_confident_rows_of_many_classes_are_exact(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    for margin in (0.0, 20.0, 80.0):
        logits, ids = oracle.confident_logits(rng, 45, 50257, margin)
        inputs = Inputs(jnp.asarray(logits, dtype), jnp.asarray(ids)[:, None])
        got = jax.jit(lambda x: cpu.evaluate(Spec((1,), False), x))(inputs)
        want = oracle.loss(np.asarray(inputs.logits, np.float32), ids)
        np.testing.assert_allclose(got.nll[:, 0], want, rtol=4e-6)


@pytest.mark.alternate(6)
@pytest.mark.parametrize(
    ("num_classes", "dtype"),
    [
        (256, jnp.bfloat16),
        (1000, jnp.bfloat16),
        (1000, jnp.float32),
        (1024, jnp.float32),
        (7, jnp.float32),
        (26, jnp.float32),
        (26, jnp.bfloat16),
    ],
)
@pytest.mark.parametrize("where", ["none", "shared", "own"])
def test_special_rows_of_blocks_and_of_few_classes_are_as_in_the_whole(
    monkeypatch: pytest.MonkeyPatch, num_classes: int, dtype: Any, where: str
) -> None:
    rng = np.random.default_rng(0)
    logits = 3 * rng.normal(size=(40, num_classes)).astype(np.float32)
    labels = rng.integers(num_classes, size=(40, 1)).astype(np.int32)
    labels[:3] = [[-1], [0], [num_classes - 1]]
    at_label = logits[np.arange(40), labels[:, 0]]
    at_label[3:12] += 70  # ahead
    at_label[12:14] = -np.inf
    at_label[14:16] = np.inf
    at_label[16:18] = np.nan
    logits[np.arange(40), labels[:, 0]] = at_label
    beside = (
        labels[:, 0] + rng.integers(1, min(20, num_classes), size=40)
    ) % num_classes
    at_beside = logits[np.arange(40), beside]
    at_beside[9:12] = at_label[9:12]  # a tie
    at_beside[18:20] = np.inf
    at_beside[20:22] = np.nan
    at_beside[22:30] += 70  # behind
    logits[np.arange(40), beside] = at_beside
    logits[30:33] = 0
    logits[33:36] = -np.inf
    logits[34, labels[34]] = 1
    logits[36:38, : num_classes // 2] = -np.inf
    logits[38] = np.nan
    counted = np.arange(40)[:, None] != 38
    spec = Spec((1,), False)
    shape = {"none": None, "shared": (1, num_classes), "own": (40, num_classes)}[where]
    mask = None if shape is None else jnp.asarray(rng.random(shape) < 0.8)
    inputs = Inputs(jnp.asarray(logits, dtype), jnp.asarray(labels), mask, counted)
    whole = jax.jit(lambda x: statistics.evaluate(spec, x))(inputs)
    monkeypatch.setattr(blocks, "LONGEST_ROW", 300)
    found = jax.jit(lambda x: cpu.evaluate(spec, x, rows=7))(inputs)
    # Of a NaN, the maximum of XLA:CPU need not know.
    rows = np.r_[:16, 18:20, 22:40]
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=3e-7)
    close(whole.nll[rows], found.nll[rows])
    # A peak may be a number near the largest logit.
    close((whole.peak + whole.spread)[rows], (found.peak + found.spread)[rows])
    bad = np.r_[0, 14:22]
    if mask is not None:
        here = np.broadcast_to(mask, logits.shape)
        # Infinities and NaN are of the label or of the class beside it.
        bad = bad[~np.isin(bad, np.r_[18:22]) | here[bad, beside[bad]]]
        out = ~here[np.arange(40), labels[:, 0]] & counted[:, 0]
        np.testing.assert_array_equal(found.nll[out], np.nan)
    np.testing.assert_array_equal(found.nll[bad], np.nan)


PLAIN = Spec((1,), False)


@functools.cache
def read_directly() -> Callable[[Inputs], tuple[jax.Array, jax.Array]]:
    """Losses of inputs, and whether they are safe."""

    def run(inputs: Inputs) -> tuple[jax.Array, jax.Array]:
        part = statistics.partial(PLAIN, inputs, None, cpu.DIRECT)
        nll = statistics.finish(PLAIN, part, inputs).nll
        return nll[:, 0], direct.are_safe(part, inputs)

    return jax.jit(run)


@pytest.mark.parametrize(
    ("level", "ahead"),
    [
        *((0.0, ahead) for ahead in (-50.0, 0.0, 12.0, 20.0, 54.0)),
        *((-30.0, ahead) for ahead in (-25.0, 0.0, 79.0)),
        *((25.0, ahead) for ahead in (-84.0, -40.0, 20.0)),
        # Beyond 60 nats exponentials are relative to that of the label.
        *((level, ahead) for level in (-200.0, 200.0) for ahead in (-12.0, 0.0, 7.0)),
    ],
)
# Added up by eight, by five, by eight with some left over, and by four.
@pytest.mark.parametrize("num_classes", [1024, 1000, 1021, 32])
def test_exponentials_as_they_are_cost_no_digits(
    num_classes: int, level: float, ahead: float
) -> None:
    """With the label in every place."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(66, num_classes)).astype(np.float32) + np.float32(level)
    rows = np.arange(66)
    ids = np.append(np.arange(64) * num_classes // 64, [0, num_classes - 1])
    logits[rows, ids] = -np.inf
    logits[rows, ids] = logits.max(axis=-1) + np.float32(ahead)
    inputs = Inputs(jnp.asarray(logits), jnp.asarray(ids, jnp.int32)[:, None])
    losses, safe = read_directly()(inputs)
    assert safe
    np.testing.assert_allclose(losses, oracle.loss(logits, ids), rtol=1e-6)


@pytest.mark.alternate(3)
@pytest.mark.parametrize("scale", [0.7, -1.3, 1e-3, 300.0, "of each"])
@pytest.mark.parametrize(
    ("level", "ahead"),
    [
        *((0.0, ahead) for ahead in (-50.0, 0.0, 20.0, 54.0)),
        *((level, ahead) for level in (-20.0, 15.0) for ahead in (-25.0, 40.0)),
        *((level, ahead) for level in (-200.0, 200.0) for ahead in (-12.0, 7.0)),
    ],
)
def test_scaled_logits_by_exponentials_as_they_are_cost_no_digits(
    scale: float | str, level: float, ahead: float
) -> None:
    """All but the rounding of a product, which for a sum of 24 nats is a millionth."""
    rng = np.random.default_rng(0)
    rows, ids = np.arange(66), rng.integers(1000, size=66)
    if scale == "of each":
        factor = rng.normal(size=66).astype(np.float32)
    else:
        factor = np.full(66, scale, np.float32)
    scaled = rng.normal(size=(66, 1000)) + level
    scaled[rows, ids] = -np.inf
    scaled[rows, ids] = scaled.max(axis=-1) + ahead
    logits = (scaled / factor[:, None]).astype(np.float32)
    given = factor[:, None] if scale == "of each" else factor[0]
    inputs = Inputs(
        jnp.asarray(logits),
        jnp.asarray(ids, jnp.int32)[:, None],
        scale=jnp.asarray(given),
    )
    losses, safe = read_directly()(inputs)
    assert safe
    exact = oracle.loss(logits, ids, logit_scale=factor[:, None])
    np.testing.assert_allclose(losses, exact, rtol=2e-6)


@pytest.mark.parametrize("beyond", [0.0, 25.0, 60.0])
def test_smoothing_by_exponentials_as_they_are_costs_no_digits(
    monkeypatch: pytest.MonkeyPatch, beyond: float
) -> None:
    """Also with classes of no probability, where the loss is infinite."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(19, 1024)).astype(np.float32)
    ids = rng.integers(1024, size=19)
    # For some rows not the label.
    logits[:, 500] = 3 + np.float32(beyond)
    ids[::3] = 500
    logits[7, 300] = -np.inf
    monkeypatch.setattr(blocks, "BLOCK_SIZE", 2048)
    options = {"label_smoothing": 0.1, "z_loss": 1e-3}
    run = on_one_device(
        lambda z: jax.value_and_grad(
            lambda z: loss_fn(z, ids, reduction="sum", **options)
        )(z)
    )
    kept = logits[np.arange(19) != 7]
    value, gradient = jax.jit(run)(logits)
    assert value == np.inf
    ids = np.delete(ids, 7)
    value, gradient = jax.jit(run)(kept)
    assert_loss(value, oracle.loss(kept, ids, reduction="sum", **options), "float32")
    exact = oracle.gradients(kept, ids, reduction="sum", **options)
    assert_gradient(gradient, exact["logits"], "float32", exact["logits_terms"])


def rows_that_are_not_fit() -> np.ndarray:
    """The first six of nine, one of whose classes may be far from all others."""
    logits = np.random.default_rng(0).normal(size=(9, 1024)).astype(np.float32)
    logits[0, 500] = 75
    logits[1, 500] = 3e38
    logits[2, 500] = np.nan
    logits[3, 5] = np.inf
    logits[4] -= 100
    logits[4, 700] = 0
    logits[5] = -np.inf
    return logits


def test_what_exponentials_as_they_are_cannot_serve_is_told() -> None:
    logits = rows_that_are_not_fit()
    ids = np.full((9, 1), 700, np.int32)
    logits[6, 700] = 90
    # What they can: classes that are not there.
    logits[7, 200:] = -np.inf
    ids[8] = -1
    for scale in (None, jnp.float32(0.5), jnp.float32(-1)):
        z = logits if scale is None else logits / scale
        rows = zip(jnp.asarray(z)[:, None], jnp.asarray(ids)[:, None], strict=True)
        safe = [read_directly()(Inputs(*row, scale=scale))[1] for row in rows]
        np.testing.assert_array_equal(safe, [False] * 7 + [True] * 2)
    level = Inputs(jnp.full((1, 1024), 30.0), jnp.zeros((1, 1), jnp.int32))
    for scale, fits in ((None, True), (jnp.float32(1), False), (jnp.float32(0), True)):
        loss, safe = read_directly()(level._replace(scale=scale))
        np.testing.assert_allclose(loss, np.log(1024), rtol=1e-6)
        assert safe == fits


@pytest.mark.alternate(3)
@pytest.mark.parametrize("num_classes", [1000, 1024])
@pytest.mark.parametrize("outlier", [80.0, 3e38, -3e38, np.inf, np.nan])
def test_one_row_that_is_not_safe_spoils_none(num_classes: int, outlier: float) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(21, num_classes)).astype(np.float32)
    logits[3, 500] = outlier
    ids = rng.integers(400, size=21)
    want = oracle.loss(logits, ids)
    for counted in (np.ones((21, 1), bool), np.arange(21)[:, None] != 3):
        inputs = Inputs(
            jnp.asarray(logits), jnp.asarray(ids, jnp.int32)[:, None], counted=counted
        )
        got = jax.jit(lambda x: cpu.evaluate(PLAIN, x, rows=8))(inputs)
        np.testing.assert_allclose(
            got.nll[:, 0], np.where(counted[:, 0], want, 0), rtol=1e-6
        )


@functools.cache
def tail_directly() -> Callable[..., Tail]:
    spec = Spec((1,), True, entropy=True)

    def run(signed: jax.Array, magnitude: jax.Array | None) -> Tail:
        return direct.tail(spec, Inputs(signed, None), signed, magnitude)

    return jax.jit(run)


@pytest.mark.alternate(3)
@pytest.mark.parametrize(
    ("scale", "level", "ahead"),
    [
        *((None, 0.0, ahead) for ahead in (0.0, 12.0, 20.0, 54.0)),
        *((None, -40.0, ahead) for ahead in (0.0, 79.0)),
        *((None, 30.0, ahead) for ahead in (12.0, 20.0)),
        # Beyond 60 nats exponentials are relative to the largest logit.
        *((None, level, ahead) for level in (-200.0, 200.0, 1e4) for ahead in (0, 15)),
        *((0.7, level, ahead) for level in (-15.0, 0.0, 40.0) for ahead in (0, 15)),
        *((300.0, level, ahead) for level in (0.0, -500.0) for ahead in (0, 15)),
    ],
)
@pytest.mark.parametrize("num_classes", [1024, 1000, 1021])
def test_tails_by_exponentials_as_they_are_cost_no_digits(
    num_classes: int, scale: float | None, level: float, ahead: float
) -> None:
    """With the peak in every place."""
    rng = np.random.default_rng(0)
    scaled = rng.normal(size=(66, num_classes)) + level
    rows = np.arange(66)
    ids = np.append(np.arange(64) * num_classes // 64, [0, num_classes - 1])
    scaled[rows, ids] = -np.inf
    scaled[rows, ids] = scaled.max(axis=-1) + ahead
    scaled[:, 7] = scaled[:, 700]  # maybe a tie
    scaled[:, 11] = -np.inf
    factor = np.float32(1 if scale is None else scale)
    logits = (scaled / factor).astype(np.float32)
    magnitude = None if scale is None else jnp.float32(scale)
    tail = tail_directly()(jnp.asarray(logits), magnitude)
    exact = factor * logits.astype(np.float64)
    np.testing.assert_array_equal(tail.peak[:, 0], logits.max(axis=-1))
    gap = np.delete(np.sort(exact.max(axis=-1, keepdims=True) - exact), 0, axis=-1)
    rtol = 1e-6 if scale is None else 2e-6
    excess = np.exp(-gap)
    depth = excess * np.where(excess == 0, 0, gap)
    np.testing.assert_allclose(tail.excess[:, 0], excess.sum(-1), rtol=rtol)
    np.testing.assert_allclose(tail.depth[:, 0], depth.sum(-1), rtol=rtol)


def test_tails_that_exponentials_as_they_are_cannot_serve_are_told() -> None:
    """A block of them is read again, and its other rows keep what they are."""
    logits = rows_that_are_not_fit()
    # What they can: classes that are not there, and all alike.
    logits[6, 200:] = -np.inf
    logits[7] = 0
    bad = np.arange(9) < 6
    spec = Spec((1,), True, entropy=True)
    for scale in (None, jnp.float32(0.5)):
        z = jnp.asarray(logits if scale is None else logits / scale)
        tail = tail_directly()(z, scale)
        np.testing.assert_array_equal(np.isnan(tail.excess[:, 0]), bad)
        inputs = Inputs(z, jax.nn.softmax(z), scale=scale)
        whole = jax.jit(lambda x: statistics.evaluate(spec, x))(inputs)
        found = jax.jit(lambda x: cpu.evaluate(spec, x, rows=4))(inputs)
        for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(found), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.alternate(6)
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(40, 100), (90, 1000), (90, 1024), (5, 12)])
def test_masked_classes_are_left_out_of_blocks(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], dtype: str, own: bool
) -> None:
    """By exponentials that both passes share, by those that are as they are, or not."""
    monkeypatch.setattr(blocks, "BLOCK_SIZE", 2**14)
    rng = np.random.default_rng(sum(shape))
    where = rng.random(shape if own else (1, shape[1])) < 0.8
    logits = rng.normal(size=shape)
    ids = rng.integers(shape[1], size=shape[0])
    every = np.arange(shape[0])
    logits[every, ids] += np.where(every % 3 == 0, 32, 0)
    logits[-1] += 512  # read again, but in the smallest
    logits = np.asarray(jnp.asarray(logits, dtype), np.float32)
    here = np.broadcast_to(where, shape)
    some = np.where(here, logits, np.resize([np.nan, np.inf, -np.inf], shape))
    z = jnp.asarray(some, dtype)

    def total(z: jax.Array, ids: np.ndarray) -> tuple[jax.Array, jax.Array]:
        loss = loss_fn(z, ids, where=where)
        return jnp.sum(jnp.where(jnp.isnan(loss), 0, loss)), loss

    run = jax.grad(total, has_aux=True)
    gradient, loss = on_one_device(run)(z, ids)
    named = here[every, ids]
    np.testing.assert_array_equal(np.isnan(loss), ~named)
    want = oracle.loss(logits[named], ids[named], where=here[named])
    assert_loss(loss[named], want, dtype)
    exact = oracle.gradients(logits[named], ids[named], where=here[named])
    assert_gradient(gradient[named], exact["logits"], dtype)
    np.testing.assert_array_equal(gradient[named][~here[named]], 0)

    def of_many(z: jax.Array, ids: jax.Array) -> jax.Array:
        return jax.vmap(run)(z, ids)[0]

    more = on_one_device(of_many)(jnp.stack([z, z[::-1]]), np.stack([ids, ids[::-1]]))
    if not own:
        assert_gradient(more[1][::-1][named], exact["logits"], dtype)
    assert_gradient(more[0][named], exact["logits"], dtype)


@pytest.mark.parametrize("of_each", [True, False])
def test_scaled_logits_of_blocks_have_exact_gradients(
    monkeypatch: pytest.MonkeyPatch, of_each: bool
) -> None:
    """Also by the scale; of blocks that are safe and of one that is not."""
    monkeypatch.setattr(blocks, "BLOCK_SIZE", 2**14)
    rng = np.random.default_rng(3)
    logits = 2 * rng.normal(size=(90, 1000)).astype(np.float32)
    ids = rng.integers(1000, size=90)
    logits[:20, 7] += 400
    scale = rng.normal(size=90 if of_each else ()).astype(np.float32)
    where = rng.random((1, 1000)) < 0.9
    where[0, ids] = True

    def total(z: jax.Array, scale: jax.Array) -> jax.Array:
        return jnp.sum(loss_fn(z, ids, where=where, logit_scale=scale))

    run = on_one_device(jax.grad(total, (0, 1)))
    by_logits, by_scale = run(jnp.asarray(logits), jnp.asarray(scale))
    factors = np.broadcast_to(scale, 90)
    exact = oracle.gradients(logits, ids, where=where, logit_scale=factors[:, None])
    assert_gradient(by_logits, exact["logits"], "float32")
    rows = zip(logits[:, None], ids[:, None], factors, strict=True)
    each = [oracle.gradients(z, y, where=where, logit_scale=x) for z, y, x in rows]
    want = np.array([row["logit_scale"] for row in each])
    want = want if of_each else want.sum()
    np.testing.assert_allclose(by_scale, want, rtol=1e-5, atol=1e-5)


def test_control_tokens_far_below_the_rest_are_safe() -> None:
    """Logits as trained models have them, with those ids first."""
    rng = np.random.default_rng(0)
    for num_classes, level in ((1000, 0), (32000, 0), (1000, -90)):
        logits = rng.normal(size=(16, num_classes)).astype(np.float32)
        logits += np.float32(level)
        ids = rng.integers(300, num_classes, size=16)
        logits[np.arange(16), ids] += 20 if level == 0 else 7
        logits[:, :256] -= 40
        inputs = Inputs(jnp.asarray(logits), jnp.asarray(ids, jnp.int32)[:, None])
        losses, safe = read_directly()(inputs)
        assert safe
        np.testing.assert_allclose(losses, oracle.loss(logits, ids), rtol=2e-6)


def test_parts_of_a_long_row_may_leave_some_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blocks, "LONGEST_ROW", 7)
    monkeypatch.setattr(blocks, "_MOST_PARTS", 8)
    rng = np.random.default_rng(0)
    for num_classes, sizes in ((23, (5, 3)), (24, (6,))):
        logits = rng.normal(size=(4, num_classes)).astype(np.float32)
        ids = rng.integers(num_classes, size=4)
        rows = blocks.short_rows(jnp.asarray(logits))
        assert tuple(a.shape[1] for a, _ in rows) == sizes
        inputs = Inputs(jnp.asarray(logits), jnp.asarray(ids, jnp.int32)[:, None])
        part = statistics.partial(PLAIN, inputs, None, cpu.BLOCK)
        found = statistics.finish(PLAIN, part, inputs).nll[:, 0]
        np.testing.assert_allclose(found, oracle.loss(logits, ids), rtol=1e-6)


def test_sums_by_halves_are_of_all_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "LONGEST_ROW", 7)
    for num_classes in (1, 2, 5, 13, 32):
        a = np.arange(3.0 * num_classes, dtype=np.float32).reshape(3, num_classes) - 4
        found = jax.jit(folds.in_halves)((jnp.asarray(a), jnp.asarray(-2 * a)))
        for got, want in zip(found, (a, -2 * a), strict=True):
            np.testing.assert_array_equal(got, want.sum(axis=-1, keepdims=True))


def test_only_the_block_of_a_row_that_is_not_safe_is_read_again() -> None:
    inputs = Inputs(jnp.zeros((64, 1024)), jnp.zeros((64, 1), jnp.int32))
    jaxpr = str(jax.make_jaxpr(lambda x: cpu.evaluate(PLAIN, x, rows=8))(inputs))
    # One loop, whose body is of one block: in it is decided whether that is safe.
    assert jaxpr.count("scan[") == 1
    (flags,) = re.findall(r"\] (\w+) (\w+) True:bool\[\] True:bool\[\]", jaxpr)
    for flag in flags:
        assert f" {flag}:bool[16,1] = lt " in jaxpr


def test_calls_of_a_few_numbers_stay_in_the_thread_that_waits() -> None:
    """XLA:CPU hands others to a thread that has to wake up."""

    def operations(run: Callable[..., Any], *shape: int) -> float:
        ids = jnp.zeros(shape[0], jnp.int32)
        run = jax.jit(on_one_device(run))
        compiled = run.lower(jnp.zeros(shape), ids).compile()
        return compiled.cost_analysis()["flops"]

    def mean(z: jax.Array, y: jax.Array) -> jax.Array:
        return loss_fn(z, y, reduction="mean")

    both = functools.partial(jl.softmax_log_probs, return_entropy=True)
    assert operations(loss_fn, 8, 10) < 1000
    assert operations(jax.value_and_grad(mean), 1, 18) < 1000
    assert operations(both, 1, 18) < 1000


@pytest.mark.alternate(3)
@pytest.mark.parametrize("num_classes", [640, 1000, 100])
def test_a_batch_without_examples_has_empty_gradients(num_classes: int) -> None:
    """Rows in folds were cut by a division by their number."""
    empty, ids = np.zeros((0, num_classes), np.float32), np.zeros(0, np.int32)

    def total(z: jax.Array) -> jax.Array:
        weights = jnp.ones(num_classes)
        smooth = {"label_smoothing": 0.1, "class_weights": weights}
        terms = (
            jl.softmax_entropy(z),
            jl.softmax_cross_entropy(z, empty),
            jl.softmax_cross_entropy_with_integer_labels(z, ids, label_smoothing=0.1),
            jl.softmax_cross_entropy_with_integer_labels(z, ids, **smooth),
            jl.softmax_kl_divergence(z, empty),
        )
        return sum(map(jnp.sum, terms), jnp.float32(0))

    value, gradient = on_one_device(jax.value_and_grad(total))(empty)
    assert value == 0
    assert gradient.shape == empty.shape


def test_rows_without_any_label_are_nan() -> None:
    inputs = Inputs(jnp.zeros((21, 1024)), jnp.full((21, 1), -1, jnp.int32))
    got = jax.jit(lambda x: cpu.evaluate(PLAIN, x, rows=8))(inputs)
    np.testing.assert_array_equal(got.nll, np.nan)
    np.testing.assert_allclose(got.peak + got.spread, np.log(1024), rtol=1e-6)


def example_inputs(rng: np.random.Generator, batch: tuple[int, ...]) -> dict[str, Any]:
    """All that an example can have, by name; two kinds of masks of classes."""
    shape, ones = (*batch, 640), (1,) * len(batch)
    return {
        "logits": rng.normal(size=shape).astype(np.float32),
        "labels": rng.integers(-1, 640, size=(*batch, 1)).astype(np.int32),
        "shared where": rng.random((*ones, 640)) < 0.8,
        "own where": rng.random(shape) < 0.8,
        "counted": rng.random((*batch, 1)) < 0.8,
        "class_weights": rng.random((*ones, 640)).astype(np.float32),
        "scale": np.float32(rng.random()),
    }


@pytest.mark.alternate(4)
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize(
    ("batch", "mapped", "equal", "blocked"),
    [
        ((), "logits,labels", "", True),
        ((6,), "logits,labels,counted", "", True),
        ((6,), "logits", "labels,counted", True),
        ((6,), "labels", "logits", True),
        ((6,), "logits,labels", "shared where,class_weights,scale", True),
        ((6,), "logits,labels,own where", "class_weights", True),
        ((6,), "logits,labels", "own where", True),
        ((6,), "logits,labels,shared where", "", False),
        ((6,), "logits,labels,scale", "", False),
        ((6,), "logits,labels,class_weights", "", False),
    ],
)
def test_vmap_makes_a_block_of_more_rows(
    monkeypatch: pytest.MonkeyPatch,
    batch: tuple[int, ...],
    mapped: str,
    equal: str,
    blocked: bool,
) -> None:
    monkeypatch.setattr(choose, "is_local", lambda: True)
    monkeypatch.setattr(blocks, "BLOCK_SIZE", 640)
    rng = np.random.default_rng(0)
    examples = [example_inputs(rng, batch) for _ in range(7)]

    def inputs_of(value: Callable[[str, int | None], Any]) -> Inputs:
        given = {name: value(name, 0) for name in mapped.split(",")}
        given |= {name: value(name, None) for name in equal.split(",") if name}
        return Inputs(**{name.split()[-1]: a for name, a in given.items()})

    in_axes = inputs_of(lambda _, axis: axis)
    inputs = inputs_of(
        lambda name, axis: jnp.asarray(
            examples[0][name] if axis is None else np.stack([e[name] for e in examples])
        )
    )
    spec = Spec((len(batch),), False, smooth="class_weights" in mapped + equal)
    run = jax.vmap(functools.partial(choose.evaluate, spec), (in_axes,))
    whole = jax.vmap(functools.partial(statistics.evaluate, spec), (in_axes,))
    assert (loops(run, inputs) > 0) == blocked
    got, want = jax.jit(run)(inputs), jax.jit(whole)(inputs)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=3e-7)
    close(got.nll, want.nll)
    # A peak may be a number near the largest logit.
    close(got.peak + got.spread, want.peak + want.spread)
    if spec.smooth:
        close(got.smooth, want.smooth)


@pytest.mark.without_llvm_passes
def test_vmap_of_vmap_is_blocked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "is_local", lambda: True)
    monkeypatch.setattr(blocks, "BLOCK_SIZE", 2 * 640)
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 5, 640)).astype(np.float32)
    ids = rng.integers(640, size=(5, 3)).astype(np.int32)

    def evaluate(z: jax.Array, y: jax.Array) -> jax.Array:
        return choose.evaluate(Spec((0,), False), Inputs(z, y[None])).nll[0]

    run = jax.jit(jax.vmap(jax.vmap(evaluate), (0, 1)))
    assert loops(run, logits, ids) > 0
    want = oracle.loss(logits.reshape(15, 640), ids.T.reshape(15))
    got = run(logits, ids)
    np.testing.assert_allclose(got.reshape(15), want, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_blocks_copy_no_logits(dtype: Any) -> None:
    """XLA:CPU may convert an array to float32, or to integers, before a loop."""
    logits = jax.ShapeDtypeStruct((300, 2**15), dtype)
    labels = jax.ShapeDtypeStruct((300, 1), jnp.int32)
    run = jax.jit(lambda z, y: cpu.evaluate(Spec((1,), False), Inputs(z, y)))
    memory = run.lower(logits, labels).compile().memory_analysis()
    block = cpu.LARGER * blocks.BLOCK_SIZE
    assert memory.temp_size_in_bytes < 1.2 * 4 * block < 0.3 * 4 * logits.size


def loops(function: object, *args: jax.Array) -> int:
    return str(jax.make_jaxpr(function)(*args)).count("scan[")


def test_rows_are_not_blocked_where_they_may_be_sharded() -> None:
    """Under automatic sharding the trace cannot see whether they are."""
    logits, labels = jnp.zeros((8, 2**20), jnp.bfloat16), jnp.zeros(8, jnp.int32)
    assert jax.device_count("cpu") == 8
    assert loops(loss_fn, logits, labels) == 0


@pytest.mark.alternate
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("labels_differ", [True, False])
def test_rows_are_blocked_inside_shard_map(
    monkeypatch: pytest.MonkeyPatch, labels_differ: bool, dtype: Any
) -> None:
    monkeypatch.setattr(blocks, "BLOCK_SIZE", 2**19)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    of_labels = P("data") if labels_differ else P()
    sharded = jax.shard_map(
        loss_fn, mesh=mesh, in_specs=(P("data"), of_labels), out_specs=P("data")
    )
    logits = jnp.zeros((40, 2**19), dtype)
    labels = jnp.zeros(40 if labels_differ else 5, jnp.int32)
    assert loops(sharded, logits, labels) == 1
    np.testing.assert_allclose(sharded(logits, labels), np.log(2.0**19), rtol=1e-6)


def test_split_classes_are_not_blocked() -> None:
    """A block would wait for its own collectives."""
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(
        lambda z, y: loss_fn(z, y, axis_name="model"),
        mesh=mesh,
        in_specs=(P(None, "model"), P()),
        out_specs=P(),
    )
    logits, labels = jnp.zeros((4, 2**22)), jnp.zeros(4, jnp.int32)
    assert loops(sharded, logits, labels) == 0
