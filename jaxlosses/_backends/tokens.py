"""A sum over examples, with its gradient formed in the same pass over their chunks.

For a sum or mean alone, whose scalar cotangent can be applied afterwards.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

from jaxlosses._backends.chunks import Plan, Plans
from jaxlosses._backends.examples import Found, LossOf, Operands, in_chunks
from jaxlosses._rules import (
    Flags,
    cotangent_like,
    flags_of,
    values_and_wanted,
    wanted_of,
)
from jaxlosses._types import Tree


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def summed(plans: Plans, loss_of: LossOf, operands: Operands) -> tuple[Array, Tree]:
    """The sum of the losses, and what `loss_of` keeps of each example.

    Differentiated, it forms every gradient that is asked for in its one pass over the
    chunks, and applies the cotangent of the sum to them afterwards.
    """
    found = _run(plans, loss_of, operands, None)
    return found.total, found.keep


def _summed_fwd(plans: Plans, loss_of: LossOf, marked: Operands) -> tuple[Tree, Tree]:
    operands, wanted = values_and_wanted(marked)
    out = _run(plans, loss_of, operands, wanted)
    # One array for each leaf, whatever is wanted; see `Flags`.
    tree: Any = jax.tree.structure(operands)
    found = tree.flatten_up_to(out.gradient)
    kept = [jnp.zeros(0) if d is None else d for d in found]
    return (out.total, out.keep), (operands, flags_of(wanted), kept)


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


def _run(
    plans: Plans, loss_of: LossOf, operands: Operands, wanted: Operands | None
) -> Found:
    def run(plan: Plan, operands: Operands) -> Found:
        return in_chunks(plan, loss_of, operands, wanted)

    # A function of the caller that closes over a trace must not outlive it.
    return plans.run(run, operands, lazily=not operands.closed)
