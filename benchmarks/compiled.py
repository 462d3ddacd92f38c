"""What the compilers for a GPU and a TPU make of a loss, without a device.

Both compile ahead of time for a described chip. Times need the chip; how often the
compiled program reads the logits, in which type it multiplies and how much memory it
holds can be read.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import itertools
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks import run
from benchmarks.cases import (
    FORWARD,
    FUSED,
    VALUE_AND_GRADIENT,
    Case,
    fused_grid,
    fused_on_gpu,
)
from benchmarks.hlo import collectives, matmuls, passes, work
from benchmarks.peers import Peers, first_line
from jaxlosses import linear_softmax_cross_entropy, testing

# Of the data sheet and of what the driver reports.
_H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132 fpus_per_core: 128 threads_per_warp: 32
  threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 l2_cache_size: 52428800
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  driver_version: "13.0.0" runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
}
platform_name: "CUDA"
runtime_version { major: 12 minor: 8 }
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
_STRATEGIES = ("tokens", "recompute", "vocab", "dense")
# Choosing among matmul kernels would need the chip.
_CUDA_FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"


def _h100() -> Any:
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} {_CUDA_FLAGS}"
    return topologies.get_topology_desc(
        "h100", platform="cuda", target_config=_H100, topology="1x1x1"
    )


def _v5e(shape: str = "2x2") -> Any:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    return topologies.get_topology_desc(f"v5e:{shape}", platform="tpu")


TARGETS: dict[str, tuple[str, Callable[[], Any]]] = {
    "h100": ("cuda", _h100),
    "v5e": ("tpu", _v5e),
}


def compilers() -> dict[str, str]:
    """Versions of the compilers' packages that are installed."""
    names = ("libtpu", "jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cuda-nvcc-cu12")
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def cases() -> Iterator[Case]:
    for dtype in ("bfloat16", "float32"):
        for what in (FORWARD, VALUE_AND_GRADIENT):
            yield Case("GPT-2", 8192, 50257, dtype, "random", what)
    yield from fused_on_gpu()
    yield from fused_grid()


def inspect(target: str, out: pathlib.Path, shrink: int = 1) -> pathlib.Path:
    """Compiles every case for the target, and writes what was read.

    Args:
        target: a key of `TARGETS`.
        out: folder of the file.
        shrink: divides every size, for a try-out.
    """
    platform, describe = TARGETS[target]
    topology = describe()
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("device",))
    place = NamedSharding(mesh, PartitionSpec())
    peers = Peers(("optax",), {}, "cpu", 1)
    result: dict[str, Any] = {
        "preset": "compiled",
        "only": "",
        "shrink": shrink,
        "environment": {
            "platform": platform,
            "device": topology.devices[0].device_kind,
            "revision": run.revision(),
        },
        "versions": peers.versions | compilers(),
        "absent": peers.absent,
        "not_run": [],
        "cases": [],
    }
    for full in tqdm.tqdm(list(cases()), unit="case", dynamic_ncols=True):
        case = full.shrunk(shrink)
        entries, failed = {}, {}
        for name, function in peers.functions(case).items():
            if case.model == "grid" and name not in ("jaxlosses", "optax"):
                continue
            try:
                entries[name] = _facts(function, case, platform, place)
            except jax.errors.JaxRuntimeError as error:  # too large for the chip
                failed[name] = first_line(error)
        described = dataclasses.asdict(case)
        if case.what == FUSED:
            described["plan"] = _plan(case, platform)
        result["cases"].append(described | {"failed": failed, "entries": entries})
    path = out / f"compiled-{target}-jax{jax.__version__}.json"
    run.write(result, path)
    return path


def inspect_eight_chips(out: pathlib.Path, shrink: int = 1) -> pathlib.Path:
    """The largest head, its examples over four chips and its classes over two.

    Value and gradient of the mean, on automatic and on explicit axes.
    """
    case = next(fused_on_gpu()).shrunk(shrink)
    B, D, V = case.batch, case.features, case.classes
    topology = _v5e("4x2")
    devices = np.array(topology.devices).reshape(4, 2)
    entries = []
    kinds, strategies = (AxisType.Auto, AxisType.Explicit), ("auto", *_STRATEGIES)
    for kind, strategy in itertools.product(kinds, strategies):
        mesh = jax.sharding.Mesh(devices, ("data", "model"), axis_types=(kind, kind))
        places = [
            NamedSharding(mesh, PartitionSpec(*axes))
            for axes in (("data", None), (None, "model"), ("data",))
        ]
        shapes = ((B, D), case.dtype), ((D, V), case.dtype), ((B,), jnp.int32)
        arguments = [
            jax.ShapeDtypeStruct(*shape, sharding=place)
            for shape, place in zip(shapes, places, strict=True)
        ]
        loss = functools.partial(
            linear_softmax_cross_entropy, strategy=strategy, reduction="mean"
        )
        function = jax.value_and_grad(loss, (0, 1))
        with jax.set_mesh(mesh):
            traced = jax.jit(function, out_shardings=(None, tuple(places[:2]))).trace(
                *arguments
            )
            compiled = traced.lower(lowering_platforms=("tpu",)).compile()
        text = compiled.as_text()
        entries.append(
            {
                "axes": kind.name.lower(),
                "strategy": strategy,
                "temp_bytes": int(compiled.memory_analysis().temp_size_in_bytes),
                "largest_moved": collectives(text),
                "work": dataclasses.asdict(work(text)),
            }
        )
    result = {
        "preset": "chips",
        "only": "",
        "shrink": shrink,
        "environment": {
            "platform": "tpu",
            "device": f"8 x {topology.devices[0].device_kind}",
            "revision": run.revision(),
        },
        "versions": {"jax": jax.__version__} | compilers(),
        "shape": f"{B}×{D}×{V} {case.dtype}",
        # Both gradients, in float32, each summed over the axis that it does not have.
        "ideal_bytes_moved": 4 * (B // 4 * D + D * V // 2),
        "entries": entries,
        "cases": [],
    }
    path = out / f"chips-v5e-4x2-jax{jax.__version__}.json"
    run.write(result, path)
    return path


def _plan(case: Case, platform: str) -> dict[str, Any]:
    """What our fused loss says that it is going to do."""
    shapes = (case.batch, case.features), (case.features, case.classes)
    head = (jax.ShapeDtypeStruct(shape, case.dtype) for shape in shapes)
    return testing.plan(*head, platform=platform)._asdict()


def _facts(
    function: Callable[..., Any], case: Case, platform: str, place: Any
) -> dict[str, Any]:
    def shape(dims: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=place)

    B, D, V = case.batch, case.features, case.classes
    dtype = jnp.dtype(case.dtype)
    fused = case.what == FUSED
    factors = (shape((B, D), dtype), shape((D, V), dtype))
    arguments = factors if fused else (shape((B, V), dtype),)
    traced = jax.jit(function).trace(*arguments, shape((B,), jnp.int32))
    compiled = traced.lower(lowering_platforms=(platform,)).compile()
    text = compiled.as_text()
    facts: dict[str, Any] = {
        "temp_bytes": int(compiled.memory_analysis().temp_size_in_bytes),
        "work": dataclasses.asdict(work(text)),
    }
    if fused:
        return facts | {"matmuls": matmuls(text)}
    return facts | passes(text, B * V)
