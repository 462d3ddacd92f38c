"""One pass over chunks of examples: the loss of each, from the logits of its chunk.

With it the gradients, for the cotangents of the losses where they are known.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxlosses._backends.chunks import Cut, Plan, add
from jaxlosses._backends.head import NO_LABELS, Head, Labels, Wants, project
from jaxlosses._sharding import typed_like
from jaxlosses._types import Tree


class Operands(NamedTuple):
    """What losses of examples depend on.

    Attributes:
        head: the factors of the logits.
        shared: differentiable, the same for all examples.
        closed: likewise, what a function of the caller closes over.
        rows: differentiable, of shapes that begin with `B...`.
        labels: ids and masks.
        exists: classes that exist for every example, or None for all.
    """

    head: Head
    shared: Tree
    closed: tuple[Array, ...]
    rows: Tree
    labels: Labels
    exists: Bool[Array, " V"] | None


# logits, shared, closed, rows, labels, exists
# -> loss of each example, and what else to keep
LossOf = Callable[
    [Array, Tree, Tree, Tree, Labels, Bool[Array, " V"] | None],
    tuple[Float[Array, "*B"], Tree],
]


class Found(NamedTuple):
    """What a pass over the examples leaves.

    Attributes:
        total: the sum of the losses.
        values: the loss of each example, or None where the sum is all that is wanted.
        keep: what `loss_of` keeps of each example.
        gradient: of the structure of the operands and in the accumulation dtype, with
            None where none is wanted.
    """

    total: Float[Array, ""]
    values: Float[Array, "*B"] | None
    keep: Tree
    gradient: Operands


def in_chunks(
    plan: Plan,
    loss_of: LossOf,
    operands: Operands,
    wanted: Operands | None = None,
    each: bool = False,
    g: Float[Array, "*B"] | None = None,
) -> Found:
    """The losses of all examples, chunk by chunk.

    Args:
        plan: how examples are cut.
        loss_of: the loss of each example of a chunk, by itself.
        operands: its arguments.
        wanted: which of them are differentiated, or None for no gradient.
        each: whether the loss of each example is wanted.
        g: cotangents of the losses, or None for ones.
    """
    head, shared, closed, rows, labels, exists = operands
    cut = Cut(plan, labels)
    acc = plan.matmul.accumulation
    # A sum over devices belongs after the loop, in which not all of them may run every
    # chunk: inside it, what they share counts as the part of each.
    shared, rows = jax.tree.map(lambda a: typed_like(a, head.hidden), (shared, rows))
    shared, shared_tree = jax.tree.flatten((shared, closed))
    rows, rows_tree = jax.tree.flatten(rows)
    wants = Wants(False, False, False)
    want_shared, want_rows = [False] * len(shared), [False] * len(rows)
    if wanted is not None:
        wants = Wants(*map(bool, wanted.head))
        want_shared = jax.tree.leaves((wanted.shared, wanted.closed))
        want_rows = jax.tree.leaves(wanted.rows)

    def body(carry: Tree, chunk: Tree) -> tuple[Tree, Tree]:
        total, sums, d_shared = carry
        hidden, row, ids, g_here = chunk
        own = head._replace(hidden=hidden)
        z = project(plan.matmul, own)

        def loss(
            z_in: Array | None, shared_in: list[Tree], row_in: list[Tree]
        ) -> tuple[Array, Tree]:
            for_all = jax.tree.unflatten(shared_tree, _filled(shared_in, shared))
            return loss_of(
                z if z_in is None else z_in,
                for_all[0],
                for_all[1],
                jax.tree.unflatten(rows_tree, _filled(row_in, row)),
                ids,
                exists,
            )

        inputs = (
            z if any(wants) else None,
            _only(want_shared, shared),
            _only(want_rows, row),
        )
        if wanted is None:
            values, keep = loss(*inputs)
            total = total + jnp.sum(values)
            own_value = values if each else None
            return (total, sums, d_shared), (own_value, keep, None, None)
        values, pull, keep = jax.vjp(loss, *inputs, has_aux=True)
        own_value = values if each else None
        d_z, d_shared_here, d_row = pull(jnp.ones_like(values) if g is None else g_here)
        d_hidden = None
        if d_z is not None:
            here = add(plan, sums, own, d_z, wants)
            d_hidden, sums = here.hidden, here._replace(hidden=None)
        d_shared = jax.tree.map(jnp.add, d_shared, d_shared_here)
        total = total + jnp.sum(values)
        return (total, sums, d_shared), (own_value, keep, d_hidden, d_row)

    def zeros(like: Tree, want: bool) -> Tree:
        return jnp.zeros_like(like, dtype=acc) if want else None

    start = (
        jnp.zeros((), acc),
        Head(None, zeros(head.kernel, wants.kernel), zeros(head.bias, wants.bias)),
        jax.tree.map(jnp.zeros_like, _only(want_shared, shared)),
    )
    chunks = (cut.split(head.hidden), cut.split(rows), cut.labels, cut.split(g))
    (total, sums, d_shared), stacked = cut.loop(body, start, chunks)
    values, keep, d_hidden, d_rows = cut.join(stacked)
    d_for_all = jax.tree.unflatten(shared_tree, d_shared)
    gradient = Operands(
        sums._replace(hidden=d_hidden),
        d_for_all[0],
        d_for_all[1],
        jax.tree.unflatten(rows_tree, [None] * len(rows) if d_rows is None else d_rows),
        NO_LABELS,
        None,
    )
    return Found(total, values, keep, gradient)


def _only(wanted: list[bool], values: list[Tree]) -> list[Tree]:
    return [x if want else None for want, x in zip(wanted, values, strict=True)]


def _filled(values: list[Tree], defaults: list[Tree]) -> list[Tree]:
    pairs = zip(values, defaults, strict=True)
    return [default if x is None else x for x, default in pairs]
