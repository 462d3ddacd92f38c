"""How arrays are split over devices: by explicit axes, and inside a `shard_map`.

On a mesh of explicit axes the type of an array says how it is split. JAX refuses there
what its partitioner would settle by itself: operands of one operation that are split in
different ways, and a custom rule whose cotangent is split unlike its primal. So
everything that one pass reads is first brought to one split. `reshard` is
differentiable: its transpose brings the cotangent back to the split of the argument.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxlosses._math.classes import Whole
from jaxlosses._platform import is_by_hand
from jaxlosses._types import Size, Tree

# A tree of arrays, in which None stands for what is not given.
Arrays = TypeVar("Arrays")

Split = tuple[Any, ...]
"""The mesh axes of each axis of an array: a name, several, or None."""


def explicit_mesh(*arrays: Tree) -> Tree:
    """The mesh of the first array that is on explicit axes, or None."""
    for x in jax.tree.leaves(arrays):
        mesh: Any = jax.typeof(x).sharding.mesh
        if not mesh.empty and mesh.explicit_axes:
            return mesh
    return None


def split_of(x: Tree) -> Split:
    """How each axis of an array is split by explicit mesh axes."""
    entries = tuple(jax.typeof(x).sharding.spec)
    return entries + (None,) * (x.ndim - len(entries))


def names(entry: Tree) -> tuple[str, ...]:
    """Mesh axes of one entry of a split."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def every_name(split: Split) -> tuple[str, ...]:
    """Mesh axes of all entries of a split."""
    return tuple(name for entry in split for name in names(entry))


def split_like(x: Tree, like: Tree) -> Tree:
    """An array, split as another one of its rank is."""
    mesh = explicit_mesh(like)
    return x if mesh is None else reshard(mesh, x, split_of(like))


def as_ids(ids: Tree) -> NamedSharding | None:
    """The type of what is looked up for each id; None where JAX derives it."""
    mesh = explicit_mesh(ids)
    return None if mesh is None else NamedSharding(mesh, P(*split_of(ids)))


def of_splits(*records: type) -> Tree:
    """Records of arrays, to be filled with how each of them is split."""
    return records


def partitions(arrays: Arrays, splits: Arrays) -> Arrays:
    """The splits as partitions: of what is given, and of axes that are not shared.

    An axis of size 1, along which something is shared, cannot be split.
    """

    def of(x: Tree, split: Split) -> P | None:
        if x is None:
            return None
        return P(*(None if n == 1 else a for n, a in zip(x.shape, split, strict=True)))

    return jax.tree.map(of, arrays, splits, is_leaf=lambda x: x is None)


def reshard(mesh: Tree, arrays: Arrays, splits: Arrays) -> Arrays:
    """What is given, split as it is to be."""

    def put(x: Tree, partition: P) -> Tree:
        return jax.sharding.reshard(x, NamedSharding(mesh, partition))

    return jax.tree.map(put, arrays, partitions(arrays, splits))


def by_hand(
    run: Callable[[Arrays], Tree],
    mesh: Tree,
    arrays: Arrays,
    splits: Arrays,
    out_specs: Tree,
) -> Tree:
    """Runs a function of arrays inside a `shard_map` over all explicit axes.

    Args:
        run: what every device does with its part.
        mesh: of the arrays.
        arrays: split in any way.
        splits: how they are to be split.
        out_specs: partitions of the result.
    """
    split = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(partitions(arrays, splits),),
        out_specs=out_specs,
        axis_names=set(mesh.explicit_axes),
    )
    return split(reshard(mesh, arrays, splits))


@dataclasses.dataclass(frozen=True)
class Shards(Whole):
    """The classes are split over axes of a mesh, equally, inside a `shard_map`."""

    names: tuple[str, ...]

    def sum(self, a: Array) -> Array:
        return lax.psum(a, self.names)

    def max(self, a: Array) -> Array:
        return lax.pmax(a, self.names)

    def min(self, a: Array) -> Array:
        return lax.pmin(a, self.names)

    def count(self) -> int:
        return lax.axis_size(self.names)

    def first_id(self, size: Size) -> Size | Array:
        return size * lax.axis_index(self.names)


def shards_over(names: tuple[str, ...]) -> Whole:
    """How reductions over classes come together that mesh axes split, or none."""
    return Shards(names) if names else Whole()


def varying_axes(a: Tree) -> frozenset[str]:
    """Mesh axes of a `shard_map` along which an array, or a shape, may differ."""
    aval: Any = a if isinstance(a, jax.ShapeDtypeStruct) else jax.typeof(a)
    manual = aval.manual_axis_type
    return frozenset() if manual is None else manual.varying


def summed_like(cotangent: Array, primal: Tree) -> Array:
    """Inside a `shard_map`, sums a cotangent over axes on which its primal is equal."""
    axes = varying_axes(cotangent) - varying_axes(primal)
    return lax.psum(cotangent, tuple(sorted(axes))) if axes else cotangent


def typed_like(a: Array, like: Tree) -> Array:
    """Inside a `shard_map`, an array typed as varying wherever another one is."""
    axes = tuple(sorted(varying_axes(like) - varying_axes(a)))
    return lax.pcast(a, axes, to="varying") if axes else a


def varies_less(x: Tree, like: Tree) -> bool:
    """Inside a `shard_map`, whether devices share an array that differs of another."""
    return bool(varying_axes(like) - varying_axes(x))


def scan(body: Callable[[Tree, Tree], Tree], start: Tree, xs: Tree) -> Tree:
    """`lax.scan`, with constants at the start typed as the loop makes them."""
    if is_by_hand():
        first = jax.tree.map(lambda a: a[0], xs)
        like, _ = jax.eval_shape(body, start, first)
        start = jax.tree.map(typed_like, start, like)
    return lax.scan(body, start, xs)
