"""Examples in chunks and back, and the gradients that chunks add up."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxlosses._backends.head import Head, Labels, Matmul, Wants, pull
from jaxlosses._backends.strips import Strips
from jaxlosses._platform import by_platform, take
from jaxlosses._sharding import scan, typed_like
from jaxlosses._types import Size, Tree

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the logits are cut; static.

    Attributes:
        matmul: how the logits are formed.
        num_chunks: of examples or of classes.
        axis: batch axis that is cut, where examples are.
        local: the examples are on one device. Those that count are moved to the front,
            and chunks without any are skipped at run time. Otherwise chunk `i` takes
            every `num_chunks`-th example from the `i`-th: a contiguous chunk of an
            axis that is split over devices would live on one of them.
        kernel_pieces: in how many pieces of classes a chunk of examples adds to the
            gradient of the kernel. Where a matmul cannot add to what is there, its
            result is as large as the kernel.
        strips: in how many strips the classes are, if they are cut.
        piece: classes of a strip in a chunk of classes; None for equal chunks.
        rounds: whether a matmul that has a part of the kernel's gradient to itself may
            round it, too.
    """

    matmul: Matmul
    num_chunks: int = 1
    axis: int = 0
    local: bool = False
    kernel_pieces: int = 1
    strips: int = 1
    piece: int | None = None
    rounds: bool = False

    def strips_of(self, classes: Size) -> Strips:
        """How chunks of so many classes are taken."""
        length = classes // self.strips
        size = self.piece or -(-length // self.num_chunks)
        return Strips(self.strips, length, self.num_chunks, size)


class Plans(NamedTuple):
    """How the logits are cut on each platform."""

    on_cpu: Plan
    on_gpu: Plan
    on_tpu: Plan

    @classmethod
    def of_all(cls, plan: Plan) -> "Plans":
        """The same on all."""
        return cls(plan, plan, plan)

    def of(self, platform: str) -> Plan:
        """The plan of a platform."""
        plan: Plan = getattr(self, f"on_{platform}")
        return plan

    @property
    def first(self) -> Plan:
        """One of them: how logits are formed, and whether on one device, is common."""
        return self.on_cpu

    def run(
        self, function: Callable[..., Result], *args: object, lazily: bool = True
    ) -> Result:
        """The result of `function(plan, *args)`, by the plan of the platform.

        Args:
            function: of a plan and the arguments.
            *args: pytrees of arrays.
            lazily: as in `by_platform`.
        """
        on_cpu, on_gpu, on_tpu = (functools.partial(function, plan) for plan in self)
        if self.on_cpu == self.on_gpu == self.on_tpu:
            return on_cpu(*args)
        return by_platform(on_cpu, on_gpu, *args, on_tpu=on_tpu, lazily=lazily)


class Cut:
    """Examples in chunks, and back."""

    def __init__(self, plan: Plan, labels: Labels) -> None:
        ids, counted = labels.ids, labels.counted
        self._plan, self._total = plan, ids.shape[plan.axis]
        self._size = -(-self._total // plan.num_chunks)
        self._padding = self._size * plan.num_chunks - self._total
        self._order = self._num_counted = None
        if plan.local and counted is not None:
            self._order = jnp.argsort(~counted, stable=True)
            self._num_counted = jnp.sum(counted)
        if self._padding and counted is None:
            counted = jnp.ones(ids.shape, bool)
        # What pads is zero: labels of class 0 that do not count.
        self.labels: Labels = self.split(labels._replace(counted=counted))

    def split(self, tree: Tree) -> Tree:
        """Every array that begins with `B...` as chunks along a new first axis."""
        return jax.tree.map(self._split, tree)

    def join(self, tree: Tree) -> Tree:
        """The inverse of `split`."""
        return jax.tree.map(self._join, tree)

    def loop(self, body: Tree, start: Tree, chunks: Tree) -> tuple[Tree, Tree]:
        """`lax.scan` over the chunks; one without examples that count is skipped."""
        if self._num_counted is None:
            return scan(body, start, chunks)
        num_counted, size = self._num_counted, self._size
        first = jax.tree.map(lambda a: a[0], chunks)
        carry, _ = jax.eval_shape(body, start, first)
        start = jax.tree.map(typed_like, start, carry)
        _, like = jax.eval_shape(body, start, first)

        def idle(carry: Tree, chunk: Tree) -> tuple[Tree, Tree]:
            del chunk
            zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)
            return carry, jax.tree.map(typed_like, zeros, like)

        def step(carry: Tree, x: Tree) -> tuple[Tree, Tree]:
            i, chunk = x
            out: tuple[Tree, Tree] = lax.cond(
                i * size < num_counted, body, idle, carry, chunk
            )
            return out

        ids = jnp.arange(self._plan.num_chunks)
        return lax.scan(step, start, (ids, chunks))

    def _split(self, a: Array) -> Array:
        plan = self._plan
        if self._order is not None:
            a = a.at[self._order].get(mode="promise_in_bounds", unique_indices=True)
        if self._padding:
            widths = [(0, 0)] * a.ndim
            widths[plan.axis] = (0, self._padding)
            a = jnp.pad(a, widths)
        cut = (plan.num_chunks, self._size)
        cut = cut[::-1] if not plan.local else cut
        a = a.reshape(*a.shape[: plan.axis], *cut, *a.shape[plan.axis + 1 :])
        return jnp.moveaxis(a, plan.axis + (not plan.local), 0)

    def _join(self, a: Array) -> Array:
        plan = self._plan
        a = jnp.moveaxis(a, 0, plan.axis + (not plan.local))
        shape = (*a.shape[: plan.axis], -1, *a.shape[plan.axis + 2 :])
        a = lax.slice_in_dim(a.reshape(shape), 0, self._total, axis=plan.axis)
        if self._order is not None:
            back = jnp.argsort(self._order)
            a = a.at[back].get(mode="promise_in_bounds", unique_indices=True)
        return a


def add(
    plan: Plan,
    sums: Head,
    head: Head,
    d_logits: Array,
    wants: Wants,
) -> Head:
    """The cotangent of the hidden states, and the sums with those of the others."""
    in_pieces = wants.kernel and plan.kernel_pieces > 1
    once = wants._replace(kernel=wants.kernel and not in_pieces)
    here = pull(plan.matmul, head, d_logits, once)
    d_bias = jax.tree.map(jnp.add, sums.bias, here.bias)
    if not in_pieces:
        d_kernel = jax.tree.map(jnp.add, sums.kernel, here.kernel)
        return Head(here.hidden, d_kernel, d_bias)

    classes = d_logits.shape[-1]
    size = -(-classes // plan.kernel_pieces)
    axis = 1 if plan.matmul.layout == "dv" else 0

    def body(d_kernel: Array, i: Array) -> tuple[Array, None]:
        start = jnp.minimum(i * size, classes - size)
        d_piece = take(d_logits, start, size, d_logits.ndim - 1)
        if size * plan.kernel_pieces != classes:  # the last pieces overlap
            fresh = start + jnp.arange(size, dtype=jnp.int32) >= i * size
            d_piece = jnp.where(jnp.broadcast_to(fresh, d_piece.shape), d_piece, 0)
        d = pull(plan.matmul, head, d_piece, Wants(False, True, False)).kernel
        so_far = lax.dynamic_slice_in_dim(d_kernel, start, size, axis)
        return lax.dynamic_update_slice_in_dim(d_kernel, so_far + d, start, axis), None

    d_kernel, _ = scan(
        body, sums.kernel, jnp.arange(plan.kernel_pieces, dtype=jnp.int32)
    )
    return Head(here.hidden, d_kernel, d_bias)
