"""Logit statistics of given logits, differentiable in two ways.

`_reverse` is a `custom_vjp`: one backward pass, no array of the logits' size kept.
`_forward` is the same value and the same pullback as a `custom_jvp`, for `jvp`,
`jacfwd` and `linearize`, which a `custom_vjp` cannot serve. The forward pass of the
first calls the second, so higher derivatives of either meet an exact rule and not the
derivative of an implementation.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from jaxlosses import _sharding, _sizes, _statistics
from jaxlosses._sizes import Size
from jaxlosses._statistics import Cotangents, Inputs, Partial, Spec, Statistics

# Logits of a block, about 4 MiB in float32: read from cache after the first time.
_BLOCK_SIZE = 2**20
# Where only sums of them are written, a block may be so many times as large.
_LARGER = (4, 2)

# Up to so many classes, what is done with each is written out.
_FEW_CLASSES = 26

# From so many on, looking for the largest logit costs more than a sample; from so many
# too if some are left over in the sums of a sampled row.
_FEWEST_SAMPLED = 128
_FEWEST_LEFT_OVER = 512


class Residuals(NamedTuple):
    """What the backward pass keeps: the inputs, and three numbers per example.

    Attributes:
        inputs: the arguments themselves, which the caller holds anyway.
        peak: as in `Statistics`.
        spread: `lse - |scale| * peak`.
        nll: negative log-likelihood, for the entry at the label.

    A NaN is kept as 0, and that of `nll` as `-inf`.
    """

    inputs: Inputs
    peak: Float[Array, "..."]
    spread: Float[Array, "..."]
    nll: Float[Array, "..."]


def statistics(spec: Spec, inputs: Inputs, forward_mode: bool = False) -> Statistics:
    """Statistics of every example, differentiable.

    Args:
        spec: what is static.
        inputs: the logits and what belongs to them.
        forward_mode: use the rule that forward mode can take.
    """
    rule = _forward if forward_mode else _reverse
    return rule(spec, inputs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _reverse(spec: Spec, inputs: Inputs) -> Statistics:
    """Logit statistics with a reverse rule."""
    return evaluate(spec, inputs)


def _reverse_fwd(spec: Spec, inputs: Inputs) -> tuple[Statistics, Residuals]:
    result = _forward(spec, inputs)

    def kept(a: Array, instead: float = 0.0) -> Array:
        # Each by its own NaN: by that of `nll`, few classes take XLA:CPU twice as long.
        return jnp.where(jnp.isnan(a), instead, a)

    # An example of weight zero may have NaN statistics in a loss without a NaN, and
    # `jax_debug_nans` looks at residuals, too.
    nll = kept(result.nll, -jnp.inf)
    return result, Residuals(inputs, kept(result.peak), kept(result.spread), nll)


def _reverse_bwd(spec: Spec, residuals: Residuals, g: Statistics) -> tuple[Inputs]:
    nll = jnp.where(residuals.nll == -jnp.inf, jnp.nan, residuals.nll)
    kept = Statistics(residuals.peak, residuals.spread, nll, None, None)
    # What no loss depends on has a cotangent of zeros, not worth a pass.
    cotangents = Cotangents(g.spread if spec.lse else None, g.nll, g.smooth)
    return (_pullback(spec, residuals.inputs, kept, cotangents),)


_reverse.defvjp(_reverse_fwd, _reverse_bwd)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _forward(spec: Spec, inputs: Inputs) -> Statistics:
    """Logit statistics with a forward rule, which can also be transposed."""
    return evaluate(spec, inputs)


def _forward_jvp(
    spec: Spec, primals: Any, tangents: Any
) -> tuple[Statistics, Statistics]:
    (inputs,), (d_inputs,) = primals, tangents
    result = _forward(spec, inputs)
    kept = Statistics(result.peak, result.spread, result.nll, None, None)
    # Checkpointed, so that reverse mode through the tangent keeps what the
    # custom_vjp keeps and rebuilds the probabilities.
    push = jax.checkpoint(_push, prevent_cse=False, static_argnums=(0,))
    return result, tangents_of(
        result, push(spec, inputs, kept, differentiable(d_inputs))
    )


# What is not differentiated must not become an array of zeros that is kept.
_forward.defjvp(_forward_jvp, symbolic_zeros=True)


def _push(spec: Spec, inputs: Inputs, kept: Statistics, d_inputs: Inputs) -> Cotangents:
    """Tangents of the statistics: the transpose of their pullback."""

    def pull(g: Cotangents) -> Inputs:
        d = _pullback(spec, inputs, kept, g, linear=True)
        wanted: list[Any] = [
            b if a is not None else None for a, b in zip(d_inputs, d, strict=True)
        ]
        return Inputs(*wanted)

    like = kept.nll
    example = Cotangents(like, like, like if spec.smooth else None)
    (d,) = jax.linear_transpose(pull, example)(d_inputs)
    return d


def _pullback(
    spec: Spec, inputs: Inputs, kept: Statistics, g: Cotangents, linear: bool = False
) -> Inputs:
    d = _statistics.pullback(spec, inputs, kept, g, linear=linear)
    return Inputs(*(summed_like(a, b) for a, b in zip(d, inputs, strict=True)))


def tangents_of(result: Statistics, d: Cotangents) -> Statistics:
    """Tangents of all statistics from those of the differentiable ones."""
    d_predicted: Any = None
    if result.predicted is not None:
        # NumPy has no array of a symbolic size.
        d_predicted = SymbolicZero.from_primal_value(result.predicted)
    spread: Any = d.spread
    return Statistics(jnp.zeros_like(result.peak), spread, d.nll, d.smooth, d_predicted)


def differentiable(d_inputs: Any) -> Any:
    """The tangents, with None for what is not differentiated."""
    return jax.tree.map(
        lambda t: None if isinstance(t, SymbolicZero) else t,
        d_inputs,
        is_leaf=lambda t: isinstance(t, SymbolicZero),
    )


def summed_like(cotangent: Array | None, primal: Any) -> Any:
    """Inside a `shard_map`, sums a cotangent over axes on which its primal is equal."""
    if cotangent is None:
        return None
    axes = varying_axes(cotangent) - varying_axes(primal)
    return lax.psum(cotangent, tuple(sorted(axes))) if axes else cotangent


def varying_axes(a: Any) -> frozenset[str]:
    """Mesh axes of a `shard_map` along which an array, or a shape, may differ."""
    aval: Any = a if isinstance(a, jax.ShapeDtypeStruct) else jax.typeof(a)
    manual = aval.manual_axis_type
    return frozenset() if manual is None else manual.varying


def sliced(a: Array, start: Array, size: Size, axis: int = 0) -> Array:
    """A slice of a static size, clamped."""

    def plain(a: Array, start: Array) -> Array:
        return lax.dynamic_slice_in_dim(a, start, size, axis)

    def of_bits(a: Array, start: Array) -> Array:
        # Tied to the place, which changes, or the integers would be made before the
        # loop, as a copy of the whole array.
        a, start = lax.optimization_barrier((a, start))
        bits = plain(lax.bitcast_convert_type(a, jnp.uint16), start)
        return lax.bitcast_convert_type(bits, a.dtype)

    if a.dtype.itemsize != 2:
        return plain(a, start)
    # As integers, or XLA:CPU would convert the whole array to float32. XLA:TPU would
    # copy the integers.
    return lax.platform_dependent(a, start, cpu=of_bits, default=plain)


def evaluate(spec: Spec, inputs: Inputs) -> Statistics:
    """Chooses how the statistics are computed: the only place where that is done."""
    whole = functools.partial(_statistics.evaluate, spec)
    if not _may_block(spec, inputs):
        return whole(inputs)
    return lax.platform_dependent(inputs, cpu=_in_blocks(spec), default=whole)


def _may_block(spec: Spec, inputs: Inputs) -> bool:
    """Whether a loop over rows is sound and of use, were the platform a CPU.

    A loop over an axis that turns out to be sharded would make every device compute
    everything, and under automatic sharding a trace cannot see the mesh. Safe are a
    process that has one CPU device, and the inside of a `shard_map`.
    """
    *batch, num_classes = inputs.logits.shape
    if spec.axes != (len(batch),) or num_classes == 0:
        return False
    if not _sizes.are_numbers(*inputs.logits.shape):  # so many blocks, of so many rows
        return False
    if spec.dense and inputs.labels.shape != inputs.logits.shape:
        return False
    if spec.axis_name:  # every block would wait for its own collectives
        return False
    if _sharding.explicit_mesh(inputs.logits) is not None:  # also one of one device
        return False
    if inputs.where is not None and inputs.where.size not in (
        num_classes,
        inputs.logits.size,
    ):
        return False
    mesh = jax.sharding.get_abstract_mesh()
    return _num_cpus() == 1 if mesh.empty else mesh.are_all_axes_manual


def _num_cpus() -> int:
    try:
        return jax.device_count("cpu")
    except RuntimeError:  # JAX_PLATFORMS leaves them out
        return 0


def _is_plain(spec: Spec, inputs: Inputs) -> bool:
    """Whether nothing but the logits and class ids is to be read."""
    if spec.dense or spec.smooth or spec.predicted:
        return False
    return inputs.where is None and inputs.scale is None and spec.softcap is None


def _in_blocks(spec: Spec) -> Callable[[Inputs], Statistics]:
    """`_evaluate_blocked`, of which `vmap` makes one of more rows."""
    blocked = custom_vmap(functools.partial(_evaluate_blocked, spec))

    @blocked.def_vmap
    def of_more_rows(size: Size, mapped: Any, inputs: Inputs) -> tuple[Statistics, Any]:
        (is_mapped,) = mapped
        more = dataclasses.replace(spec, axes=tuple(axis + 1 for axis in spec.axes))
        rows = _with_rows(size, is_mapped, inputs)
        if rows is not None and _may_block(more, rows):
            out = _in_blocks(more)(rows)
        else:
            in_axes = jax.tree.map(lambda here: 0 if here else None, is_mapped)
            whole = functools.partial(_statistics.evaluate, spec)
            out = jax.vmap(whole, (in_axes,))(inputs)
        return out, jax.tree.map(lambda _: True, out)

    return blocked


def _with_rows(size: Size, is_mapped: Inputs, inputs: Inputs) -> Inputs | None:
    """Inputs with a mapped axis as one more batch axis; None if it cannot be that."""
    if is_mapped.scale or is_mapped.class_weights:
        return None

    def lead(a: Array, here: bool) -> Array:
        return a if here or a.ndim == 0 else a[None]

    def repeated(a: Any) -> Any:
        return None if a is None else jnp.broadcast_to(a, (size, *a.shape[1:]))

    rows = jax.tree.map(lead, inputs, is_mapped)
    logits, labels, counted = map(repeated, (rows.logits, rows.labels, rows.counted))
    where = rows.where
    if where is not None and where.size != logits.shape[-1]:
        where = repeated(where)
    return Inputs(logits, labels, where, counted, rows.class_weights, rows.scale)


def _evaluate_blocked(spec: Spec, inputs: Inputs) -> Statistics:
    """Statistics by blocks of rows, each small enough to be read again from cache.

    Plain logits of few classes are read class by class instead.
    """
    *batch, num_classes = inputs.logits.shape
    num_rows = math.prod(batch)
    few = _is_plain(spec, inputs) and num_classes <= _FEW_CLASSES
    rows = num_rows if few else rows_of_block(num_classes)
    blocked = dataclasses.replace(spec, axes=(1,), in_cache=not few, few=few)
    # One batch axis; what all rows share keeps it at size 1.
    inputs = jax.tree.map(
        lambda a: a if a.ndim == 0 else a.reshape(-1, a.shape[-1]), inputs
    )

    if few or spec.dense or spec.smooth or inputs.where is not None:
        evaluate = functools.partial(_statistics.evaluate, blocked)
        out = _by_rows(evaluate, inputs, rows)
    else:
        # What is left to do per row takes a single loop, and not one per block.
        part = _read(blocked, inputs, rows)
        out = _statistics.finish(blocked, part, inputs)
    return jax.tree.map(lambda a: a.reshape(*batch, 1), out)


def _read(spec: Spec, inputs: Inputs, rows: int) -> Partial:
    """What a loss on class ids needs of each row.

    Its largest logit is not looked for, where the largest of a sample will do.
    """

    def by_blocks(spec: Spec, rows: int) -> Partial:
        read = functools.partial(_statistics.partial, spec, uniform=None)
        part: Partial = _by_rows(read, inputs, rows)
        return part

    num_rows, num_classes = inputs.logits.shape
    even = _statistics.fold_of(num_classes) is not None
    fewest = _FEWEST_SAMPLED if even else _FEWEST_LEFT_OVER
    if num_rows <= rows or num_classes < fewest or not _is_plain(spec, inputs):
        return by_blocks(spec, rows)
    # Such that no row is read twice, and in a loop: otherwise XLA:CPU may compute the
    # logits anew for each of their readers.
    larger = (n * rows for n in _LARGER if num_rows % (n * rows) == 0)
    more = next((n for n in larger if n < num_rows), rows)
    part = by_blocks(dataclasses.replace(spec, sampled=True), more)
    unsafe = ~_statistics.is_safe(part)
    if inputs.counted is not None:
        unsafe &= inputs.counted
    result: Partial = lax.cond(
        jnp.any(unsafe), lambda: by_blocks(spec, rows), lambda: part
    )
    return result


def rows_of_block(num_classes: int) -> int:
    """A power of two, which XLA:CPU shares out evenly between threads."""
    return 2 ** max(0, round(math.log2(_BLOCK_SIZE / num_classes)))


def _by_rows(of_rows: Callable[[Inputs], Any], inputs: Inputs, rows: int) -> Any:
    """A function of rows, of so many at a time."""
    num_rows = len(inputs.logits)
    if rows >= num_rows:
        return of_rows(inputs)

    def block(i: Array) -> Any:
        def take(a: Array) -> Array:
            if a.ndim == 0 or a.shape[0] != num_rows:
                return a
            return sliced(a, i * rows, rows)

        return of_rows(jax.tree.map(take, inputs))

    def join(blocks: Array) -> Array:
        # A slice clamps its start: the last block is whole, and overlaps.
        head, tail = blocks[:-1].reshape(-1, 1), blocks[-1]
        return jnp.concatenate([head, tail[len(head) - num_rows :]])

    num_blocks = -(-num_rows // rows)
    return jax.tree.map(join, lax.map(block, jnp.arange(num_blocks)))
