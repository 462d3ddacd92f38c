"""Every decision: rows in blocks or whole, the strategy, its chunks, its workspace."""

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

from jaxlosses._backends import cpu
from jaxlosses._backends.chunks import Plan
from jaxlosses._backends.head import Head, Layout, classes_of, compute_dtype
from jaxlosses._math import online, statistics, tails
from jaxlosses._math.classes import (
    Inputs,
    Spec,
    Values,
    Whole,
    accumulation_dtype,
)
from jaxlosses._math.statistics import Statistics
from jaxlosses._platform import by_platform, is_cpu, is_local
from jaxlosses._sharding import explicit_mesh
from jaxlosses._types import Size, are_numbers

Way = Literal["tokens", "recompute", "vocab", "dense"]
Strategy = Literal["auto", Way]

# Least and most on a CPU (benchmarks/NOTES.md, "the workspace a sixth of the logits").
_CPU_WORKSPACE = (2**25, 2**27)
_WORKSPACE = 2**30
# Chunks of fewer examples spend their time on reading the kernel.
_FEW_EXAMPLES = 64
# A piece of the kernel's gradient takes this part of the workspace.
_PIECES = 8
# Slices of a row of given logits, on a TPU.
_SLICES_ON_TPU = 4
# Chunks of what has a symbolic size, whose bytes cannot be counted.
_CHUNKS_OF_ANY_SIZE = 16


def evaluate(spec: Spec, inputs: Inputs) -> Statistics:
    """Statistics of given logits, read as the platform of the program wants it.

    Off a CPU a reduction of several numbers at once reads them once. XLA:CPU would take
    it one by one, and XLA:GPU writes the slices of a row that help XLA:TPU
    (benchmarks/NOTES.md, "One read, by a reduction of several numbers").
    """
    on_cpu: Callable[[Inputs], Statistics]
    on_cpu = functools.partial(statistics.evaluate, spec)
    if _may_block(spec, inputs):
        on_cpu = cpu.in_blocks(spec, _may_block)
    if spec.softcap is not None:  # arithmetic of pairs in every step costs more
        return by_platform(on_cpu, functools.partial(statistics.evaluate, spec), inputs)
    once = functools.partial(online.evaluate, spec)
    on_tpu = functools.partial(once, slices=_SLICES_ON_TPU)
    return by_platform(on_cpu, once, inputs, on_tpu=on_tpu)


def normalizer(spec: Spec, inputs: Inputs) -> tuple[Values, Values]:
    """What turns logits into probabilities, `peak` and `spread`, likewise."""

    def on_cpu(inputs: Inputs) -> tuple[Values, Values]:
        return tails.peak_and_spread(statistics.normalize(spec, inputs)[1])

    return by_platform(on_cpu, functools.partial(online.normalizer, spec), inputs)


def _may_block(spec: Spec, inputs: Inputs) -> bool:
    """Whether a loop over rows is sound and of use, were the platform a CPU.

    A loop over an axis that turns out to be sharded would make every device compute
    everything.
    """
    *batch, num_classes = inputs.logits.shape
    if spec.axes != (len(batch),) or num_classes == 0:
        return False
    if not are_numbers(*inputs.logits.shape):  # so many blocks, of so many rows
        return False
    shape = None if inputs.labels is None else inputs.labels.shape
    if spec.dense and shape not in (None, inputs.logits.shape):
        return False
    if spec.shards != Whole():  # every block would wait for its own collectives
        return False
    if explicit_mesh(inputs.logits) is not None:  # also one of one device
        return False
    if inputs.where is not None and inputs.where.size not in (
        num_classes,
        inputs.logits.size,
    ):
        return False
    return is_local()


class Request(NamedTuple):
    """What a loss needs of a strategy.

    Attributes:
        dense: labels are distributions.
        summed: all that is wanted is a sum or a mean.
        forward_mode: of the rule.
    """

    dense: bool
    summed: bool
    forward_mode: bool


def plan(
    layout: Layout,
    head: Head,
    request: Request,
    strategy: Strategy,
    workspace: int | None,
) -> tuple[Way, Plan]:
    """The strategy and the number of its chunks."""
    *batch, features = head.hidden.shape
    num_classes = classes_of(layout, head.kernel)
    num_examples = math.prod(batch)
    held = _bytes_of_logits(head, num_examples * num_classes)
    is_free = workspace is None
    if workspace is None:
        workspace = _workspace(num_examples * num_classes)
    if strategy == "auto":
        strategy = _strategy(request, held, num_examples, workspace)
    if num_examples * num_classes == 0:
        strategy = "dense"
    if strategy == "dense":
        return strategy, Plan(layout, 1)
    if strategy == "vocab":  # a piece keeps its logits beside the cotangent
        return strategy, Plan(layout, _chunks(num_classes, 2 * held, workspace))
    # Flattened examples have one axis; where they may be split over devices, the
    # longest one is cut and the others stay.
    local = is_local()
    axis = 0 if local or not batch else batch.index(_longest(batch))
    size = num_examples if local or not batch else batch[axis]
    number = _chunks(size, held, workspace)
    on_cpu = is_cpu()
    known = are_numbers(num_examples, features)
    if is_free and not on_cpu and known and num_examples >= 2 * features > 0:
        # A shorter chunk takes less time than it takes to add what it has to the
        # float32 gradient of the kernel (benchmarks/NOTES.md, "Fused").
        number = min(number, 2 * num_examples // features)
    if not (local and on_cpu) and are_numbers(size):
        # Equal chunks need no padding, whose entries would move between devices; and
        # a matmul of whole tiles pads no operand.
        equal = range(number, min(2 * number, size) + 1)
        number = next((n for n in equal if size % n == 0), number)
    pieces = 1
    if local and on_cpu and are_numbers(head.kernel.size):
        accumulator = (
            head.kernel.size * accumulation_dtype(compute_dtype(head)).itemsize
        )
        pieces = max(1, min(num_classes, -(-_PIECES * accumulator // workspace)))
    return strategy, Plan(layout, number, axis, local, pieces)


def _bytes_of_logits(head: Head, size: Size) -> Size:
    """Logits, which their cotangent replaces, and that in the compute dtype.

    A quarter is left for what else a chunk needs.
    """
    dtype = compute_dtype(head)
    entry = accumulation_dtype(dtype).itemsize
    entry += dtype.itemsize if dtype.itemsize < 4 else 0
    return size * entry * 4 // 3


def _workspace(num_logits: Size) -> int:
    if not is_cpu():
        return _WORKSPACE
    least, most = _CPU_WORKSPACE
    if not are_numbers(num_logits):
        return most
    return min(max(least, 4 * num_logits // 6), most)


def _strategy(request: Request, held: Size, num_examples: Size, workspace: int) -> Way:
    """What `"auto"` takes, as its docstring says."""
    is_known = are_numbers(held)
    if request.dense or (is_known and held <= workspace):
        return "dense"
    if is_known and is_local() and _FEW_EXAMPLES * held > workspace * num_examples:
        return "vocab"
    return "tokens" if request.summed and not request.forward_mode else "recompute"


def _chunks(size: Size, held: Size, workspace: int) -> int:
    """In how many chunks so many examples or classes are cut."""
    number = -(-held // workspace) if are_numbers(held) else _CHUNKS_OF_ANY_SIZE
    return max(1, min(size, number)) if are_numbers(size) else number


def _longest(sizes: list[Size]) -> Size:
    """The largest size; for that counts the first whose number is not known."""
    unknown = (size for size in sizes if not are_numbers(size))
    return next(unknown, None) or max(sizes)
