"""Arguments split in any way over the explicit axes of a mesh, each unlike the others.

What JAX refuses to mix, the losses bring to the split of the logits, or of the hidden
states and the kernel; gradients come back split as their argument is.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import sweep, turns
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxlosses as jl
from jaxlosses._backends import choose

B, V, D = 8, 16, 8
BOTH = ("data", "model")
# A partition; None for NumPy arrays that no device holds yet.
Placed = tuple[Any, ...] | None

SCORES: dict[str, Placed] = {
    "numpy": None,
    "replicated": (),
    "examples": ("data",),
    "both": ("data", "model"),
    "crossed": ("model", "data"),
    "classes twice": (None, BOTH),
}
# Of what has examples and classes, of examples, and of classes.
OTHERS: dict[str, tuple[Placed, Placed, Placed]] = {
    "numpy or replicated": (None, None, ()),
    "more": ((None, BOTH), (BOTH,), None),
    "across": (("model", "data"), ("model",), ("data",)),
}
OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.01}


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), BOTH, axis_types=(AxisType.Explicit,) * 2)


def place(mesh: jax.sharding.Mesh, array: Any, placed: Placed) -> Any:
    if placed is None:
        return array
    return jax.device_put(array, NamedSharding(mesh, P(*placed)))


def numbers(dense: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is differentiated, and what is not."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, V, B).astype(np.int32)
    exists = rng.random((B, V)) < 0.8
    exists[np.arange(B), ids] = True
    floats = {
        "logits": 3 * rng.normal(size=(B, V)),
        "class_weights": rng.random(V),
        "weights": rng.random(B),
    }
    if dense:
        floats["labels"] = rng.dirichlet(np.ones(V), B)
    floats = {name: np.asarray(a, np.float32) for name, a in floats.items()}
    return floats, {"where": exists} | ({} if dense else {"labels": ids})


def spread(
    mesh: jax.sharding.Mesh, arrays: Any, scores: Placed, others: tuple[Placed, ...]
) -> Any:
    """Arrays by name: logits as one partition says, the others by what they have."""
    of_both, of_examples, of_classes = others

    def placed(name: str, a: Any) -> Placed:
        if name == "logits":
            return scores
        if a.ndim == 2:
            return of_both
        return of_classes if name == "class_weights" else of_examples

    return {name: place(mesh, a, placed(name, a)) for name, a in arrays.items()}


def total(dense: bool, reduction: Any = "mean") -> Callable[..., Any]:
    function: Any = jl.softmax_cross_entropy
    if not dense:
        function = jl.softmax_cross_entropy_with_integer_labels

    def loss(floats: Any, rest: Any) -> Any:
        return function(**floats, **rest, **OPTIONS, reduction=reduction)

    return loss


def check_typed_like(gradients: Any, arguments: Any) -> None:
    def check(gradient: Any, argument: Any) -> None:
        if isinstance(argument, jax.Array):
            assert jax.typeof(gradient).sharding == jax.typeof(argument).sharding

    jax.tree.map(check, gradients, arguments)


def check_close(got: Any, want: Any) -> None:
    size = max(np.abs(want).max(), 1e-6)
    np.testing.assert_allclose(got, want, rtol=0, atol=4e-6 * size)


def check_against_oracle(got: Any, floats: Any, rest: Any) -> None:
    given = {**floats, **rest}
    logits, labels = given.pop("logits"), given.pop("labels")
    value, gradients = got
    want = oracle.loss(logits, labels, reduction="mean", **given, **OPTIONS)
    np.testing.assert_allclose(value, want, rtol=4e-6)
    exact = oracle.gradients(logits, labels, reduction="mean", **given, **OPTIONS)
    for name, gradient in gradients.items():
        check_close(gradient, exact[name])


@pytest.mark.alternate(6)
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize(("scores", "dense"), turns(SCORES, [False, True]))
def test_what_belongs_to_logits_may_be_split_in_any_way(
    mesh: jax.sharding.Mesh, scores: str, dense: bool
) -> None:
    floats, rest = numbers(dense)
    calls = {
        name: (
            spread(mesh, floats, SCORES[scores], others),
            spread(mesh, rest, None, others),
        )
        for name, others in OTHERS.items()
    }
    both = jax.value_and_grad(total(dense))
    closed_over = calls["more"][1]

    @jax.jit
    def of_all(calls: Any) -> Any:
        belongs = {name: b for name, (_, b) in calls.items()} | {"more": closed_over}
        return {name: both(given, belongs[name]) for name, (given, _) in calls.items()}

    for name, got in of_all(calls).items():
        check_against_oracle(got, floats, rest)
        check_typed_like(got[1], calls[name][0])


@pytest.mark.alternate
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize("dense", [False, True])
def test_eager_losses_on_explicit_axes_are_those_under_jit(
    mesh: jax.sharding.Mesh, dense: bool
) -> None:
    floats, rest = numbers(dense)
    pairs = [("both", "numpy or replicated"), ("examples", "across")]
    with jax.set_mesh(mesh):
        for scores, others in pairs:
            given = spread(mesh, floats, SCORES[scores], OTHERS[others])
            belongs = spread(mesh, rest, None, OTHERS[others])
            got = jax.value_and_grad(total(dense))(given, belongs)
            check_against_oracle(got, floats, rest)
            check_typed_like(got[1], given)


@pytest.mark.without_llvm_passes
def test_second_derivatives_forward_mode_and_vmap_mix_splits_as_well(
    mesh: jax.sharding.Mesh,
) -> None:
    floats, rest = numbers(dense=False)
    given = spread(mesh, floats, ("data", "model"), OTHERS["across"])
    belongs = spread(mesh, rest, None, OTHERS["more"])

    def loss(z: Any, floats: Any, rest: Any, **options: Any) -> Any:
        return total(dense=False, reduction="sum")(
            {**floats, "logits": z} | options, rest
        )

    def derivatives(floats: Any, rest: Any) -> Any:
        z = floats["logits"]
        gradient = jax.grad(loss)
        push = jax.jvp(lambda z: loss(z, floats, rest, forward_mode=True), (z,), (z,))
        product = jax.jvp(lambda z: gradient(z, floats, rest), (z,), (z,))[1]
        stack = jnp.stack([z, 2 * z])
        each = jax.vmap(gradient, (0, None, None))(stack, floats, rest)
        return push, product, each

    want = derivatives(floats, rest)
    got = jax.jit(derivatives)(given, belongs)
    jax.tree.map(check_close, got, want)


@pytest.mark.without_llvm_passes
def test_several_class_axes_and_what_is_shared_are_split_as_well(
    mesh: jax.sharding.Mesh,
) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, B, 2)).astype(np.float32)  # classes, batch, classes
    ids = rng.integers(0, 8, B)
    shared = rng.dirichlet(np.ones(8)).reshape(4, 1, 2).astype(np.float32)
    exists = rng.random((4, 1, 2)) < 0.8
    counts = rng.random(B) < 0.7
    exists.reshape(-1)[ids] = True
    class_weights = rng.random(8).astype(np.float32)
    options = {"axis": (0, 2), "label_smoothing": 0.1, "reduction": "sum"}

    def of_ids(z: Any, w: Any, ids: Any, where: Any) -> Any:
        return jl.softmax_cross_entropy_with_integer_labels(
            z, ids, where=where, class_weights=w, **options
        )

    def of_shared(z: Any, w: Any, q: Any, where: Any) -> Any:
        return jl.softmax_cross_entropy(z, q, where=where, class_weights=w, **options)

    def both(z: Any, w: Any, q: Any, ids: Any, exists: Any, counts: Any) -> Any:
        by_ids = jax.value_and_grad(of_ids, (0, 1))(z, w, ids, exists)
        return by_ids, jax.value_and_grad(of_shared, (0, 1, 2))(z, w, q, counts)

    pairs = (
        (logits, ("model", "data")),
        (class_weights, ("model",)),
        (shared, (None, None, "data")),
        (ids, ("model",)),
        (exists, ("model",)),
        (counts, (BOTH,)),
    )
    given = [place(mesh, *pair) for pair in pairs]
    by_ids, by_shared = jax.jit(both)(*given)
    check_typed_like(by_ids[1], tuple(given[:2]))
    check_typed_like(by_shared[1], tuple(given[:3]))

    options["class_weights"] = class_weights
    every = np.broadcast_to(shared, logits.shape)
    cases = ((by_ids, ids, exists), (by_shared, every, counts))
    for (value, gradients), labels, where in cases:
        want = oracle.loss(logits, labels, where=where, **options)
        np.testing.assert_allclose(value, want, rtol=4e-6)
        exact = oracle.gradients(logits, labels, where=where, **options)
        check_close(gradients[0], exact["logits"])
        check_close(gradients[1], exact["class_weights"])
        if labels is not ids:
            check_close(gradients[2], exact["labels"].sum(1, keepdims=True))


def test_rows_on_explicit_axes_of_one_device_are_not_cut_into_blocks(
    mesh: jax.sharding.Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outside of `jax.set_mesh` the mesh is known from the arrays' types alone."""
    monkeypatch.setattr(choose, "is_local", lambda: True)
    logits = np.random.default_rng(0).normal(size=(3, B, V)).astype(np.float32)
    ids = np.zeros((3, B), np.int32)
    given = place(mesh, logits, (None, *BOTH))
    got = jax.jit(jl.softmax_cross_entropy_with_integer_labels)(given, ids)
    np.testing.assert_allclose(got, oracle.loss(logits, ids), rtol=4e-6)


@pytest.mark.alternate(4)
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize("scores", ["numpy", "examples", "both", "crossed"])
def test_masks_of_softmax_may_be_split_in_any_way(
    mesh: jax.sharding.Mesh, scores: str
) -> None:
    floats, rest = numbers(dense=False)
    z, exists = floats["logits"].astype(np.float64), rest["where"]
    e = np.where(exists, np.exp(z), 0)
    p = e / e.sum(-1, keepdims=True)
    g = np.linspace(-1, 1, B * V).reshape(B, V)
    # Of sum(g p), and of sum(g log p) over the classes that exist.
    want = {
        "softmax": p * (g - (g * p).sum(-1, keepdims=True)),
        "log_softmax": np.where(exists, g - p * (g * exists).sum(-1, keepdims=True), 0),
    }

    @jax.jit
    def pulled(calls: Any) -> Any:
        def total(z: Any, where: Any, name: str) -> Any:
            out = getattr(jl, name)(z, where=where)
            return jnp.sum(jnp.where(jnp.isfinite(out), out * g.astype(np.float32), 0))

        return {
            (key, name): jax.grad(total)(*arguments, name)
            for key, arguments in calls.items()
            for name in want
        }

    given = place(mesh, floats["logits"], SCORES[scores])
    calls = {key: (given, place(mesh, exists, OTHERS[key][0])) for key in OTHERS}
    for (_, name), gradient in pulled(calls).items():
        check_close(gradient, want[name])
        check_typed_like(gradient, given)


HEADS: dict[str, tuple[Placed, Placed]] = {
    "numpy": (None, None),
    "replicated": ((), ()),
    "examples and classes": (("data",), (None, "model")),
    "features": ((None, "model"), ("data",)),
    "examples over the axis of classes": (("model",), (None, "model")),
    "kernel alone": (None, (None, BOTH)),
}


@pytest.mark.alternate(4)
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize(
    ("head", "strategy"),
    sweep(
        [
            ("numpy", "recompute"),
            ("replicated", "tokens"),
            ("examples and classes", "dense"),
            ("examples and classes", "vocab"),
            ("features", "tokens"),
            ("examples over the axis of classes", "recompute"),
            ("kernel alone", "vocab"),
        ],
        lambda head, strategy: (
            "examples" in head or (head, strategy) == ("features", "tokens")
        ),
    ),
)
def test_what_belongs_to_a_head_may_be_split_in_any_way(
    mesh: jax.sharding.Mesh, head: str, strategy: str
) -> None:
    rng = np.random.default_rng(0)
    floats, rest = numbers(dense=False)
    labels, exists = rest["labels"], np.arange(V) % 7 != 0
    labels[~exists[labels]] = 1
    del floats["logits"]
    floats |= {
        "hidden": rng.normal(size=(B, D)).astype(np.float32),
        "kernel": rng.normal(size=(D, V)).astype(np.float32),
        "bias": rng.normal(size=V).astype(np.float32),
    }

    def loss(floats: Any, labels: Any, where: Any) -> Any:
        return jl.linear_softmax_cross_entropy(
            **floats,
            labels=labels,
            where=where,
            strategy=strategy,
            workspace_bytes=400,
            reduction="mean",
            **OPTIONS,
        )

    def spread_head(others: tuple[Placed, Placed, Placed]) -> Any:
        hidden, kernel = HEADS[head]
        _, of_examples, of_classes = others
        placed = {
            "hidden": hidden,
            "kernel": kernel,
            "bias": of_classes,
            "class_weights": of_classes,
            "weights": of_examples,
        }
        given = {name: place(mesh, a, placed[name]) for name, a in floats.items()}
        belongs = (labels, of_examples), (exists, of_classes)
        return given, *(place(mesh, *pair) for pair in belongs)

    calls = {key: spread_head(OTHERS[key]) for key in ("numpy or replicated", "across")}

    @jax.jit
    def of_all(calls: Any) -> Any:
        both = jax.value_and_grad(loss)
        return {key: both(*arguments) for key, arguments in calls.items()}

    wide = {name: a.astype(np.float64) for name, a in floats.items()}
    hidden, kernel, bias = (wide.pop(name) for name in ("hidden", "kernel", "bias"))
    logits = hidden @ kernel + bias
    given = wide | OPTIONS | {"where": exists[None], "reduction": "mean"}
    exact = oracle.gradients(logits, labels, **given)
    dz = exact["logits"]
    exact |= {"hidden": dz @ kernel.T, "kernel": hidden.T @ dz, "bias": dz.sum(0)}
    for key, (value, gradients) in of_all(calls).items():
        np.testing.assert_allclose(
            value, oracle.loss(logits, labels, **given), rtol=4e-6
        )
        for name, gradient in gradients.items():
            check_close(gradient, exact[name])
        check_typed_like(gradients, calls[key][0])


@pytest.mark.alternate
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize("dense", [False, True])
def test_no_collective_moves_an_array_of_split_logits(
    mesh: jax.sharding.Mesh, dense: bool
) -> None:
    floats, rest = numbers(dense)
    given = spread(mesh, floats, ("data", "model"), OTHERS["across"])
    belongs = spread(mesh, rest, None, OTHERS["numpy or replicated"])
    if dense:
        given["labels"] = place(mesh, floats["labels"], ("data",))
    both = jax.jit(jax.grad(lambda z, f, r: total(dense)(f | {"logits": z}, r)))
    z = given.pop("logits")
    text = both.lower(z, given, belongs).compile().as_text()
    moved = re.findall(
        r"= (.*?) (?:all-reduce|all-gather|all-to-all|collective-permute|"
        r"reduce-scatter)(?:-start)?\(",
        text,
    )
    assert moved
    for shapes in moved:
        for shape in re.findall(r"\w+\[([\d,]*)\]", shapes):
            sizes = [int(n) for n in shape.split(",") if n]
            assert sum(n > 1 for n in sizes) <= 1, shapes
