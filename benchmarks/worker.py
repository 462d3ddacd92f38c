"""PyTorch or TensorFlow in a process of its own.

Reads one JSON object per line, answers with one. It computes only while the other
side waits for the answer.
"""

import functools
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from benchmarks.cases import FORWARD, Case

Call = Callable[[Any, Any], Any]


class Framework(Protocol):
    def about(self) -> dict[str, str]: ...
    def load(self, logits: np.ndarray, labels: np.ndarray, case: Case) -> Any: ...
    def call(self, case: Case) -> Call: ...
    def temp_bytes(self, call: Call, logits: Any, labels: Any) -> int | None: ...
    def synchronize(self) -> None: ...
    def to_numpy(self, losses: Any) -> np.ndarray: ...
    def release(self) -> None: ...


class Torch:
    def __init__(self, device: str, threads: int, *, compiled: bool = False) -> None:
        import torch

        torch.set_num_threads(threads)
        self._torch = torch
        self._device = "cuda" if device == "gpu" else "cpu"
        self._compiled = compiled

    def about(self) -> dict[str, str]:
        threads = self._torch.get_num_threads()
        return {"torch": self._torch.__version__, "torch threads": str(threads)}

    def load(self, logits: np.ndarray, labels: np.ndarray, case: Case) -> Any:
        torch = self._torch
        rows = torch.from_numpy(logits).to(self._device, getattr(torch, case.dtype))
        ids = torch.from_numpy(labels).to(self._device, torch.int64)
        rows = rows.repeat(case.repeats, 1)[: case.batch].contiguous()
        return rows.requires_grad_(), ids.repeat(case.repeats)[: case.batch]

    def call(self, case: Case) -> Call:
        torch = self._torch
        loss = torch.nn.functional.cross_entropy
        if self._compiled:
            # Otherwise it counts the shapes seen, and gives up after eight.
            torch.compiler.reset()
            loss = torch.compile(loss, dynamic=False)
        if case.what == FORWARD:
            return torch.no_grad()(lambda z, y: loss(z, y, reduction="none"))

        def value_and_gradient(z: Any, y: Any) -> Any:
            value = loss(z, y)
            return value, torch.autograd.grad(value, z)

        return value_and_gradient

    def temp_bytes(self, call: Call, logits: Any, labels: Any) -> int | None:
        if self._device == "cpu":
            return None
        cuda = self._torch.cuda
        cuda.synchronize()
        cuda.reset_peak_memory_stats()
        before = cuda.memory_allocated()
        result = call(logits, labels)
        cuda.synchronize()
        kept = cuda.memory_allocated() - before
        del result
        return int(cuda.max_memory_allocated() - before - kept)

    def synchronize(self) -> None:
        if self._device == "cuda":
            self._torch.cuda.synchronize()

    def to_numpy(self, losses: Any) -> np.ndarray:
        return losses.double().cpu().numpy()

    def release(self) -> None:
        if self._device == "cuda":
            self._torch.cuda.empty_cache()


class TensorFlow:
    def __init__(self, device: str, threads: int) -> None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        if device == "cpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(threads)
        self._tf = tf

    def about(self) -> dict[str, str]:
        threads = self._tf.config.threading.get_intra_op_parallelism_threads()
        return {"tensorflow": self._tf.__version__, "tensorflow threads": str(threads)}

    def load(self, logits: np.ndarray, labels: np.ndarray, case: Case) -> Any:
        tf = self._tf
        rows = tf.cast(tf.constant(logits), case.dtype)
        ids = tf.constant(labels)
        if case.repeats == 1:
            return rows, ids
        rows = tf.tile(rows, (case.repeats, 1))[: case.batch]
        return rows, tf.tile(ids, (case.repeats,))[: case.batch]

    def call(self, case: Case) -> Call:
        tf = self._tf

        def loss(z: Any, y: Any) -> Any:
            return tf.nn.sparse_softmax_cross_entropy_with_logits(labels=y, logits=z)

        def value_and_gradient(z: Any, y: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(z)
                value = tf.reduce_mean(loss(z, y))
            return value, tape.gradient(value, z)

        function = loss if case.what == FORWARD else value_and_gradient
        return tf.function(function, jit_compile=False)

    def temp_bytes(self, call: Call, logits: Any, labels: Any) -> int | None:
        return None

    def synchronize(self) -> None:
        self._tf.test.experimental.sync_devices()

    def to_numpy(self, losses: Any) -> np.ndarray:
        return self._tf.cast(losses, self._tf.float64).numpy()

    def release(self) -> None:
        pass


def _framework(name: str, device: str, threads: int) -> Framework:
    if name == "tensorflow":
        return TensorFlow(device, threads)
    return Torch(device, threads, compiled=name == "torch.compile")


class Worker:
    _framework: Framework
    _call: Call
    _inputs: list[Any]

    def __init__(self, name: str, device: str, threads: int) -> None:
        self._arguments = (name, device, threads)

    def start(self) -> dict[str, Any]:
        self._framework = _framework(*self._arguments)
        return {"about": self._framework.about()}

    def prepare(self, case: dict[str, Any]) -> dict[str, Any]:
        self.release()
        parsed = Case(**case)
        self._call = self._framework.call(parsed)
        self._inputs = [
            self._framework.load(*parsed.pool(turn), parsed)
            for turn in range(parsed.turns)
        ]
        temp_bytes = self._framework.temp_bytes(self._call, *self._inputs[0])
        return {"temp_bytes": temp_bytes}

    def time(self, turn: int, calls: int) -> dict[str, Any]:
        inputs = self._inputs[turn % len(self._inputs)]
        self._framework.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            result = self._call(*inputs)
        self._framework.synchronize()
        elapsed = time.perf_counter() - start
        del result
        return {"ms": 1e3 * elapsed / calls}

    def losses(self) -> dict[str, Any]:
        losses = self._framework.to_numpy(self._call(*self._inputs[0]))
        return {"losses": losses.tolist()}

    def release(self) -> dict[str, Any]:
        self._inputs = []
        self._framework.release()
        return {}


def main(name: str, device: str, threads: str) -> None:
    # What a library prints must not end up among the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(function: Callable[[], dict[str, Any]]) -> None:
        try:
            reply = function()
        except Exception as error:
            first_line = str(error).partition("\n")[0]
            reply = {"failed": f"{type(error).__name__}: {first_line}"}
        print(json.dumps(reply), file=answers, flush=True)

    worker = Worker(name, device, int(threads))
    answer(worker.start)
    for line in sys.stdin:
        request = json.loads(line)
        answer(functools.partial(getattr(worker, request.pop("do")), **request))


if __name__ == "__main__":
    main(*sys.argv[1:])
