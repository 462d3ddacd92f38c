"""Any loss of the statistics of each example, and what its function may do."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import PAGE, STRATEGIES, page, sweep, turns
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_recipes import RECIPES

import jaxlosses as jl

pytestmark = pytest.mark.without_llvm_passes

T, D, V = 26, 6, 33
Args = tuple[Any, ...]


class Problem:
    """A head, of whose examples some do not count, and what losses take beside."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.hidden = rng.normal(size=(T, D)).astype(np.float32)
        self.kernel = rng.normal(size=(D, V)).astype(np.float32)
        self.labels = rng.integers(0, V, T)
        self.labels[[0, 7, 25]] = -100
        self.old = rng.uniform(-6, -2, T).astype(np.float32)
        self.reference = rng.uniform(-6, -2, T).astype(np.float32)
        self.advantages = rng.normal(size=T).astype(np.float32)

    @property
    def head(self) -> Args:
        return self.hidden, self.kernel

    def loss(self, function: Any, strategy: str = "tokens", **options: Any) -> Any:
        """The loss as a function of what is differentiated."""
        given = {"ignore_index": -100, "strategy": strategy} | options
        if strategy != "auto":
            given["workspace_bytes"] = 8 * V * 4  # four chunks or more

        def loss(hidden: Any, kernel: Any, *args: Any) -> Any:
            return jl.linear_softmax_loss(
                function, hidden, kernel, self.labels, *args, **given
            )

        return loss


# --- The losses of the page, beside textbook forms on all logits in float64.

Textbook = Callable[..., Any]


def clipped(ratio: Any, advantages: Any) -> Any:
    return jnp.where(
        advantages > 0,
        jnp.minimum(ratio, 1.2) * advantages,
        jnp.maximum(ratio, 0.8) * advantages,
    )


def cosface(z: Any, at: Any) -> Any:
    scale, margin = 16.0, 0.35
    z = jnp.where(at, z - scale * margin, z)
    return -jnp.sum(jnp.where(at, jax.nn.log_softmax(z), 0), -1)


# Of the label's log-probability, all logits, which of them is the label's, and args.
TEXTBOOK: dict[str, tuple[Textbook, tuple[str, ...]]] = {
    "grpo": (
        lambda lp, z, at, old, ref, a: (
            0.04 * (jnp.exp(ref - lp) - (ref - lp) - 1) - clipped(jnp.exp(lp - old), a)
        ),
        ("old", "reference", "advantages"),
    ),
    "ppo": (
        lambda lp, z, at, old, a: (
            -clipped(jnp.exp(lp - old), a)
            + 0.01 * jnp.sum(jax.nn.softmax(z) * jax.nn.log_softmax(z), -1)
        ),
        ("old", "advantages"),
    ),
    "rloo": (lambda lp, z, at, a: -a * lp, ("advantages",)),
    "cispo": (
        lambda lp, z, at, old, a: (
            -jnp.minimum(jax.lax.stop_gradient(jnp.exp(lp - old)), 1.2) * a * lp
        ),
        ("old", "advantages"),
    ),
    "dft": (lambda lp, z, at: -jax.lax.stop_gradient(jnp.exp(lp)) * lp, ()),
    "focal": (lambda lp, z, at: -((1 - jnp.exp(lp)) ** 2) * lp, ()),
    "poly_1": (lambda lp, z, at: -lp + 1 - jnp.exp(lp), ()),
    "generalised": (lambda lp, z, at: (1 - jnp.exp(lp) ** 0.7) / 0.7, ()),
    "cosface": (lambda lp, z, at: cosface(z, at), ()),
}


def textbook(problem: Problem, name: str) -> tuple[Any, Any]:
    """The sum, and its gradients, on all logits in float64."""
    function, names = TEXTBOOK[name]
    counted = problem.labels >= 0

    def total(hidden: Any, kernel: Any, *args: Any) -> Any:
        z = hidden @ kernel
        at = jnp.arange(V)[None] == problem.labels[:, None]
        lp = jnp.sum(jnp.where(at, jax.nn.log_softmax(z), 0), -1)
        return jnp.sum(jnp.where(counted, function(lp, z, at, *args), 0))

    with jax.enable_x64(True):
        args = [getattr(problem, name) for name in names]
        given = [np.asarray(a, np.float64) for a in (*problem.head, *args)]
        return jax.value_and_grad(total, tuple(range(len(given))))(*given)


def assert_close(got: Any, want: Any, rtol: float = 2e-5) -> None:
    value, gradient = got
    np.testing.assert_allclose(value, want[0], rtol=rtol)
    for d, exact in zip(gradient, want[1], strict=True):
        scale = np.abs(exact).max()
        np.testing.assert_allclose(d, exact, rtol=rtol, atol=rtol * scale)


CASES = [(name, strategy) for name in TEXTBOOK for strategy in (*STRATEGIES, "auto")]


@pytest.mark.alternate(4)
@pytest.mark.parametrize(
    ("name", "strategy"),
    sweep(CASES, lambda name, strategy: strategy == "tokens" or name == "ppo"),
)
def test_losses_of_the_page_are_those_of_the_textbook(name: str, strategy: str) -> None:
    problem = Problem()
    uses_entropy = name == "ppo"
    loss = problem.loss(page()[name], strategy, uses_entropy=uses_entropy)
    args = [getattr(problem, name) for name in TEXTBOOK[name][1]]
    every = tuple(range(2 + len(args)))
    got = jax.jit(jax.value_and_grad(loss, every))(*problem.head, *args)
    assert_close(got, textbook(problem, name))


def test_every_loss_of_the_page_is_tested() -> None:
    defined = {n for n, f in page().items() if getattr(f, "__module__", 0) is None}
    functions = re.findall(r"^def (\w+)\(", PAGE.read_text("utf-8"), re.MULTILINE)
    assert defined <= set(functions)
    assert set(functions) - {"sums", "dpo", "gspo"} == set(TEXTBOOK) | RECIPES


def test_losses_of_sequences_are_those_of_the_textbook() -> None:
    problem, sequences = Problem(), np.repeat(np.arange(4), (5, 8, 9, 4))
    rewards = problem.advantages[:4]
    exact_rewards = rewards.astype(np.float64)

    def ours(hidden: Any, kernel: Any) -> Any:
        log_probs = jl.linear_softmax_log_probs(
            hidden, kernel, problem.labels, ignore_index=-100, strategy="recompute"
        )
        old = jnp.where(problem.labels < 0, 0, problem.old)
        first = page()["dpo"](log_probs, old, sequences, 2)
        return first + page()["gspo"](log_probs, old, sequences, rewards)

    def exact(hidden: Any, kernel: Any) -> Any:
        at = jnp.arange(V)[None] == problem.labels[:, None]
        log_p = jax.nn.log_softmax(hidden @ kernel)
        gain = jnp.sum(jnp.where(at, log_p - np.float64(problem.old)[:, None], 0), -1)
        s = jnp.stack([gain[sequences == i].sum() for i in range(4)])
        dpo = -jnp.mean(jax.nn.log_sigmoid(0.1 * (s[::2] - s[1::2])))
        ratio = jnp.exp(s / np.array((5.0, 8.0, 9.0, 4.0)))
        cut = jnp.clip(ratio, 1 - 3e-4, 1 + 4e-4)
        return dpo - jnp.mean(jnp.minimum(ratio * exact_rewards, cut * exact_rewards))

    got = jax.value_and_grad(ours, (0, 1))(*problem.head)
    with jax.enable_x64(True):
        given = [np.asarray(a, np.float64) for a in problem.head]
        assert_close(got, jax.value_and_grad(exact, (0, 1))(*given))


# --- Beside the loss and the log-probabilities.


def nll(rows: jl.Rows) -> jax.Array:
    return rows.nll


@pytest.mark.alternate
@pytest.mark.parametrize(
    ("strategy", "reduction"), turns([*STRATEGIES, "auto"], ["sum", "mean"])
)
def test_the_likelihood_alone_has_the_bits_of_the_loss(
    strategy: str, reduction: Any
) -> None:
    problem = Problem()
    weights = np.linspace(0.1, 2, T, dtype=np.float32)
    options = {"reduction": reduction, "weights": weights, "logit_softcap": 5.0}
    loss = problem.loss(nll, strategy, **options)

    def plain(hidden: Any, kernel: Any) -> Any:
        given = {} if strategy == "auto" else {"workspace_bytes": 8 * V * 4}
        return jl.linear_softmax_cross_entropy(
            hidden,
            kernel,
            problem.labels,
            strategy=strategy,
            ignore_index=-100,
            **given,
            **options,
        )

    ours = jax.value_and_grad(loss, (0, 1))(*problem.head)
    theirs = jax.value_and_grad(plain, (0, 1))(*problem.head)
    np.testing.assert_array_equal(ours[0], theirs[0])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
        ours[1],
        theirs[1],
    )


@pytest.mark.alternate
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rows_are_the_statistics_of_each_example(strategy: str) -> None:
    problem = Problem()

    def all_of_them(rows: jl.Rows) -> Any:
        return rows.nll, rows

    loss = problem.loss(all_of_them, strategy, uses_entropy=True, logit_scale=0.5)
    _, rows = loss(*problem.head)
    z = 0.5 * problem.hidden.astype(np.float64) @ problem.kernel
    lse = np.log(np.exp(z).sum(-1))
    p, on = np.exp(z - lse[:, None]), problem.labels >= 0
    at_label = z[np.arange(T), problem.labels * on]
    exact = jl.Rows(lse - at_label, lse, -(p * np.log(p)).sum(-1), at_label)
    for got, want in zip(rows, exact, strict=True):
        np.testing.assert_allclose(got, np.where(on, want, 0), rtol=2e-6, atol=1e-6)
    log_probs = jl.linear_softmax_log_probs(
        *problem.head,
        problem.labels,
        ignore_index=-100,
        logit_scale=0.5,
        strategy="recompute" if strategy == "tokens" else strategy,  # type: ignore
        workspace_bytes=8 * V * 4,
    )
    np.testing.assert_array_equal(log_probs, -rows.nll)


# --- What a function may do.


@pytest.mark.alternate(4)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_it_closes_over_gets_its_gradient(strategy: str) -> None:
    problem = Problem()

    def closed(beta: Any, hidden: Any) -> Any:
        loss = problem.loss(lambda rows: beta["b"] * rows.nll**2, strategy)
        return loss(hidden, problem.kernel)

    def passed(beta: Any, hidden: Any) -> Any:
        loss = problem.loss(lambda rows, b: b * rows.nll**2, strategy)
        return loss(hidden, problem.kernel, jnp.broadcast_to(beta["b"], (T,)))

    derivatives = {
        "eager": jax.value_and_grad(closed, (0, 1)),
        "jit": jax.jit(jax.value_and_grad(closed, (0, 1))),
        "checkpoint": jax.grad(jax.checkpoint(closed), (0, 1)),
    }
    for beta in (0.3, 2.0):  # a compiled function does not keep the first
        at = {"b": jnp.float32(beta)}
        value, gradient = jax.value_and_grad(passed, (0, 1))(at, problem.hidden)
        for name, function in derivatives.items():
            want = gradient if name == "checkpoint" else (value, gradient)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
                function(at, problem.hidden),
                want,
            )
    betas = {"b": jnp.array([0.3, 2.0])}
    many = jax.vmap(jax.grad(closed), (0, None))(betas, problem.hidden)
    np.testing.assert_allclose(many["b"], jnp.full(2, gradient[0]["b"]), rtol=1e-5)
    # Linear in beta, and quadratic in what the hidden states make of it.
    twice = jax.jacrev(jax.grad(closed, 1))(at, problem.hidden)["b"]
    np.testing.assert_allclose(2 * twice[..., 0], gradient[1][..., 0], rtol=2e-5)


def test_stop_gradient_is_heeded() -> None:
    problem = Problem()

    def weighed(rows: jl.Rows) -> jax.Array:
        return jax.lax.stop_gradient(jnp.exp(-rows.nll)) * rows.nll

    def given(rows: jl.Rows, weight: jax.Array) -> jax.Array:
        return weight * rows.nll

    p = jnp.exp(jl.linear_softmax_log_probs(*problem.head, problem.labels * 0 + 3))
    problem.labels[:] = 3
    got = jax.grad(problem.loss(weighed))(*problem.head)
    want = jax.grad(problem.loss(given))(*problem.head, p)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)


@pytest.mark.alternate
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_aux_is_of_each_example_and_has_no_gradient(strategy: str) -> None:
    problem = Problem()

    def both(rows: jl.Rows, old: jax.Array) -> Any:
        ratio = jnp.exp(-rows.nll - old)
        return rows.nll, {"ratio": ratio, "far": (jnp.abs(ratio - 1) > 0.2, rows.nll)}

    loss = problem.loss(both, strategy)
    (value, aux), gradient = jax.value_and_grad(loss, has_aux=True)(
        *problem.head, problem.old
    )
    on = problem.labels >= 0
    assert aux["ratio"].shape == (T,)
    assert aux["far"][0].dtype == bool
    np.testing.assert_array_equal(aux["ratio"] == 0, ~on)
    np.testing.assert_allclose(aux["far"][1].sum(), value, rtol=1e-6)
    plain = jax.grad(problem.loss(nll, strategy))(*problem.head)
    np.testing.assert_array_equal(gradient, plain)
    by_aux = jax.grad(lambda h: loss(h, problem.kernel, problem.old)[1]["ratio"].sum())
    np.testing.assert_array_equal(by_aux(problem.hidden), 0)


@pytest.mark.alternate
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_examples_that_do_not_count_add_nothing(strategy: str) -> None:
    problem = Problem()
    off = problem.labels < 0

    def risky(rows: jl.Rows, scale: jax.Array) -> jax.Array:
        # Infinite, and of infinite slope, where rows and args are zeros or NaN.
        return jnp.log(rows.nll) / scale

    scale = np.where(off, np.nan, 2).astype(np.float32)
    hidden = np.where(off[:, None], np.nan, problem.hidden).astype(np.float32)
    loss = problem.loss(risky, strategy)
    value, gradient = jax.value_and_grad(loss, (0, 1, 2))(hidden, problem.kernel, scale)
    assert np.isfinite(value)
    d_hidden, d_kernel, d_scale = gradient
    np.testing.assert_array_equal(d_hidden[off], 0)
    np.testing.assert_array_equal(d_scale[off], 0)
    assert np.isfinite(d_kernel).all()
    assert (d_scale[~off] != 0).all()
    # Zero weights are no different.
    again = problem.loss(risky, strategy, ignore_index=None, weights=~off)
    problem.labels[off] = V + 1
    assert again(hidden, problem.kernel, scale) == value


@pytest.mark.alternate
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_bad_label_is_loud_whatever_the_function_makes_of_it(strategy: str) -> None:
    problem = Problem()
    problem.labels[4] = V

    def forgets(rows: jl.Rows) -> jax.Array:
        return jnp.where(rows.nll > 1, rows.nll, 0)

    value, gradient = jax.value_and_grad(problem.loss(forgets, strategy))(*problem.head)
    assert np.isnan(value)
    np.testing.assert_array_equal(np.isnan(gradient).all(-1), np.arange(T) == 4)


@pytest.mark.alternate
@pytest.mark.parametrize("strategy", ["recompute", "vocab", "dense"])
def test_forward_mode(strategy: str) -> None:
    problem = Problem()
    loss = problem.loss(page()["ppo"], strategy, forward_mode=True, uses_entropy=True)
    given = (*problem.head, problem.old, problem.advantages)
    forward = jax.jacfwd(lambda h: loss(h, *given[1:]))(given[0])
    reverse = jax.grad(lambda h: loss(h, *given[1:]))(given[0])
    np.testing.assert_allclose(forward, reverse, rtol=2e-5, atol=1e-6)


# --- Devices and programs.


def mesh_of(kind: AxisType) -> Any:
    return jax.make_mesh((2, 4), ("data", "model"), (kind,) * 2)


@pytest.mark.alternate
@pytest.mark.parametrize(
    ("strategy", "kind"), turns(STRATEGIES, [AxisType.Explicit, AxisType.Auto])
)
def test_meshes_of_either_kind(strategy: str, kind: AxisType) -> None:
    problem = Problem()
    args = problem.old, problem.advantages
    loss = problem.loss(page()["ppo"], strategy, uses_entropy=True)
    mesh = mesh_of(kind)
    splits = P("data", None), P(None, None), P("data"), P("data")
    given = [
        jax.device_put(a, NamedSharding(mesh, split))
        for a, split in zip((*problem.head, *args), splits, strict=True)
    ]
    with jax.set_mesh(mesh):
        got = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(*given)
    want = Problem()
    exact = jax.value_and_grad(
        want.loss(page()["ppo"], "dense", uses_entropy=True), (0, 1, 2, 3)
    )(*want.head, *args)
    assert_close(got, exact)


def test_explicit_axes_take_no_closure_and_say_what_to_do() -> None:
    problem = Problem()
    hidden = jax.device_put(
        problem.hidden, NamedSharding(mesh_of(AxisType.Explicit), P("data"))
    )

    def by(beta: Any) -> Any:
        return problem.loss(lambda rows: beta * rows.nll)(hidden, problem.kernel)

    with pytest.raises(ValueError, match=r"^function: ") as raised:
        jax.grad(by)(2.0)
    assert str(raised.value) == (
        "function: got one that closes over arrays, on a mesh of explicit axes, "
        "expected one of Rows and args alone. Pass what it needs in args, as "
        "jnp.broadcast_to(x, labels.shape)."
    )


class Parts:
    """A mean over parts of examples and of classes; some devices have nothing."""

    def __init__(self, strategy: str) -> None:
        self.problem = Problem()
        self.problem.labels[13:] = -100
        self.kernel = np.pad(self.problem.kernel, ((0, 0), (0, 3)))
        self.strategy = strategy

    def mean(self, closes: bool) -> Any:
        """Of a coefficient, which the function takes or closes over, and the head."""

        def part(beta: Any, hidden: Any, kernel: Any, labels: Any, exists: Any) -> Any:
            def own(rows: jl.Rows, beta: Any = beta) -> jax.Array:
                return beta * rows.nll - rows.entropy

            return jl.linear_softmax_loss(
                own,
                hidden,
                kernel,
                labels,
                *(() if closes else (jnp.broadcast_to(beta, labels.shape),)),
                ignore_index=-100,
                where=exists,
                uses_entropy=True,
                reduction="mean",
                strategy=self.strategy,  # type: ignore[call-overload]
                workspace_bytes=8 * V * 4,
                axis_name="model",
                batch_axis_name="data",
            )

        split = jax.shard_map(
            part,
            mesh=mesh_of(AxisType.Auto),
            in_specs=(P(), P("data"), P(None, "model"), P("data"), P("model")),
            out_specs=P(),
        )

        def mean(beta: Any, hidden: Any, kernel: Any) -> Any:
            exists = np.arange(V + 3) < V
            return split(beta, hidden, kernel, self.problem.labels, exists)

        return mean


@pytest.mark.alternate(3)
@pytest.mark.parametrize(
    ("strategy", "closes"),
    [
        *((strategy, True) for strategy in ("auto", "recompute", "vocab", "dense")),
        ("tokens", False),
        ("auto", False),
    ],
)
def test_parts_of_examples_and_of_classes_by_hand(strategy: str, closes: bool) -> None:
    parts = Parts(strategy)
    given = parts.problem.hidden, parts.kernel
    mean = parts.mean(closes)

    def doubled(beta: Any, hidden: Any, kernel: Any) -> Any:
        return 2 * mean(beta, hidden, kernel)

    got = jax.jit(jax.value_and_grad(doubled, (0, 1, 2)))(0.7, *given)
    whole = parts.problem.loss(
        lambda rows, beta: beta * rows.nll - rows.entropy,
        "dense",
        uses_entropy=True,
        reduction="mean",
    )

    def plain(beta: Any, hidden: Any, kernel: Any) -> Any:
        return 2 * whole(hidden, kernel[:, :V], jnp.broadcast_to(beta, (T,)))

    want = jax.value_and_grad(plain, (0, 1, 2))(0.7, *given)
    assert_close(got, want)


def test_what_devices_share_is_no_closure_of_tokens() -> None:
    parts = Parts("tokens")
    with pytest.raises(ValueError, match=r"^strategy: ") as raised:
        jax.grad(parts.mean(True))(0.7, parts.problem.hidden, parts.kernel)
    assert str(raised.value) == (
        'strategy: got "tokens" with a function that closes over what all devices of a '
        'shard_map share, expected "auto", "recompute", "vocab" or "dense". Or pass '
        "what it needs in args, as jnp.broadcast_to(x, labels.shape)."
    )


@pytest.mark.alternate
@pytest.mark.parametrize("strategy", sweep(STRATEGIES, lambda s: s != "dense"))
def test_export_with_any_number_of_examples(strategy: str) -> None:
    problem = Problem()
    (batch,) = export.symbolic_shape("b")

    def step(hidden: Any, kernel: Any, labels: Any, advantages: Any) -> Any:
        return jax.value_and_grad(
            lambda h, k: jl.linear_softmax_loss(
                page()["rloo"],
                h,
                k,
                labels,
                advantages,
                strategy=strategy,  # type: ignore[call-overload]
            ),
            (0, 1),
        )(hidden, kernel)

    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((batch, D), np.float32),
            ((D, V), np.float32),
            ((batch,), np.int32),
            ((batch,), np.float32),
        )
    ]
    exported = export.export(jax.jit(step), platforms=("cpu", "cuda", "tpu"))(*shapes)
    labels = np.abs(problem.labels).astype(np.int32) % V
    for n in (T, 5):
        given = problem.hidden[:n], problem.kernel, labels[:n], problem.advantages[:n]
        assert_close(exported.call(*given), step(*given))


def test_three_matmuls_and_no_logits_at_once() -> None:
    tokens, classes = 64, 128
    shapes = [
        jax.ShapeDtypeStruct(shape, np.float32)
        for shape in ((tokens, D), (D, classes), (tokens,), (tokens,))
    ]
    labels = np.zeros(tokens, np.int32)

    def loss(hidden: Any, kernel: Any, old: Any, advantages: Any) -> Any:
        return jl.linear_softmax_loss(
            page()["ppo"],
            hidden,
            kernel,
            labels,
            old,
            advantages,
            uses_entropy=True,
            strategy="tokens",
            workspace_bytes=tokens * classes,
        )

    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))
    text = step.lower(*shapes).compile().as_text()
    matmuls = re.findall(r" dot\(|custom-call.*[Mm]at[Mm]ul", text)
    assert len(matmuls) == 3
    assert f"f32[{tokens},{classes}]" not in text


def test_a_function_that_comes_again_is_not_compiled_again() -> None:
    problem = Problem()
    traced = []

    def counting(rows: jl.Rows) -> jax.Array:
        traced.append(rows.nll.shape)
        return rows.nll

    loss = problem.loss(counting)
    first = loss(*problem.head)
    traced.clear()
    assert loss(*problem.head) == first
    # It is tried once on what it gets; JAX may even remember that.
    assert len(traced) <= 1
