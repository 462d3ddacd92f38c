"""What the compilers for a GPU and a TPU make of a loss, without a device.

Both compile ahead of time for a described chip. Times need the chip; how often the
compiled program reads the logits, in which type it multiplies and how much memory it
holds can be read.
"""

import collections
import dataclasses
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import run
from benchmarks.cases import FORWARD, FUSED, VALUE_AND_GRADIENT, Case, fused_on_gpu
from benchmarks.peers import Peers
from jaxlosses._backends import choose

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
# Choosing among matmul kernels would need the chip.
_CUDA_FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"


def _h100() -> Any:
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} {_CUDA_FLAGS}"
    return topologies.get_topology_desc(
        "h100", platform="cuda", target_config=_H100, topology="1x1x1"
    )


def _v5e() -> Any:
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    return topologies.get_topology_desc("v5e:2x2", platform="tpu")


TARGETS: dict[str, tuple[str, Callable[[], Any]]] = {
    "h100": ("cuda", _h100),
    "v5e": ("tpu", _v5e),
}


def cases() -> Iterator[Case]:
    for dtype in ("bfloat16", "float32"):
        for what in (FORWARD, VALUE_AND_GRADIENT):
            yield Case("GPT-2", 8192, 50257, dtype, "random", what)
    yield from fused_on_gpu()


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
        "versions": peers.versions,
        "absent": peers.absent,
        "not_run": [],
        "cases": [],
    }
    for full in tqdm.tqdm(list(cases()), unit="case", dynamic_ncols=True):
        case = full.shrunk(shrink)
        entries = {
            name: _facts(function, case, platform, place)
            for name, function in peers.functions(case).items()
        }
        described = dataclasses.asdict(case)
        result["cases"].append(described | {"failed": {}, "entries": entries})
    path = out / f"compiled-{target}-jax{jax.__version__}.json"
    run.write(result, path)
    return path


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
    # The fused loss asks for the backend, which here is the host's.
    with mock.patch.object(choose, "is_cpu", return_value=platform == "cpu"):
        traced = jax.jit(function).trace(*arguments, shape((B,), jnp.int32))
    compiled = traced.lower(lowering_platforms=(platform,)).compile()
    text = compiled.as_text()
    facts: dict[str, Any] = {
        "temp_bytes": int(compiled.memory_analysis().temp_size_in_bytes)
    }
    if fused:
        return facts | {"matmuls": matmuls(text)}
    return facts | passes(text, B * V)


# Reading the text of a compiled module.

_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%(?P<name>[\w.-]+) = (?P<type>\([^()]*\)|\S+) (?P<op>[\w-]+)"
    r"\((?P<operands>[^()]*)\)"
)
_ARRAY = re.compile(r"\b([a-z]+\d+)\[([\d,]*)\]")
# They name arrays, and touch none.
_FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "while", "constant"}


@dataclasses.dataclass(frozen=True)
class Instruction:
    op: str
    arrays: tuple[tuple[str, int], ...]
    operands: tuple[tuple[tuple[str, int], ...], ...]
    line: str


def computations(text: str) -> dict[str, list[Instruction]]:
    """Instructions of every computation, by its name; the entry's is `ENTRY`."""
    found: dict[str, list[Instruction]] = collections.defaultdict(list)
    known: dict[str, tuple[tuple[str, int], ...]] = {}
    name = ""
    for line in text.splitlines():
        if line and not line[0].isspace():
            name = line.split()[0]
            known = {}
            continue
        # Layouts, attributes in braces and comments.
        plain = re.sub(r"/\*.*?\*/", "", line)
        while plain != (plain := re.sub(r"\{[^{}]*\}", "", plain)):
            pass
        match = _INSTRUCTION.match(plain)
        if match is None:
            continue
        arrays = tuple(
            (dtype, math.prod(int(n) for n in dims.split(",") if n))
            for dtype, dims in _ARRAY.findall(match["type"])
        )
        known[match["name"]] = arrays
        names = re.findall(r"%([\w.-]+)", match["operands"])
        operands = tuple(known[n] for n in names if n in known)
        found[name].append(Instruction(match["op"], arrays, operands, line))
    return dict(found)


def passes(text: str, size: int) -> dict[str, int]:
    """How often arrays of the logits' size are read, written, and in float32."""
    reads = writes = wide = 0
    for step in computations(text)["ENTRY"]:
        if step.op in _FREE:
            continue
        reads += sum(n == size for operand in step.operands for _, n in operand)
        writes += sum(n == size for _, n in step.arrays)
        wide += sum(n == size for dtype, n in step.arrays if dtype == "f32")
    return {"reads": reads, "writes": writes, "float32_arrays": wide}


def matmuls(text: str) -> list[dict[str, Any]]:
    """Type of operands and result, and whether the result is added in place."""
    found = []
    for steps in computations(text).values():
        for step in steps:
            called = step.op == "custom-call" and re.search("gemm|matmul", step.line)
            if not called and step.op not in ("dot", "convolution"):
                continue
            factors = [operand[0][0] for operand in step.operands[:2]]
            product = {"factors": factors, "product": step.arrays[0][0]}
            if called:
                product["added_in_place"] = '"beta":1' in step.line
            found.append(product)
    return found
