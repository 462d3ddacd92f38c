"""What the losses do on this machine: accuracy, gradient checks, timings.

The exit status is 0 if every error is within its bar. optax, where it is installed,
is shown beside; it does not decide.
"""

import argparse
import functools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxlosses as jl
from jaxlosses import _accuracy, testing

Rows = _accuracy.Rows


def main(argv: Sequence[str] | None = None) -> int:
    """Runs every check and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m jaxlosses", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument(
        "--plan",
        metavar="TOKENSxFEATURESxCLASSES",
        help="print what the fused loss does on each platform, and no more",
    )
    parser.add_argument(
        "--dtype", default="bfloat16", help="of that head; default: bfloat16"
    )
    given = parser.parse_args(argv)
    if given.plan:
        _print_plans(given.plan, given.dtype, given.json)
        return 0
    as_json = given.json
    report: dict[str, Any] = {
        "versions": _versions(),
        "devices": [f"{d.platform}: {d.device_kind}" for d in jax.devices()],
        "accuracy": _accuracy.accuracy(),
        "entropy": _accuracy.entropy(),
        "gradients": _gradients(),
        "timing": _timing(),
    }
    checked = report["accuracy"] + report["entropy"] + report["gradients"]
    holds = all(row["holds"] for row in checked)
    print(json.dumps({**report, "holds": holds}) if as_json else _text(report, holds))
    return 0 if holds else 1


def _print_plans(size: str, dtype: str, as_json: bool) -> None:
    examples, features, classes = map(int, size.split("x"))
    head = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape in ((examples, features), (features, classes))
    ]
    plans = {p: testing.plan(*head, platform=p) for p in ("cpu", "gpu", "tpu")}
    if as_json:
        print(json.dumps({p: plan._asdict() for p, plan in plans.items()}))
        return
    for where, plan in plans.items():
        rows, columns = plan.chunk_shape
        print(
            f"{where}: {plan.strategy}, {plan.matmuls} matmuls, {plan.chunks} chunks "
            f"of {rows} x {columns} logits, "
            f"about {plan.temporary_bytes / 2**20:.0f} MiB "
            f"(all logits: {plan.materialised_bytes / 2**20:.0f} MiB)"
        )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "jaxlosses": jl.__version__}
    for name in ("jax", "jaxlib", "chex", "optax"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _gradients() -> Rows:
    """`check_loss` on the public losses, demanding relative errors entry by entry."""
    rng = np.random.default_rng(0)
    dense = rng.dirichlet(np.ones(11), size=6)
    logits = rng.normal(size=(6, 11))
    dense_loss = jl.softmax_cross_entropy
    integer_loss = jl.softmax_cross_entropy_with_integer_labels
    forward = functools.partial(integer_loss, forward_mode=True)
    cases: list[tuple[str, Callable[..., Any], tuple[Any, ...]]] = [
        ("softmax_cross_entropy", dense_loss, (logits, dense)),
        ("softmax_cross_entropy_with_integer_labels", integer_loss, ()),
        ("softmax_cross_entropy_with_integer_labels, forward_mode", forward, ()),
    ]
    rows = []
    for name, loss_fn, args in cases:
        row: dict[str, Any] = {"loss": name}
        try:
            checks = jl.testing.check_loss(loss_fn, *args, strict=not args)
            row |= {"comparisons": len(checks), "holds": True}
            row["worst, of what is allowed"] = max(check.error for check in checks)
        except AssertionError as error:
            row |= {"comparisons": 0, "holds": False, "message": str(error)}
        rows.append(row)
    return rows


def _timing() -> Rows:
    """Median times in milliseconds, ours and optax's calls alternating."""
    rows = []
    for batch, num_classes in ((4096, 1000), (512, 50257)):
        for dtype in ("float32", "bfloat16"):
            rng = np.random.default_rng(0)
            logits = jnp.asarray(rng.normal(size=(batch, num_classes)), dtype)
            labels = jnp.asarray(rng.integers(num_classes, size=batch))
            for what in ("forward", "value and gradient"):
                times = _alternate(what, logits, labels)
                row: dict[str, Any] = {"shape": f"{batch}x{num_classes}"}
                rows.append(row | {"dtype": dtype, "what": what} | times)
    return rows


def _alternate(what: str, logits: jax.Array, labels: jax.Array) -> dict[str, float]:
    losses = {"jaxlosses ms": jl.softmax_cross_entropy_with_integer_labels}
    optax = _accuracy.installed_optax()
    if optax is not None:
        losses["optax ms"] = optax.softmax_cross_entropy_with_integer_labels
    compiled = {}
    for name, loss_fn in losses.items():

        def mean(z: jax.Array, y: jax.Array, loss_fn: Any = loss_fn) -> jax.Array:
            return loss_fn(z, y).mean()

        function = mean if what == "forward" else jax.value_and_grad(mean)
        compiled[name] = jax.jit(function)
        jax.block_until_ready(compiled[name](logits, labels))
    times: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(7):
        for name, function in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(function(logits, labels))
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def _text(report: dict[str, Any], holds: bool) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    parts = [versions, *report["devices"], ""]
    parts += [
        "Worst relative error at margins from 0 to "
        f"{_accuracy.MARGINS[-1]:g} nats, against",
        "float64. A gradient's error is relative to the sum of its absolute terms.",
        _table(report["accuracy"]),
        "",
        "Entropy, at the same margins. A gradient's error is relative to the largest",
        "of its example.",
        _table(report["entropy"]),
        "",
        "Gradients: float64 and finite differences (jaxlosses.testing.check_loss)",
        _table(report["gradients"]),
        "",
        "Median time, alternating calls",
        _table(report["timing"]),
        "",
        "every error is within its bar" if holds else "AN ERROR IS OUTSIDE ITS BAR",
    ]
    return "\n".join(parts)


def _table(rows: Rows) -> str:
    head = list(rows[0])
    lines = [head] + [[_cell(row.get(key, "")) for key in head] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
