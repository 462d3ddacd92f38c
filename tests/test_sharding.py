"""Classes and batch split over devices: by hand, by jit, and by types."""

import functools
import itertools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import sweep, turns
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxlosses as jl

B, V = 8, 24
MESHES = [(8, 1), (1, 8), (2, 4)]


def make_mesh(shape: tuple[int, int]) -> jax.sharding.Mesh:
    return jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def make_arguments(dense: bool) -> tuple[tuple[Any, ...], tuple[P, ...]]:
    rng = np.random.default_rng(0)
    logits = (3 * rng.normal(size=(B, V))).astype(np.float32)
    ids = rng.integers(0, V, B).astype(np.int32)
    mask = rng.random((B, V)) < 0.8
    mask[np.arange(B), ids] = True
    arguments = (
        logits,
        rng.dirichlet(np.ones(V), B).astype(np.float32) if dense else ids,
        mask,
        rng.random(V).astype(np.float32),
        rng.random(B).astype(np.float32),
        np.float32(-1.3),
    )
    both = P("data", "model")
    labels = both if dense else P("data")
    return arguments, (both, labels, both, P("model"), P("data"), P())


def loss(dense: bool, forward_mode: bool, axis_name: Any = None) -> Any:
    function = jl.softmax_cross_entropy
    if not dense:
        function = jl.softmax_cross_entropy_with_integer_labels

    def with_options(
        logits: Any,
        labels: Any,
        where: Any,
        class_weights: Any,
        weights: Any,
        scale: Any,
    ) -> Any:
        return function(
            logits,
            labels,
            where=where,
            class_weights=class_weights,
            weights=weights,
            logit_scale=scale,
            label_smoothing=0.1,
            z_loss=0.01,
            logit_softcap=5.0,
            forward_mode=forward_mode,
            axis_name=axis_name,
        )

    return with_options


@pytest.mark.alternate(4)
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize(
    ("shape", "dense", "forward_mode"),
    sweep(
        itertools.product(MESHES, [False, True], [False, True]),
        # Both axes are split for each, one axis for some.
        lambda shape, dense, forward_mode: (
            dense == forward_mode and (shape == (2, 4) or dense == (shape == (8, 1)))
        ),
    ),
    ids=str,
)
def test_split_classes_give_the_loss_and_gradients_of_one_device(
    shape: tuple[int, int], dense: bool, forward_mode: bool
) -> None:
    arguments, specs = make_arguments(dense)
    floating = (0, 1, 3, 4, 5) if dense else (0, 3, 4, 5)

    def total(function: Any) -> Any:
        return lambda *args: jnp.sum(jnp.sin(function(*args)))

    single = loss(dense, forward_mode)
    sharded = jax.shard_map(
        loss(dense, forward_mode, "model"),
        mesh=make_mesh(shape),
        in_specs=specs,
        out_specs=P("data"),
    )
    want = jax.jit(jax.value_and_grad(total(single), floating))(*arguments)
    got = jax.jit(jax.value_and_grad(total(sharded), floating))(*arguments)
    # Sums over classes are taken in another order.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6), want, got
    )


@pytest.mark.without_llvm_passes
@pytest.mark.parametrize(
    "shape", sweep([(mesh,) for mesh in MESHES], lambda shape: shape == (2, 4)), ids=str
)
def test_a_gradient_taken_inside_is_the_one_taken_outside(
    shape: tuple[int, int],
) -> None:
    arguments, specs = make_arguments(dense=False)
    floating = (0, 3, 4, 5)
    split = loss(False, False, "model")

    def inside(*args: Any) -> Any:
        def total(*args: Any) -> jax.Array:
            return jax.lax.psum(jnp.sum(jnp.sin(split(*args))), "data")

        return jax.grad(total, floating)(*args)

    got = jax.jit(
        jax.shard_map(
            inside,
            mesh=make_mesh(shape),
            in_specs=specs,
            out_specs=tuple(specs[i] for i in floating),
        )
    )(*arguments)
    single = loss(False, False)
    total = jax.grad(lambda *args: jnp.sum(jnp.sin(single(*args))), floating)
    want = jax.jit(total)(*arguments)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6), want, got
    )


@pytest.mark.alternate
@pytest.mark.parametrize("axis_name", ["model", ("data", "model")], ids=str)
def test_confident_rows_keep_their_digits_over_devices(axis_name: Any) -> None:
    rng = np.random.default_rng(0)
    split = jax.jit(
        jax.shard_map(
            lambda z, y: jl.softmax_cross_entropy_with_integer_labels(
                z, y, axis_name=axis_name
            ),
            mesh=make_mesh((2, 4)),
            in_specs=(P(None, axis_name), P()),
            out_specs=P(),
        )
    )
    for margin in (0.0, 20.0, 80.0):
        logits, ids = oracle.confident_logits(rng, 16, 800, margin)
        want, gradient = oracle.loss(logits, ids), oracle.gradients(logits, ids)
        np.testing.assert_allclose(split(logits, ids), want, rtol=4e-6)
        got = jax.grad(lambda z, y: jnp.sum(split(z, y)))(logits, ids)
        np.testing.assert_allclose(got, gradient["logits"], rtol=1e-5, atol=1e-37)


def test_a_label_of_no_device_is_nan_on_all() -> None:
    split = jax.shard_map(
        lambda z, y: jl.softmax_cross_entropy_with_integer_labels(
            z, y, axis_name="model"
        ),
        mesh=make_mesh((1, 8)),
        in_specs=(P(None, "model"), P()),
        out_specs=P(),
    )
    logits, labels = jnp.zeros((3, V)), jnp.array([-1, V, V - 1])
    value, pull = jax.vjp(lambda z: split(z, labels), logits)
    assert np.isnan(value).tolist() == [True, True, False]
    (gradient,) = pull(jnp.ones(3))
    assert np.isnan(gradient).all(1).tolist() == [True, True, False]
    assert np.isfinite(gradient[2]).all()


# --- What `axis_name` may name.

LOSSES = {
    "ids": (jl.softmax_cross_entropy_with_integer_labels, {}),
    "distributions": (jl.softmax_cross_entropy, {}),
    **{
        strategy: (jl.linear_softmax_cross_entropy, {"strategy": strategy})
        for strategy in ("auto", "dense", "tokens", "recompute", "vocab")
    },
}


def split_sum(name: str, axis_name: Any) -> Any:
    """A sum of losses of scores whose classes are split, as a function of those."""
    function, given = LOSSES[name]

    def total(scores: jax.Array) -> Any:
        options = dict(given)
        labels: Any = np.zeros(2, np.int32)
        if function is jl.softmax_cross_entropy:
            labels = jnp.ones_like(scores) / V
        if function is jl.linear_softmax_cross_entropy:
            scores, options["kernel"] = np.eye(2, dtype=np.float32), scores
        return function(
            scores, labels=labels, axis_name=axis_name, reduction="sum", **options
        )

    return total


def message_of(function: Any, *arguments: Any) -> str:
    with pytest.raises(ValueError, match=r"^axis_name: ") as raised:
        jax.make_jaxpr(function)(*arguments)
    return str(raised.value)


def by_classes(function: Any, **options: Any) -> Any:
    """A function of scores of which every device has some classes."""
    return jax.shard_map(
        function,
        mesh=make_mesh((2, 4)),
        in_specs=P(None, "model"),
        out_specs=P(),
        **options,
    )


def scanned(function: Any, scores: jax.Array) -> jax.Array:
    """A function of scores, inside of a scan."""
    once = scores[None]
    return jnp.sum(jax.lax.scan(lambda c, s: (c, function(s)), 0, once)[1])


SCORES = jnp.arange(2 * V, dtype=jnp.float32).reshape(2, V) / V
UNCHECKED = (
    "axis_name: got {got}, where {name} is an axis of pmap or of a shard_map with "
    "check_vma=False, expected a mesh axis of an enclosing shard_map with "
    "check_vma=True. The gradient could not be right. Leave out check_vma=False; in "
    "place of pmap use jax.shard_map, or drop axis_name and let jax.jit split the "
    "classes."
)
UNCHECKED_MODEL = UNCHECKED.format(got="'model'", name="'model'")
OF_VMAP = (
    "axis_name: got 'model', where 'model' is the axis of a vmap, expected a mesh axis "
    "of an enclosing shard_map. The gradient could not be right. In place of vmap use "
    "jax.shard_map, or drop axis_name and let jax.jit split the classes."
)


@pytest.mark.parametrize("axis_name", ["model", ("data", "model"), ("model",)], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_axis_that_is_not_checked_for_varying_is_refused(
    name: str, axis_name: Any
) -> None:
    split = by_classes(split_sum(name, axis_name), check_vma=False)
    first = axis_name if isinstance(axis_name, str) else axis_name[0]
    want = UNCHECKED.format(got=repr(axis_name), name=repr(first))
    assert message_of(split, SCORES) == want


@pytest.mark.parametrize("around", ["jit", "grad", "scan", "checkpoint", "vmap"])
def test_axis_that_is_not_checked_is_refused_in_any_transformation(around: str) -> None:
    split = split_sum("distributions", "model")
    inside = {
        "jit": jax.jit(split),
        "grad": lambda s: jnp.sum(jax.grad(split)(s)),
        "scan": functools.partial(scanned, split),
        "checkpoint": jax.checkpoint(split),
        "vmap": lambda s: jnp.sum(jax.vmap(split)(s[None])),
    }[around]
    unchecked = by_classes(inside, check_vma=False)
    assert message_of(unchecked, SCORES) == UNCHECKED_MODEL
    assert message_of(jax.grad(unchecked), SCORES) == UNCHECKED_MODEL


@pytest.mark.parametrize("name", LOSSES)
def test_axis_of_vmap_or_pmap_is_refused(name: str) -> None:
    split = split_sum(name, "model")
    parts = jnp.moveaxis(SCORES.reshape(2, 4, -1), 1, 0)
    assert message_of(jax.vmap(split, axis_name="model"), parts) == OF_VMAP
    mapped = jax.pmap(split, axis_name="model")
    assert message_of(mapped, parts) == UNCHECKED_MODEL


def test_axis_of_no_shard_map_or_named_twice_is_refused() -> None:
    assert message_of(split_sum("distributions", "model"), SCORES) == (
        "axis_name: got 'model', expected a mesh axis of an enclosing shard_map. "
        "Outside of shard_map, shard the arrays and pass None."
    )
    twice = by_classes(split_sum("distributions", ("model", "model")))
    assert message_of(twice, SCORES) == (
        "axis_name: got ('model', 'model'), expected each mesh axis once. Drop the "
        "repeated name."
    )


@pytest.mark.parametrize("name", LOSSES)
def test_axis_over_which_nothing_is_split_is_refused(name: str) -> None:
    split = split_sum(name, "model")
    scores = (
        "kernel" if LOSSES[name][0] is jl.linear_softmax_cross_entropy else "logits"
    )
    want = (
        f"axis_name: got 'model', over which {scores} is the same everywhere, expected "
        f"a mesh axis that splits the classes of {scores}. Name it in the in_specs of "
        "shard_map, and leave check_vma=False out of every shard_map around; parts "
        f"that are meant to be the same are marked by jax.lax.pcast({scores}, 'model', "
        'to="varying").'
    )
    mesh = make_mesh((2, 4))
    whole = jax.shard_map(split, mesh=mesh, in_specs=P(), out_specs=P())
    assert message_of(whole, SCORES) == want

    def inner(scores: jax.Array) -> jax.Array:
        return jax.shard_map(split, in_specs=P(), out_specs=P(), axis_names={"data"})(
            scores
        )

    # The outer one hides from the inner one that they are split.
    outer = by_classes(inner, axis_names={"model"}, check_vma=False)
    assert message_of(outer, SCORES) == want


@pytest.mark.alternate
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize(
    "name", sweep(["ids", "tokens", "vocab"], lambda name: name != "tokens")
)
def test_axis_is_taken_in_any_transformation_of_a_checked_shard_map(name: str) -> None:
    split, whole = split_sum(name, "model"), split_sum(name, None)

    def inside(scores: jax.Array) -> jax.Array:
        by_grad = jnp.sum(jax.grad(jax.jit(split))(scores) ** 2)
        by_vmap = jnp.sum(jax.vmap(split)(jnp.stack([scores, 2 * scores])))
        return (
            scanned(jax.checkpoint(split), scores)
            + jax.lax.psum(by_grad, "model")
            + by_vmap
        )

    def of_one(scores: jax.Array) -> jax.Array:
        by_grad = jnp.sum(jax.grad(whole)(scores) ** 2)
        return 2 * whole(scores) + by_grad + whole(2 * scores)

    part = by_classes(inside, axis_names={"model"})
    stack = jnp.stack([SCORES, -SCORES])
    got = jax.jit(jax.vmap(jax.value_and_grad(part)))(stack)
    want = jax.jit(jax.vmap(jax.value_and_grad(of_one)))(stack)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), want, got
    )


# --- jit with shardings, and the collectives of the compiled module.

TOKENS, SEQUENCE, FEATURES, CLASSES = 8, 16, 16, 96
ALL = ("dense", "tokens", "recompute", "vocab")
COLLECTIVE = re.compile(
    r"= (?P<type>.*?) (?P<what>all-reduce|all-gather|all-to-all|"
    r"collective-permute|reduce-scatter)(-start)?\("
)


class Collective(NamedTuple):
    what: str
    size: int  # of its largest array
    in_loop: bool


def collectives(compiled: Any) -> list[Collective]:
    found = []
    for line in compiled.as_text().splitlines():
        match = COLLECTIVE.search(line)
        if match:
            shapes = re.findall(r"\w+\[([\d,]*)\]", match["type"])
            sizes = [math.prod(int(n) for n in s.split(",") if n) for s in shapes]
            found.append(Collective(match["what"], max(sizes), "while/body" in line))
    return found


def typed_mesh(shape: tuple[int, int], kind: str) -> jax.sharding.Mesh:
    types = (getattr(AxisType, kind),) * 2
    return jax.make_mesh(shape, ("data", "model"), axis_types=types)


def put(mesh: jax.sharding.Mesh, array: Any, *spec: Any) -> jax.Array:
    return jax.device_put(array, jax.sharding.NamedSharding(mesh, P(*spec)))


@pytest.mark.alternate(6)
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_sharded_logits_are_reduced_where_they_are(
    shape: tuple[int, int], dense: bool, kind: str
) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(TOKENS, SEQUENCE, CLASSES)).astype(np.float32)
    ids = rng.integers(0, CLASSES, (TOKENS, SEQUENCE))
    labels = (
        rng.dirichlet(np.ones(CLASSES), ids.shape).astype(np.float32) if dense else ids
    )
    function = jl.softmax_cross_entropy
    if not dense:
        function = jl.softmax_cross_entropy_with_integer_labels

    def mean(z: jax.Array, y: jax.Array) -> jax.Array:
        return function(z, y, label_smoothing=0.1, z_loss=1e-3, reduction="mean")

    mesh = typed_mesh(shape, kind)
    with jax.set_mesh(mesh):
        z = put(mesh, logits, "data", None, "model")
        y = put(mesh, labels, "data", None, *["model"] * dense)
        compiled = jax.jit(jax.value_and_grad(mean)).lower(z, y).compile()
        value, gradient = compiled(z, y)
    want = oracle.loss(logits, labels, label_smoothing=0.1, z_loss=1e-3)
    np.testing.assert_allclose(value, want.mean(), rtol=2e-6)
    exact = oracle.gradients(
        logits, labels, label_smoothing=0.1, z_loss=1e-3, reduction="mean"
    )
    np.testing.assert_allclose(gradient, exact["logits"], rtol=1e-4, atol=1e-9)
    assert gradient.sharding.is_equivalent_to(z.sharding, 3)
    examples = TOKENS * SEQUENCE // shape[0]
    found = collectives(compiled)
    assert found
    for collective in found:
        assert collective.what == "all-reduce"
        assert collective.size <= examples


@pytest.mark.alternate(4)
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize(
    ("shape", "strategy", "kind"), turns(MESHES, ALL, ["Auto", "Explicit"]), ids=str
)
def test_sharded_head_moves_its_gradients_and_vectors_alone(
    shape: tuple[int, int], strategy: str, kind: str
) -> None:
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(TOKENS, SEQUENCE, FEATURES)).astype(np.float32)
    kernel = (rng.normal(size=(FEATURES, CLASSES)) / 4).astype(np.float32)
    ids = rng.integers(0, CLASSES, (TOKENS, SEQUENCE))

    def mean(h: jax.Array, w: jax.Array, y: jax.Array) -> jax.Array:
        return jl.linear_softmax_cross_entropy(
            h, w, y, reduction="mean", strategy=strategy, workspace_bytes=96 * CLASSES
        )

    mesh = typed_mesh(shape, kind)
    with jax.set_mesh(mesh):
        h, w = put(mesh, hidden, "data"), put(mesh, kernel, None, "model")
        y = put(mesh, ids, "data")
        both = jax.jit(jax.value_and_grad(mean, argnums=(0, 1)))
        compiled = both.lower(h, w, y).compile()
        value, (d_hidden, d_kernel) = compiled(h, w, y)
    check_head(hidden, kernel, ids, value, d_hidden, d_kernel)
    examples = TOKENS * SEQUENCE // shape[0]
    allowed = {examples * FEATURES, FEATURES * CLASSES // shape[1]}
    local_logits = examples * CLASSES // shape[1]
    large = []
    for collective in collectives(compiled):
        assert collective.what == "all-reduce"
        assert collective.size < local_logits or collective.size in allowed
        large += [collective] if collective.size > examples else []
    # One for each gradient at most, and once a call. The partitioner of automatic
    # axes leaves those of a chunk in the loop over chunks.
    assert len(large) <= 2
    assert kind == "Auto" or not any(collective.in_loop for collective in large)


@pytest.mark.alternate(4)
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("strategy", [*ALL, "auto"])
def test_kernel_split_over_features_is_gathered_once(strategy: str, kind: str) -> None:
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(TOKENS, SEQUENCE, FEATURES)).astype(np.float32)
    kernel = (rng.normal(size=(FEATURES, CLASSES)) / 4).astype(np.float32)
    ids = rng.integers(0, CLASSES, (TOKENS, SEQUENCE))
    mesh = typed_mesh((2, 4), kind)
    with jax.set_mesh(mesh):
        arguments = (
            put(mesh, hidden, "data", "model"),
            put(mesh, kernel, "data", "model"),
            put(mesh, ids, "data", "model"),
        )

        def mean(h: jax.Array, w: jax.Array, y: jax.Array) -> jax.Array:
            return jl.linear_softmax_cross_entropy(
                h,
                w,
                y,
                reduction="mean",
                strategy=strategy,
                workspace_bytes=128 * CLASSES,
            )

        value, d = jax.jit(jax.value_and_grad(mean, argnums=(0, 1)))(*arguments)
    check_head(hidden, kernel, ids, value, *d)
    if kind == "Explicit":  # else the partitioner chooses
        assert d[1].sharding.is_equivalent_to(arguments[1].sharding, 2)


def check_head(
    hidden: np.ndarray,
    kernel: np.ndarray,
    ids: np.ndarray,
    value: Any,
    d_hidden: Any,
    d_kernel: Any,
) -> None:
    """The mean and its gradients by both factors are those of float64."""
    h, w = hidden.astype(np.float64), kernel.astype(np.float64)
    dz = oracle.gradients(h @ w, ids, reduction="mean")["logits"]
    np.testing.assert_allclose(
        value, oracle.loss(h @ w, ids, reduction="mean"), rtol=2e-6
    )
    np.testing.assert_allclose(d_hidden, dz @ w.T, rtol=1e-4, atol=1e-8)
    flat = (h.reshape(-1, h.shape[-1]), dz.reshape(-1, dz.shape[-1]))
    np.testing.assert_allclose(d_kernel, flat[0].T @ flat[1], rtol=1e-4, atol=1e-7)


@pytest.mark.alternate
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize(
    ("shape", "strategy"),
    sweep(
        itertools.product(MESHES, ALL),
        lambda *case: case in [((2, 4), "vocab"), ((8, 1), "tokens")],
    ),
    ids=str,
)
def test_head_split_by_hand_with_every_option(
    shape: tuple[int, int], strategy: str
) -> None:
    rng = np.random.default_rng(0)
    exists = np.arange(CLASSES) % 7 != 0
    ids = rng.choice(np.flatnonzero(exists), TOKENS * 2).astype(np.int32)
    ids[::4] = -100
    arrays = {
        "hidden": rng.normal(size=(len(ids), FEATURES)).astype(np.float32),
        "kernel": (rng.normal(size=(FEATURES, CLASSES)) / 4).astype(np.float32),
        "bias": rng.normal(size=CLASSES).astype(np.float32),
        "class_weights": rng.random(CLASSES).astype(np.float32),
        "weights": rng.random(len(ids)).astype(np.float32),
        "logit_scale": np.float32(-1.3),
    }
    specs = {
        "hidden": P("data"),
        "kernel": P(None, "model"),
        "bias": P("model"),
        "class_weights": P("model"),
        "weights": P("data"),
        "logit_scale": P(),
    }
    options = {"label_smoothing": 0.1, "z_loss": 1e-3, "logit_softcap": 5.0}

    def total(arrays: Any, labels: Any, where: Any) -> jax.Array:
        loss = jl.linear_softmax_cross_entropy(
            labels=labels,
            where=where,
            ignore_index=-100,
            reduction="sum",
            axis_name="model",
            strategy=strategy,
            workspace_bytes=800,
            **arrays,
            **options,
        )
        return jax.lax.psum(loss, "data")

    split = jax.shard_map(
        total,
        mesh=make_mesh(shape),
        in_specs=(specs, P("data"), P("model")),
        out_specs=P(),
    )
    value, gradients = jax.jit(jax.value_and_grad(split))(arrays, ids, exists)

    wide = {name: a.astype(np.float64) for name, a in arrays.items()}
    hidden, kernel, bias = (wide.pop(name) for name in ("hidden", "kernel", "bias"))
    given = wide | options | {"ignore_index": -100, "where": exists[None]}
    logits = hidden @ kernel + bias
    exact = oracle.gradients(logits, ids, reduction="sum", **given)
    dz = exact["logits"]
    exact |= {"hidden": dz @ kernel.T, "kernel": hidden.T @ dz, "bias": dz.sum(0)}
    np.testing.assert_allclose(
        value, oracle.loss(logits, ids, reduction="sum", **given), rtol=2e-6
    )
    for name, gradient in gradients.items():
        size = np.abs(exact[name]).max()
        np.testing.assert_allclose(gradient, exact[name], rtol=0, atol=3e-6 * size)


@pytest.mark.without_llvm_passes
def test_split_head_serves_forward_mode_second_derivatives_and_vmap() -> None:
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(4, FEATURES)).astype(np.float32)
    kernel = (rng.normal(size=(FEATURES, CLASSES)) / 4).astype(np.float32)
    ids = rng.integers(0, CLASSES, 4)
    direction = rng.normal(size=hidden.shape).astype(np.float32)

    def on(axis_name: str | None, strategy: str, forward_mode: bool) -> Any:
        def total(h: jax.Array, w: jax.Array, y: jax.Array) -> jax.Array:
            return jl.linear_softmax_cross_entropy(
                h,
                w,
                y,
                reduction="sum",
                axis_name=axis_name,
                strategy=strategy,
                workspace_bytes=400,
                forward_mode=forward_mode,
            )

        return total

    def derivatives(total: Any, forward: Any, h: Any, w: Any, y: Any, v: Any) -> Any:
        push = jax.jvp(lambda h: forward(h, w, y), (h,), (v,))[1]
        product = jax.jvp(jax.grad(lambda h: total(h, w, y)), (h,), (v,))[1]
        each = jax.vmap(lambda h, y: total(h[None], w, y[None]))(h, y)
        return push, product, each

    want = derivatives(
        on(None, "dense", True), on(None, "dense", True), hidden, kernel, ids, direction
    )
    for strategy in ("tokens", "recompute", "vocab"):
        forward = on("model", "vocab" if strategy == "tokens" else strategy, True)
        split = jax.shard_map(
            functools.partial(derivatives, on("model", strategy, False), forward),
            mesh=make_mesh((1, 8)),
            in_specs=(P(), P(None, "model"), P(), P()),
            out_specs=P(),
        )
        got = jax.jit(split)(hidden, kernel, ids, direction)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            want,
            got,
        )


@pytest.mark.without_llvm_passes
@pytest.mark.parametrize(
    ("classes", "layout", "forward_mode"),
    # 8 strips, 1 and 4
    turns([104, 37, 100], ["dv", "vd"], [False, True], of=5),
)
def test_pieces_of_strips_are_what_pieces_of_all_classes_are(
    classes: int, layout: str, forward_mode: bool
) -> None:
    """Under `jax.set_mesh`, where automatic axes may have split the classes."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(B, FEATURES)).astype(np.float32)
    kernel = rng.normal(size=(FEATURES, classes)).astype(np.float32)
    kernel = kernel if layout == "dv" else kernel.T
    bias, weights = rng.normal(size=(2, classes)).astype(np.float32) ** 2
    ids = rng.integers(0, classes, B)
    ids[:3] = [classes - 1, -1, classes]  # the last, and two that cannot be
    mask = rng.random((B, classes)) < 0.8
    top, share = np.argsort(rng.random((B, classes)))[:, :5], np.full((B, 5), 0.2)
    static: dict[str, Any] = {"kernel_layout": layout, "forward_mode": forward_mode}

    def all_of(strategy: str, hidden: Any, kernel: Any, bias: Any, weights: Any) -> Any:
        how = static | {"strategy": strategy, "workspace_bytes": 4 * 5 * B * 5 * 2}
        per_class, stats = jl.linear_softmax_cross_entropy(
            hidden,
            kernel,
            ids,
            bias,
            class_weights=weights,
            label_smoothing=0.1,
            z_loss=0.01,
            return_stats=("entropy", "rank"),
            **how,
        )
        masked = jl.linear_softmax_cross_entropy(
            hidden, kernel, ids, bias, where=mask, **how
        )
        of_top = jl.linear_softmax_cross_entropy_with_top_k_labels(
            hidden, kernel, top, share.astype(np.float32), bias, rest="bucket", **how
        )
        return (per_class, masked, of_top), stats

    def total(strategy: str, *arrays: Any) -> Any:
        losses, stats = all_of(strategy, *arrays)
        terms = [jnp.sum(jnp.where(jnp.isnan(a), 0, a) ** 2) for a in losses]
        return sum(terms), (losses, stats)

    def run(strategy: str, *arrays: Any) -> Any:
        of = functools.partial(total, strategy)
        return jax.jit(jax.value_and_grad(of, (0, 1, 2, 3), has_aux=True))(*arrays)

    want = run("dense", hidden, kernel, bias, weights)
    mesh = make_mesh((2, 4))
    parts = ("data",), ("model",) if layout == "vd" else (None, "model"), ("model",)
    if classes % 4:  # nothing but the examples is split
        parts = ("data",), (), ()
    with jax.set_mesh(mesh):
        arrays = (hidden, kernel, bias, weights)
        placed = (
            put(mesh, a, *p) for a, p in zip(arrays, (*parts, parts[2]), strict=True)
        )
        got = run("vocab", *placed)

    def same(a: Any, b: Any) -> None:
        largest = np.nanmax(np.abs(a), initial=0)
        np.testing.assert_allclose(a, b, rtol=5e-6, atol=5e-7 * largest)

    jax.tree.map(same, want, got)


def test_auto_takes_pieces_of_strips_that_are_whole_tiles() -> None:
    def strategy(classes: int) -> str:
        shapes = (4096, 4096), (4096, classes)
        head = (jax.ShapeDtypeStruct(shape, "bfloat16") for shape in shapes)
        return jl.testing.plan(*head, platform="tpu").strategy

    # The kernel's gradient in float32 takes more than all logits of a device.
    assert strategy(256000) == "tokens"  # nobody knows the devices
    with jax.set_mesh(make_mesh((2, 4))):
        assert strategy(256000) == "vocab"
        assert strategy(128256) == "tokens"  # eighths of which would be copied


@pytest.mark.alternate
@pytest.mark.parametrize("head", [False, True])
def test_classes_that_do_not_divide_are_filled_up_and_masked(head: bool) -> None:
    rng = np.random.default_rng(0)
    V, filled = 21, 24
    kernel = rng.normal(size=(FEATURES, filled)).astype(np.float32)
    hidden = rng.normal(size=(B, FEATURES)).astype(np.float32)
    ids = rng.integers(0, V, B)
    exists = np.arange(filled) < V

    def total(kernel: jax.Array, where: Any, axis_name: str | None) -> jax.Array:
        if head:
            loss = jl.linear_softmax_cross_entropy(
                hidden, kernel, ids, where=where, axis_name=axis_name, strategy="vocab"
            )
        else:
            loss = jl.softmax_cross_entropy_with_integer_labels(
                hidden @ kernel,
                ids,
                where=None if where is None else where[None],
                axis_name=axis_name,
            )
        return jnp.sum(loss**2)

    value, gradient = jax.value_and_grad(
        jax.shard_map(
            functools.partial(total, axis_name="model"),
            mesh=make_mesh((1, 8)),
            in_specs=(P(None, "model"), P("model")),
            out_specs=P(),
        )
    )(kernel, exists)
    one_device = functools.partial(total, where=None, axis_name=None)
    want, want_gradient = jax.value_and_grad(one_device)(kernel[:, :V])
    np.testing.assert_allclose(value, want, rtol=2e-6)
    size = np.abs(want_gradient).max()
    np.testing.assert_allclose(gradient[:, :V], want_gradient, rtol=0, atol=1e-6 * size)
    assert not gradient[:, V:].any()


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_classes_that_do_not_divide_are_refused_by_jax(kind: str) -> None:
    mesh = typed_mesh((1, 8), kind)
    with pytest.raises(ValueError, match="evenly divide"):
        put(mesh, np.zeros((B, 21), np.float32), None, "model")


def test_classes_that_do_not_divide_may_be_split_inside_jit() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(B, 21)).astype(np.float32)
    ids = rng.integers(0, 21, B)
    over_classes = jax.sharding.NamedSharding(make_mesh((1, 8)), P(None, "model"))

    def mean(z: jax.Array) -> jax.Array:
        z = jax.lax.with_sharding_constraint(z, over_classes)
        return jl.softmax_cross_entropy_with_integer_labels(z, ids, reduction="mean")

    compiled = jax.jit(jax.value_and_grad(mean)).lower(logits).compile()
    value, gradient = compiled(logits)
    np.testing.assert_allclose(value, oracle.loss(logits, ids).mean(), rtol=2e-6)
    exact = oracle.gradients(logits, ids, reduction="mean")["logits"]
    np.testing.assert_allclose(gradient, exact, rtol=1e-5, atol=1e-9)
    reduced = [c.size for c in collectives(compiled) if c.what == "all-reduce"]
    assert reduced
    assert max(reduced) <= B


@pytest.mark.without_llvm_passes
def test_split_logits_serve_forward_mode_second_derivatives_and_vmap() -> None:
    rng = np.random.default_rng(0)
    logits, direction = (rng.normal(size=(B, V)).astype(np.float32) for _ in range(2))
    ids = rng.integers(0, V, B)

    def derivatives(axis_name: str | None, z: Any, v: Any) -> Any:
        def loss_of(z: jax.Array, y: jax.Array, forward_mode: bool) -> jax.Array:
            return jl.softmax_cross_entropy_with_integer_labels(
                z, y, axis_name=axis_name, forward_mode=forward_mode
            )

        push = jax.jvp(lambda z: loss_of(z, ids, True), (z,), (v,))[1]
        gradient = jax.grad(lambda z: jnp.sum(loss_of(z, ids, False) ** 2))
        product = jax.jvp(gradient, (z,), (v,))[1]
        each = jax.vmap(functools.partial(loss_of, forward_mode=False))(z, ids)
        return push, product, each

    split = jax.shard_map(
        functools.partial(derivatives, "model"),
        mesh=make_mesh((1, 8)),
        in_specs=(P(None, "model"),) * 2,
        out_specs=(P(), P(None, "model"), P()),
    )
    got = jax.jit(split)(logits, direction)
    want = derivatives(None, logits, direction)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), want, got
    )


@pytest.mark.alternate
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize("dense", [False, True])
def test_mean_over_explicit_axes_divides_by_the_weights_of_all_examples(
    dense: bool,
) -> None:
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(B, FEATURES)).astype(np.float32)
    kernel = (rng.normal(size=(FEATURES, CLASSES)) / 4).astype(np.float32)
    weights = rng.integers(1, 5, B)  # exact in bfloat16
    labels: Any = rng.integers(0, CLASSES, B)
    if dense:  # one distribution for all
        labels = rng.dirichlet(np.ones(CLASSES), 1).astype(np.float32)
    mesh = typed_mesh((2, 4), "Explicit")
    with jax.set_mesh(mesh):
        got = jl.linear_softmax_cross_entropy(
            put(mesh, hidden, "data"),
            put(mesh, kernel, None, "model"),
            put(mesh, labels, None if dense else "data"),
            weights=put(mesh, weights.astype(jnp.bfloat16), "data"),
            reduction="mean",
        )
    logits = hidden.astype(np.float64) @ kernel.astype(np.float64)
    want = oracle.loss(
        logits, np.broadcast_to(labels, (B, CLASSES)) if dense else labels
    )
    np.testing.assert_allclose(got, np.average(want, weights=weights), rtol=2e-6)


def test_classes_split_by_hand_and_by_type_at_once() -> None:
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(B, FEATURES)).astype(np.float32)
    kernel = (rng.normal(size=(FEATURES, CLASSES)) / 4).astype(np.float32)
    labels = rng.integers(0, CLASSES, B)
    mesh = typed_mesh((2, 4), "Explicit")

    def loss(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
        return jl.linear_softmax_cross_entropy(
            hidden, kernel, labels, reduction="mean", axis_name="data"
        )

    with jax.set_mesh(mesh):
        by_hand = jax.shard_map(
            loss,
            in_specs=(P(), P(None, "data"), P()),
            out_specs=P(),
            axis_names={"data"},
        )
        placed = put(mesh, kernel, None, ("data", "model"))
        arrays = (put(mesh, hidden), placed, put(mesh, labels))
        got = jax.jit(by_hand)(*arrays)
    want = oracle.loss(hidden.astype(np.float64) @ kernel.astype(np.float64), labels)
    np.testing.assert_allclose(got, want.mean(), rtol=2e-6)
