"""Divergences from a teacher: every digit near convergence, and nothing below 0."""

import functools
import itertools
from collections.abc import Callable
from typing import Any
from unittest import mock

import divergences
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from divergences import DIRECTIONS
from helpers import assert_all_zero, on_one_device, sweep, turns
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from mpmath import mp

import jaxlosses as jl
from jaxlosses._backends import blocks
from jaxlosses._math import ratios

NAN, INF = np.nan, np.inf
Loss = Callable[..., Any]


def fused(strategy: str, head: bool) -> Loss:
    """The fused function as one of logits, whose product with an identity is exact."""

    def loss(logits: Any, teacher: Any, **options: Any) -> Any:
        kernel = jnp.eye(np.shape(logits)[-1], dtype=jnp.float32)
        given: dict[str, Any] = {"teacher_logits": teacher}
        if head:
            given = {"teacher_hidden": teacher, "teacher_kernel": kernel}
        options = {"strategy": strategy, "workspace_bytes": 640} | given | options
        return jl.linear_softmax_kl_divergence(logits, kernel, **options)

    return loss


def in_blocks(logits: Any, teacher: Any, **options: Any) -> Any:
    """The one of given logits as a CPU takes it, four rows at a time."""
    with mock.patch.object(blocks, "BLOCK_SIZE", 2 * 4 * logits.shape[-1]):
        run = on_one_device(lambda s, t: jl.softmax_kl_divergence(s, t, **options))
        return run(logits, teacher)


STRATEGIES = ("tokens", "recompute", "dense")
DIVERGENCES: dict[str, Loss] = {
    "logits": jl.softmax_kl_divergence,
    **{
        f"fused, {strategy}, {kind}": fused(strategy, kind == "head")
        for strategy in STRATEGIES
        for kind in ("head", "given")
    },
}
BY_NAME = DIVERGENCES | {"in blocks": in_blocks}
OF_EACH = [name for name in DIVERGENCES if "tokens" not in name]
by_function = pytest.mark.parametrize("name", DIVERGENCES)
by_direction = pytest.mark.parametrize("direction", DIRECTIONS)


@functools.cache
def rows(
    classes: int, noise: float, number: int = 10, shift: float = 3.0
) -> tuple[np.ndarray, np.ndarray]:
    """A student near its teacher, at several scales, and shifted: it is the same."""
    rng = np.random.default_rng(classes)
    scale = np.resize([0.1, 1.0, 5.0, 20.0], (number, 1))
    teacher = (scale * rng.normal(size=(number, classes))).astype(np.float32)
    student = teacher + noise * rng.normal(size=teacher.shape)
    student = student + shift * rng.normal(size=(number, 1))
    return student.astype(np.float32), teacher


def check(
    name: str,
    student: Any,
    teacher: Any,
    bar: float = 1e-5,
    dtype: Any = np.float32,
    **options: Any,
) -> None:
    """Values and gradients beside exact ones; a gradient by its row's largest."""
    student, teacher = (jnp.asarray(a, dtype) for a in (student, teacher))
    exact = {**options}
    if exact.get("where") is not None:
        options = options | {"where": jnp.asarray(exact["where"])}
        if name == "logits" and exact["where"].ndim == 1:
            options["where"] = options["where"][None]
    want, slope = divergences.exact(
        np.asarray(student, np.float64), np.asarray(teacher, np.float64), **exact
    )
    weights = jnp.asarray(np.resize([1.0, 0.5, 2.0], len(want)), student.dtype)
    summed = "tokens" in name

    def run(z: Any) -> Any:
        values = BY_NAME[name](
            z,
            teacher,
            weights=weights,
            reduction="sum" if summed else "none",
            **options,
        )
        return jnp.sum(values), values

    (_, found), gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(student)
    of_rows = np.asarray(weights, np.float64)
    want, slope = want * of_rows, slope * of_rows[:, None]
    want = want.sum() if summed else want
    tiny = 1e3 * float(jnp.finfo(found.dtype).tiny)
    assert found.dtype == (np.float64 if dtype == np.float64 else np.float32)
    assert gradient.dtype == student.dtype
    assert np.all(found >= 0)
    np.testing.assert_allclose(np.asarray(found, np.float64), want, bar, tiny)
    largest = abs(slope).max(1, keepdims=True)
    rounding = 0 if student.dtype.itemsize > 2 else float(jnp.finfo(dtype).eps)
    tiny = 1e3 * float(jnp.finfo(gradient.dtype).tiny)
    error = abs(np.asarray(gradient, np.float64) - slope)
    assert np.all(error <= bar * largest + rounding * abs(slope) + tiny)


# Every digit


@pytest.mark.alternate(8)
@by_direction
@pytest.mark.parametrize(
    ("classes", "noise"),
    sweep(
        [(v, n) for v in (2, 7, 311) for n in (1e-4, 1e-2, 1.0, 10.0)],
        lambda v, n: v == 7 or (v, n) in ((2, 1e-2), (311, 1e-4)),
    ),
)
def test_every_digit_is_right_at_any_distance(
    direction: str, classes: int, noise: float
) -> None:
    student, teacher = rows(classes, noise, 4 if classes > 100 else 12)
    check("logits", student, teacher, direction=direction)
    if direction == "jensen_shannon":
        for weight in (1e-3, 0.02, 0.9):
            options = {"direction": direction, "teacher_weight": weight}
            check("logits", student, teacher, **options)


@pytest.mark.alternate(3)
@by_direction
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"where": np.random.default_rng(1).random((11, 523)) < 0.7},
        {"temperature": 0.7, "teacher_logit_softcap": 30.0},
    ],
)
def test_blocks_of_rows_have_the_same_digits(direction: str, options: Any) -> None:
    """Of rows that are no multiple of a block, and of its folds."""
    student, teacher = rows(523, 1e-2, 11)
    student[3] = teacher[3]
    check("in blocks", student, teacher, direction=direction, **options)


def test_a_bad_row_of_a_block_spoils_no_other() -> None:
    student, teacher = rows(529, 1e-2, 11)
    student[6, 528] = NAN
    weights = jnp.ones(11).at[2].set(0)
    found = in_blocks(jnp.asarray(student), teacher, weights=weights)
    assert np.flatnonzero(np.isnan(found)).tolist() == [6]
    assert found[2] == 0
    program = jax.jit(jax.grad(lambda s: in_blocks(s, teacher).sum()))
    assert " while(" in program.lower(jnp.asarray(student)).compile().as_text()


def test_the_curvature_of_a_forward_divergence_is_that_of_its_student() -> None:
    student, teacher = rows(7, 1.0, 1)
    run = jax.hessian(lambda z: jl.softmax_kl_divergence(z, teacher[0]))
    p = np.asarray(jl.softmax(student[0]), np.float64)
    found = jax.jit(run)(student[0])
    np.testing.assert_allclose(found, np.diag(p) - np.outer(p, p), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "direction", sweep(DIRECTIONS, lambda direction: direction == "jensen_shannon")
)
def test_a_gradient_is_the_only_array_of_the_size_of_logits(direction: str) -> None:
    logits = jax.ShapeDtypeStruct((256, 16001), jnp.float32)
    run = jax.grad(lambda s, t: in_blocks(s, t, direction=direction).sum())
    compiled = jax.jit(run).lower(logits, logits).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < logits.size


@pytest.mark.parametrize("weight", [1e-3, 0.5, 0.999])
def test_a_mixture_has_its_digits_beside_either_part(weight: float) -> None:
    """`log(m / s)`, also where the teacher has but a part of the mixture."""
    sizes = np.array([1e-3, 0.3, 0.6, 3.0, 20.0, 59.0, 61.0, 85.0], np.float32)
    lead = np.concatenate([sizes, -sizes])
    part = np.float32(weight)
    with mp.workdps(60):
        b = mp.mpf(float(part))
        want = [float(mp.log(b * mp.exp(mp.mpf(float(d))) + 1 - b)) for d in lead]
    found = jax.jit(ratios.log_of_mixture)(lead, jnp.asarray(part), 1 - part)
    np.testing.assert_allclose(found, want, rtol=2e-6)


@pytest.mark.alternate
@by_direction
def test_a_confident_student_has_the_digits_of_its_own_entry(direction: str) -> None:
    student = np.array([[50.0, 0, 0], [30, 0, -1], [0, 80, 3]], np.float32)
    teacher = np.array([[5.0, 0, 1], [28, 1, 0], [0, 79, 9]], np.float32)
    check("logits", student, teacher, direction=direction)


def test_what_people_write_loses_the_digits_and_the_sign() -> None:
    student, teacher = rows(7, 1e-4, 40, shift=0.0)
    want, _ = divergences.exact(student, teacher)
    log_s, log_t = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
    textbook = jnp.sum(jnp.exp(log_t) * (log_t - log_s), -1)
    ours = jl.softmax_kl_divergence(student, teacher)
    assert np.max(abs(textbook / want - 1)) > 10
    assert np.min(textbook) < 0
    assert np.max(abs(ours / want - 1)) < 1e-5


@pytest.mark.alternate
@by_direction
def test_no_divergence_is_negative(direction: str) -> None:
    rng = np.random.default_rng(0)
    number = 10**5
    scale = np.exp(rng.uniform(-7, 5, size=(number, 1)))
    noise = np.exp(rng.uniform(-16, 5, size=(number, 1)))
    teacher = scale * rng.normal(size=(number, 5))
    student = teacher + noise * rng.normal(size=(number, 5))
    for dtype in (np.float32, jnp.bfloat16):
        both = (jnp.asarray(a, dtype) for a in (student, teacher))
        found = jl.softmax_kl_divergence(*both, direction=direction)
        assert found.min() >= 0
        assert np.isfinite(found).all()


@pytest.mark.alternate(8)
@pytest.mark.parametrize(
    ("name", "direction", "options"),
    turns(
        DIVERGENCES,
        DIRECTIONS,
        [
            {},
            {"temperature": 0.7},
            {"logit_softcap": 5.0, "teacher_logit_softcap": 5.0},
        ],
        of=4,
    ),
)
def test_equal_heads_are_exactly_zero(name: str, direction: str, options: Any) -> None:
    student, _ = rows(23, 0.0, 13)
    reduction = "sum" if "tokens" in name else "none"

    def run(z: Any) -> Any:
        values = DIVERGENCES[name](
            z, student, direction=direction, reduction=reduction, **options
        )
        return jnp.sum(values), values

    out = jax.jit(jax.value_and_grad(run, has_aux=True))(student)
    assert_all_zero(*jax.tree.leaves(out))


@pytest.mark.alternate(10)
@pytest.mark.parametrize(
    ("name", "direction", "options"),
    turns(
        DIVERGENCES,
        DIRECTIONS,
        [
            {"temperature": 2.5},
            {"logit_softcap": 5.0, "teacher_logit_softcap": 5.0, "temperature": 0.5},
            {"logit_softcap": 5.0},
            {"where": "classes", "teacher_logit_softcap": 30.0},
            {"where": "both", "temperature": 1.5},
        ],
        of=6,
    ),
)
def test_options_are_those_of_the_definition(
    name: str, direction: str, options: Any
) -> None:
    student, teacher = rows(23, 1.0, 13, shift=0.0)
    if "where" in options:
        mask = np.random.default_rng(0).random((13, 23)) < 0.7
        options = options | {
            "where": mask[0] if options["where"] == "classes" else mask
        }
    check(name, student, teacher, direction=direction, **options)


@pytest.mark.alternate(3)
@by_direction
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_dtypes_have_the_digits_of_their_sums(dtype: str, direction: str) -> None:
    student, teacher = rows(7, 1.0, 13)
    with jax.enable_x64(dtype == "float64"):
        bar = 1e-13 if dtype == "float64" else 1e-5
        check("logits", student, teacher, bar, jnp.dtype(dtype), direction=direction)
        if dtype == "float64":
            far = (a.astype(np.float64) for a in rows(7, 1e-4, 13))
            check("logits", *far, 1e-11, np.float64, direction=direction)


# Heads of their own


class Problem:
    """A student and a wider teacher, 13 examples of 23 classes."""

    def __init__(self, dtype: Any = jnp.float32) -> None:
        rng = np.random.default_rng(0)
        shapes = ((13, 5), (5, 23), (23,), (13, 7), (23, 7), (23,))
        arrays = [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]
        self.head, self.teacher = tuple(arrays[:3]), tuple(arrays[3:])
        self.weights = jnp.asarray(rng.integers(0, 3, size=13), jnp.float32)
        self.where = jnp.asarray(rng.random(23) < 0.8)

    def fused(self, *head: Any, **options: Any) -> Any:
        hidden, kernel, bias = self.teacher
        return jl.linear_softmax_kl_divergence(
            *head,
            teacher_hidden=hidden,
            teacher_kernel=kernel,
            teacher_bias=bias,
            teacher_kernel_layout="vd",
            where=self.where,
            weights=self.weights,
            **options,
        )

    def on_logits(self, *head: Any, **options: Any) -> Any:
        (hidden, kernel, bias), (other, table, beside) = head, self.teacher
        z = jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)
        t = jnp.dot(other, table.T, preferred_element_type=jnp.float32)
        z, t = (a + b.astype(a.dtype)[None] for a, b in ((z, bias), (t, beside)))
        where = self.where[None]
        return jl.softmax_kl_divergence(
            z, t, where=where, weights=self.weights, **options
        )


@pytest.mark.alternate(6)
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize(
    ("strategy", "reduction", "direction", "local"),
    [
        case
        for case in turns(
            STRATEGIES, ["sum", "mean", "none"], DIRECTIONS, [False, True], of=5
        )
        if case.values[:2] != ("tokens", "none")
    ],
)
def test_a_fused_divergence_is_that_of_the_logits(
    strategy: str, reduction: str, direction: str, local: bool
) -> None:
    options = {
        "direction": direction,
        "reduction": reduction,
        "temperature": 1.7,
        "logit_softcap": 5.0,
    }
    problem = Problem()

    def both(function: Loss, **more: Any) -> Any:
        def run(*head: Any) -> Any:
            return jnp.sum(jnp.square(function(*head, **options, **more)))

        run = jax.value_and_grad(run, (0, 1, 2))
        return jax.jit(on_one_device(run) if local else run)(*problem.head)

    want = both(problem.on_logits)
    found = both(problem.fused, strategy=strategy, workspace_bytes=700)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.max(abs(b)))


def test_sixteen_bits_are_multiplied_as_such_and_summed_in_32() -> None:
    problem = Problem(jnp.bfloat16)
    for strategy in STRATEGIES:
        mean = functools.partial(
            problem.fused, reduction="mean", strategy=strategy, workspace_bytes=700
        )
        found = jax.jit(jax.value_and_grad(mean, (0, 1, 2)))(*problem.head)
        want = problem.on_logits(*problem.head, reduction="mean")
        assert found[0].dtype == np.float32
        np.testing.assert_allclose(found[0], want, rtol=2e-6)
        assert all(d.dtype == jnp.bfloat16 for d in found[1])


def test_nothing_of_a_teacher_is_differentiated() -> None:
    problem = Problem()

    def run(teacher: Any, temperature: Any) -> Any:
        problem.teacher = teacher
        return problem.fused(
            *problem.head, temperature=temperature, reduction="sum", strategy="tokens"
        )

    given = (problem.teacher, jnp.float32(1.5))
    assert_all_zero(*jax.tree.leaves(jax.grad(run, (0, 1))(*given)))
    logits, teacher = rows(7, 1.0)
    assert_all_zero(
        jax.grad(lambda t: jl.softmax_kl_divergence(logits, t).sum())(teacher)
    )


def test_a_given_temperature_and_weight_never_retrace() -> None:
    logits, teacher = rows(7, 1.0)
    traces = []

    @jax.jit
    def run(temperature: Any, weight: Any) -> Any:
        traces.append(0)
        return jl.softmax_kl_divergence(
            logits,
            teacher,
            direction="jensen_shannon",
            temperature=temperature,
            teacher_weight=weight,
        )

    for temperature, weight in ((1.0, 0.5), (2.5, 0.1)):
        want, _ = divergences.exact(
            logits,
            teacher,
            "jensen_shannon",
            temperature=temperature,
            teacher_weight=weight,
        )
        np.testing.assert_allclose(run(temperature, weight), want, rtol=1e-5)
    assert len(traces) == 1


# Values that are no numbers


@pytest.mark.alternate(6)
@by_direction
@pytest.mark.parametrize("name", ["logits", "fused, recompute, given"])
def test_bad_rows_are_loud_and_alone(name: str, direction: str) -> None:
    student, teacher = (a.copy() for a in rows(6, 1.0, 8))
    teacher[1, 2] = NAN
    teacher[2, 3] = INF
    student[3, 1] = NAN
    student[4, 1] = NAN  # weight 0
    teacher[5] = NAN  # masked
    weights = np.ones(8, np.float32)
    weights[4] = 0
    where = np.ones(8, bool)
    where[5] = False

    def run(z: Any) -> Any:
        values = DIVERGENCES[name](
            z, teacher, direction=direction, weights=weights, where=where
        )
        return jnp.sum(values[jnp.array([0, 4, 5, 6, 7])]), values

    gradient, values = jax.jit(jax.grad(run, has_aux=True))(student)
    bad = np.isin(np.arange(8), (1, 2, 3))
    np.testing.assert_array_equal(np.isnan(values), bad)
    assert_all_zero(values[4:6], gradient[4:6])
    assert np.isfinite(gradient[np.array([0, 6, 7])]).all()
    gradient = jax.jit(jax.grad(lambda z: run(z)[1].sum()))(student)
    np.testing.assert_array_equal(np.isnan(gradient).all(1), bad)
    np.testing.assert_array_equal(np.isnan(gradient).any(1), bad)


@by_direction
def test_mass_against_none_is_infinite_and_none_against_none_nothing(
    direction: str,
) -> None:
    student = np.array([[0.0, -INF, 1.0], [0.0, 1.0, 2.0], [-INF, 1.0, -INF]])
    teacher = np.array([[1.0, -INF, 0.5], [0.0, -INF, 1.0], [0.0, 1.0, 0.5]])
    student, teacher = student.astype(np.float32), teacher.astype(np.float32)
    values, pull = jax.vjp(
        lambda z: jl.softmax_kl_divergence(z, teacher, direction=direction), student
    )
    (gradient,) = pull(jnp.ones(3))
    infinite = {
        "forward": [False, False, True],
        "reverse": [False, True, False],
        "jensen_shannon": [False, False, False],
    }[direction]
    np.testing.assert_array_equal(np.isinf(values), infinite)
    assert not np.isnan(values).any()
    assert np.isfinite(gradient).all()
    # What is so far behind has no mass in float64, either.
    far = (np.maximum(a, -1e4) for a in (student, teacher))
    want, slope = divergences.exact(*far, direction)
    finite = ~np.isinf(values)
    np.testing.assert_allclose(values[finite], want[finite], rtol=1e-6)
    np.testing.assert_allclose(gradient[finite], slope[finite], rtol=1e-5, atol=1e-7)
    assert gradient[0, 1] == 0


def test_an_example_of_weight_zero_has_no_part_whatever_it_holds() -> None:
    student, teacher = rows(5, 1.0, 3)
    student, teacher = student.copy(), teacher.copy()
    student[0], teacher[1, 2] = -INF, INF
    weights = jnp.array([0.0, 0.0, 1.0])
    for reduction in ("none", "sum", "mean"):

        def total(z: Any, w: Any, reduction: str = reduction) -> Any:
            values = jl.softmax_kl_divergence(
                z, teacher, weights=w, reduction=reduction
            )
            return jnp.sum(values)

        value, d = jax.jit(jax.value_and_grad(total, (0, 1)))(student, weights)
        want, _ = divergences.exact(student[2:], teacher[2:])
        np.testing.assert_allclose(value, want[0], rtol=1e-5)
        assert_all_zero(d[0][:2])
        if reduction != "mean":  # which has the weights in its denominator
            assert_all_zero(d[1][:2])


@pytest.mark.without_llvm_passes
def test_axes_shapes_and_nothing_at_all() -> None:
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
    axes: Any
    for axes in (0, 1, (2, 0)):
        found = jl.softmax_kl_divergence(student, teacher, axes)
        order = [i for i in range(3) if i not in np.atleast_1d(axes)]
        flat = [
            a.transpose(order + list(np.atleast_1d(axes))).reshape(found.size, -1)
            for a in (student, teacher)
        ]
        want, _ = divergences.exact(*flat)
        np.testing.assert_allclose(np.ravel(found), want, rtol=1e-5)
    assert jl.softmax_kl_divergence(student[..., :0], teacher[..., :0]).shape == (3, 4)
    assert_all_zero(
        jl.softmax_kl_divergence(student[..., :0], teacher[..., :0]),
        jl.softmax_kl_divergence(student[..., :1], teacher[..., :1]),
        jl.softmax_kl_divergence(student[:0], teacher[:0], reduction="mean"),
    )


# How JAX runs it


@pytest.mark.without_llvm_passes
@pytest.mark.parametrize(
    ("direction", "cap"),
    sweep(
        itertools.product(DIRECTIONS, [None, 3.0]),
        lambda direction, cap: direction == "jensen_shannon" and cap is None,
    ),
)
def test_all_modes_serve_to_second_order(direction: str, cap: float | None) -> None:
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        student, teacher = jnp.asarray(rng.normal(size=(2, 4, 3)))
        options = {
            "direction": direction,
            "teacher_weight": 0.3,
            "temperature": 1.4,
            "logit_softcap": cap,
        }

        def total(z: Any, w: Any) -> Any:
            values = jl.softmax_kl_divergence(z, teacher, weights=w, **options)
            return jnp.sum(jnp.sin(values))

        weights = jnp.array([1.0, 0.5, 0.0, 2.0])
        given = (student, weights)
        check_grads(
            jax.jit(total), given, 2, modes=("fwd", "rev"), rtol=1e-5, atol=1e-5
        )
        batch = jnp.stack([student, -student])
        slope = jax.jit(jax.grad(total))
        mapped = jax.jit(jax.vmap(slope, (0, None)))(batch, weights)
        one = [slope(z, weights) for z in batch]
        np.testing.assert_allclose(mapped, jnp.stack(one), rtol=1e-12)


@pytest.mark.alternate
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize("strategy", ["recompute", "dense"])
def test_fused_modes(strategy: str) -> None:
    with jax.enable_x64(True):
        problem = Problem(jnp.float64)

        def total(*head: Any) -> Any:
            values = problem.fused(
                *head,
                strategy=strategy,
                workspace_bytes=2000,
                forward_mode=strategy == "dense",
            )
            return jnp.sum(jnp.sin(values))

        modes = ("fwd", "rev") if strategy == "dense" else ("rev",)
        order = 2 if strategy == "dense" else 1
        check_grads(
            jax.jit(total), problem.head, order, modes=modes, rtol=1e-5, atol=1e-5
        )


@pytest.mark.alternate
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_on_meshes_the_values_are_those_of_one_device(kind: AxisType) -> None:
    student, teacher = rows(24, 1.0, 8)

    def run(z: Any, t: Any, **names: Any) -> Any:
        def total(z: Any) -> Any:
            return jl.softmax_kl_divergence(
                z, t, direction="reverse", reduction="mean", **names
            )

        return jax.value_and_grad(total)(z)

    want = run(student, teacher)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)
    split = NamedSharding(mesh, P("data", "model"))
    put = [jax.device_put(a, split) for a in (student, teacher)]
    found = [jax.jit(run)(*put)]
    if kind == AxisType.Auto:
        specs = P("data", "model")
        names = {"axis_name": "model", "batch_axis_name": "data"}
        mapped = jax.shard_map(
            functools.partial(run, **names),
            mesh=mesh,
            in_specs=specs,
            out_specs=(P(), specs),
        )
        found.append(jax.jit(mapped)(student, teacher))
    for value, gradient in found:
        np.testing.assert_allclose(value, want[0], rtol=1e-5)
        size = np.max(abs(want[1]))
        np.testing.assert_allclose(gradient / size, want[1] / size, atol=1e-5)


@pytest.mark.alternate(4)
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("strategy", ["tokens", "recompute"])
def test_a_fused_divergence_on_an_explicit_mesh(strategy: str, given: bool) -> None:
    rng = np.random.default_rng(0)
    shapes = ((8, 5), (5, 24), (8, 7), (7, 24))
    arrays = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]

    def run(hidden: Any, kernel: Any, wide: Any, of_teacher: Any, **how: Any) -> Any:
        teacher = {"teacher_hidden": wide, "teacher_kernel": of_teacher}
        if given:
            teacher = {"teacher_logits": wide @ of_teacher}
        return jax.value_and_grad(
            lambda *head: jl.linear_softmax_kl_divergence(
                *head, reduction="mean", **teacher, **how
            ),
            (0, 1),
        )(hidden, kernel)

    want = run(*arrays)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    specs = (P("data"), P(None, "model")) * 2
    put = [
        jax.device_put(a, NamedSharding(mesh, s))
        for a, s in zip(arrays, specs, strict=True)
    ]
    how = {"strategy": strategy, "workspace_bytes": 300}
    found = jax.jit(functools.partial(run, **how))(*put)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.without_llvm_passes
def test_it_is_exported_for_any_sizes_and_platforms() -> None:
    b, v = jax.export.symbolic_shape("b, v")
    logits = jax.ShapeDtypeStruct((b, v), np.float32)
    kernel = jax.ShapeDtypeStruct((v, v), np.float32)

    def run(z: Any, t: Any, kernel: Any) -> Any:
        alone = jax.value_and_grad(lambda z: jl.softmax_kl_divergence(z, t).sum())(z)
        return alone, jl.linear_softmax_kl_divergence(
            z, kernel, teacher_hidden=t, teacher_kernel=kernel, reduction="sum"
        )

    program = jax.export.export(jax.jit(run), platforms=["cpu", "cuda", "tpu"])(
        logits, logits, kernel
    )
    student, teacher = rows(13, 1.0, 5)
    eye = np.eye(13, dtype=np.float32)
    (value, gradient), together = jax.jit(program.call)(student, teacher, eye)
    want, slope = divergences.exact(student, teacher)
    np.testing.assert_allclose([value, together], want.sum(), rtol=1e-5)
    np.testing.assert_allclose(gradient, slope, rtol=1e-5, atol=1e-6)


# What it holds


def test_two_chunks_of_logits_are_held_and_four_matmuls_done() -> None:
    """At 1024 x 512 x 32000 with a teacher of 768: at most an eighth."""
    shapes = ((1024, 512), (512, 32000), (1024, 768), (768, 32000))
    arrays = [jax.ShapeDtypeStruct(s, np.float32) for s in shapes]

    def textbook(hidden: Any, kernel: Any, wide: Any, of_teacher: Any) -> Any:
        log_s, log_t = map(
            jax.nn.log_softmax,
            (hidden @ kernel, jax.lax.stop_gradient(wide @ of_teacher)),
        )
        return jnp.mean(jnp.sum(jnp.exp(log_t) * (log_t - log_s), -1))

    def ours(hidden: Any, kernel: Any, wide: Any, of_teacher: Any) -> Any:
        return jl.linear_softmax_kl_divergence(
            hidden,
            kernel,
            teacher_hidden=wide,
            teacher_kernel=of_teacher,
            reduction="mean",
        )

    held = []
    for loss in (textbook, ours):
        run = jax.jit(on_one_device(jax.value_and_grad(loss, (0, 1))))
        compiled = run.lower(*arrays).compile()
        held.append(compiled.memory_analysis().temp_size_in_bytes)
    assert held[1] <= held[0] / 8
    text = compiled.as_text()
    # In a loop over chunks, of which one is left at run time and one in the program.
    assert "f32[1024,32000]" not in text
