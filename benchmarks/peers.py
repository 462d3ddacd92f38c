"""Everyone who takes part, behind one interface.

JAX losses are compiled here. Other frameworks answer from a process of their own.
"""

import contextlib
import dataclasses
import functools
import importlib
import json
import os
import pathlib
import subprocess
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import (
    COPY,
    FIRST_CALL,
    FORWARD,
    FUSED,
    FUSED_FIRST_CALL,
    MATMUL,
    OURS,
    STEP,
    VALUE_AND_GRADIENT,
    Case,
)

Loss = Callable[[jax.Array, jax.Array], Any]
Fused = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Inputs = list[tuple[jax.Array, jax.Array]]

_LEARNING_RATE = 1e-3


class Contestant(Protocol):
    """Compiled and loaded for one case.

    Attributes:
        temp_bytes: temporary memory of one call, None where unknown.
        pause: so many seconds after a call its threads look for more work, which
            slows another process down.
        process: where it runs.
    """

    temp_bytes: int | None
    pause: float
    process: str

    def time(self, turn: int, calls: int) -> float:
        """Milliseconds per call."""
        ...

    def losses(self) -> np.ndarray:
        """What a forward call returns."""
        ...


class PeerError(Exception):
    """A peer cannot be started, or cannot run a case."""


def first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


# One function per JAX peer: `(logits, labels)` to one loss per row.


def _jaxlosses() -> Loss:
    import jaxlosses

    return jaxlosses.softmax_cross_entropy_with_integer_labels


def _optax() -> Loss:
    import optax

    loss: Loss = optax.softmax_cross_entropy_with_integer_labels
    return loss


def _jax_nn() -> Loss:
    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        log_p = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]

    return loss


_LOSSES: dict[str, Callable[[], Loss]] = {
    OURS: _jaxlosses,
    "optax": _optax,
    "jax.nn": _jax_nn,
}


# With an option: ours, and what people write by hand, `(logits, labels)` to one loss
# per row, or a pair of it and of statistics. Distributions and the logits of a teacher
# are in the place of labels.

_SMOOTHING, _Z_LOSS, _CAP, _SCALE = 0.1, 1e-4, 30.0, 1.25


def _exists(logits: jax.Array) -> jax.Array:
    classes = logits.shape[-1]
    return jnp.arange(classes) < classes - classes // 50 - 1


def _weights(logits: jax.Array) -> jax.Array:
    return 1 + jnp.arange(logits.shape[-1], dtype=jnp.float32) % 3


def _with_option(option: str) -> Loss:
    import jaxlosses as jl

    integer = jl.softmax_cross_entropy_with_integer_labels
    losses: dict[str, Loss] = {
        "plain": integer,
        "dense labels": jl.softmax_cross_entropy,
        "smoothing": functools.partial(integer, label_smoothing=_SMOOTHING),
        "z-loss": functools.partial(integer, z_loss=_Z_LOSS),
        "cap": functools.partial(integer, logit_softcap=_CAP),
        "scale": functools.partial(integer, logit_scale=_SCALE),
        "mask": lambda z, y: integer(z, y, where=_exists(z)[None]),
        "class weights": lambda z, y: integer(z, y, class_weights=_weights(z)),
        "statistics": functools.partial(integer, return_stats=True),
        "entropy": lambda z, y: _both(jl.softmax_log_probs(z, y, return_entropy=True)),
        "forward KL": jl.softmax_kl_divergence,
    }
    return losses[option]


def _by_hand(option: str) -> Loss:
    import optax

    integer = optax.softmax_cross_entropy_with_integer_labels

    def smoothed(z: jax.Array, y: jax.Array) -> jax.Array:
        return integer(z, y) + _SMOOTHING * (_at(z, y) - z.mean(axis=-1))

    def with_statistics(z: jax.Array, y: jax.Array) -> Any:
        predicted = z.argmax(axis=-1)
        lse = jax.nn.logsumexp(z, axis=-1)
        return lse - _at(z, y), (lse, predicted, predicted == y)

    def with_entropy(z: jax.Array, y: jax.Array) -> jax.Array:
        log_p = jax.nn.log_softmax(z)
        return _both((_at(log_p, y), -(jnp.exp(log_p) * log_p).sum(axis=-1)))

    def divergence(z: jax.Array, teacher: jax.Array) -> jax.Array:
        log_t = jax.nn.log_softmax(teacher)
        return (jnp.exp(log_t) * (log_t - jax.nn.log_softmax(z))).sum(axis=-1)

    losses: dict[str, Loss] = {
        "plain": integer,
        "dense labels": optax.softmax_cross_entropy,
        "smoothing": smoothed,
        "z-loss": lambda z, y: (
            integer(z, y) + _Z_LOSS * jax.nn.logsumexp(z, axis=-1) ** 2
        ),
        "cap": lambda z, y: integer(_CAP * jnp.tanh(z / _CAP), y),
        "scale": lambda z, y: integer(_SCALE * z, y),
        "mask": lambda z, y: integer(jnp.where(_exists(z), z, -1e30), y),
        "class weights": lambda z, y: _weights(z)[y] * integer(z, y),
        "statistics": with_statistics,
        "entropy": with_entropy,
        "forward KL": divergence,
    }
    return losses[option]


def _at(z: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.take_along_axis(z, y[:, None], axis=-1)[:, 0]


def _both(found: Any) -> jax.Array:
    log_p, entropy = found
    return log_p + 0.01 * entropy


_OPTIONS: dict[str, Callable[[str], Loss]] = {
    OURS: _with_option,
    "by hand": _by_hand,
}


# One function per contestant: `(hidden, kernel, labels)` to the mean loss.


def _fused(strategy: str) -> Callable[[], Fused]:
    def load() -> Fused:
        import jaxlosses

        return functools.partial(
            jaxlosses.linear_softmax_cross_entropy, strategy=strategy, reduction="mean"
        )

    return load


def _within(workspace_bytes: int | None, name: str, fused: Fused) -> Fused:
    """Ours with the workspace of a case; a peer as it is."""
    if workspace_bytes is None or not name.startswith(OURS):
        return fused
    return functools.partial(fused, workspace_bytes=workspace_bytes)


def _materialised() -> Fused:
    loss = _optax()
    return lambda hidden, kernel, labels: loss(hidden @ kernel, labels).mean()


def _tokamax() -> Fused:
    import tokamax
    from absl import flags

    flags.FLAGS.mark_as_parsed()  # it would read our command line

    def fused(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
        return tokamax.linear_softmax_cross_entropy_loss(
            hidden, labels, kernel, reduction="mean"
        )

    return fused


def _jax_cce() -> Fused:
    import jax_cce

    def fused(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
        return jax_cce.linear_cross_entropy(hidden, kernel.T, labels)

    return fused


_FUSED: dict[str, Callable[[], Fused]] = {
    OURS: _fused("auto"),
    **{f"{OURS} {s}": _fused(s) for s in ("tokens", "recompute", "vocab")},
    "optax": _materialised,
    "tokamax": _tokamax,
    "jax-cce": _jax_cce,
}
_WORKERS = ("torch", "torch.compile", "tensorflow")
PEERS = (
    *dict.fromkeys(n for n in (*_LOSSES, *_FUSED) if not n.startswith(OURS)),
    *_WORKERS,
)


def _half_square(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """A loss whose gradient is its argument: a step of it is nearly all matmul."""
    return (logits * logits).sum(axis=-1) / 2


def _floor(case: Case) -> tuple[str, Callable[..., Any]]:
    """The least that a case must do, by its name and as a function."""
    return {
        FORWARD: ("max", lambda z, y: z.max(axis=-1)),
        VALUE_AND_GRADIENT: ("x + 1", lambda z, y: z + 1),
        STEP: ("matmuls", _step(_half_square)),
        FUSED: ("matmuls", _gradients(_half_square_mean)),
        FUSED_FIRST_CALL: ("matmuls", _gradients(_half_square_mean)),
        FIRST_CALL: ("x + 1", lambda z, y: z + 1),
        COPY: ("x + 1", lambda z, y: z + 1),
        MATMUL: ("x @ x", lambda z, y: z @ z),
    }[case.what]


def _measured(case: Case, loss: Loss) -> Callable[..., Any]:
    """What of a loss a case measures."""
    if case.what == FORWARD:
        return loss
    if case.what in (VALUE_AND_GRADIENT, FIRST_CALL):
        return jax.value_and_grad(functools.partial(_mean, loss), has_aux=True)
    return _step(loss)


def _mean(loss: Loss, logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
    """Of the loss, and what comes beside it."""
    found = loss(logits, labels)
    values, beside = found if isinstance(found, tuple) else (found, None)
    return values.mean(), beside


def _step(loss: Loss) -> Callable[..., Any]:
    def step(factors: Any, labels: jax.Array) -> tuple[Any, jax.Array]:
        def objective(factors: Any) -> jax.Array:
            hidden, kernel = factors
            return loss(hidden @ kernel, labels).mean()

        value, gradients = jax.value_and_grad(objective)(factors)
        updated = jax.tree.map(lambda p, g: p - _LEARNING_RATE * g, factors, gradients)
        return updated, value

    return step


def _half_square_mean(
    hidden: jax.Array, kernel: jax.Array, labels: jax.Array
) -> jax.Array:
    return _half_square(hidden @ kernel, labels).mean()


def _gradients(fused: Fused) -> Callable[..., Any]:
    return jax.value_and_grad(fused, argnums=(0, 1))


class _Compiled:
    """A JAX function of logits and labels, or of their factors and labels."""

    pause = 0.0
    process = "this"

    def __init__(self, function: Callable[..., Any], inputs: Any) -> None:
        self._function = jax.jit(function).lower(*inputs[0]).compile()
        self.temp_bytes = _temp_bytes(self._function)
        self._inputs = inputs

    def time(self, turn: int, calls: int) -> float:
        inputs = self._inputs[turn % len(self._inputs)]
        start = time.perf_counter()
        for _ in range(calls):
            result = self._function(*inputs)
        jax.block_until_ready(result)
        elapsed = time.perf_counter() - start
        del result  # outside of the clock, as a peer's result is
        return 1e3 * elapsed / calls

    def result(self) -> Any:
        return self._function(*self._inputs[0])

    def losses(self) -> np.ndarray:
        return np.asarray(self.result(), np.float64)


class _FirstCall:
    """A JAX function, which each call traces, lowers and compiles."""

    pause = _Compiled.pause
    process = _Compiled.process
    temp_bytes = None

    def __init__(self, function: Callable[..., Any], inputs: Any) -> None:
        self._function, self._inputs = function, inputs[0]

    def time(self, turn: int, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            jax.clear_caches()
            jax.jit(self._function).lower(*self._inputs).compile()
        return 1e3 * (time.perf_counter() - start) / calls

    def losses(self) -> np.ndarray:
        raise NotImplementedError("It is compiled, not called.")


class _CompiledStep:
    """A JAX training step, whose factors are donated from call to call."""

    pause = _Compiled.pause
    process = _Compiled.process

    def __init__(
        self, function: Callable[..., Any], factors: Any, labels: jax.Array
    ) -> None:
        compiled = jax.jit(function, donate_argnums=0).lower(factors, labels).compile()
        self.temp_bytes = _temp_bytes(compiled)
        self._function, self._labels = compiled, labels
        self._factors = jax.tree.map(jnp.copy, factors)

    def time(self, turn: int, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            self._factors, value = self._function(self._factors, self._labels)
        jax.block_until_ready((self._factors, value))
        return 1e3 * (time.perf_counter() - start) / calls

    def losses(self) -> np.ndarray:
        raise NotImplementedError("A step returns no loss per row.")


def _temp_bytes(compiled: Any) -> int | None:
    analysis = compiled.memory_analysis()
    return None if analysis is None else int(analysis.temp_size_in_bytes)


class _Remote:
    """A case that a worker has loaded."""

    # Of TensorFlow, a tenth of a second was too short.
    pause = 0.2

    def __init__(self, worker: "Worker", case: Case) -> None:
        self._ask = worker.ask
        self.process = worker.name
        answer = worker.ask("prepare", case=dataclasses.asdict(case))
        self.temp_bytes = answer["temp_bytes"]

    def time(self, turn: int, calls: int) -> float:
        return float(self._ask("time", turn=turn, calls=calls)["ms"])

    def losses(self) -> np.ndarray:
        return np.array(self._ask("losses")["losses"])


class Worker:
    """A long-lived process with another framework, idle unless asked."""

    def __init__(self, name: str, python: str, device: str, threads: int) -> None:
        self.name = name
        root = str(pathlib.Path(__file__).parents[1])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            [python, "-m", "benchmarks.worker", name, device, str(threads)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.about: dict[str, str] = self._answer()["about"]

    def ask(self, method: str, **arguments: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        # A process that died is found out by its answer.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"do": method, **arguments}) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(f"its process ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise PeerError(answer["failed"])
        return answer

    def close(self) -> None:
        # A worker ends with its input.
        self._process.communicate()


class Peers:
    """Those who take part in a run.

    Attributes:
        absent: peer to the reason why it is not there.
        versions: of every package that is measured.
    """

    def __init__(
        self, names: Iterable[str], pythons: dict[str, str], device: str, threads: int
    ) -> None:
        self._losses: dict[str, Loss] = {}
        self._fused: dict[str, Fused] = {}
        self._workers: dict[str, Worker] = {}
        self.absent: dict[str, str] = {}
        self.versions = _versions()
        ours = (name for name in _FUSED if name.startswith(OURS))
        for name in (*ours, *names):
            try:
                if name in _FUSED:
                    self._fused[name] = _FUSED[name]()
                if name in _WORKERS:
                    python = pythons[name.partition(".")[0]]
                    worker = Worker(name, python, device, threads)
                    self._workers[name] = worker
                    self.versions |= worker.about
                elif name in _LOSSES:
                    self._losses[name] = _LOSSES[name]()
            except (ImportError, OSError, PeerError) as error:
                self.absent[name] = first_line(error)

    def functions(self, case: Case) -> dict[str, Callable[..., Any]]:
        """What of each JAX library the case measures."""
        if case.what in (FUSED, FUSED_FIRST_CALL):
            return {
                name: _gradients(_within(case.workspace_bytes, name, fused))
                for name, fused in self._fused.items()
            }
        if case.what in (COPY, MATMUL):
            return {}
        if case.option:
            return {n: _measured(case, of(case.option)) for n, of in _OPTIONS.items()}
        return {name: _measured(case, loss) for name, loss in self._losses.items()}

    def contestants(
        self, case: Case
    ) -> tuple[dict[str, Contestant], str, dict[str, str]]:
        """Contestants, which of them is the floor, and who failed and why."""
        floor, least = _floor(case)
        functions = self.functions(case) | {floor: least}
        make: Callable[..., Contestant]
        if case.what == STEP:
            factors, labels = load_factors(case)
            make = functools.partial(_CompiledStep, factors=factors, labels=labels)
        elif case.what in (FUSED, FUSED_FIRST_CALL):
            factors, labels = load_factors(case)
            kind = _Compiled if case.what == FUSED else _FirstCall
            make = functools.partial(kind, inputs=[(*factors, labels)])
        elif case.what == FIRST_CALL:
            make = functools.partial(_FirstCall, inputs=_load(case))
        else:
            make = functools.partial(_Compiled, inputs=_load(case))
        starts: dict[str, Callable[[], Contestant]]
        starts = {name: functools.partial(make, f) for name, f in functions.items()}
        ready: dict[str, Contestant] = {}
        failed = {}
        if case.what in (FORWARD, VALUE_AND_GRADIENT) and not case.option:
            for name, worker in self._workers.items():
                starts[name] = functools.partial(_Remote, worker, case)
        for name, start in starts.items():
            try:
                ready[name] = start()
            except (PeerError, jax.errors.JaxRuntimeError) as error:
                failed[name] = first_line(error)
        return ready, floor, failed

    def release(self) -> None:
        """Frees what the workers hold of a case."""
        for worker in self._workers.values():
            with contextlib.suppress(PeerError):  # reported where it failed to answer
                worker.ask("release")

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()


def _versions() -> dict[str, str]:
    names = ("jax", "jaxlib", "jaxlosses", "optax", "numpy", "tokamax", "jax-cce")
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            try:  # run from a checkout that is not installed
                found[name] = importlib.import_module(name).__version__
            except ImportError:
                continue
    return found


def _load(case: Case) -> Inputs:
    @jax.jit
    def load(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = jnp.tile(logits.astype(case.dtype), (case.repeats, 1))[: case.batch]
        if case.option in ("dense labels", "forward KL"):
            others = jnp.roll(rows, 1, axis=0)
            return rows, jax.nn.softmax(others) if "labels" in case.option else others
        return rows, jnp.tile(labels, case.repeats)[: case.batch]

    return [load(*case.pool(turn)) for turn in range(case.turns)]


def load_factors(case: Case) -> tuple[Any, jax.Array]:
    factors = tuple(jnp.asarray(x, case.dtype) for x in case.factors())
    return factors, jnp.asarray(np.resize(case.pool(0)[1], case.batch))
