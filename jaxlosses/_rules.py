"""The derivative rules of the logit statistics, once for every backend.

`_reverse` is a `custom_vjp`: one backward pass, and no array of the logits' size kept.
`_forward` is the same value and the same pullback as a `custom_jvp`, for `jvp`,
`jacfwd` and `linearize`, which a `custom_vjp` cannot serve. The forward pass of the
first calls the second, so higher derivatives of either meet an exact rule and not the
derivative of an implementation.
"""

import functools
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jaxtyping import Array

from jaxlosses._math.classes import Spec, Values
from jaxlosses._math.gradient import Cotangents
from jaxlosses._math.statistics import Statistics
from jaxlosses._platform import traced_once
from jaxlosses._sharding import summed_like
from jaxlosses._types import Tree

Operands = TypeVar("Operands", contravariant=True)


@runtime_checkable  # annotations are enforced in tests
class Backend(Protocol[Operands]):
    """A way to compute logit statistics and their pullback, frozen and hashable.

    Attributes:
        spec: the statistics.
    """

    @property
    def spec(self) -> Spec: ...

    def evaluate(self, operands: Operands) -> Statistics:
        """The statistics of every example."""

    def pullback(
        self,
        operands: Operands,
        kept: Statistics,
        cotangents: Cotangents,
        wanted: Tree,
        linear: bool,
    ) -> Tree:
        """Cotangents of the operands, rebuilt from the statistics.

        Args:
            operands: the arguments of `evaluate`.
            kept: `peak`, `spread`, `nll` and `depth` of its result.
            cotangents: one per statistic.
            wanted: of the structure of the operands: which are differentiated.
            linear: stay linear in the cotangents, to be transposed.

        Returns:
            The structure of the operands, with None where nothing is wanted.
        """


# Which leaves of some operands are differentiated, for a backward pass: an array of one
# entry or of none for each. JAX may hand it residuals in the tree of those of another
# call, with other operands differentiated; their shapes are always their own.
Flags = tuple[Array, ...]


class Residuals(NamedTuple):
    """What the backward pass keeps: the operands, and a few numbers per example.

    Attributes:
        operands: the arguments themselves, which the caller holds anyway.
        wanted: which of their leaves are differentiated.
        peak: as in `Statistics`; 0 for NaN.
        spread: `lse - |scale| * peak`; 0 for NaN.
        nll: negative log-likelihood, for the entry at the label; `-inf` for NaN.
        depth: as in `Statistics`; 0 for NaN.
    """

    operands: Tree
    wanted: Flags
    peak: Values
    spread: Values
    nll: Values
    depth: Values | None


@traced_once
def _evaluate(backend: Backend[Operands], operands: Operands) -> Statistics:
    return backend.evaluate(operands)


def statistics(
    backend: Backend[Operands], operands: Operands, forward_mode: bool = False
) -> Statistics:
    """Statistics of every example, differentiable.

    Args:
        backend: what computes them.
        operands: its arguments.
        forward_mode: use the rule that forward mode can take.
    """
    rule = _forward if forward_mode else _reverse
    return rule(backend, operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _reverse(backend: Backend[Operands], operands: Operands) -> Statistics:
    return _evaluate(backend, operands)


def _reverse_fwd(
    backend: Backend[Operands], marked: Operands
) -> tuple[Statistics, Residuals]:
    operands, wanted = values_and_wanted(marked)
    result = _forward(backend, operands)

    def kept(a: Array, instead: float = 0.0) -> Array:
        # Each by its own NaN: by that of `nll`, few classes take XLA:CPU twice as long.
        return jnp.where(jnp.isnan(a), instead, a)

    # An example of weight zero may have NaN statistics in a loss without a NaN, and
    # `jax_debug_nans` looks at residuals, too.
    numbers = kept(result.peak), kept(result.spread), kept(result.nll, -jnp.inf)
    depth = None if result.depth is None else kept(result.depth)
    return result, Residuals(operands, flags_of(wanted), *numbers, depth)


def _reverse_bwd(
    backend: Backend[Operands], residuals: Residuals, g: Statistics
) -> tuple[Tree]:
    operands, flags, peak, spread, nll, depth = residuals
    nll = jnp.where(nll == -jnp.inf, jnp.nan, nll)
    kept = Statistics(peak, spread, nll, depth=depth)
    # What no loss depends on has a cotangent of zeros, not worth a pass.
    g_spread = _asked(g.spread) if backend.spec.lse else None
    g_smooth = None if g.smooth is None else _array(g.smooth)
    # An entropy that is a metric alone costs none either.
    g_entropy = _asked(g.entropy)
    g_picks = None if g.picks is None else _array(g.picks)
    cotangents = Cotangents(g_spread, _array(g.nll), g_smooth, g_entropy, g_picks)
    wanted = wanted_of(flags, operands)
    return (_pullback(backend, operands, kept, cotangents, wanted, False),)


_reverse.defvjp(_reverse_fwd, _reverse_bwd, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _forward(backend: Backend[Operands], operands: Operands) -> Statistics:
    return _evaluate(backend, operands)


def _forward_jvp(
    backend: Backend[Operands], primals: tuple[Operands], tangents: tuple[Tree]
) -> tuple[Statistics, Tree]:
    (operands,), (d_operands,) = primals, tangents
    result = _forward(backend, operands)
    kept = Statistics(*result[:3], depth=result.depth, picks=result.picks)
    # Checkpointed, so that reverse mode through the tangent keeps what the
    # custom_vjp keeps and rebuilds the probabilities. A new function each time: what
    # JAX has traced of one it keeps, and a trace may be for one platform.
    push = jax.checkpoint(functools.partial(_push, backend), prevent_cse=False)
    d = push(operands, kept, _without_zeros(d_operands))
    # NumPy has no array of a symbolic size.
    zero: Any = SymbolicZero.from_primal_value
    d_predicted, d_rank = jax.tree.map(zero, (result.predicted, result.rank))
    d_depth = None if d.entropy is None else d.entropy - d.spread
    d_peak = jnp.zeros_like(result.peak)
    d_result = Statistics(
        d_peak,
        d.spread,
        d.nll,
        d.smooth,
        d_predicted,
        d.entropy,
        d_depth,
        d_rank,
        d.picks,
    )
    return result, d_result


# What is not differentiated must not become an array of zeros that is kept.
_forward.defjvp(_forward_jvp, symbolic_zeros=True)


def _push(
    backend: Backend[Operands], operands: Operands, kept: Statistics, d_operands: Tree
) -> Cotangents:
    """Tangents of the statistics: the transpose of their pullback."""
    tree: Any = jax.tree.structure(operands)
    wanted = tree.unflatten([d is not None for d in tree.flatten_up_to(d_operands)])

    def pull(g: Cotangents) -> list[Array]:
        d = _pullback(backend, operands, kept, g, wanted, True)
        return [x for x in tree.flatten_up_to(d) if x is not None]

    like = kept.nll
    smooth, entropy = backend.spec.smooth, backend.spec.entropy
    example = Cotangents(
        like, like, like if smooth else None, like if entropy else None, kept.picks
    )
    (d,) = jax.linear_transpose(pull, example)(jax.tree.leaves(d_operands))
    return d


def _pullback(
    backend: Backend[Operands],
    operands: Operands,
    kept: Statistics,
    g: Cotangents,
    wanted: Tree,
    linear: bool,
) -> Tree:
    """Cotangents of what is wanted, of the types of their primals."""
    d = backend.pullback(operands, kept, g, wanted, linear)

    def of(value: Array, d: Array | None, want: bool) -> Array | None:
        return cotangent_like(d, value) if want and d is not None else None

    return jax.tree.map(of, operands, d, wanted)


def cotangent_like(d: Array, value: Array) -> Array:
    """A cotangent in the dtype of its primal, summed over devices where that is one."""
    return summed_like(d, value).astype(value.dtype)


def values_and_wanted(marked: Tree) -> tuple[Tree, Tree]:
    """The values of arguments of a `custom_vjp`, and which are differentiated."""
    leaves, tree = jax.tree.flatten(
        marked, is_leaf=lambda x: isinstance(x, CustomVJPPrimal)
    )
    wanted = jax.tree.unflatten(tree, [bool(x.perturbed) for x in leaves])
    return jax.tree.unflatten(tree, [x.value for x in leaves]), wanted


def flags_of(wanted: Tree) -> Flags:
    """What is wanted, to be kept for a backward pass."""
    return tuple(jnp.zeros(int(want), bool) for want in jax.tree.leaves(wanted))


def wanted_of(flags: Flags, operands: Tree) -> Tree:
    """The inverse of `flags_of`."""
    wanted = [a.size == 1 for a in flags]
    return jax.tree.unflatten(jax.tree.structure(operands), wanted)


def _array(g: Array | SymbolicZero) -> Array:
    return jnp.zeros(g.shape, g.dtype) if isinstance(g, SymbolicZero) else g


def _asked(g: Array | SymbolicZero | None) -> Array | None:
    return None if isinstance(g, SymbolicZero) else g


def _without_zeros(tangents: Tree) -> Tree:
    """The tangents, with None for what is not differentiated."""
    return jax.tree.map(
        lambda t: None if isinstance(t, SymbolicZero) else t,
        tangents,
        is_leaf=lambda t: isinstance(t, SymbolicZero),
    )
