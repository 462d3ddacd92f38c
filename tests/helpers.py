"""What several test modules share: the losses, sweeps, exact values, and listeners."""

import contextlib
import functools
import itertools
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from tolerances import accumulated, assert_gradient, assert_loss

import jaxlosses as jl

Loss = Callable[..., Any]
STRATEGIES = ("tokens", "recompute", "vocab", "dense")


def fused(
    strategy: str,
    function: Loss = jl.linear_softmax_cross_entropy,
    workspace_bytes: int = 64,
) -> Loss:
    """A fused function as one of logits: of an identity for a kernel.

    A product with the identity is exact. There are several chunks.
    """

    def loss(logits: Any, *labels: Any, **options: Any) -> Any:
        kernel = jnp.eye(np.shape(logits)[-1], dtype=jnp.float32)
        how = {"strategy": strategy, "workspace_bytes": workspace_bytes}
        return function(logits, kernel, *labels, **how, **options)

    return loss


# What every claim about losses is made of: functions of logits and labels.
TAKE_IDS: dict[str, Loss] = {
    "integer": jl.softmax_cross_entropy_with_integer_labels,
    **{f"fused, {strategy}": fused(strategy) for strategy in STRATEGIES},
}
LOSSES: dict[str, Loss] = {"dense": jl.softmax_cross_entropy, **TAKE_IDS}
# Functions that also return an entropy, of logits and labels.
LOG_PROBS: dict[str, Loss] = {
    "logits": jl.softmax_log_probs,
    **{
        f"fused, {strategy}": fused(strategy, jl.linear_softmax_log_probs)
        for strategy in STRATEGIES[1:]
    },
}


# Which cases `make test` has


def sweep(cases: Iterable[Any], short: Callable[..., bool]) -> list[Any]:
    """Parameters, of which those that are not `short` wait for `make test-long`."""
    parameters = []
    for case in cases:
        values = case if isinstance(case, tuple) else (case,)
        marks = () if short(*values) else pytest.mark.long
        parameters.append(pytest.param(*values, marks=marks))
    return parameters


def turns(*axes: Iterable[Any], of: int = 2) -> list[Any]:
    """All combinations, of which all but one of so many wait for `make test-long`.

    What is left has each value of an axis, with as large a part of those of the others.
    """
    lists = [list(axis) for axis in axes]
    places = itertools.product(*(range(len(values)) for values in lists))
    return [
        pytest.param(
            *(values[i] for values, i in zip(lists, place, strict=True)),
            marks=pytest.mark.long if sum(place) % of else (),
        )
        for place in places
    ]


# Exact values

# Options that are arrays are differentiated; the others are static.
DIFFERENTIATED = (
    "class_weights",
    "weights",
    "label_smoothing",
    "z_loss",
    "logit_scale",
)


MARGINS = (0.0, 1.0, 5.0, 20.0, 30.0, 50.0, 80.0)
SCALES = (1e-3, 1.0, 30.0, 1e4)


@functools.cache
def confident(
    classes: int, dtype: str = "float32", repeat: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """Rows at every scale and margin; the rounding to `dtype` may move the margin."""
    rng = np.random.default_rng(classes)
    margins = MARGINS if classes < 10**4 else MARGINS[::3]
    rows = [
        oracle.confident_logits(rng, repeat, classes, margin, scale, jnp.dtype(dtype))
        for scale in SCALES
        for margin in margins
    ]
    logits, ids = zip(*rows, strict=True)
    return np.concatenate(logits), np.concatenate(ids)


@np.errstate(all="ignore")
def exact_derivatives(
    logits: np.ndarray,
    labels: np.ndarray,
    cotangent: np.ndarray,
    options: dict[str, Any],
) -> dict[str, tuple[Any, Any]]:
    """Gradients, and the sums of the absolute terms of each."""
    exact = oracle.gradients(logits, labels, cotangent=cotangent, **options)
    out = {"logits": (exact["logits"], exact["logits_terms"])}
    size = abs(cotangent.astype(np.float64))
    one_sign = [n for n in ("labels", "class_weights", "weights") if n in exact]
    # All terms of these are of one sign, but for the cotangent and the denominator.
    if one_sign:
        unsigned = oracle.gradients(logits, labels, cotangent=size, **options)
    share = 1.0
    if one_sign and options.get("reduction") == "mean":
        summed = options | {"reduction": "sum"}
        total = oracle.loss(logits, labels, **summed)
        share = oracle.loss(logits, labels, **options) / total if total else 0.0
        unsigned_sum = oracle.gradients(logits, labels, cotangent=size, **summed)
    for name in one_sign:
        terms = unsigned[name]
        if share != 1.0 and name != "labels":
            terms = 2 * share * unsigned_sum[name] - terms
        out[name] = (exact[name], terms)
    # The loss is linear in both of these.
    for name in ("label_smoothing", "z_loss"):
        if name in options:
            one = oracle.loss(logits, labels, **(options | {name: 1.0}))
            none = oracle.loss(logits, labels, **(options | {name: 0.0}))
            out[name] = (
                np.sum(cotangent * (one - none)),
                np.sum(size * (one + none)),
            )
    if "logit_scale" in options:
        out["logit_scale"] = (
            exact["logit_scale"],
            scale_terms(logits, labels, size, options),
        )
    return out


def scale_terms(
    logits: np.ndarray, labels: np.ndarray, size: np.ndarray, options: dict[str, Any]
) -> Any:
    """Sum of the absolute terms of the derivative by the scale."""
    capped, cap = logits.astype(np.float64), options.get("logit_softcap")
    if cap is not None:
        capped = np.where(np.isinf(capped), capped, cap * np.tanh(capped / cap))
    uncapped = options | {"logit_softcap": None}
    terms = oracle.gradients(capped, labels, cotangent=size, **uncapped)["logits_terms"]
    terms = terms / abs(float(options["logit_scale"]))
    return np.sum(np.where(terms == 0, 0, terms * abs(capped)))


@functools.cache
def compiled(
    kind: str, static: tuple[tuple[str, Any], ...], local: bool = False
) -> Callable[..., Any]:
    """Value and gradients as one program, kept for the next call of its shapes.

    `local` runs it inside a `shard_map` over one device, where a loss may loop over
    blocks of rows, as it does in a process of one CPU device.
    """

    def value_and_gradients(
        differentiated: dict[str, jax.Array],
        fixed: dict[str, jax.Array],
        cotangent: jax.Array,
    ) -> Any:
        def loss(arrays: dict[str, jax.Array]) -> jax.Array:
            return LOSSES[kind](**arrays, **fixed, **dict(static))

        value, pull = jax.vjp(loss, differentiated)
        return value, pull(cotangent)[0]

    if local:
        value_and_gradients = on_one_device(value_and_gradients)
    return jax.jit(value_and_gradients)


def check(
    logits: Any,
    labels: Any,
    *,
    name: str | None = None,
    dtype: str = "float32",
    forward_mode: bool = False,
    local: bool = False,
    compared: tuple[str, ...] = ("logits", "labels", *DIFFERENTIATED),
    **options: Any,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Loss and all gradients, after a comparison with the exact ones.

    Floating arguments are rounded to `dtype` (logits), or to what it is accumulated
    in; exact is the loss of the rounded arguments. Integers are class ids. The loss is
    that of `name`, by default the one on logits that takes such labels.
    """
    labels = np.asarray(labels)
    ids_given = np.issubdtype(labels.dtype, np.integer)
    name = name or ("integer" if ids_given else "dense")
    wide = accumulated(dtype)
    logits = np.asarray(logits, np.float64).astype(jnp.dtype(dtype))
    labels = labels if ids_given else labels.astype(wide)
    arrays = {"logits": logits}
    fixed = {"labels": labels} if ids_given else {}
    if not ids_given:
        arrays["labels"] = labels
    for key in DIFFERENTIATED:
        if key in options:
            options[key] = np.asarray(options[key], wide)
            arrays[key] = options[key]
    if options.get("where") is not None:
        fixed["where"] = np.asarray(options["where"])
    keys = ("axis", "ignore_index", "logit_softcap", "reduction")
    static = {key: options[key] for key in keys if key in options}
    if forward_mode:
        static["forward_mode"] = True

    exact = oracle.loss(logits, labels, **options)
    cotangent = np.resize([1.0, -0.5, 2.0, -1.0, 0.25], exact.shape).astype(wide)
    run = compiled(name, tuple(static.items()), local)
    with jax.enable_x64(dtype == "float64"):
        loss, gradients = run(arrays, fixed, cotangent)
    assert_loss(loss, exact, dtype)
    exact_gradients = exact_derivatives(logits, labels, cotangent, options)
    if name.startswith("fused") and "weights" in options:
        # An example of weight 0 is left out, where the oracle has its loss.
        out = options["weights"] == 0
        exact_gradients["weights"] = tuple(
            np.where(out, 0, x) for x in exact_gradients["weights"]
        )
    assert gradients.keys() == arrays.keys()
    for key, gradient in gradients.items():
        assert gradient.dtype == arrays[key].dtype, key
        if key not in compared:
            continue
        value, terms = exact_gradients[key]
        # Which of the parameters a bad example spoils is not promised.
        if np.isnan(exact).any() and key not in ("logits", "labels", "weights"):
            continue
        assert_gradient(gradient, value, dtype, terms, f"gradient by {key}")
    return np.asarray(loss), {k: np.asarray(v) for k, v in gradients.items()}


def assert_all_zero(*arrays: Any) -> None:
    for array in arrays:
        assert np.all(np.asarray(array) == 0), array


# The page of recipes

PAGE = pathlib.Path(__file__).parent.parent / "notebooks" / "which_loss.md"


@functools.cache
def page() -> dict[str, Any]:
    """What its code defines."""
    namespace: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), namespace)
    return namespace


# How JAX runs it


def on_one_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Inside a `shard_map` arrays are known to be on one device."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("one",))
    everywhere = jax.sharding.PartitionSpec()
    return jax.shard_map(function, mesh=mesh, in_specs=everywhere, out_specs=everywhere)


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """What JAX traces, lowers and compiles within the context."""
    events: list[str] = []
    _LISTENERS.append(events)
    try:
        yield events
    finally:
        _LISTENERS.remove(events)


_LISTENERS: list[list[str]] = []


def _record(event: str, seconds: float, **_: Any) -> None:
    for events in _LISTENERS:
        if event.startswith("/jax/core/compile"):
            events.append(event)


# JAX has no way to take a listener back, so one serves every test.
jax.monitoring.register_event_duration_secs_listener(_record)
