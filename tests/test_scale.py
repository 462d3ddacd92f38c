"""A temperature of each example: `logit_scale` of the batch's shape."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import LOG_PROBS, LOSSES, sweep, turns
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxlosses as jl

pytestmark = pytest.mark.without_llvm_passes

SHAPE, V = (4, 6), 37
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cap": {"logit_softcap": 3.0},
    "all": {
        "logit_softcap": 3.0,
        "label_smoothing": 0.2,
        "z_loss": 0.1,
        "class_weights": np.linspace(0.5, 2, V, dtype=np.float32),
    },
}


class Problem:
    """Rows of order 1, of which one is ignored, and scales of every kind."""

    def __init__(self, name: str) -> None:
        rng = np.random.default_rng(0)
        self.logits = rng.normal(size=(*SHAPE, V)).astype(np.float32)
        self.scale = rng.uniform(0.3, 3, SHAPE).astype(np.float32)
        self.scale[0, :4] = -0.7, 0.0, 1.0, 40.0
        ids = rng.integers(0, V, SHAPE)
        if name == "dense":
            self.labels = np.eye(V, dtype=np.float32)[ids]
            self.more: dict[str, Any] = {}
        else:
            ids[1, 2] = -1
            self.labels, self.more = ids, {"ignore_index": -1}
        self.g = rng.normal(size=SHAPE).astype(np.float32)

    def exact(self, **options: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Values, and gradients of their sum weighed by `g`, row by row."""
        value = np.zeros(SHAPE)
        d_logits, d_scale = np.zeros(self.logits.shape), np.zeros(SHAPE)
        for at in np.ndindex(SHAPE):
            row = self.logits[at][None], self.labels[at][None]
            given = options | self.more | {"logit_scale": float(self.scale[at])}
            value[at] = oracle.loss(*row, **given)[0]
            d = oracle.gradients(*row, cotangent=self.g[at][None], **given)
            d_logits[at], d_scale[at] = d["logits"][0], d["logit_scale"]
        return value, d_logits, d_scale


def assert_close(got: Any, want: Any) -> None:
    for a, b in zip(jax.tree.leaves(got), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


@pytest.mark.alternate(8)
@pytest.mark.parametrize(
    ("name", "options"),
    sweep(
        [(name, options) for name in LOSSES for options in OPTIONS],
        lambda name, options: options == "all" or name in ("integer", "fused, tokens"),
    ),
)
def test_each_example_has_its_own(name: str, options: str) -> None:
    problem, given = Problem(name), OPTIONS[options]
    reduction = "sum" if name == "fused, tokens" else "none"

    def loss(logits: Any, scale: Any) -> Any:
        weights = problem.g if reduction == "sum" else None
        return LOSSES[name](
            logits,
            problem.labels,
            logit_scale=scale,
            weights=weights,
            reduction=reduction,
            **problem.more,
            **given,
        )

    value, pull = jax.vjp(jax.jit(loss), problem.logits, problem.scale)
    exact, *derivatives = problem.exact(**given)
    if reduction == "sum":
        assert_close(value, [np.sum(exact * problem.g)])
        assert_close(pull(jnp.float32(1)), derivatives)
    else:
        assert_close(value, [exact])
        assert_close(pull(problem.g), derivatives)


@pytest.mark.alternate(4)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_a_scale_of_zero_makes_classes_alike(name: str, masked: bool) -> None:
    """What is out stays out: nothing times infinity is nothing here."""
    logits = Problem(name).logits[0]
    ids = np.arange(len(logits)) + 7
    exists = np.arange(V) >= (6 if masked else 0)
    labels = np.eye(V, dtype=np.float32)[ids] if name == "dense" else ids
    where = exists if name.startswith("fused") else exists[None]

    def loss(logits: Any, scale: Any) -> Any:
        return LOSSES[name](
            logits, labels, where=where, logit_scale=scale, reduction="sum"
        )

    value, (d_logits, d_scale) = jax.value_and_grad(loss, (0, 1))(
        logits, jnp.float32(0)
    )
    np.testing.assert_allclose(value, len(logits) * np.log(exists.sum()), rtol=2e-6)
    np.testing.assert_array_equal(d_logits, 0)
    of_label = np.arange(V) == ids[:, None]
    slope = logits * (exists / exists.sum() - of_label)
    np.testing.assert_allclose(d_scale, slope.sum(), rtol=1e-5)


@pytest.mark.alternate
@pytest.mark.parametrize("name", LOG_PROBS)
def test_log_probabilities_and_entropies_of_each_temperature(name: str) -> None:
    problem = Problem("integer")

    def both(logits: Any, scale: Any) -> Any:
        return LOG_PROBS[name](
            logits,
            problem.labels,
            logit_scale=scale,
            return_entropy=True,
            **problem.more,
        )

    def of_one(logits: Any, label: Any, scale: Any) -> Any:
        return jl.softmax_log_probs(
            logits, label, logit_scale=scale, return_entropy=True, **problem.more
        )

    every = jax.vmap(jax.vmap(of_one))
    got = jax.vjp(both, problem.logits, problem.scale)
    want = jax.vjp(lambda z, s: every(z, problem.labels, s), *problem_of(problem))
    assert_close(got[0], jax.tree.leaves(want[0]))
    cotangents = jnp.asarray(problem.g), 1 - jnp.asarray(problem.g)
    assert_close(got[1](cotangents), jax.tree.leaves(want[1](cotangents)))
    exact, *_ = problem.exact()
    assert_close(-got[0][0], [exact])


def problem_of(problem: Problem) -> tuple[Any, Any]:
    return problem.logits, problem.scale


@pytest.mark.alternate
@pytest.mark.parametrize("strategy", ["tokens", "recompute", "vocab", "dense"])
def test_any_loss_of_rows(strategy: Any) -> None:
    problem, kernel = Problem("integer"), np.eye(V, dtype=np.float32)

    def loss(logits: Any, scale: Any) -> Any:
        return jl.linear_softmax_loss(
            lambda rows, g: g * (rows.nll + rows.label_logit - rows.lse) + rows.entropy,
            logits,
            kernel,
            problem.labels,
            problem.g,
            uses_entropy=True,
            logit_scale=scale,
            strategy=strategy,
            workspace_bytes=64,
            **problem.more,
        )

    def entropy(logits: Any, scale: Any) -> Any:
        found = jl.softmax_entropy(logits, logit_scale=scale)
        return jnp.sum(jnp.where(problem.labels < 0, 0, found))

    got = jax.value_and_grad(loss, (0, 1))(*problem_of(problem))
    want = jax.value_and_grad(entropy, (0, 1))(*problem_of(problem))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # Two terms of up to 100 cancel.
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=5e-5)


@pytest.mark.alternate
@pytest.mark.parametrize(
    "name", sweep(LOSSES, lambda name: name in ("dense", "fused, tokens"))
)
def test_transformations(name: str) -> None:
    problem = Problem(name)
    loss = functools.partial(LOSSES[name], labels=problem.labels, **problem.more)
    reduction = "sum"

    def total(logits: Any, scale: Any) -> Any:
        return loss(logits, logit_scale=scale, reduction=reduction)

    gradient = jax.grad(total, (0, 1))(*problem_of(problem))
    twice = jax.vmap(jax.grad(total, (0, 1)), (None, 0))(
        problem.logits, np.stack([problem.scale, problem.scale])
    )
    assert_close([d[1] for d in twice], jax.tree.leaves(gradient))
    # A scale times logits is one of 1 for the product, up to its rounding.
    tangent = jax.jvp(
        lambda s: jax.grad(total, 1)(problem.logits, s),
        (problem.scale,),
        (np.ones_like(problem.scale),),
    )[1]
    eps = 1e-2
    ahead, behind = (
        jax.grad(total, 1)(problem.logits, problem.scale + d) for d in (eps, -eps)
    )
    np.testing.assert_allclose(tangent, (ahead - behind) / (2 * eps), atol=1e-3)
    if name != "fused, tokens":
        forward = jax.jacfwd(
            lambda s: loss(
                problem.logits, logit_scale=s, reduction="sum", forward_mode=True
            )
        )(problem.scale)
        assert_close(forward, [gradient[1]])


@pytest.mark.alternate(3)
@pytest.mark.parametrize(
    ("name", "kind"), turns(LOSSES, [AxisType.Auto, AxisType.Explicit])
)
def test_meshes(name: str, kind: AxisType) -> None:
    problem = Problem(name)
    mesh = jax.make_mesh((2, 4), ("data", "model"), (kind,) * 2)

    def mean(logits: Any, scale: Any, labels: Any) -> Any:
        return LOSSES[name](
            logits, labels, logit_scale=scale, reduction="mean", **problem.more
        )

    split = NamedSharding(mesh, P("data"))
    given = (*problem_of(problem), problem.labels)
    with jax.set_mesh(mesh):
        got = jax.jit(jax.grad(mean, (0, 1)))(*jax.device_put(given, (split,) * 3))
    want = jax.grad(mean, (0, 1))(*given)
    assert_close(got, jax.tree.leaves(want))


@pytest.mark.alternate(4)
@pytest.mark.parametrize(
    "strategy",
    sweep(["tokens", "recompute", "vocab", "dense", None], lambda s: s != "dense"),
)
def test_classes_split_by_hand(strategy: Any) -> None:
    problem = Problem("integer")
    classes = 40
    logits = np.pad(problem.logits, [(0, 0), (0, 0), (0, 3)], constant_values=-50)
    mesh = jax.make_mesh((2, 4), ("data", "model"), (AxisType.Auto,) * 2)

    def local(logits: Any, scale: Any, labels: Any) -> Any:
        given = {"logit_scale": scale, "axis_name": "model", "reduction": "sum"}
        given |= {"batch_axis_name": "data", **problem.more}
        if strategy is None:
            return jl.softmax_cross_entropy_with_integer_labels(logits, labels, **given)
        hidden, kernel = logits
        return jl.linear_softmax_cross_entropy(
            hidden, kernel, labels, strategy=strategy, workspace_bytes=64, **given
        )

    spec: Any = P("data", None, "model")
    of: Any = logits
    if strategy is not None:
        spec = (P("data"), P(None, "model"))
        of = (logits, np.eye(classes, dtype=np.float32))
    specs = (spec, P("data"), P("data"))
    total = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P())
    d_of, d_scale = jax.jit(jax.grad(total, (0, 1)))(of, problem.scale, problem.labels)
    d_logits = d_of if strategy is None else d_of[0]

    def whole(logits: Any, scale: Any) -> Any:
        return jl.softmax_cross_entropy_with_integer_labels(
            logits, problem.labels, logit_scale=scale, reduction="sum", **problem.more
        )

    want = jax.grad(whole, (0, 1))(logits, problem.scale)
    assert_close((d_logits, d_scale), jax.tree.leaves(want))
