"""Reading the text of a module that XLA has compiled."""

import collections
import dataclasses
import math
import re
from typing import Any

_INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%(?P<name>[\w.-]+) = (?P<type>\([^()]*\)|\S+) (?P<op>[\w-]+)"
    r"\((?P<operands>[^()]*)\)"
)
_ARRAY = re.compile(r"\b([a-z]+\d+|pred)\[([\d,]*)\]")
# They name arrays, and touch none.
_FREE = {"parameter", "tuple", "get-tuple-element", "bitcast", "while", "constant"}


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    op: str
    arrays: tuple[tuple[str, int], ...]
    operands: tuple[tuple[tuple[str, int], ...], ...]
    of: tuple[str, ...]
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
        of = tuple(n for n in names if n in known)
        operands = tuple(known[n] for n in of)
        step = Instruction(match["name"], match["op"], arrays, operands, of, line)
        found[name].append(step)
    return dict(found)


@dataclasses.dataclass(frozen=True)
class Work:
    """What a program does, its loops counted by their trips.

    Attributes:
        launches: operations that touch memory: kernels, on a GPU.
        bytes_read: of their operands; of a slice, what is sliced.
        bytes_written: of their results; of an array updated in place, the update.
        bytes_moved: between devices: the results of collectives.
        cycles: estimate of a TPU's compiler; 0 elsewhere.
    """

    launches: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    bytes_moved: int = 0
    cycles: int = 0

    def __add__(self, other: "Work") -> "Work":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Work(*(a + b for a, b in pairs))

    def times(self, trips: int) -> "Work":
        return Work(*(trips * a for a in dataclasses.astuple(self)))


_BYTES = {"pred": 1, "bf16": 2}
_COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute")
_COLLECTIVES += ("reduce-scatter", "ragged-all-to-all")


def work(text: str) -> Work:
    """What a compiled module does when it runs once; of branches, the longest."""
    modules = computations(text)
    found: dict[str, Work] = {}

    def of(name: str) -> Work:
        if name not in found:
            found[name] = sum(map(of_step, modules.get(name, [])), Work())
        return found[name]

    def of_step(step: Instruction) -> Work:
        if step.op == "while":
            trips = _trips(step, modules)
            return (of(_called(step, "body")) + of(_called(step, "condition"))).times(
                trips
            )
        if step.op == "call":
            return of(_called(step, "to_apply"))
        if step.op == "conditional":
            names = re.search(r"branch_computations=\{([^}]*)\}", step.line)
            branches = re.findall(r"%([\w.-]+)", names[1]) if names else []
            branches += re.findall(r"(?:true|false)_computation=%([\w.-]+)", step.line)
            return max((of(f"%{name}") for name in branches), key=_length)
        if step.op in _FREE or step.op.endswith("-done"):
            return Work()
        cycles = re.search(r'"estimated_cycles":"(\d+)"', step.line)
        read, written = _traffic(step, modules.get(_called(step, "calls"), []))
        moved = written if step.op.startswith(_COLLECTIVES) else 0
        return Work(1, read, written, moved, int(cycles[1]) if cycles else 0)

    return of("ENTRY")


def _length(work: Work) -> tuple[int, int]:
    return work.cycles, work.bytes_read + work.bytes_written


def _called(step: Instruction, role: str) -> str:
    match = re.search(rf"\b{role}=(%[\w.-]+)", step.line)
    return match[1] if match else ""


def _trips(step: Instruction, modules: dict[str, list[Instruction]]) -> int:
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', step.line)
    if known:
        return int(known[1])
    # A loop counts up to the one constant that its condition has.
    condition = modules[_called(step, "condition")]
    lines = [s.line for s in condition]
    lines += [
        s.line for step in condition for s in modules.get(_called(step, "calls"), [])
    ]
    limits = [int(n) for n in re.findall(r"constant\((\d+)\)", "\n".join(lines))]
    return max(limits, default=1)


def _traffic(step: Instruction, fused: list[Instruction]) -> tuple[int, int]:
    """Bytes that an operation reads and writes."""
    read = [sum(map(_size, operand)) for operand in step.operands]
    written = sum(map(_size, step.arrays))
    steps = fused or [step]
    for inner in steps:
        if inner.op == "dynamic-update-slice":
            written -= sum(map(_size, inner.arrays))
            written += sum(map(_size, inner.operands[1]))
    if step.op == "dynamic-slice":
        read[0] = written
    if step.op == "dynamic-update-slice":
        read[0] = 0
    for inner in fused:
        number = re.search(r"parameter\((\d+)\)", inner.line)
        if inner.op != "parameter" or number is None or int(number[1]) >= len(read):
            continue
        uses = [user for user in fused if inner.name in user.of]
        while len(uses) == 1 and uses[0].op == "bitcast":
            uses = [user for user in fused if uses[0].name in user.of]
        if uses and all(user.op == "dynamic-slice" for user in uses):
            sliced = sum(sum(map(_size, user.arrays)) for user in uses)
            read[int(number[1])] = min(read[int(number[1])], sliced)
        elif uses and all(
            user.op == "dynamic-update-slice" and user.of[0] == inner.name
            for user in uses
        ):
            read[int(number[1])] = 0
    return sum(read), max(written, 0)


def _size(array: tuple[str, int]) -> int:
    """Bytes of an array."""
    dtype, count = array
    bits = re.search(r"\d+", dtype)
    return count * (_BYTES.get(dtype) or max(1, int(bits[0]) // 8 if bits else 1))


def collectives(text: str) -> dict[str, str]:
    """The largest array that each kind of collective moves, such as `f32, 64 MiB`."""
    found: dict[str, tuple[int, str]] = {}
    for steps in computations(text).values():
        for step in steps:
            kind = step.op.removesuffix("-start")
            if kind in _COLLECTIVES:
                size, dtype = max((_size(a), a[0]) for a in step.arrays)
                found[kind] = max(found.get(kind, (0, "")), (size, dtype))
    return {
        kind: f"{dtype}, {size / 2**20:.3g} MiB"
        for kind, (size, dtype) in found.items()
    }


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
