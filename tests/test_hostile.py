"""Wrong calls, of every public function and argument: an error, or what is documented.

An error is a TypeError or a ValueError that begins with the name of the argument, with
arrays and while it is traced. `test_checks.py` has the words.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_checks import (
    DEFAULTS,
    DISTRIBUTIONS,
    IDS,
    LOGITS,
    B,
    V,
    dense,
    integer,
    linear,
    linear_log_probs,
    linear_named,
    named,
    zeros,
)

import jaxlosses as jl
from jaxlosses import testing

NAN, INF = math.nan, math.inf
NAMES = {function: function.__name__ for function in DEFAULTS}

NO_ARRAYS = [
    *("0.1", [[1.0], [2.0, 3.0]], {"a": 1.0}, {1.0}, max, float),
    *(np.array(["a"]), np.array([None]), np.array(["2026-01-01"], "datetime64[D]")),
    np.ones((B, V), np.complex64),
    np.ones((B, V), np.dtype([("a", np.float32)])),
    np.zeros((B, V, 2, 2, 2), np.float32),
]
NOT_FLOATING = [np.zeros((B, V), np.int32), np.zeros((B, V), np.bool_), np.float32(1)]
# One number or a few: none of them is what is asked for.
NO_NUMBERS = ["0.1", 1j, np.ones(3, np.float32), [0.1, 0.2], {}, object()]
NO_FLAGS = ["yes", None, 2, 1.0, np.ones(2, np.bool_), jnp.bool_(True)]
NO_NAMES = ["", "other", "None", None, 1, b"mean", ("sum",), sum]
NO_MESH_AXES = [1, 1.5, ("a", 1), b"a", object()]
NO_CAPS = [0.0, -30.0, NAN, INF, "a", 1j, jnp.float32(30.0), [30.0]]
NO_LAYOUTS = ["dd", "DV", "", 1, ("dv",)]
WRONG: dict[str, list[Any]] = {
    "logits": [*NO_ARRAYS[:-1], *NOT_FLOATING, None],
    "teacher_logits": NO_ARRAYS,
    "hidden": [*NO_ARRAYS[:-1], *NOT_FLOATING, None],
    "kernel": [*NO_ARRAYS, *NOT_FLOATING, None],
    "teacher_hidden": NO_ARRAYS[:-1],
    "teacher_kernel": NO_ARRAYS,
    "labels": [*NO_ARRAYS, np.zeros(B + 1, np.int32), np.zeros((B, 1, 1), np.int32)],
    "ids": [*NO_ARRAYS, np.zeros(B, np.int32), np.zeros((B, 2), np.float32), None],
    "probs": [*NO_ARRAYS, np.zeros((B, 3), np.float32), None],
    "weights": [*NO_ARRAYS, np.ones((B, 1), np.float32), np.ones(B + 1, np.float32)],
    "class_weights": [*NO_ARRAYS, np.ones(V + 1, np.float32), 2.0],
    "bias": [*NO_ARRAYS, np.ones(V + 1, np.float32), np.float32(1)],
    "teacher_bias": [*NO_ARRAYS, np.ones(V + 1, np.float32)],
    "where": [*NO_ARRAYS, np.ones((B, V), np.int32), np.ones((B, V + 1), np.bool_)],
    "label_smoothing": [-0.1, 1.0, 1.5, NAN, INF, None, *NO_NUMBERS],
    "z_loss": [-1e-4, NAN, INF, -INF, None, *NO_NUMBERS],
    "logit_softcap": NO_CAPS,
    "teacher_logit_softcap": NO_CAPS,
    "logit_scale": [NAN, INF, None, *NO_NUMBERS],
    "temperature": [0.0, -1.0, NAN, INF, None, *NO_NUMBERS],
    "teacher_weight": [-0.1, 0.0, 1.0, 1.1, NAN, INF, None, *NO_NUMBERS],
    "normalizer": [-1.0, NAN, *NO_NUMBERS],
    "reduction": [*NO_NAMES, "Mean", "avg"],
    "direction": [*NO_NAMES, "Forward", "kl"],
    "rest": [*NO_NAMES, "Bucket"],
    "strategy": [*NO_NAMES, "Tokens", "fast"],
    "axis": [5, -7, 0.5, "a", (0, 0), (), (0, 5), True, np.zeros(2), [[0]]],
    "axis_name": NO_MESH_AXES,
    "batch_axis_name": NO_MESH_AXES,
    "return_stats": ["rank", ("perplexity",), ("rank", 1), None, 2, 1.0],
    "ignore_index": ["a", 1.5, True, (1, 2), np.zeros(2, np.int32), 1j],
    "kernel_layout": [*NO_LAYOUTS, None],
    "teacher_kernel_layout": NO_LAYOUTS,
    "workspace_bytes": [0, -1, 1.5, "1MB", True, [2**20], 1j],
    "compute_dtype": ["float99", "int32", "complex64", 1, jnp.int8, object()],
    "platform": ["xpu", "", "CPU", 1],
    "function": [None, 1, "nll", jnp.ones(3)],
    **dict.fromkeys(
        ("forward_mode", "return_entropy", "as_divergence", "uses_entropy"), NO_FLAGS
    ),
    "distributions": NO_FLAGS,
}
# The arguments of a user's own function.
TAKEN = [
    (function, argument)
    for function in DEFAULTS
    for argument in inspect.signature(function).parameters
    if argument != "args"
]


def refuses(argument: str, call: Callable[[], Any]) -> None:
    """The error of a call is one that says what is wrong with the argument."""
    with pytest.raises((TypeError, ValueError)) as raised:
        call()
    assert str(raised.value).startswith(f"{argument}: got "), str(raised.value)[:200]
    assert len(str(raised.value)) < 600


@pytest.mark.parametrize(
    ("function", "argument"), TAKEN, ids=[f"{NAMES[f]}-{a}" for f, a in TAKEN]
)
def test_a_wrong_argument_is_named(function: Callable[..., Any], argument: str) -> None:
    for value in WRONG[argument]:
        given = DEFAULTS[function] | {argument: value}
        refuses(argument, functools.partial(function, **given))
        arrays = {k: v for k, v in given.items() if isinstance(v, jax.Array)}
        static = {k: v for k, v in given.items() if k not in arrays}

        def traced(
            arrays: dict[str, jax.Array], static: dict[str, Any] = static
        ) -> Any:
            return function(**static, **arrays)

        refuses(argument, functools.partial(jax.eval_shape, traced, arrays))


def test_there_are_hundreds_of_them() -> None:
    assert set(WRONG) == {argument for _, argument in TAKEN}
    assert sum(len(WRONG[argument]) for _, argument in TAKEN) > 1500


HIDDEN, KERNEL = DEFAULTS[linear]["hidden"], DEFAULTS[linear]["kernel"]
PROBS = jnp.ones((B, 2))
# Arguments in the order of other libraries, or of none.
MISPLACED: dict[str, tuple[str, Callable[[], Any]]] = {
    "labels first": ("logits", lambda: integer(IDS, LOGITS)),
    "distributions as ids": ("labels", lambda: integer(LOGITS, DISTRIBUTIONS)),
    "ids as distributions": ("labels", lambda: dense(LOGITS, IDS)),
    "ids first": ("logits", lambda: dense(IDS, LOGITS)),
    "kernel first": ("kernel", lambda: linear(KERNEL, HIDDEN, IDS)),
    "kernel last": ("kernel", lambda: linear(HIDDEN, IDS, KERNEL)),
    "labels as a bias": ("labels", lambda: linear(HIDDEN, KERNEL, jnp.zeros(V), IDS)),
    "probabilities first": ("ids", lambda: named(LOGITS, PROBS, IDS)),
    "head, probabilities first": (
        "ids",
        lambda: linear_named(HIDDEN, KERNEL, PROBS, IDS[:, None]),
    ),
    "class weights third, as PyTorch": (
        "axis",
        lambda: integer(LOGITS, IDS, jnp.ones(V)),
    ),
    "a reduction third": ("axis", lambda: integer(LOGITS, IDS, "mean")),
    "a smoothing third": ("axis", lambda: dense(LOGITS, DISTRIBUTIONS, 0.1)),
    "weights as a mask": (
        "where",
        lambda: dense(LOGITS, DISTRIBUTIONS, -1, jnp.ones(B)),
    ),
    "labels of a softmax": ("axis", lambda: jl.softmax(LOGITS, IDS)),
    "a mask as the axis": ("axis", lambda: jl.log_softmax(LOGITS, LOGITS > 0)),
    "labels of an entropy": ("axis", lambda: jl.softmax_entropy(LOGITS, IDS)),
    "a teacher of other classes": (
        "teacher_logits",
        lambda: jl.softmax_kl_divergence(LOGITS, zeros((B, V - 1))),
    ),
    "a shift of one row": ("labels", lambda: integer(LOGITS[:-1], IDS)),
    "a column of ids": ("labels", lambda: integer(LOGITS, IDS[:, None])),
    "a row of ids": ("labels", lambda: integer(LOGITS, IDS[None])),
    "a transposed kernel": ("kernel", lambda: linear(HIDDEN, KERNEL.T, IDS)),
    "logits to check": ("labels", lambda: testing.check_labels(LOGITS, V)),
}


@pytest.mark.parametrize("name", MISPLACED)
def test_a_misplaced_argument_is_named(name: str) -> None:
    argument, call = MISPLACED[name]
    refuses(argument, call)


def test_what_python_refuses_is_refused() -> None:
    for function, given in DEFAULTS.items():
        with pytest.raises(TypeError, match="unexpected keyword argument 'epsilon'"):
            function(**given, epsilon=1e-8)
    for function in (integer, dense):
        with pytest.raises(TypeError, match="positional argument"):
            function(LOGITS, IDS, -1, None, 0.1)


# Values that only a run can see


ROWS = jnp.arange(B * 300, dtype=jnp.float32).reshape(B, 300) % 7
NO_CLASS = {
    "minus one": np.array([-1, 0, 0, 0], np.int32),
    "the number of classes": np.array([300, 0, 0, 0], np.int32),
    "the least": np.array([-(2**31), 0, 0, 0], np.int32),
    "the largest": np.array([2**31 - 1, 0, 0, 0], np.int32),
    "a narrow one": np.array([-1, 0, 0, 0], np.int8),
    "the largest of a narrow one": np.array([-128, 0, 0, 0], np.int8),
    "wrapped to a class": np.array([2**32, 0, 0, 0], np.int64),
    "wrapped to minus one": np.array([2**64 - 1, 0, 0, 0], np.uint64),
    "unsigned": np.array([2**32 - 1, 0, 0, 0], np.uint32),
}


@pytest.mark.alternate(3)
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize("name", NO_CLASS)
def test_a_label_that_is_no_class_is_nan_in_its_row_alone(name: str) -> None:
    ids = NO_CLASS[name]
    eye = jnp.eye(300)
    found = {
        "integer": integer(ROWS, ids),
        "log probs": jl.softmax_log_probs(ROWS, ids),
        "top-k": named(ROWS, ids[:, None], jnp.ones((B, 1))),
        "head": linear(ROWS, eye, ids),
        "log probs of a head": linear_log_probs(ROWS, eye, ids),
        "top-k of a head": linear_named(ROWS, eye, ids[:, None], jnp.ones((B, 1))),
    }
    for function, values in found.items():
        if function.startswith("top-k") and name in ("minus one", "a narrow one"):
            assert values[0] == 0, function  # of top-k labels, -1 names none
        else:
            assert np.isnan(values[0]), function
        assert np.all(np.isfinite(values[1:])), function
    with pytest.raises(ValueError, match=r"^labels"):
        testing.check_labels(ids, 300)


@pytest.mark.without_llvm_passes
@pytest.mark.parametrize("value", [NAN, INF], ids=["nan", "inf"])
@pytest.mark.parametrize("function", [f for f in DEFAULTS if f is not testing.plan])
def test_a_diverged_row_is_nan_and_no_other_is(
    function: Callable[..., Any], value: float
) -> None:
    given = dict(DEFAULTS[function])
    name = "hidden" if "hidden" in given else "logits"
    given[name] = given[name].at[1].set(value)
    if "kernel" in given:
        given["kernel"] = jnp.ones_like(given["kernel"])
    if function is jl.linear_softmax_loss:
        gradient = jax.grad(lambda x: function(**given | {name: x}))(given[name])
        found = np.isnan(gradient).any(-1)
    else:
        values = np.asarray(function(**given))
        found = np.isnan(values.reshape(B, -1)).any(-1)
    np.testing.assert_array_equal(found, [False, True, False, False])


@pytest.mark.parametrize("function", [f for f in DEFAULTS if f is not testing.plan])
def test_no_example_is_no_error(function: Callable[..., Any]) -> None:
    per_example = ("logits", "labels", "hidden", "teacher_", "ids", "probs")
    given = {
        name: value[:0]
        if name.startswith(per_example) and not name.endswith("kernel")
        else value
        for name, value in DEFAULTS[function].items()
    }
    values = np.asarray(function(**given))
    assert values.size == 0 or values == 0
    if "reduction" in inspect.signature(function).parameters:
        for reduction in ("sum", "mean"):
            assert function(**given | {"reduction": reduction}) == 0
