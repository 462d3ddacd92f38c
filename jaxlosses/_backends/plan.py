"""How a fused loss goes through its logits: the strategy, and its chunks by platform.

The strategy follows from shapes, dtypes and sharding alone; how many chunks it takes,
from the platform of the program as well. benchmarks/NOTES.md has the measurements,
"Fused, by platform".
"""

import math
from typing import Literal, NamedTuple

from jaxlosses._backends.chunks import Plan, Plans
from jaxlosses._backends.head import Head, Matmul, classes_of
from jaxlosses._platform import is_local, num_parts
from jaxlosses._types import Size, are_numbers

Way = Literal["tokens", "recompute", "vocab", "dense"]
Strategy = Literal["auto", Way]
Platform = Literal["cpu", "gpu", "tpu"]

# All logits at once, if they and what becomes of them take no more than this, or than
# this part of the kernel.
_DENSE_BYTES = 2**25
_DENSE_PART = 4
# Chunks of fewer examples spend their time on reading the kernel.
_FEW_EXAMPLES = 64
_FEW_EXAMPLES_BYTES = 2**28
# Chunks of what has a symbolic size, whose bytes cannot be counted.
_CHUNKS_OF_ANY_SIZE = 16
# Least and most on a CPU (NOTES.md, "the workspace a sixth of the logits").
_CPU_WORKSPACE = (2**25, 2**27)
# Longer chunks pay for the sum of their gradients, and as many as half the features.
_PAYING_EXAMPLES = 2048
# From so many examples on, XLA:GPU materialises 16-bit logits in float32.
_WIDE_ON_GPU = 8192
# A piece of the kernel's gradient takes this part of the workspace.
_PIECES = 8
_WORKSPACE = 2**30
# Of what the materialised loss holds, the part that a piece of the vocabulary takes.
_VOCAB_PART = 0.4
# Pieces are multiples of a tile, or matmuls would pad them and copy the gradient.
_TILE = 128
# float32 logits of a piece that a TPU keeps on the chip, and the classes of one.
_VMEM = 2**26
_VMEM_CLASSES = (512, 8192)


class Request(NamedTuple):
    """What a loss needs of a strategy.

    Attributes:
        dense: labels are distributions, or logits of a teacher.
        summed: all that is wanted is a sum or a mean.
        forward_mode: of the rule.
        teacher: its logits are formed, too.
    """

    dense: bool
    summed: bool
    forward_mode: bool
    teacher: bool = False


class Sizes(NamedTuple):
    """Of a product, on each device as far as that is known.

    Attributes:
        examples: of all batch axes.
        features: of the hidden states.
        classes: of the kernel.
        wide: bytes of a logit as it is formed; with those of a teacher's, if formed.
        cotangent: bytes of its cotangent in the compute dtype, if that is narrower.
        logit: bytes of a logit in the compute dtype, likewise.
        weight: bytes of an entry of the kernel.
        kernel_sum: bytes of an entry of the kernel's gradient beyond the result.
        hidden_sum: likewise, of the hidden states.
    """

    examples: Size
    features: Size
    classes: Size
    wide: int
    cotangent: int
    logit: int
    weight: int
    kernel_sum: int
    hidden_sum: int

    @property
    def entry(self) -> int:
        """Bytes of a logit and of its cotangent."""
        return self.wide + self.cotangent

    def entry_on(self, platform: Platform) -> int:
        """Those that are in memory: on a TPU the one takes the place of the other."""
        return self.wide if platform == "tpu" else self.entry

    @property
    def held(self) -> Size:
        """Bytes of all logits at once; a quarter is left for what else is needed."""
        return self.examples * self.classes * self.entry * 4 // 3

    @property
    def sums(self) -> Size:
        """Bytes of what sums up gradients, beyond the results."""
        kernel = self.kernel_sum * self.features * self.classes
        return kernel + self.hidden_sum * self.examples * self.features

    @property
    def materialised(self) -> Size:
        """Bytes that a loss on all logits holds at least, on any platform."""
        return self.examples * self.classes * self.logit

    def materialised_on(self, platform: Platform) -> Size:
        """Bytes that it holds on one."""
        narrow = self.logit < self.entry  # a compute dtype of 16 bits
        wide = platform == "gpu" and self.examples >= _WIDE_ON_GPU and narrow
        return self.materialised * (2 if wide else 1)


def sizes_of(matmul: Matmul, head: Head, teacher: bool = False) -> Sizes:
    """Sizes and bytes of a head; where a known mesh has its arrays, of one device."""
    *batch, features = head.hidden.shape
    acc, narrow = matmul.accumulation.itemsize, matmul.dtype.itemsize
    examples, number = math.prod(batch), 2 if teacher else 1
    if are_numbers(examples):
        examples = -(-examples // num_parts())
    return Sizes(
        examples,
        features,
        classes_of(matmul.layout, head.kernel),
        acc * number,
        narrow if narrow < 4 else 0,
        narrow * number,
        head.kernel.dtype.itemsize,
        *(acc if a.dtype.itemsize < acc else 0 for a in (head.kernel, head.hidden)),
    )


def choose(
    matmul: Matmul,
    head: Head,
    request: Request,
    strategy: Strategy,
    workspace: int | None,
) -> tuple[Way, Plans]:
    """The strategy, and its chunks on each platform."""
    sizes = sizes_of(matmul, head, request.teacher)
    way = _strategy(request, sizes, workspace) if strategy == "auto" else strategy
    if sizes.examples * sizes.classes == 0:
        way = "dense"
    if way == "dense":
        return way, Plans.of_all(Plan(matmul))

    def of(platform: Platform) -> Plan:
        if way == "vocab":
            return _by_classes(matmul, sizes, workspace, platform)
        *batch, _ = head.hidden.shape
        dense = request.dense
        return _by_examples(matmul, batch, sizes, workspace, platform, dense)

    return way, Plans(of("cpu"), of("gpu"), of("tpu"))


def _strategy(request: Request, sizes: Sizes, workspace: int | None) -> Way:
    """What `"auto"` takes, as its docstring says."""
    if request.dense and request.forward_mode:
        return "dense"
    in_chunks: Way
    in_chunks = "tokens" if request.summed and not request.forward_mode else "recompute"
    if not are_numbers(sizes.examples, sizes.features, sizes.classes):
        return in_chunks
    little = workspace
    if little is None:
        kernel = sizes.features * sizes.classes * sizes.weight
        little = max(_DENSE_BYTES, kernel // _DENSE_PART)
    if sizes.held <= little:
        return "dense"
    if not _may_cut(sizes.classes):
        return in_chunks
    if request.dense:  # whose classes are not cut
        return in_chunks if _pays(sizes) else "dense"
    few = _FEW_EXAMPLES_BYTES if workspace is None else workspace
    if _FEW_EXAMPLES * sizes.held > few * sizes.examples or not _pays(sizes):
        return "vocab"
    return in_chunks


def _may_cut(classes: int) -> bool:
    """Whether chunks may be of classes.

    A slice of a kernel that automatic axes may have split would be gathered, unless it
    is one of strips. Where a strip is no whole number of tiles, a TPU copies the kernel
    for that (NOTES.md, "Classes in strips").
    """
    if is_local():
        return True
    strips = _strips(classes)
    return strips > 1 and classes // strips % _TILE == 0


def _strips(classes: Size) -> int:
    """Of the classes, so many that a device has whole ones as far as that is known."""
    return math.gcd(classes, num_parts()) if are_numbers(classes) else 1


def _pays(sizes: Sizes) -> bool:
    """Whether chunks of examples hold less than the materialised loss.

    They sum up the gradient of a 16-bit kernel in float32, and take less time than
    that if they have a quarter as many examples as features.
    """
    chunk = sizes.features // 4 * sizes.classes * sizes.entry if sizes.kernel_sum else 0
    return sizes.sums + chunk <= sizes.materialised


def _by_examples(
    matmul: Matmul,
    batch: list[Size],
    sizes: Sizes,
    workspace: int | None,
    platform: Platform,
    dense: bool,
) -> Plan:
    # Flattened examples have one axis; where they may be split over devices, the
    # longest one is cut and the others stay.
    local, on_cpu = is_local(), platform == "cpu"
    axis = 0 if local or not batch else batch.index(_longest(batch))
    size = math.prod(batch) if local or not batch else batch[axis]
    known = are_numbers(sizes.examples, sizes.features, sizes.classes)
    bytes_ = _workspace(sizes, platform) if workspace is None else workspace
    number = _number(size, sizes.held, bytes_)
    if workspace is None and not on_cpu and known:
        # A shorter chunk takes less time than it takes to add what it has to the
        # float32 gradient of the kernel.
        paying = max(_PAYING_EXAMPLES, sizes.features // 2)
        number = min(number, max(1, sizes.examples // paying))
        left = sizes.materialised_on(platform) - sizes.sums
        if left > 0:
            chunks = sizes.examples * sizes.classes * sizes.entry_on(platform)
            number = max(number, _number(size, chunks, left))
    if are_numbers(size):
        # Equal chunks need no padding, whose entries would move between devices, and
        # which would copy distributions; and a matmul of whole tiles pads no operand.
        # Elsewhere it is a mask, and programs of more operations.
        most = 2 * number if dense or not (local and on_cpu) else 4 * number // 3
        equal = range(number, min(most, size) + 1)
        number = next((n for n in equal if size % n == 0), number)
    pieces = 1
    if local and on_cpu and known:
        accumulator = sizes.features * sizes.classes * matmul.accumulation.itemsize
        pieces = max(1, min(sizes.classes, -(-_PIECES * accumulator // bytes_)))
    return Plan(matmul, number, axis, local, pieces)


def _by_classes(
    matmul: Matmul, sizes: Sizes, workspace: int | None, platform: Platform
) -> Plan:
    classes = sizes.classes
    known = are_numbers(sizes.examples, sizes.features, classes)
    bytes_ = _workspace(sizes, platform) if workspace is None else workspace
    strips = _strips(classes)
    length = classes // strips
    if platform == "cpu" or not known:
        # A piece keeps its logits beside the cotangent.
        number = _number(length, 2 * sizes.held, bytes_)
        return Plan(matmul, number, strips=strips)
    if workspace is None:
        bytes_ = min(bytes_, int(_VOCAB_PART * sizes.materialised))
    sliced = 0 if platform == "tpu" else sizes.weight  # it reads slices in place
    logits = sizes.examples * sizes.entry_on(platform)
    size = bytes_ // (logits + sizes.features * sliced)
    if platform == "tpu":
        least, most = _VMEM_CLASSES
        on_chip = _VMEM // (sizes.examples * matmul.accumulation.itemsize)
        size = min(size, max(least, min(on_chip, most)))
    number = -(-classes // max(size, 1))
    size = -(-length // number)
    if length > _TILE:
        size = min(length, -(-size // _TILE) * _TILE)
    number = -(-length // size)
    return Plan(matmul, number, strips=strips, piece=size, rounds=is_local())


def _workspace(sizes: Sizes, platform: Platform) -> int:
    if platform != "cpu":
        return _WORKSPACE
    least, most = _CPU_WORKSPACE
    if not are_numbers(sizes.held):
        return most
    return min(max(least, 4 * sizes.examples * sizes.classes // 6), most)


def _number(size: Size, held: Size, workspace: int) -> int:
    """In how many chunks so many examples or classes are cut."""
    number = -(-held // workspace) if are_numbers(held) else _CHUNKS_OF_ANY_SIZE
    return max(1, min(size, number)) if are_numbers(size) else number


def _longest(sizes: list[Size]) -> Size:
    """The largest size; for that counts the first whose number is not known."""
    unknown = (size for size in sizes if not are_numbers(size))
    return next(unknown, None) or max(sizes)


def temporary_bytes(way: Way, plan: Plan, sizes: Sizes, platform: Platform) -> int:
    """About what value and gradient hold beyond arguments and results."""
    examples, features, classes = sizes[:3]
    entry = sizes.entry_on(platform)
    if way == "dense":
        return int(examples * classes * entry)
    if way == "vocab":
        piece = plan.strips_of(classes).in_chunk
        logits = examples * piece * entry
        sliced = 0 if platform == "tpu" else sizes.weight + sizes.kernel_sum
        beside = sizes.hidden_sum * examples
        return int(logits + features * (sliced * piece + beside))
    logits = -(-examples // plan.num_chunks) * classes * entry
    part = features * classes * plan.matmul.accumulation.itemsize
    beside = part // plan.kernel_pieces if plan.kernel_pieces > 1 else 0
    return int(logits + sizes.sums + beside)
