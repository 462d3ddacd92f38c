"""The losses in training loops as people write them: Flax, Optax, the demo."""

import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import one_device
import optax
import pytest
from flax import linen, nnx
from flax.training.train_state import TrainState
from helpers import sweep

import jaxlosses as jl

FEATURES, CLASSES, EXAMPLES = 8, 5, 40
cross_entropy = jl.softmax_cross_entropy_with_integer_labels
# The same sums in another order.
REORDERED = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(autouse=True)
def as_users_run_it() -> Iterator[None]:
    """The promotion rules that JAX has by default; Optax relies on them."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def separable() -> tuple[jax.Array, jax.Array]:
    """Features whose class can be learned in a few steps."""
    rng = np.random.default_rng(0)
    centres = 3 * rng.standard_normal((CLASSES, FEATURES))
    labels = rng.integers(CLASSES, size=EXAMPLES)
    features = centres[labels] + 0.3 * rng.standard_normal((EXAMPLES, FEATURES))
    return jnp.asarray(features, jnp.float32), jnp.asarray(labels, jnp.int32)


def test_flax_nnx_learns() -> None:
    features, labels = separable()
    model = nnx.Linear(FEATURES, CLASSES, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)

    @nnx.jit
    def train_step(model: nnx.Linear, optimizer: nnx.Optimizer[Any]) -> Any:
        def loss_fn(model: nnx.Linear) -> tuple[jax.Array, jl.Stats]:
            return cross_entropy(
                model(features), labels, reduction="mean", return_stats=True
            )

        gradient = nnx.value_and_grad(loss_fn, has_aux=True)
        (loss, stats), gradients = gradient(model)
        optimizer.update(model, gradients)
        return loss, jnp.mean(stats.correct, dtype=jnp.float32)

    history = [train_step(model, optimizer) for _ in range(20)]
    losses = [float(loss) for loss, _ in history]
    assert losses[-1] < 0.1 < losses[0]
    assert history[-1][1] == 1


def test_flax_linen_learns_in_bfloat16() -> None:
    features, labels = separable()
    model = linen.Dense(CLASSES, dtype=jnp.bfloat16)
    state = TrainState.create(
        apply_fn=model.apply,
        params=model.init(jax.random.key(0), features),
        tx=optax.sgd(0.5),
    )

    @jax.jit
    def train_step(state: TrainState) -> tuple[TrainState, jax.Array]:
        def loss_fn(params: Any) -> jax.Array:
            logits = state.apply_fn(params, features)
            assert logits.dtype == jnp.bfloat16
            return cross_entropy(
                logits, labels, reduction="mean", label_smoothing=0.1, z_loss=1e-4
            )

        loss, gradients = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=gradients), loss

    losses = []
    for _ in range(20):
        state, loss = train_step(state)
        losses.append(float(loss))
    assert losses[-1] < 0.7 < losses[0]
    assert loss.dtype == jnp.float32
    logits = model.apply(state.params, features)
    np.testing.assert_array_equal(jnp.argmax(logits, -1), labels)


def parameters() -> dict[str, jax.Array]:
    rng = np.random.default_rng(1)
    kernel = jnp.asarray(rng.standard_normal((FEATURES, CLASSES)), jnp.float32)
    return {"kernel": kernel, "bias": jnp.zeros(CLASSES)}


def logits_of(params: dict[str, jax.Array], features: jax.Array) -> jax.Array:
    return features @ params["kernel"] + params["bias"][None, :]


@pytest.mark.parametrize("weighted", [False, True])
def test_accumulated_micro_batches_are_the_large_batch(weighted: bool) -> None:
    # Micro-batches of unequal numbers of valid tokens: a mean of their means would
    # weigh a token of a short one more.
    features, labels = separable()
    labels = labels.at[3:10].set(-100).at[21].set(-100).at[30:38].set(-100)
    rng = np.random.default_rng(2)
    drawn = rng.uniform(0.5, 2, EXAMPLES) if weighted else np.ones(EXAMPLES)
    weights = jnp.asarray(drawn, jnp.float32)
    steps = 4
    micro = EXAMPLES // steps
    mass = jnp.sum(jnp.where(labels == -100, 0, weights))

    def large(params: dict[str, jax.Array]) -> jax.Array:
        return cross_entropy(
            logits_of(params, features),
            labels,
            ignore_index=-100,
            weights=weights,
            reduction="mean",
        )

    def small(params: dict[str, jax.Array], start: jax.Array) -> jax.Array:
        cut = [
            jax.lax.dynamic_slice_in_dim(a, start, micro)
            for a in (features, labels, weights)
        ]
        total = cross_entropy(
            logits_of(params, cut[0]),
            cut[1],
            ignore_index=-100,
            weights=cut[2],
            reduction="sum",
        )
        # MultiSteps averages the gradients of the micro-batches.
        return steps * total / mass

    params = parameters()
    whole = optax.sgd(0.1, momentum=0.9)
    value, gradient = jax.jit(jax.value_and_grad(large))(params)
    updates, _ = whole.update(gradient, whole.init(params), params)
    expected = optax.apply_updates(params, updates)

    accumulated = optax.MultiSteps(optax.sgd(0.1, momentum=0.9), steps)
    state = accumulated.init(params)
    step = jax.jit(jax.value_and_grad(small))
    actual, values = params, []
    for i in range(steps):
        part, gradient = step(actual, jnp.asarray(i * micro))
        updates, state = accumulated.update(gradient, state, actual)
        actual = optax.apply_updates(actual, updates)
        values.append(part)
    assert accumulated.has_updated(state)
    np.testing.assert_allclose(np.mean(values), value, **REORDERED)
    for name in params:
        np.testing.assert_allclose(actual[name], expected[name], **REORDERED)
        assert not np.allclose(actual[name], params[name], **REORDERED)


def test_a_schedule_drives_label_smoothing_without_a_new_trace() -> None:
    features, labels = separable()
    schedule = optax.linear_schedule(0.3, 0.0, transition_steps=4)
    traces = []

    @jax.jit
    def loss_at(params: dict[str, jax.Array], count: jax.Array) -> jax.Array:
        traces.append(count)
        return cross_entropy(
            logits_of(params, features),
            labels,
            label_smoothing=schedule(count),
            reduction="mean",
        )

    params = parameters()
    losses = [float(loss_at(params, jnp.asarray(i))) for i in range(5)]
    assert len(traces) == 1
    expected = [
        cross_entropy(
            logits_of(params, features),
            labels,
            label_smoothing=float(schedule(i)),
            reduction="mean",
        )
        for i in range(5)
    ]
    np.testing.assert_allclose(losses, expected, **REORDERED)
    assert len(set(losses)) == 5


@pytest.mark.parametrize("kind", ["integer", "dense"])
def test_a_training_step_is_that_of_optax(kind: str) -> None:
    features, labels = separable()
    name = "softmax_cross_entropy"
    if kind == "integer":
        name += "_with_integer_labels"
    else:
        labels = optax.smooth_labels(jax.nn.one_hot(labels, CLASSES), 0.1)
    results = []
    for module in (jl, optax):
        function: Callable[..., jax.Array] = getattr(module, name)

        def mean_loss(
            params: dict[str, jax.Array],
            function: Callable[..., jax.Array] = function,
        ) -> jax.Array:
            return function(logits_of(params, features), labels).mean()

        results.append(jax.jit(jax.value_and_grad(mean_loss))(parameters()))
    ours, theirs = map(jax.tree.leaves, results)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, **REORDERED)


DEMO = pathlib.Path(__file__).parent.parent / "notebooks" / "digits.py"
IMPORT = (
    "from jaxlosses import softmax_cross_entropy_with_integer_labels as cross_entropy"
)


@pytest.mark.long  # `make demo` is run by itself
@pytest.mark.parametrize(
    "package", sweep(["jaxlosses", "optax"], lambda package: package == "jaxlosses")
)
def test_demo_runs_with_either_import(package: str, tmp_path: pathlib.Path) -> None:
    source = DEMO.read_text("utf-8")
    assert source.count(IMPORT) == 1
    script = tmp_path / "digits.py"  # writes its figure beside itself
    line = IMPORT.replace("jaxlosses", package)
    script.write_text(source.replace(IMPORT, line), "utf-8")
    shutil.copy(DEMO.parent / "page.mplstyle", tmp_path)
    run = subprocess.run(
        [sys.executable, str(script), "--quick"],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env=one_device.environment(),
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert "test accuracy" in run.stdout
    assert (tmp_path / "figures" / "digits_loss.png").stat().st_size > 10_000


@pytest.mark.long  # `make quick` runs it by itself
def test_sharding_notebook_holds_what_it_asserts() -> None:
    notebook = DEMO.parent / "sharding.py"
    run = subprocess.run(
        [sys.executable, str(notebook)],
        capture_output=True,
        text=True,
        timeout=300,
        env=one_device.environment(),
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    assert "4096 512 × 8" in run.stdout
