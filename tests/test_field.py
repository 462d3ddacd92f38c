"""Faults that people met in the field, each as the kind of call that it was.

What is refused has its message in `test_checks.py`; meshes are in `test_sharding.py`
and `test_explicit_mesh.py`, symbolic sizes in `test_export.py`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from helpers import STRATEGIES, TAKE_IDS, fused, sweep, turns

import jaxlosses as jl

integer = jl.softmax_cross_entropy_with_integer_labels
dense = jl.softmax_cross_entropy
LEAST = np.finfo(np.float32).min
NAN, INF = np.nan, np.inf


def of_one_hot(logits: Any, labels: Any, **options: Any) -> Any:
    return dense(logits, np.eye(logits.shape[-1], dtype=np.float32)[labels], **options)


LOSSES = {"dense": of_one_hot} | TAKE_IDS
by_loss = pytest.mark.parametrize("name", LOSSES)
by_loss_of_ids = pytest.mark.parametrize("name", TAKE_IDS)


def both(
    name: str, logits: np.ndarray, labels: Any, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Value and gradient by the logits of a sum or a mean."""
    options = {"reduction": "sum"} | options
    run = jax.value_and_grad(lambda z: LOSSES[name](z, labels, **options))
    return jax.device_get(run(jnp.asarray(logits)))


# 64-bit labels, which JAX narrows to 32 bits


WIDE = [
    np.array([0, 2**32 + 2]),
    np.array([0, 2**31]),
    np.array([0, 1 - 2**32]),
    np.array([0, 2**32 + 2], np.uint64),
    np.array([0, 2**64 - 1], np.uint64),
    [0, 2**32 + 2],
    [0, np.int64(2**32 + 2)],
]


@pytest.mark.alternate
@by_loss_of_ids
def test_a_64_bit_numpy_label_is_no_class_before_jax_narrows_it(name: str) -> None:
    logits = np.float32([[0, 0, 5], [0, 0, 5]])
    for labels in WIDE:
        value, gradient = both(name, logits, labels)
        assert np.isnan(value)
        assert np.isnan(gradient[1]).all()
        assert np.isfinite(gradient[0]).all()


def test_a_wide_label_of_one_example_is_no_class() -> None:
    for label in (np.int64(2**32), np.array(2**32), 2**32):
        assert np.isnan(integer(jnp.zeros(3), label))


@pytest.mark.alternate(6)
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize(
    ("ignored", "name"),
    turns([-100, -1, -2, 0, 2, 2**32, 2**40 + 1, -(2**40)], TAKE_IDS),
)
def test_ignore_index_is_compared_with_64_bit_labels_as_they_are(
    name: str, ignored: int
) -> None:
    # Narrowed to 32 bits, all but the first and the fourth would be classes.
    labels = np.array([1, 2**32 + 1, 2**40, -100, 2**32, ignored])
    logits = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    gradients = both(name, logits, labels, ignore_index=ignored)[1]
    invalid = (labels < 0) | (labels > 2)
    np.testing.assert_array_equal(
        np.isnan(gradients).all(1), invalid & (labels != ignored)
    )
    assert not gradients[labels == ignored].any()


@pytest.mark.alternate(3)
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize(
    ("largest", "name"),
    turns(
        [("uint8", 255), ("uint16", 2**16 - 1), ("uint32", 2**32 - 1), ("int8", -128)],
        TAKE_IDS,
    ),
    ids=str,
)
def test_ignore_index_may_be_any_value_of_the_labels_dtype(
    name: str, largest: tuple[str, int]
) -> None:
    dtype, ignored = largest
    labels = jnp.asarray(np.array([0, 2, ignored], dtype))
    value, gradient = both(
        name, np.zeros((3, 3), np.float32), labels, ignore_index=ignored
    )
    np.testing.assert_allclose(value, 2 * np.log(3), rtol=1e-6)
    assert not gradient[2].any()


def test_ignore_index_above_32_bits_is_that_of_64_bit_labels() -> None:
    with jax.enable_x64(True):
        for dtype, ignored in (("uint64", 2**64 - 1), ("int64", 2**40)):
            labels = jnp.asarray(np.array([0, 1, ignored], dtype))
            loss = integer(jnp.zeros((3, 3)), labels, ignore_index=ignored)
            np.testing.assert_allclose(loss, [np.log(3), np.log(3), 0], rtol=1e-6)


def test_check_labels_takes_an_unsigned_ignore_index_traced_and_not() -> None:
    from jax.experimental import checkify

    labels = jnp.asarray(np.array([0, 2**32 - 1], np.uint32))
    jl.testing.check_labels(labels, 3, ignore_index=2**32 - 1)
    check = functools.partial(
        jl.testing.check_labels, num_classes=3, ignore_index=2**32 - 1
    )
    error, _ = checkify.checkify(jax.jit(check))(labels)
    error.throw()


# Examples of weight zero

# The least float32 is what masks of attention are filled with; its lse is finite and
# the square of that is not.
ROWS = {
    "least": [LEAST, LEAST, LEAST],
    "large": [1e38, -1e38, 0.0],
    "diverged": [NAN, INF, 0.0],
    "infinite": [INF, INF, -INF],
    "masked": [-INF, -INF, -INF],
}
WEIGHTS = np.float32([1.5, 0.0, 0.5])
OPTIONS: dict[str, dict[str, Any]] = {
    "z_loss": {"z_loss": 1e-4},
    "class weights": {"class_weights": np.float32([10.0, 2.0, 3.0]), "z_loss": 1e-4},
    "smoothing": {"label_smoothing": 0.1},
}


@pytest.mark.alternate(6)
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize(
    ("name", "forward_mode", "option"),
    sweep(
        [
            (name, forward_mode, option)
            for name in LOSSES
            for forward_mode in (False, True)
            for option in OPTIONS
            if (name, forward_mode) != ("fused, tokens", True)
        ],
        # The registrations take turns between the options.
        lambda name, forward_mode, option: (
            forward_mode == (option == "z_loss") or name == "fused, tokens"
        ),
    ),
)
def test_an_example_of_weight_zero_may_hold_anything(
    name: str, forward_mode: bool, option: str
) -> None:
    labels, options = np.array([0, 0, 2]), OPTIONS[option] | {"reduction": "mean"}

    @jax.jit
    def run(logits: jax.Array, scale: jax.Array, weights: jax.Array) -> Any:
        def loss(logits: jax.Array, scale: jax.Array, weights: jax.Array) -> jax.Array:
            return LOSSES[name](
                logits,
                labels,
                logit_scale=scale,
                weights=weights,
                forward_mode=forward_mode,
                **options,
            )

        return jax.value_and_grad(loss, (0, 1, 2))(logits, scale, weights)

    for row in ROWS.values():
        logits = np.float32([[1.0, 2.0, 0.5], row, [0.0, 1.0, -1.0]])
        finite = np.where(np.arange(3)[:, None] == 1, 0, logits)
        given = labels if name != "dense" else np.eye(3)[labels]
        exact = oracle.gradients(finite, given, weights=WEIGHTS, **options)
        value, gradients = jax.device_get(run(logits, np.float32(1), WEIGHTS))
        want = oracle.loss(finite, given, weights=WEIGHTS, **options)
        np.testing.assert_allclose(value, want, rtol=1e-6)
        np.testing.assert_allclose(gradients[0], exact["logits"], rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(gradients[1], exact["logit_scale"], rtol=1e-4)
        kept = [0, 2]
        np.testing.assert_allclose(
            gradients[2][kept], exact["weights"][kept], rtol=1e-4, atol=1e-6
        )
        assert np.isfinite(gradients[2][1])


@pytest.mark.alternate(3)
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize(("row", "name"), turns(ROWS, LOSSES))
def test_statistics_of_an_example_of_weight_zero_are_zeros(name: str, row: str) -> None:
    logits = np.float32([[1.0, 2.0, 0.5], ROWS[row], [0.0, 1.0, -1.0]])
    _, stats = LOSSES[name](
        jnp.asarray(logits),
        np.array([0, 1, 1]),
        weights=WEIGHTS,
        z_loss=1e-4,
        reduction="sum",
        return_stats=("entropy", "rank", "confidence", "label_logit"),
    )
    stats = jax.device_get(stats)
    for name, values in stats._asdict().items():
        assert not values[1], name
    assert np.all(stats.nll[[0, 2]] > 0)
    np.testing.assert_array_equal(stats.predicted, [1, 0, 1])
    np.testing.assert_array_equal(stats.correct, [False, False, True])


@pytest.mark.alternate(3)
@by_loss
def test_a_snippet_with_a_padded_row_of_the_least_float(name: str) -> None:
    logits = np.float32([[1.0, 2.0], [LEAST, LEAST]])
    options = {"weights": np.float32([1, 0]), "z_loss": 1e-4, "reduction": "mean"}
    value, gradient = both(name, logits, np.array([0, 0]), **options)
    lse = np.logaddexp(1.0, 2.0)
    np.testing.assert_allclose(value, lse - 1 + 1e-4 * lse**2, rtol=1e-6)
    assert np.isfinite(gradient).all()
    assert not gradient[1].any()


# A z-loss of zero


@pytest.mark.alternate(3)
@by_loss
def test_a_traced_z_loss_of_zero_is_none(name: str) -> None:
    logits = np.float32([[2e19, 0.0, 1.0], [1.0, 2.0, 0.5]])

    @jax.jit
    def run(logits: jax.Array, z_loss: jax.Array) -> Any:
        def total(logits: jax.Array, z_loss: jax.Array) -> jax.Array:
            return LOSSES[name](
                logits, np.array([0, 1]), z_loss=z_loss, reduction="sum"
            )

        return jax.value_and_grad(total, (0, 1))(logits, z_loss)

    value, (gradient, slope) = run(logits, jnp.float32(0.0))
    want, exact = both(name, logits, np.array([0, 1]), z_loss=0.0)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(gradient, exact, rtol=1e-6)
    assert np.isfinite(slope)
    # What does not overflow has the derivative that it has at any other z-loss.
    lse = np.log(np.exp(logits[1:].astype(np.float64)).sum())
    _, (_, slope) = run(np.float32(logits[[1, 1]]), jnp.float32(0.0))
    np.testing.assert_allclose(slope, 2 * lse**2, rtol=1e-6)


# The mean of a z-loss beside class weights


@pytest.mark.alternate(4)
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize(("factor", "name"), turns([1.0, 10.0, 0.0], TAKE_IDS))
def test_class_weights_do_not_rescale_the_z_loss_of_a_mean(
    name: str, factor: float
) -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(5, 3)).astype(np.float32), rng.integers(3, size=5)
    weights = rng.uniform(0.1, 2, 5).astype(np.float32)
    class_weights = factor * np.float32([0.5, 1.0, 2.0])
    lse = np.log(np.exp(logits.astype(np.float64)).sum(-1))
    penalty = 0.1 * np.average(lse**2, weights=weights)
    given = {"class_weights": class_weights, "weights": weights, "reduction": "mean"}
    plain, _ = both(name, logits, labels, **given)
    value, gradient = both(name, logits, labels, z_loss=0.1, **given)
    np.testing.assert_allclose(value, plain + penalty, rtol=1e-6)
    exact = oracle.gradients(logits, labels, z_loss=0.1, **given)["logits"]
    np.testing.assert_allclose(gradient, exact, rtol=1e-5, atol=1e-7)


@pytest.mark.alternate(4)
@by_loss_of_ids
def test_gradients_by_both_weights_of_a_mean_with_z_loss_are_exact(name: str) -> None:
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(5, 3)).astype(np.float32), rng.integers(3, size=5)
    arrays = {
        "weights": rng.uniform(0.1, 2, 5).astype(np.float32),
        "class_weights": rng.uniform(0.1, 2, 3).astype(np.float32),
    }
    options = {"z_loss": 0.1, "label_smoothing": 0.2, "reduction": "mean"}
    got = jax.grad(lambda a: LOSSES[name](logits, labels, **options, **a))(arrays)
    exact = oracle.gradients(logits, labels, **options, **arrays)
    for key, gradient in got.items():
        np.testing.assert_allclose(gradient, exact[key], rtol=1e-5, atol=1e-7)


# Arguments as they really come


@pytest.mark.parametrize(
    "axis", [np.int64(1), np.int8(-1), np.array(1), jnp.array(1), (np.int64(1),)]
)
def test_an_axis_is_any_integer(axis: Any) -> None:
    logits = jnp.arange(6.0).reshape(2, 3)
    for loss, labels in ((integer, np.array([0, 1])), (dense, jnp.eye(2, 3))):
        np.testing.assert_array_equal(loss(logits, labels, axis), loss(logits, labels))
    np.testing.assert_array_equal(jl.softmax(logits, axis), jl.softmax(logits))
    np.testing.assert_array_equal(jl.log_softmax(logits, axis), jl.log_softmax(logits))


@pytest.mark.alternate(4)
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize(("kind", "name"), turns([bool, np.int32, np.uint8], LOSSES))
def test_weights_may_be_flags_or_whole_numbers(name: str, kind: Any) -> None:
    logits = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    weights, labels = np.array([1, 0, 1]).astype(kind), np.array([3, 1, 0])
    for reduction in ("sum", "mean"):
        got = both(name, logits, labels, weights=weights, reduction=reduction)
        floats = weights.astype(np.float32)
        want = both(name, logits, labels, weights=floats, reduction=reduction)
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.alternate(4)
@pytest.mark.parametrize(
    ("name", "weighted"),
    sweep(
        [(name, weighted) for name in LOSSES for weighted in (False, True)],
        lambda name, weighted: not weighted or name in ("dense", "fused, tokens"),
    ),
)
def test_a_mask_of_examples_leaves_them_out(name: str, weighted: bool) -> None:
    logits = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    labels, kept = np.array([2, 1, 0, 1]), np.array([True, False, True, True])
    broken = np.where(kept[:, None], logits, NAN)
    options = {"weights": np.float32([1, 2, 3, 4])} if weighted else {}
    value, gradient = both(
        name, broken, labels, where=kept, reduction="mean", **options
    )
    fewer = {key: value[kept] for key, value in options.items()}
    want, exact = both(name, logits[kept], labels[kept], reduction="mean", **fewer)
    np.testing.assert_allclose(value, want, rtol=1e-6)
    np.testing.assert_allclose(gradient[kept], exact, rtol=1e-5)
    assert not gradient[~kept].any()


def test_a_mask_that_fits_classes_and_examples_means_classes() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 3)).astype(np.float32)
    labels, where = np.array([0, 0, 2]), np.array([True, False, True])
    want = integer(logits, labels, where=where[None])
    for strategy in ("dense", "recompute", "vocab"):
        got = fused(strategy)(logits, labels, where=where)
        np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.alternate(3)
@pytest.mark.parametrize(
    ("argument", "name"), turns(["logit_scale", "label_smoothing", "z_loss"], LOSSES)
)
def test_a_scalar_may_be_a_parameter_of_a_model(name: str, argument: str) -> None:
    logits = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    labels = np.array([3, 1, 0])

    def total(parameter: Any) -> jax.Array:
        return LOSSES[name](logits, labels, reduction="sum", **{argument: parameter})

    value, gradient = nnx.value_and_grad(total)(nnx.Param(jnp.float32(0.25)))
    want, exact = jax.value_and_grad(total)(jnp.float32(0.25))
    np.testing.assert_array_equal(value, want)
    np.testing.assert_array_equal(jax.tree.leaves(gradient)[0], exact)


def test_arrays_may_be_parameters_of_a_model() -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
    labels, ones = jnp.array([3, 1, 0]), jnp.ones(3)
    held = (nnx.Param(logits), nnx.Variable(labels))
    want = integer(logits, labels, weights=ones)
    np.testing.assert_array_equal(integer(*held, weights=nnx.Param(ones)), want)
    got = jl.linear_softmax_cross_entropy(
        held[0], nnx.Param(jnp.eye(4)), held[1], nnx.Param(jnp.zeros(4))
    )
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_array_equal(jl.softmax(held[0]), jl.softmax(logits))


# Forward mode


def test_forward_mode_without_its_option_is_refused_by_name() -> None:
    logits, labels = jnp.ones((2, 3)), jnp.array([0, 1])
    for loss in (of_one_hot, integer, fused("recompute"), fused("dense")):
        given = functools.partial(loss, labels=np.asarray(labels))
        for transform in (
            lambda f: jax.jvp(f, (logits,), (logits,)),
            lambda f: jax.jacfwd(f)(logits),
            lambda f: jax.jit(jax.jacfwd(f))(logits),
        ):
            with pytest.raises(TypeError, match="forward_mode: got False under"):
                transform(given)


# Seen right elsewhere, and to be kept right


@pytest.mark.alternate(12)
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize("dtype", ["int2", "uint2", "int4", "uint4", "uint8"])
@by_loss_of_ids
def test_narrow_labels_of_more_classes_than_they_can_count(
    name: str, dtype: str
) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(6, 300)).astype(np.float32)
    ids = np.array([0, 1, 1, 0, 1, 0])
    if dtype == "uint8":
        ids = ids + 254
    got = both(name, logits, jnp.asarray(ids).astype(dtype))
    want = both(name, logits, ids)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.alternate
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_16_bit_head_has_logits_beyond_its_largest_number(strategy: Any) -> None:
    rng = np.random.default_rng(0)
    hidden = (500 * rng.normal(size=(9, 16))).astype(np.float16)
    kernel = (90 * rng.normal(size=(16, 40))).astype(np.float16)
    logits = hidden.astype(np.float64) @ kernel.astype(np.float64)
    assert np.abs(logits).max() > 2 * 65504
    labels = logits.argmax(-1)
    labels[::2] = 3

    def loss(hidden: Any, kernel: Any) -> Any:
        given = {"reduction": "sum", "strategy": strategy, "logit_scale": 1e-4}
        return jl.linear_softmax_cross_entropy(
            hidden, kernel, labels, workspace_bytes=300, **given
        )

    value, gradient = jax.value_and_grad(loss, (0, 1))(hidden, kernel)
    given = {"logit_scale": float(np.float32(1e-4)), "reduction": "sum"}
    np.testing.assert_allclose(value, oracle.loss(logits, labels, **given), rtol=2e-5)
    d = oracle.gradients(logits, labels, **given)["logits"]
    for got, want in zip(
        gradient, (d @ kernel.T.astype(float), hidden.T.astype(float) @ d), strict=True
    ):
        assert got.dtype == np.float16
        np.testing.assert_allclose(
            np.asarray(got, np.float64), want, rtol=2e-3, atol=2e-3 * np.abs(want).max()
        )


@pytest.mark.alternate
@pytest.mark.parametrize("axis", [1, -1, 0])
def test_volumes_are_segmented_along_any_axis(axis: int) -> None:
    rng = np.random.default_rng(0)
    shape = (2, 7, 3, 5, 4)
    logits = rng.normal(size=shape).astype(np.float32)
    batch = [n for i, n in enumerate(shape) if i != axis % 5]
    labels = rng.integers(0, shape[axis], batch)
    labels[0, 1] = 255
    weights = np.linspace(0.5, 2, shape[axis], dtype=np.float32)
    options = {"ignore_index": 255, "class_weights": weights, "reduction": "mean"}
    got = jax.value_and_grad(lambda z: integer(z, labels, axis=axis, **options))(logits)
    want = oracle.loss(logits, labels, axis=axis, **options)
    np.testing.assert_allclose(got[0], want, rtol=2e-6)
    d = oracle.gradients(logits, labels, axis=axis, **options)["logits"]
    np.testing.assert_allclose(got[1], d, rtol=1e-5, atol=1e-8)


@pytest.mark.alternate(3)
@pytest.mark.without_llvm_passes
@by_loss
def test_a_temperature_is_learned(name: str) -> None:
    """As of contrastive models and of calibration: by its logarithm."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 9, 64)
    logits = rng.normal(size=(64, 9)) + 3 * np.eye(9)[labels] * (
        rng.random((64, 1)) < 0.8
    )
    logits = (4 * logits).astype(np.float32)

    def loss(log_scale: Any) -> Any:
        scale = jnp.exp(log_scale)
        return LOSSES[name](logits, labels, logit_scale=scale, reduction="mean")

    step = jax.jit(jax.value_and_grad(loss))
    log_scale = jnp.zeros(())
    for _ in range(60):
        log_scale -= 0.3 * step(log_scale)[1]
    scales = np.exp(np.linspace(-2.5, 0.5, 301))
    exact = [
        oracle.loss(logits, labels, logit_scale=s, reduction="mean") for s in scales
    ]
    best = scales[np.argmin(exact)]
    np.testing.assert_allclose(jnp.exp(log_scale), best, rtol=0.02)
    np.testing.assert_allclose(step(log_scale)[0], np.min(exact), rtol=1e-4)


@pytest.mark.alternate(3)
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("name", ["dense", "integer"])
def test_a_scan_of_masked_and_ignored_rows_under_vmap(name: str, axis: int) -> None:
    rng = np.random.default_rng(0)
    shape = (3, 2, 4, 5, 6)  # vmap, scan, and an array of three axes
    logits = rng.normal(size=shape).astype(np.float32)
    one = shape[2:]
    where = rng.random(one) < 0.8
    batch = [n for i, n in enumerate(one) if i != axis % 3]
    ids = rng.integers(0, one[axis], (*shape[:2], *batch))
    exists = np.take_along_axis(
        np.broadcast_to(where, shape), np.expand_dims(ids, axis % 3 + 2), axis % 3 + 2
    )
    ids = np.where(np.squeeze(exists, axis % 3 + 2), ids, -1)
    function, labels, more = integer, ids, {"ignore_index": -1}
    if name == "dense":
        function, more = dense, {}
        labels = np.stack([ids == i for i in range(one[axis])], axis % 3 + 2)
        labels = labels.astype(np.float32)

    def total(logits: Any, labels: Any) -> Any:
        def body(carry: Any, x: Any) -> Any:
            loss = function(*x, axis=axis, where=where, **more)
            return carry + jnp.sum(loss), loss

        return jax.lax.scan(body, jnp.zeros(()), (logits, labels))[0]

    value, gradient = jax.jit(jax.vmap(jax.value_and_grad(total)))(logits, labels)
    for i in range(shape[0]):
        exact, d = 0.0, []
        for j in range(shape[1]):
            row = logits[i, j], labels[i, j], axis, where
            exact += oracle.loss(*row, **more).sum()
            d.append(oracle.gradients(*row, **more)["logits"])
        np.testing.assert_allclose(value[i], exact, rtol=3e-6)
        np.testing.assert_allclose(gradient[i], d, rtol=1e-5, atol=1e-7)
