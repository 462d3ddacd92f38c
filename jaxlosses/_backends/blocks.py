"""Blocks of rows, each small enough to be read again from cache.

XLA:CPU reads an array once per reduction; of a block, all but the first find it there
(benchmarks/NOTES.md, "Blocks of about 2^20 logits").
"""

import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxlosses._math.classes import Values
from jaxlosses._platform import in_memory, take

Result = TypeVar("Result")
Arrays = TypeVar("Arrays")
Operands = tuple[Array, ...]

# Logits of a block, about 4 MiB in float32: read from cache after the first time
# (NOTES.md, "Blocks of about 2^20 logits").
BLOCK_SIZE = 2**20
# XLA:CPU reduces longer rows at half the rate or less (NOTES.md, "Rows of a block").
LONGEST_ROW = 2**15 - 1
# Shorter ones cost more to start with than a copy.
_MOST_PARTS = 64

# So many entries become one before any is written: what one core has written is slow to
# read for another. A loop over more would not be unrolled (NOTES.md, "Eight of them
# added up").
LARGEST_FOLD = 8
# float32 numbers of a vector of XLA:CPU.
_LANES = 8


def rows_of_block(num_classes: int) -> int:
    """A power of two, which XLA:CPU shares out evenly between threads."""
    return 2 ** max(0, round(math.log2(BLOCK_SIZE / num_classes)))


def by_rows(
    of_block: Callable[[Callable[[], Arrays]], Result],
    arrays: Arrays,
    num_rows: int,
    rows: int,
) -> Result:
    """A function of what cuts out a block, for one of so many rows after the other."""
    if rows >= num_rows:
        return of_block(lambda: arrays)

    def block(start: Array, _: None) -> tuple[Array, Result]:
        def part(a: Array) -> Array:
            if a.ndim == 0 or a.shape[0] != num_rows:
                return a
            return take(a, start, rows)

        return start + rows, of_block(lambda: jax.tree.map(part, arrays))

    def join(blocks: Array) -> Array:
        if num_rows % rows == 0:
            return blocks.reshape(-1, 1)
        # A slice clamps its start: the last block is whole, and overlaps.
        head, tail = blocks[:-1].reshape(-1, 1), blocks[-1]
        return jnp.concatenate([head, tail[len(head) - num_rows :]])

    num_blocks = -(-num_rows // rows)
    _, blocks = lax.scan(block, jnp.int32(0), length=num_blocks)
    joined: Result = jax.tree.map(join, blocks)
    return joined


def in_folds(num_classes: int, most: int = LARGEST_FOLD) -> int:
    """How many entries of a row are in whole folds; the others are left over."""
    return math.prod(_cut_in_folds(num_classes, most))


def folded(
    entries: Operands,
    both: Callable[[Operands, Operands], Operands],
    nothing: tuple[float, ...],
    most: int = LARGEST_FOLD,
) -> Operands:
    """Rows of whole folds of so many, of which each has become one entry per lane."""
    # There may be no row at all.
    num_rows, num_classes = entries[0].shape
    number, fold, lanes = _cut_in_folds(num_classes, most)
    cut = tuple(a.reshape(num_rows, number, fold, lanes) for a in entries)
    start = tuple(jnp.asarray(x, a.dtype) for x, a in zip(nothing, cut, strict=True))
    found = in_memory(lax.reduce(cut, start, both, (2,)))
    return tuple(a.reshape(num_rows, number * lanes) for a in found)


def _cut_in_folds(num_classes: int, most: int) -> tuple[int, int, int]:
    folds = range(most, most // 2 - 1, -1)
    even = (n for n in folds if num_classes % (n * _LANES) == 0)
    fold = next(even, most)
    return num_classes // (fold * _LANES), fold, _LANES


def short_rows(a: Values) -> list[tuple[Values, int]]:
    """Arrays of the parts of each row, and how many those are.

    XLA:CPU is fast at reductions of an array in memory, which must not be converted
    from bfloat16, and of short rows: a long one is cut in equal parts. Without a
    divisor of fit size, less than one entry per part is left over, at the price of a
    copy.
    """
    num_rows, num_classes = a.shape
    least = -(-num_classes // LONGEST_ROW)
    exact = (n for n in range(least, _MOST_PARTS) if num_classes % n == 0)
    num_parts = next(exact, least)
    width = num_classes // num_parts
    cut, left = jnp.split(a, [width * num_parts], 1)
    rows = [(in_memory(in_memory(cut).reshape(num_rows * num_parts, width)), num_parts)]
    return [*rows, (in_memory(left), 1)] if left.shape[1] else rows


def each(
    rows: list[tuple[Values, int]], reduced: Callable[[Values, int], Values]
) -> Values:
    """A reduction of every part of each row."""
    found = [in_memory(reduced(a, parts)).reshape(-1, parts) for a, parts in rows]
    return jnp.concatenate(found, 1)
