"""A sum over examples, with its gradient formed in the same pass over their chunks.

For a sum or mean alone, whose scalar cotangent can be applied afterwards.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float

from jaxlosses._backends.chunks import Cut, Plan, Plans, add
from jaxlosses._backends.head import NO_LABELS, Head, Labels, Wants, project
from jaxlosses._rules import (
    Flags,
    cotangent_like,
    flags_of,
    values_and_wanted,
    wanted_of,
)
from jaxlosses._sharding import typed_like
from jaxlosses._types import Tree


class Operands(NamedTuple):
    """What a sum of losses depends on.

    Attributes:
        head: the factors of the logits.
        shared: differentiable, the same for all examples.
        closed: likewise, what a function of the caller closes over.
        rows: differentiable, of the shape `B...`.
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def summed(plans: Plans, loss_of: LossOf, operands: Operands) -> tuple[Array, Tree]:
    """The sum of the losses, and what `loss_of` keeps of each example.

    Differentiated, it forms every gradient that is asked for in its one pass over the
    chunks, and applies the cotangent of the sum to them afterwards.
    """
    return _sum_and_gradient(plans, loss_of, operands, None)[0]


def _summed_fwd(plans: Plans, loss_of: LossOf, marked: Operands) -> tuple[Tree, Tree]:
    operands, wanted = values_and_wanted(marked)
    out, gradient = _sum_and_gradient(plans, loss_of, operands, wanted)
    # One array for each leaf, whatever is wanted; see `Flags`.
    tree: Any = jax.tree.structure(operands)
    found = tree.flatten_up_to(gradient)
    kept = [jnp.zeros(0) if d is None else d for d in found]
    return out, (operands, flags_of(wanted), kept)


def _summed_bwd(
    plans: Plans,
    loss_of: LossOf,
    residuals: tuple[Operands, Flags, list[Array]],
    g: Tree,
) -> tuple[Operands]:
    del plans, loss_of
    operands, flags, kept = residuals
    total = g[0]
    if isinstance(total, SymbolicZero):
        total = jnp.zeros(total.shape, total.dtype)

    def scaled(value: Array, want: bool, d: Array) -> Array | None:
        return cotangent_like(total * d, value) if want else None

    gradient = jax.tree.unflatten(jax.tree.structure(operands), kept)
    return (jax.tree.map(scaled, operands, wanted_of(flags, operands), gradient),)


summed.defvjp(_summed_fwd, _summed_bwd, symbolic_zeros=True)


def _sum_and_gradient(
    plans: Plans, loss_of: LossOf, operands: Operands, wanted: Operands | None
) -> tuple[tuple[Array, Tree], Operands]:
    """The sum, what is kept, and the gradient in the accumulation dtype.

    The gradient has the structure of the operands, with None where none is wanted.
    """

    def run(plan: Plan, operands: Operands) -> tuple[tuple[Array, Tree], Operands]:
        return _in_chunks(plan, loss_of, operands, wanted)

    return plans.run(run, operands)


def _in_chunks(
    plan: Plan, loss_of: LossOf, operands: Operands, wanted: Operands | None
) -> tuple[tuple[Array, Tree], Operands]:
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
        hidden, row, ids = chunk
        own = head._replace(hidden=hidden)
        z = project(plan.matmul, own)

        def loss(
            z_in: Array | None, shared_in: list[Tree], row_in: list[Tree]
        ) -> tuple[Array, Tree]:
            for_all = jax.tree.unflatten(shared_tree, _filled(shared_in, shared))
            values, keep = loss_of(
                z if z_in is None else z_in,
                for_all[0],
                for_all[1],
                jax.tree.unflatten(rows_tree, _filled(row_in, row)),
                ids,
                exists,
            )
            return jnp.sum(values), keep

        inputs = (
            z if any(wants) else None,
            _only(want_shared, shared),
            _only(want_rows, row),
        )
        if wanted is None:
            value, keep = loss(*inputs)
            return (total + value, sums, d_shared), (keep, None, None)
        value, pull, keep = jax.vjp(loss, *inputs, has_aux=True)
        d_z, d_shared_here, d_row = pull(jnp.ones_like(value))
        d_hidden = None
        if d_z is not None:
            here = add(plan, sums, own, d_z, wants)
            d_hidden, sums = here.hidden, here._replace(hidden=None)
        d_shared = jax.tree.map(jnp.add, d_shared, d_shared_here)
        return (total + value, sums, d_shared), (keep, d_hidden, d_row)

    def zeros(like: Tree, want: bool) -> Tree:
        return jnp.zeros_like(like, dtype=acc) if want else None

    start = (
        jnp.zeros((), acc),
        Head(None, zeros(head.kernel, wants.kernel), zeros(head.bias, wants.bias)),
        jax.tree.map(jnp.zeros_like, _only(want_shared, shared)),
    )
    chunks = (cut.split(head.hidden), cut.split(rows), cut.labels)
    (total, sums, d_shared), stacked = cut.loop(body, start, chunks)
    keep, d_hidden, d_rows = cut.join(stacked)
    d_for_all = jax.tree.unflatten(shared_tree, d_shared)
    gradient = Operands(
        sums._replace(hidden=d_hidden),
        d_for_all[0],
        d_for_all[1],
        jax.tree.unflatten(rows_tree, [None] * len(rows) if d_rows is None else d_rows),
        NO_LABELS,
        None,
    )
    return (total, keep), gradient


def _only(wanted: list[bool], values: list[Tree]) -> list[Tree]:
    return [x if want else None for want, x in zip(wanted, values, strict=True)]


def _filled(values: list[Tree], defaults: list[Tree]) -> list[Tree]:
    pairs = zip(values, defaults, strict=True)
    return [default if x is None else x for x, default in pairs]
