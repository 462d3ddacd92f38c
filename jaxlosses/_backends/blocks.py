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

from jaxlosses._platform import take

Result = TypeVar("Result")
Arrays = TypeVar("Arrays")

# Logits of a block, about 4 MiB in float32: read from cache after the first time
# (NOTES.md, "Blocks of about 2^20 logits").
BLOCK_SIZE = 2**20


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

    def block(i: Array) -> Result:
        def part(a: Array) -> Array:
            if a.ndim == 0 or a.shape[0] != num_rows:
                return a
            return take(a, i * rows, rows)

        return of_block(lambda: jax.tree.map(part, arrays))

    def join(blocks: Array) -> Array:
        # A slice clamps its start: the last block is whole, and overlaps.
        head, tail = blocks[:-1].reshape(-1, 1), blocks[-1]
        return jnp.concatenate([head, tail[len(head) - num_rows :]])

    num_blocks = -(-num_rows // rows)
    blocks: Result = jax.tree.map(join, lax.map(block, jnp.arange(num_blocks)))
    return blocks
