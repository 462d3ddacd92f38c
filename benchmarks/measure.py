"""One case: calls in turns, medians of paired ratios, errors against float64."""

import contextlib
import math
import random
import statistics
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import FORWARD, FUSED, OURS, Case, groups
from benchmarks.peers import Contestant, PeerError, first_line, load_factors

_MIN_TURNS, _MAX_TURNS = 2, 20
_SAMPLES_PER_TURN = 4
# Between two calls: threads look for more work, and temporary memory is given back
# after the result is there, 1.3 GB of it in somewhat less than a tenth of a second.
_PAUSE, _PAUSE_PER_BYTE = 0.005, 1e-10
# A GPU takes calls while it works: one sample is as many calls as last so long.
_GPU_SAMPLE_MS = 20.0
# After a pause a CPU's first call waits for its threads: one sample is as many calls,
# of everyone alike, as the slowest takes so long for.
_CPU_SAMPLE_MS = 5.0
_MAX_CALLS = 200


class Measurement:
    """One case and those who are still able to run it.

    Attributes:
        failed: contestant to the reason why it has no entry.
    """

    def __init__(
        self, case: Case, contestants: dict[str, Contestant], floor: str
    ) -> None:
        self._case, self._floor = case, floor
        self._contestants = dict(contestants)
        self.failed: dict[str, str] = {}

    def entries(self, budget: float, *, on_gpu: bool) -> dict[str, Any]:
        """Runs everyone in turns for about `budget` seconds; one entry each."""
        self._turn(0)  # the first call of all pays for what is set up lazily
        began = time.monotonic()
        (estimates,) = self._turn(1)
        one_turn = time.monotonic() - began
        plain = self._case.option in ("", "plain")
        exact = plain and self._case.what in (FORWARD, FUSED)
        errors = self._errors() if exact else {}
        if on_gpu:
            calls = {
                name: min(_MAX_CALLS, math.ceil(_GPU_SAMPLE_MS / max(ms, 1e-3)))
                for name, ms in estimates.items()
            }
        else:
            slowest = max(estimates.values(), default=_CPU_SAMPLE_MS)
            alike = min(_MAX_CALLS, math.ceil(_CPU_SAMPLE_MS / max(slowest, 1e-3)))
            calls = dict.fromkeys(estimates, alike)
        for name, ms in estimates.items():
            one_turn += 1e-3 * ms * (_SAMPLES_PER_TURN * calls[name] - 1)
        turns = max(_MIN_TURNS, min(_MAX_TURNS, int(budget / one_turn)))
        samples: list[dict[str, float]] = []
        for turn in range(turns):
            samples += self._turn(turn, _SAMPLES_PER_TURN, calls)
        return {
            name: self._entry(name, samples)
            | ({"worst_error": errors[name]} if name in errors else {})
            | {"calls_per_sample": calls[name]}
            for name in self._contestants
        }

    def _entry(self, name: str, samples: list[dict[str, float]]) -> dict[str, Any]:
        own = [each[name] for each in samples]
        entry: dict[str, Any] = {"ms": quartiles(own)}
        for key, other in (("ratio_to_ours", OURS), ("ratio_to_floor", self._floor)):
            if other in self._contestants:
                entry[key] = quartiles([each[name] / each[other] for each in samples])
        entry["temp_bytes"] = self._contestants[name].temp_bytes
        entry["samples_ms"] = [float(f"{ms:.5g}") for ms in own]
        return entry

    def _turn(
        self, turn: int, count: int = 1, calls: dict[str, int] | None = None
    ) -> list[dict[str, float]]:
        """Samples of everyone, one process after the other, within it in turns.

        The order changes with the turn, that within a process with each sample.
        """
        order = random.Random(turn)
        processes: dict[str, list[str]] = {}
        for name, contestant in self._contestants.items():
            processes.setdefault(contestant.process, []).append(name)
        samples: list[dict[str, float]] = [{} for _ in range(count)]
        for names in order.sample(list(processes.values()), len(processes)):
            first = self._contestants[names[0]]
            # A process that sat idle has given its free pages back, and its first
            # call would pay for having them again.
            with self._unless_it_fails(names[0]):
                first.time(turn, 1)
            for i, sample in enumerate(samples, turn * count):
                for name in order.sample(names, len(names)):
                    contestant = self._contestants.get(name)
                    if contestant is None:
                        continue
                    with self._unless_it_fails(name):
                        each = 1 if calls is None else calls[name]
                        sample[name] = contestant.time(i, each)
                    temp_bytes = contestant.temp_bytes or 0
                    time.sleep(_PAUSE + _PAUSE_PER_BYTE * temp_bytes)
            time.sleep(first.pause)
        return samples

    def _errors(self) -> dict[str, dict[str, float]]:
        fused = self._case.what == FUSED
        exact = exact_mean(self._case) if fused else exact_losses(self._case)
        gradients = exact_gradients(self._case) if fused else None
        errors = {}
        for name in [name for name in self._contestants if name != self._floor]:
            with self._unless_it_fails(name):
                contestant: Any = self._contestants[name]
                if fused:  # by JAX alone
                    value, found = contestant.result()
                    each = {
                        "order 1": abs(float(value) / float(exact) - 1),
                        "gradient": distance(found, gradients),
                    }
                    errors[name] = {k: float(f"{v:.3g}") for k, v in each.items()}
                else:
                    losses = contestant.losses()
                    errors[name] = worst_errors(self._case, losses, exact)
        return errors

    @contextlib.contextmanager
    def _unless_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except (PeerError, jax.errors.JaxRuntimeError) as error:
            self.failed[name] = first_line(error)
            del self._contestants[name]


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return [float(f"{q:.5g}") for q in statistics.quantiles(values, method="inclusive")]


def exact_mean(case: Case) -> np.ndarray:
    """Mean loss of the rounded factors in float64."""
    hidden, kernel = (
        x.astype(jnp.dtype(case.dtype)).astype(np.float64) for x in case.factors()
    )
    labels = np.resize(case.pool(0)[1], case.batch)
    total = 0.0
    rows = max(1, 2**24 // case.classes)
    for start in range(0, case.batch, rows):
        z = hidden[start : start + rows] @ kernel
        here = labels[start : start + rows]
        peak = z.max(axis=-1)
        at_label = z[np.arange(len(z)), here]
        z -= peak[:, None]
        np.exp(z, out=z)
        total += float(np.sum(np.log(z.sum(axis=-1)) + peak - at_label))
    return np.array(total / case.batch)


def exact_gradients(case: Case) -> Any:
    """Gradients of the mean loss of the rounded factors, all logits in float32."""

    def mean(factors: Any, labels: jax.Array) -> jax.Array:
        logits = jnp.matmul(*factors, precision="highest")
        at_label = jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
        return (jax.nn.logsumexp(logits, axis=-1) - at_label).mean()

    factors, labels = load_factors(case)
    factors = jax.tree.map(lambda x: x.astype(jnp.float32), factors)
    return jax.jit(jax.grad(mean))(factors, labels)


def distance(gradients: Any, exact: Any) -> float:
    """The larger relative error of the two gradients, in the Frobenius norm."""
    errors = [
        float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b))
        for a, b in zip(gradients, exact, strict=True)
    ]
    return max(errors)


def exact_losses(case: Case) -> np.ndarray:
    """Losses of the rounded logits in float64, by a sum without the maximum."""
    logits, labels = case.pool(0)
    losses = np.empty(len(labels))
    # In pieces that fit the cache.
    rows = max(1, 2**18 // case.classes)
    for start in range(0, len(labels), rows):
        piece = logits[start : start + rows].astype(jnp.dtype(case.dtype))
        z, here = piece.astype(np.float64), np.arange(len(piece))
        at_label = z[here, labels[start : start + rows]]
        top = z.argmax(axis=-1)
        peak = z[here, top]
        others = np.exp(z - peak[:, None])
        others[here, top] = 0
        excess = others.sum(axis=-1)
        losses[start : start + rows] = np.log1p(excess) + (peak - at_label)
    return losses


def worst_errors(case: Case, losses: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Worst relative error of each group of rows."""
    # The drawn rows repeat, and so do their losses.
    wanted = np.resize(exact, case.batch)
    error = np.abs(losses - wanted) / wanted
    error[np.isnan(error)] = np.inf
    return {
        name: float(f"{error[np.resize(rows, case.batch)].max():.3g}")
        for name, rows in groups(case).items()
        if rows.any()
    }
