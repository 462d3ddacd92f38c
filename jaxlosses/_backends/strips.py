"""The classes in strips, of each of which a chunk takes a piece.

Of one device, or where a device has its part by itself, there is one strip. Automatic
mesh axes may have split the classes, nobody can tell which: a slice of them all would
be gathered. A piece of each of as many strips as there are devices stays where it is.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxlosses._platform import put, take
from jaxlosses._types import Size, Tree


@dataclasses.dataclass(frozen=True)
class Strips:
    """How chunks of classes are taken; static.

    Attributes:
        number: of strips, which are equally long.
        length: classes of one.
        num_chunks: of which each takes a piece of each strip.
        size: classes of a piece.
    """

    number: int
    length: Size
    num_chunks: int
    size: Size

    @property
    def starts(self) -> Array:
        """Where each chunk begins in a strip, if no class were taken twice."""
        return self.size * jnp.arange(self.num_chunks, dtype=jnp.int32)

    @property
    def in_chunk(self) -> Size:
        """Classes of a chunk."""
        return self.number * self.size

    @property
    def overlap(self) -> bool:
        """Whether the last chunks have classes of others."""
        return self.size * self.num_chunks != self.length

    def begin(self, start: Array) -> Array:
        """Where a chunk does begin."""
        return jnp.minimum(start, self.length - self.size)

    def fold(self, a: Tree, axis: int = 0) -> Tree:
        """An array with the strips along an axis of their own before the classes."""
        if a is None or self.number == 1:
            return a
        cut = (self.number, self.length)
        return a.reshape(*a.shape[:axis], *cut, *a.shape[axis + 1 :])

    def unfold(self, a: Tree, axis: int = 0) -> Tree:
        """The inverse."""
        if a is None or self.number == 1:
            return a
        return a.reshape(*a.shape[:axis], -1, *a.shape[axis + 2 :])

    def take(self, a: Tree, begin: Array, axis: int = 0) -> Tree:
        """What a chunk has of a folded array, not folded."""
        if a is None:
            return None
        if self.number == 1:
            return take(a, begin, self.size, axis)
        return self.unfold(take(a, begin, self.size, axis + 1), axis)

    def place(
        self, a: Array, part: Array, begin: Array, axis: int, linear: bool
    ) -> Array:
        """A folded array with what a chunk has of it replaced.

        Args:
            a: the array.
            part: of the chunk, not folded.
            begin: of the chunk.
            axis: of the classes.
            linear: so that it can be transposed.
        """
        at = axis
        if self.number > 1:
            cut = (self.number, self.size)
            part = part.reshape(*part.shape[:axis], *cut, *part.shape[axis + 1 :])
            at = axis + 1
        if linear:
            return lax.dynamic_update_slice_in_dim(a, part, begin, at)
        return put(a, part, begin, at)

    def fresh(self, start: Array) -> Array:
        """Which classes of a chunk the ones before do not have."""
        each = self.begin(start) + jnp.arange(self.size, dtype=jnp.int32) >= start
        return jnp.tile(each, self.number)

    def places(self, ids: Array, start: Array) -> Array:
        """Where a chunk has classes; nowhere in it, where another has them."""
        strip, place, begin = ids // self.length, ids % self.length, self.begin(start)
        fresh = (ids >= 0) & (place >= start) & (place < begin + self.size)
        return jnp.where(fresh, strip * self.size + place - begin, -1)

    def ids(self, places: Array, begin: Array) -> Array:
        """The inverse, for what is there."""
        return places // self.size * self.length + places % self.size + begin
