"""A loss of the statistics of each example, as a function that the caller wrote.

The function may close over arrays of the trace it was written in. A custom rule cannot
differentiate by what it does not see, and a compiled loss that is used again must not
keep what the last trace closed over. So what a function closes over is found by
tracing it once, handed on like any other argument, and put back where it is called.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jaxtyping import Array, Float

from jaxlosses import _checks
from jaxlosses._combine import Example, Losses
from jaxlosses._math import statistics
from jaxlosses._math.classes import Inputs, Spec
from jaxlosses._math.statistics import Statistics
from jaxlosses._types import DType, Shape, Tree


class Rows(NamedTuple):
    """What a loss of `linear_softmax_loss` is a function of: one number per example.

    An example that does not count has zeros.

    Attributes:
        nll: minus the log-probability of the label, in nats; never below 0.
        lse: log-sum-exp of the logits after cap and scale.
        entropy: of the probabilities, in nats; None without `uses_entropy`.
        label_logit: logit of the label after cap and scale.
    """

    nll: Float[Array, "*B"]
    lse: Float[Array, "*B"]
    entropy: Float[Array, "*B"] | None
    label_logit: Float[Array, "*B"]


# (Rows, *args) -> values, or (values, aux)
Function = Callable[..., Tree]


class Given(NamedTuple):
    """What a function is called with beside the statistics.

    Attributes:
        args: pytrees of arrays `B...`.
        closed: what it closes over.
    """

    args: Tree = ()
    closed: tuple[Array, ...] = ()


def given_to(
    function: Function, args: Tree, batch: Shape, dtype: DType, uses_entropy: bool
) -> Given:
    """The arguments of a function, which is tried on them without a number."""
    like: Tree = jax.ShapeDtypeStruct(batch, dtype)
    rows = Rows(like, like, like if uses_entropy else None, like)
    try:
        traced, (values, aux) = _traced(function, rows, args)
    except (TypeError, AttributeError) as error:
        if not uses_entropy:
            error.add_note("Rows.entropy is None without uses_entropy=True.")
        raise
    _checks.of_function(values, aux, batch)
    return Given(args, tuple(traced.consts))


def _traced(function: Function, rows: Tree, args: Tree) -> tuple[ClosedJaxpr, Tree]:
    """A function as primitives of JAX, and the form of what it returns."""

    def both(rows: Tree, args: Tree) -> tuple[Tree, Tree]:
        out = function(rows, *args)
        pair = isinstance(out, tuple) and len(out) == 2
        return out if pair else (out, None)

    return jax.make_jaxpr(both, return_shape=True)(rows, args)


def losses(
    spec: Spec,
    inputs: Inputs,
    found: Statistics,
    function: Function,
    given: Given,
    example: Example,
) -> Losses:
    """What the function makes of each example, and what it returns beside.

    Args:
        spec: of the statistics.
        inputs: their arguments.
        found: their values, whose class axes are of size 1.
        function: of the caller.
        given: its other arguments.
        example: which examples count, and their weights.
    """

    def squeezed(a: Array) -> Array:
        return jnp.squeeze(a, spec.axes)

    lse, nll = squeezed(statistics.lse(spec, inputs, found)), squeezed(found.nll)
    entropy = None if found.entropy is None else squeezed(found.entropy)
    counted = example.counted

    def counting(a: Array) -> Array:
        return a if counted is None else jnp.where(counted, a, jnp.zeros_like(a))

    rows = Rows(nll, lse, entropy, counting(lse - nll))
    # What is beside an example that does not count may be anything.
    args = jax.tree.map(counting, given.args)
    traced, form = _traced(function, rows, args)
    call = jaxpr_as_fun(ClosedJaxpr(traced.jaxpr, list(given.closed)))
    leaves = call(*jax.tree.leaves((rows, args)))
    values, aux = jax.tree.unflatten(jax.tree.structure(form), leaves)
    # A function may let go of a NaN, as a comparison does; a bad label stays loud.
    values = values.astype(nll.dtype) + jnp.where(jnp.isnan(nll), nll, 0)
    values = counting(values)
    if example.weights is not None:
        values = example.weights * values
    aux = jax.tree.map(counting, lax.stop_gradient(aux))
    return Losses(values, None, None, aux)
