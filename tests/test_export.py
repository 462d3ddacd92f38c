"""Losses are exported for sizes that are not known, and agree with the oracle at many.

Each export is for CPU, CUDA and TPU, and what it is for CPU runs here; both from a host
of eight CPU devices and from one of a single device, where concrete sizes would be read
in blocks.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import one_device
import oracle
import pytest
import tolerances

import jaxlosses as jl

PLATFORMS = ["cpu", "cuda", "tpu"]

integer = jl.softmax_cross_entropy_with_integer_labels
linear = jl.linear_softmax_cross_entropy

# What is exported, its dimensions as symbols and numbers, and what the symbols are when
# the program runs: ragged, or less than the fused loss has chunks. Programs are few and
# small, since these tests wait for compilations.
Case = tuple[str, bool, str, list[tuple[int, ...]]]
HERE: list[Case] = [
    ("logits", False, "b, 5", [(37,), (1,)]),
    ("logits", False, "4, v", [(45,), (1,)]),
    ("logits", True, "b, v", [(37, 45)]),
    ("fused", False, "b, 3, 5, 4", [(37,)]),
    ("fused", False, "2, 3, v, 4", [(45,)]),
    ("fused", True, "b, t, v, d", [(5, 7, 45, 3)]),
]
ON_ONE_DEVICE: list[Case] = [
    ("logits", False, "b, 5", [(37,)]),
    ("fused", False, "b, 3, v, d", [(1, 1, 1), (7, 45, 4)]),
    ("fused", True, "b, t, v, d", [(5, 7, 45, 3)]),
]

Arrays = dict[str, Any]
Run = Callable[[Arrays, Arrays], Any]


class Symbols:
    """Dimensions as symbols, and as the numbers that these stand for."""

    def __init__(self, dims: str) -> None:
        self.open = jax.export.symbolic_shape(dims)
        self._dims = dims.split(", ")

    def at(self, sizes: tuple[int, ...]) -> tuple[int, ...]:
        left = iter(sizes)
        return tuple(int(n) if n.isdigit() else next(left) for n in self._dims)

    def apart(self) -> tuple[int, ...]:
        """Numbers of which none stands for two of the dimensions."""
        return self.at((37, 38, 45, 46))


def exported(run: Run, *arguments: Any) -> Callable[..., Any]:
    program = jax.export.export(jax.jit(run), platforms=PLATFORMS)(*arguments)
    return jax.jit(program.call)


def symbolic(arrays: Arrays, sizes: tuple[int, ...], symbols: tuple[Any, ...]) -> Any:
    """Shapes of arrays, whose distinct sizes are written as symbols."""
    names = dict(zip(sizes, symbols, strict=True))
    assert len(names) == len(sizes)

    def shape(a: Any) -> jax.ShapeDtypeStruct:
        named = tuple(names.get(n, n) for n in np.shape(a))
        return jax.ShapeDtypeStruct(named, np.asarray(a).dtype)

    return jax.tree.map(shape, arrays)


def value_and_gradients(loss: Callable[..., Any], **options: Any) -> Run:
    """Value of the sum, gradients by what is given first, and what else comes out."""

    def run(differentiated: Arrays, fixed: Arrays) -> Any:
        def summed(arrays: Arrays) -> Any:
            out = loss(**arrays, **fixed, **options)
            value, stats = out if isinstance(out, tuple) else (out, None)
            return jnp.sum(value), None if stats is None else stats.predicted

        return jax.value_and_grad(summed, has_aux=True)(differentiated)

    return run


def everything(
    rng: np.random.Generator, batch: tuple[int, ...], labels: np.ndarray, classes: int
) -> tuple[Arrays, Arrays]:
    """Arrays of all options: those that are differentiated, and the masks."""
    exists = rng.uniform(size=classes) < 0.7
    exists[labels] = True
    floats = {
        "class_weights": rng.uniform(0.1, 3, classes),
        "weights": rng.uniform(0.1, 2, batch),
        "label_smoothing": 0.1,
        "z_loss": 0.01,
        "logit_scale": 0.7,
    }
    return {k: np.asarray(v, np.float32) for k, v in floats.items()}, {"where": exists}


STATIC = {"logit_softcap": 2.0, "return_stats": True}


def assert_near(actual: Any, exact: Any, what: str, error: float = 0.0) -> None:
    error = error or tolerances.TABLE["float32"].gradient
    actual = np.asarray(actual).astype(np.float64)
    assert actual.shape == np.shape(exact), what
    scale = 1 + np.max(np.abs(exact), initial=0)
    np.testing.assert_allclose(actual, exact, rtol=0, atol=error * scale, err_msg=what)


# --- On logits.


def logits_at(batch: int, classes: int) -> Arrays:
    rng = np.random.default_rng(classes)
    ids = rng.integers(classes, size=batch, dtype=np.int32)
    floats, masks = everything(rng, (batch,), ids, classes)
    masks["where"] = masks["where"][None]
    ids[batch // 2 :: 9] = -100
    return {
        "logits": 3 * rng.normal(size=(batch, classes)).astype(np.float32),
        "ids": ids,
        "q": rng.dirichlet(np.ones(classes), batch).astype(np.float32),
        "floats": floats,
        "masks": masks,
        "mean": {k: floats[k] for k in ("weights", "label_smoothing")},
    }


def runs_on_logits(options: bool, a: Arrays) -> dict[str, Any]:
    """Every loss on logits, with or without all of its options."""
    z, ids, q = {"logits": a["logits"]}, a["ids"], a["q"]
    of, dense = value_and_gradients, jl.softmax_cross_entropy
    if options:
        out = {}
        for forward_mode in (False, True):
            static = {"forward_mode": forward_mode, **STATIC}
            by_ids = of(integer, ignore_index=-100, **static)
            by_q = of(dense, **static)
            floats, masks = a["floats"], a["masks"]
            out[f"integer options {forward_mode}"] = by_ids(
                z | floats, {"labels": ids} | masks
            )
            out[f"dense options {forward_mode}"] = by_q(
                z | {"labels": q} | floats, masks
            )
        return out

    def by_row(logits: Any, labels: Any) -> Any:
        return jax.vmap(integer)(logits, labels)

    plain, half = {"labels": jnp.maximum(ids, 0)}, a["logits"].astype(jnp.bfloat16)
    by_ids = of(integer, reduction="mean", ignore_index=-100)
    by_q = of(dense, reduction="mean")
    out = {
        "integer by row": of(by_row)(z, plain),
        "integer bfloat16": of(integer)({"logits": half}, plain),
        "integer mean": by_ids(z | a["mean"], {"labels": ids}),
        "dense mean": by_q(z | {"labels": q} | a["mean"], {}),
    }
    exists = a["masks"]["where"]
    for function in (jl.softmax, jl.log_softmax):
        p, pull = jax.vjp(functools.partial(function, where=exists), z["logits"])
        out[function.__name__] = p, pull(jnp.where(exists, q, 0))[0]
    return out


def check_on_logits(options: bool, dims: str, each: list[tuple[int, ...]]) -> None:
    symbols = Symbols(dims)
    like = symbols.apart()
    run = exported(
        functools.partial(runs_on_logits, options),
        symbolic(logits_at(*like), like, symbols.open),
    )
    for sizes in each:
        arrays = logits_at(*symbols.at(sizes))
        for name, out in run(arrays).items():
            what = f"{name} of {symbols.at(sizes)}"
            compare = check_softmax if name.endswith("softmax") else check_loss
            compare(name, arrays, out, what)


def check_loss(name: str, a: Arrays, out: Any, what: str) -> None:
    (value, predicted), gradients = out
    labels = a["q"] if name.startswith("dense") else np.maximum(a["ids"], 0)
    options: dict[str, Any] = {}
    if "mean" in name:
        options = a["mean"] | {"reduction": "mean"}
    elif "options" in name:
        options = a["floats"] | a["masks"] | STATIC
        options.pop("return_stats")
    if options and name.startswith("integer"):
        labels, options["ignore_index"] = a["ids"], -100
    logits, dtype = a["logits"], "float32"
    if "bfloat16" in name:
        logits, dtype = np.asarray(logits.astype(jnp.bfloat16), np.float32), "bfloat16"
    exact = oracle.gradients(logits, labels, **options)
    assert_near(value, np.sum(oracle.loss(logits, labels, **options)), what)
    tolerances.assert_gradient(
        gradients["logits"], exact["logits"], dtype, exact["logits_terms"], what
    )
    for other in gradients.keys() & exact.keys() - {"logits"}:
        assert_near(gradients[other], exact[other], f"{other}: {what}")
    if predicted is not None:
        z = np.where(a["masks"]["where"], logits, -np.inf)
        counted = np.ones(len(z), bool) if name.startswith("dense") else a["ids"] >= 0
        np.testing.assert_array_equal(
            np.asarray(predicted)[counted], z.argmax(-1)[counted], what
        )


def check_softmax(name: str, a: Arrays, out: Any, what: str) -> None:
    exists = a["masks"]["where"]
    z = np.where(exists, a["logits"].astype(np.float64), -np.inf)
    e = np.exp(z - z.max(-1, keepdims=True))
    p = e / e.sum(-1, keepdims=True)
    g = np.where(exists, a["q"].astype(np.float64), 0)
    if name == "softmax":
        assert_near(out[0], p, what)
        assert_near(out[1], p * (g - np.sum(g * p, -1, keepdims=True)), what)
    else:
        np.testing.assert_array_equal(np.isfinite(out[0]), np.isfinite(z), what)
        assert_near(np.exp(out[0]), p, what)
        assert_near(out[1], g - p * g.sum(-1, keepdims=True), what)


# --- On hidden states and a kernel.


def fused_at(*dims: int) -> Arrays:
    *batch, classes, features = dims
    rng = np.random.default_rng(classes)
    ids = rng.integers(classes, size=batch, dtype=np.int32)
    floats, masks = everything(rng, tuple(batch), ids, classes)
    floats["bias"] = rng.normal(size=classes).astype(np.float32)
    ids.ravel()[ids.size // 2 :: 9] = -100
    kernel = rng.normal(size=(features, classes)) / np.sqrt(features)
    return {
        "hidden": rng.normal(size=(*batch, features)).astype(np.float32),
        "kernel": kernel.astype(np.float32),
        "embedding": np.ascontiguousarray(kernel.T.astype(np.float32)),
        "ids": ids,
        "q": rng.dirichlet(np.ones(classes), batch).astype(np.float32),
        "floats": floats,
        "masks": masks,
    }


# Strategy, layout, reduction, and whether forward mode can be taken.
PLAIN = [
    ("tokens", "vd", "mean", False),
    ("recompute", "dv", "mean", True),
    ("vocab", "vd", "none", False),
    ("dense", "dv", "none", False),
]
WITH_OPTIONS = [
    ("auto", "vd", "none", False),
    ("tokens", "dv", "sum", False),
    ("vocab", "dv", "sum", True),
]


def runs_fused(options: bool, a: Arrays) -> list[Any]:
    """The fused loss by every strategy."""
    out = []
    for strategy, layout, reduction, forward_mode in WITH_OPTIONS if options else PLAIN:
        run = value_and_gradients(
            linear,
            strategy=strategy,
            kernel_layout=layout,
            reduction=reduction,
            forward_mode=forward_mode,
            ignore_index=-100,
            **(STATIC if options else {}),
        )
        kernel = a["kernel"] if layout == "dv" else a["embedding"]
        floats, masks = (a["floats"], a["masks"]) if options else ({}, {})
        given = {"hidden": a["hidden"], "kernel": kernel} | floats
        out.append(run(given, {"labels": a["ids"]} | masks))
    if not options:
        head = {"hidden": a["hidden"], "kernel": a["kernel"]}
        out.append(value_and_gradients(linear)(head, {"labels": a["q"]}))
        half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), head)
        by_classes = value_and_gradients(linear, strategy="vocab", ignore_index=-100)
        out.append(by_classes(half, {"labels": a["ids"]}))
    return out


def check_fused(options: bool, dims: str, each: list[tuple[int, ...]]) -> None:
    symbols = Symbols(dims)
    like = symbols.apart()
    run = exported(
        functools.partial(runs_fused, options),
        symbolic(fused_at(*like), like, symbols.open),
    )
    for sizes in each:
        arrays = fused_at(*symbols.at(sizes))
        found = run(arrays)
        if not options:
            *found, distribution, half = found
            what = f"{symbols.at(sizes)}"
            check_fused_loss(arrays, arrays["q"], distribution, f"dense labels, {what}")
            # The operands of all matmuls are rounded to 8 bits.
            error, ignored = 2.0**-6, {"ignore_index": -100}
            what = f"bfloat16, {what}"
            check_fused_loss(arrays, arrays["ids"], half, what, error=error, **ignored)
        for case, out in zip(WITH_OPTIONS if options else PLAIN, found, strict=True):
            _, layout, reduction, _ = case
            given: dict[str, Any] = {"reduction": reduction, "ignore_index": -100}
            if options:
                given |= arrays["floats"] | arrays["masks"] | STATIC
            what = f"{case} of {symbols.at(sizes)}"
            check_fused_loss(arrays, arrays["ids"], out, what, layout, **given)


def check_fused_loss(
    a: Arrays,
    labels: np.ndarray,
    out: Any,
    what: str,
    layout: str = "dv",
    error: float = 0.0,
    **options: Any,
) -> None:
    (value, predicted), gradients = out
    options.pop("return_stats", None)
    h, k = a["hidden"].astype(np.float64), a["kernel"].astype(np.float64)
    z = h @ k + options.pop("bias", 0)
    if "where" in options:
        options["where"] = options["where"].reshape((1,) * (z.ndim - 1) + (-1,))
    exact = oracle.gradients(z, labels, **options)
    assert_near(value, np.sum(oracle.loss(z, labels, **options)), what, error)
    dz = exact.pop("logits")
    rows = dz.reshape(-1, dz.shape[-1])
    exact["hidden"], exact["bias"] = dz @ k.T, rows.sum(0)
    exact["kernel"] = h.reshape(-1, h.shape[-1]).T @ rows
    if layout == "vd":
        exact["kernel"] = exact["kernel"].T
    for name in gradients.keys() & exact.keys():
        assert_near(gradients[name], exact[name], f"{name}: {what}", error)
    if predicted is not None:
        z = np.where(options["where"], z, -np.inf)
        counted = labels >= 0
        np.testing.assert_array_equal(
            np.asarray(predicted)[counted], z.argmax(-1)[counted], what
        )


def check(
    kind: str, options: bool, dims: str, each: list[tuple[int, ...]]
) -> list[tuple[int, ...]]:
    {"logits": check_on_logits, "fused": check_fused}[kind](options, dims, each)
    return each


@pytest.mark.alternate(4)
@pytest.mark.without_llvm_passes
@pytest.mark.parametrize(("kind", "options", "dims", "each"), HERE)
def test_losses_exported_with_symbolic_sizes_are_exact_at_any(
    kind: str, options: bool, dims: str, each: list[tuple[int, ...]]
) -> None:
    assert check(kind, options, dims, each) == each


@pytest.mark.long
def test_hosts_of_one_device_export_symbolic_sizes_too() -> None:
    done = one_device.results("test_export", "check", ON_ONE_DEVICE)
    assert done == [each for *_, each in ON_ONE_DEVICE]


# --- What is exported.


def test_chunks_of_symbolic_sizes_are_a_fraction_of_all_logits() -> None:
    b, v, d = jax.export.symbolic_shape("b, v, d")
    shapes = {"hidden": (b, d), "kernel": (d, v)}
    head = {k: jax.ShapeDtypeStruct(n, jnp.float32) for k, n in shapes.items()}
    labels = {"labels": jax.ShapeDtypeStruct((b,), jnp.int32)}

    def holds_all_logits(strategy: str) -> bool:
        loss = value_and_gradients(linear, strategy=strategy, reduction="sum")
        return "[b,v]" in str(jax.jit(loss).trace(head, labels).jaxpr)

    assert holds_all_logits("dense")
    for strategy in ("auto", "tokens", "recompute", "vocab"):
        assert not holds_all_logits(strategy), strategy


def test_sizes_of_other_symbols_are_other_sizes() -> None:
    b, v, c = jax.export.symbolic_shape("b, v, c")
    logits, ids = jax.ShapeDtypeStruct((b, v), jnp.float32), jnp.int32

    def raised(function: Any, *shapes: Any, **options: Any) -> str:
        with pytest.raises(ValueError, match="expected") as error:
            jax.eval_shape(functools.partial(function, **options), logits, *shapes)
        return str(error.value)

    assert raised(integer, jax.ShapeDtypeStruct((c,), ids)).startswith(
        "labels: got shape (c,), expected (b,) for logits of shape (b, v). "
    )
    assert raised(integer, jax.ShapeDtypeStruct((b, 1), ids)).startswith(
        "labels: got shape (b, 1), expected (b,) for logits of shape (b, v). Drop the"
    )
    assert raised(
        jl.softmax_cross_entropy, jax.ShapeDtypeStruct((b, c), jnp.float32)
    ).startswith("labels: got shape (b, c), expected (b, v), or 1 on a batch axis")
    kernel = jax.ShapeDtypeStruct((c, 7), jnp.float32)
    assert raised(linear, kernel, jax.ShapeDtypeStruct((b,), ids)).startswith(
        "kernel: got shape (c, 7), expected (features, classes) with v features"
    )
