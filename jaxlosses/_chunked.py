"""Logit statistics of `hidden @ kernel`, without ever holding the logits of all.

Three ways to go through `B x V` logits piece by piece (`dense` is no piece at all):

- `summed`: chunks of examples, the gradient formed in the same pass. For a sum of
  losses alone, whose scalar cotangent can be applied afterwards.
- `statistics`, by examples: the backward pass computes the logits of a chunk again.
- `statistics`, by classes: chunks of the vocabulary, merged by
  `_statistics.merge`; the backward pass computes the logits of a chunk again.

Matmuls run in the promoted dtype of hidden states and kernel, the *compute dtype*, and
accumulate in float32 (float64 for float64); so do gradients, which are rounded once.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jaxtyping import Array, Bool, Float

from jaxlosses import _logits, _statistics
from jaxlosses._sizes import Size
from jaxlosses._statistics import Cotangents, Inputs, Partial, Spec, Statistics, Uniform

Layout = Literal["dv", "vd"]


class Head(NamedTuple):
    """What the logits are the product of.

    Attributes:
        hidden: `B... D`.
        kernel: `D V` or `V D`, by the layout.
        bias: `V`, or None.

    As a cotangent, None stands for zero.
    """

    hidden: Any
    kernel: Any
    bias: Float[Array, " V"] | None


class Examples(NamedTuple):
    """What belongs to each example, `B...`; None stands for all of them."""

    labels: Any
    counted: Bool[Array, "*B"] | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the logits are cut; static.

    Attributes:
        layout: of the kernel.
        num_chunks: of examples or of classes.
        axis: batch axis that is cut, where examples are.
        strided: chunk `i` takes every `num_chunks`-th example from the `i`-th. A
            contiguous chunk of an axis that is split over devices lives on one of
            them; a strided one, on all.
        compact: examples that count are moved to the front, and chunks without any
            are skipped at run time.
        kernel_pieces: in how many pieces of classes a chunk of examples adds to the
            gradient of the kernel. Where a matmul cannot add to what is there, its
            result is as large as the kernel.
    """

    layout: Layout
    num_chunks: int
    axis: int = 0
    strided: bool = False
    compact: bool = False
    kernel_pieces: int = 1


def compute_dtype(head: Head) -> Any:
    """The dtype of all three matmuls."""
    # What strict promotion refuses is documented here.
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(head.hidden.dtype, head.kernel.dtype)


def num_classes(layout: Layout, kernel: Array) -> Size:
    """How many classes the kernel has."""
    return kernel.shape[1 if layout == "dv" else 0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def logits(layout: Layout, head: Head) -> Float[Array, "*B V"]:
    """All logits, in the accumulation dtype."""
    return project(layout, head)


def _logits_fwd(layout: Layout, head: Head) -> tuple[Array, Head]:
    return project(layout, head), head


def _logits_bwd(layout: Layout, head: Head, d_logits: Array) -> tuple[Head]:
    d_head = _pull(layout, head, d_logits, (True, True, True))
    return (jax.tree.map(_like, d_head, head),)


logits.defvjp(_logits_fwd, _logits_bwd)


def project(layout: Layout, head: Head) -> Float[Array, "*B V"]:
    """The logits, by rules of JAX itself: for forward mode."""
    hidden, kernel, bias = head
    dtype = compute_dtype(head)
    out = _dot(hidden, kernel, (hidden.ndim - 1,), (0 if layout == "dv" else 1,), dtype)
    if bias is None:
        return out
    return out + jnp.broadcast_to(bias.astype(out.dtype), out.shape)


def _pull(
    layout: Layout, head: Head, d_logits: Array, wanted: tuple[bool, bool, bool]
) -> Head:
    """Cotangents of the head, those that are wanted, in the accumulation dtype."""
    by_hidden, by_kernel, by_bias = wanted
    dtype = compute_dtype(head)
    batch = tuple(range(d_logits.ndim - 1))
    d_hidden = d_kernel = d_bias = None
    # A float32 cotangent would have 16-bit operands converted to float32.
    dz = d_logits.astype(dtype)
    if by_hidden:
        classes = (1 if layout == "dv" else 0,)
        d_hidden = _dot(dz, head.kernel, (dz.ndim - 1,), classes, dtype)
    if by_kernel:
        a, b = (head.hidden, dz) if layout == "dv" else (dz, head.hidden)
        d_kernel = _dot(a, b, batch, batch, dtype)
    if by_bias and head.bias is not None:
        d_bias = jnp.sum(d_logits, batch)
    return Head(d_hidden, d_kernel, d_bias)


def _add(
    plan: Plan,
    sums: Head,
    head: Head,
    d_logits: Array,
    wanted: tuple[bool, bool, bool],
) -> Head:
    """The cotangent of the hidden states, and the sums with those of the others."""
    by_hidden, by_kernel, by_bias = wanted
    in_pieces = by_kernel and plan.kernel_pieces > 1
    once = (by_hidden, by_kernel and not in_pieces, by_bias)
    here = _pull(plan.layout, head, d_logits, once)
    d_bias = jax.tree.map(jnp.add, sums.bias, here.bias)
    if not in_pieces:
        d_kernel = jax.tree.map(jnp.add, sums.kernel, here.kernel)
        return Head(here.hidden, d_kernel, d_bias)

    classes = d_logits.shape[-1]
    size = -(-classes // plan.kernel_pieces)
    axis = 1 if plan.layout == "dv" else 0

    def body(d_kernel: Array, i: Array) -> tuple[Array, None]:
        start = jnp.minimum(i * size, classes - size)
        d_piece = _take(d_logits, start, size, d_logits.ndim - 1)
        if size * plan.kernel_pieces != classes:  # the last pieces overlap
            fresh = start + jnp.arange(size, dtype=jnp.int32) >= i * size
            d_piece = jnp.where(jnp.broadcast_to(fresh, d_piece.shape), d_piece, 0)
        d = _pull(plan.layout, head, d_piece, (False, True, False)).kernel
        so_far = lax.dynamic_slice_in_dim(d_kernel, start, size, axis)
        return lax.dynamic_update_slice_in_dim(d_kernel, so_far + d, start, axis), None

    d_kernel, _ = _scan(
        body, sums.kernel, jnp.arange(plan.kernel_pieces, dtype=jnp.int32)
    )
    return Head(here.hidden, d_kernel, d_bias)


def _dot(
    a: Array, b: Array, a_axes: tuple[int, ...], b_axes: tuple[int, ...], dtype: Any
) -> Array:
    return lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
        ((a_axes, b_axes), ((), ())),
        preferred_element_type=_statistics.accumulation_dtype(dtype),
    )


# --- A sum over examples, with its gradient in the same pass.


class Operands(NamedTuple):
    """What a sum of losses depends on.

    Attributes:
        head: the factors of the logits.
        shared: differentiable, the same for all examples.
        rows: differentiable, of the shape `B...`.
        examples: labels and masks.
        exists: classes that exist, or None for all.
    """

    head: Head
    shared: Any
    rows: Any
    examples: Examples
    exists: Bool[Array, " V"] | None


# logits, shared, rows, examples, exists -> loss of each example, and what else to keep
LossOf = Callable[[Array, Any, Any, Examples, Any], tuple[Array, Any]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def summed(plan: Plan, loss_of: LossOf, operands: Operands) -> tuple[Array, Any]:
    """The sum of the losses, and what `loss_of` keeps of each example.

    Differentiated, it forms every gradient that is asked for in its one pass over the
    chunks, and applies the cotangent of the sum to them afterwards.
    """
    return _sum_and_gradient(plan, loss_of, operands, None)[0]


def _summed_fwd(plan: Plan, loss_of: LossOf, operands: Operands) -> tuple[Any, Any]:
    values, wanted = _unzip(operands)
    out, gradient = _sum_and_gradient(plan, loss_of, values, wanted)
    return out, (values, gradient)


def _summed_bwd(plan: Plan, loss_of: LossOf, residuals: Any, g: Any) -> tuple[Operands]:
    del plan, loss_of
    values, gradient = residuals
    total = g[0]
    if isinstance(total, SymbolicZero):
        total = jnp.zeros(total.shape, total.dtype)

    def scaled(value: Array, d: Any) -> Any:
        return None if d is None else _like(total * d, value)

    return (jax.tree.map(scaled, values, gradient),)


summed.defvjp(_summed_fwd, _summed_bwd, symbolic_zeros=True)


def _sum_and_gradient(
    plan: Plan, loss_of: LossOf, operands: Operands, wanted: Operands | None
) -> tuple[tuple[Array, Any], Any]:
    """The sum, what is kept, and the gradient in the accumulation dtype.

    The gradient has the structure of the operands, with None where none is wanted.
    """
    head, shared, rows, examples, exists = operands
    cut = _Cut(plan, examples)
    acc = _statistics.accumulation_dtype(compute_dtype(head))
    # A sum over devices belongs after the loop, not into it.
    shared = _varying_with(head.hidden, shared)
    shared, shared_tree = jax.tree.flatten(shared)
    rows, rows_tree = jax.tree.flatten(rows)
    want_head = (False, False, False)
    want_shared, want_rows = [False] * len(shared), [False] * len(rows)
    if wanted is not None:
        want_head = _flags(wanted.head)
        want_shared = jax.tree.leaves(wanted.shared)
        want_rows = jax.tree.leaves(wanted.rows)

    def body(carry: Any, chunk: Any) -> tuple[Any, Any]:
        total, d_kernel, d_bias, d_shared = carry
        hidden, row, example = chunk
        own = Head(hidden, head.kernel, head.bias)
        z = project(plan.layout, own)

        def loss(z_in: Any, shared_in: Any, row_in: Any) -> tuple[Array, Any]:
            values, keep = loss_of(
                z if z_in is None else z_in,
                jax.tree.unflatten(shared_tree, _filled(shared_in, shared)),
                jax.tree.unflatten(rows_tree, _filled(row_in, row)),
                example,
                exists,
            )
            return jnp.sum(values), keep

        inputs = (
            z if any(want_head) else None,
            _only(want_shared, shared),
            _only(want_rows, row),
        )
        if wanted is None:
            value, keep = loss(*inputs)
            return (total + value, d_kernel, d_bias, d_shared), (keep, None, None)
        value, pull, keep = jax.vjp(loss, *inputs, has_aux=True)
        d_z, d_shared_here, d_row = pull(jnp.ones_like(value))
        d_hidden = None
        if d_z is not None:
            sums = Head(None, d_kernel, d_bias)
            d_hidden, d_kernel, d_bias = _add(plan, sums, own, d_z, want_head)
        d_shared = jax.tree.map(jnp.add, d_shared, d_shared_here)
        return (total + value, d_kernel, d_bias, d_shared), (keep, d_hidden, d_row)

    zeros: Any = functools.partial(jnp.zeros_like, dtype=acc)
    start = (
        jnp.zeros((), acc),
        zeros(head.kernel) if want_head[1] else None,
        zeros(head.bias) if want_head[2] else None,
        jax.tree.map(jnp.zeros_like, _only(want_shared, shared)),
    )
    chunks = (cut.split(head.hidden), cut.split(rows), cut.examples)
    (total, d_kernel, d_bias, d_shared), stacked = cut.loop(body, start, chunks)
    keep, d_hidden, d_rows = cut.join(stacked)
    gradient = Operands(
        Head(d_hidden, d_kernel, d_bias),
        jax.tree.unflatten(shared_tree, d_shared),
        jax.tree.unflatten(rows_tree, [None] * len(rows) if d_rows is None else d_rows),
        Examples(None, None),
        None,
    )
    return (total, keep), gradient


# --- Statistics of every example, for any cotangents.


class Product(NamedTuple):
    """What the statistics of logits `hidden @ kernel` depend on.

    Attributes:
        head: the factors of the logits.
        class_weights: `V`, or None for ones.
        scale: scalar factor of the logits, or None for one.
        examples: labels and masks.
        exists: classes that exist, or None for all.
    """

    head: Head
    class_weights: Float[Array, " V"] | None
    scale: Float[Array, ""] | None
    examples: Examples
    exists: Bool[Array, " V"] | None


@dataclasses.dataclass(frozen=True)
class Way:
    """A plan for some statistics; static.

    Attributes:
        plan: how the logits are cut.
        by_classes: cut the classes, not the examples.
        spec: the statistics; of the axes, the class axis comes last.
    """

    plan: Plan
    by_classes: bool
    spec: Spec


def statistics(way: Way, product: Product, forward_mode: bool = False) -> Statistics:
    """Statistics of every example, of shape `B...`, differentiable.

    Args:
        way: what is static.
        product: the factors of the logits and what belongs to them.
        forward_mode: use the rule that forward mode can take.
    """
    rule = _forward if forward_mode else _reverse
    return rule(way, product)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _reverse(way: Way, product: Product) -> Statistics:
    """Statistics with a reverse rule."""
    return _evaluate(way, product)


def _reverse_fwd(way: Way, product: Product) -> tuple[Statistics, Any]:
    product, wanted = _unzip(product)
    result = _forward(way, product)
    # Flags as structure: residuals hold arrays alone.
    flags = jax.tree.map(lambda w: () if w else None, wanted)
    return result, (product, flags, result.peak, result.spread, result.nll)


def _reverse_bwd(way: Way, residuals: Any, g: Statistics) -> tuple[Product]:
    product, flags, peak, spread, nll = residuals
    tree: Any = jax.tree.structure(product)
    given = [flag is not None for flag in tree.flatten_up_to(flags)]
    wanted = jax.tree.unflatten(tree, given)

    def real(ct: Any) -> Any:
        zero = isinstance(ct, SymbolicZero)
        return jnp.zeros(ct.shape, ct.dtype) if zero else ct

    kept = Statistics(peak, spread, nll, None, None)
    smooth = None if g.smooth is None else real(g.smooth)
    cotangents = Cotangents(
        real(g.spread) if way.spec.lse else None, real(g.nll), smooth
    )
    return (_pullback(way, product, kept, cotangents, wanted),)


_reverse.defvjp(_reverse_fwd, _reverse_bwd, symbolic_zeros=True)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _forward(way: Way, product: Product) -> Statistics:
    """Statistics with a forward rule, which can also be transposed."""
    return _evaluate(way, product)


def _forward_jvp(way: Way, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (product,), (d_product,) = primals, tangents
    result = _forward(way, product)
    kept = Statistics(result.peak, result.spread, result.nll, None, None)
    push = jax.checkpoint(_push, prevent_cse=False, static_argnums=(0,))
    d = push(way, product, kept, _logits.differentiable(d_product))
    return result, _logits.tangents_of(result, d)


_forward.defjvp(_forward_jvp, symbolic_zeros=True)


def _push(way: Way, product: Product, kept: Statistics, d_product: Any) -> Cotangents:
    """Tangents of the statistics: the transpose of their pullback."""
    tree: Any = jax.tree.structure(product)
    given = [d is not None for d in tree.flatten_up_to(d_product)]
    wanted = jax.tree.unflatten(tree, given)

    def pull(g: Cotangents) -> list[Array]:
        d = _pullback(way, product, kept, g, wanted, linear=True)
        return [x for x in tree.flatten_up_to(d) if x is not None]

    like = kept.nll
    example = Cotangents(like, like, like if way.spec.smooth else None)
    (d,) = jax.linear_transpose(pull, example)(jax.tree.leaves(d_product))
    return d


def _evaluate(way: Way, product: Product) -> Statistics:
    return (_evaluate_classes if way.by_classes else _evaluate_examples)(way, product)


def _pullback(
    way: Way,
    product: Product,
    kept: Statistics,
    g: Cotangents,
    wanted: Product,
    linear: bool = False,
) -> Product:
    pull = _pull_classes if way.by_classes else _pull_examples
    d = pull(way, product, kept, g, wanted, linear)
    # In the structure of the product, zero where nothing is wanted.
    return jax.tree.map(
        lambda value, x, want: _like(x, value) if want and x is not None else None,
        product,
        d,
        wanted,
    )


def _evaluate_examples(way: Way, product: Product) -> Statistics:
    """Statistics by chunks of examples."""
    head = product.head
    cut = _Cut(way.plan, product.examples)

    def body(carry: Any, chunk: Any) -> tuple[Any, Any]:
        hidden, examples = chunk
        z = project(way.plan.layout, Head(hidden, head.kernel, head.bias))
        inputs = inputs_of(way.spec, z, product._replace(examples=examples))
        return carry, _squeezed(way.spec, _logits.evaluate(way.spec, inputs))

    _, stacked = cut.loop(body, (), (cut.split(head.hidden), cut.examples))
    out: Statistics = cut.join(stacked)
    return out


def _pull_examples(
    way: Way,
    product: Product,
    kept: Statistics,
    g: Cotangents,
    wanted: Product,
    linear: bool,
) -> Product:
    """Cotangents by chunks of examples, whose logits are computed again."""
    head, layout = product.head, way.plan.layout
    want_head = _flags(wanted.head)
    # Without smoothing, no statistic depends on class weights.
    want_class_weights = bool(wanted.class_weights) and way.spec.smooth
    cut = _Cut(way.plan, product.examples)
    acc = _statistics.accumulation_dtype(compute_dtype(head))

    def body(carry: Any, chunk: Any) -> tuple[Any, Any]:
        hidden, examples, kept, g = chunk
        own = Head(hidden, head.kernel, head.bias)
        z = project(layout, own)
        inputs = inputs_of(way.spec, z, product._replace(examples=examples))
        d = _statistics.pullback(
            way.spec,
            inputs,
            _expanded(way.spec, kept),
            _expanded(way.spec, g),
            linear=linear,
        )
        d_kernel, d_bias, *d_others = carry
        d_hidden, d_kernel, d_bias = _add(
            way.plan, Head(None, d_kernel, d_bias), own, d.logits, want_head
        )
        here = [
            _raveled(d.class_weights) if want_class_weights else None,
            d.scale if wanted.scale else None,
        ]
        d_others = jax.tree.map(jnp.add, d_others, here)
        return (d_kernel, d_bias, *d_others), d_hidden

    zeros: Any = functools.partial(jnp.zeros_like, dtype=acc)
    start = (
        zeros(head.kernel) if want_head[1] else None,
        zeros(head.bias) if want_head[2] else None,
        zeros(product.class_weights) if want_class_weights else None,
        zeros(product.scale) if wanted.scale else None,
    )
    chunks = (cut.split(head.hidden), cut.examples, cut.split(kept), cut.split(g))
    (d_kernel, d_bias, d_class_weights, d_scale), d_hidden = cut.loop(
        body, start, chunks
    )
    d_head = Head(cut.join(d_hidden), d_kernel, d_bias)
    return Product(d_head, d_class_weights, d_scale, Examples(None, None), None)


def _evaluate_classes(way: Way, product: Product) -> Statistics:
    """Statistics by chunks of classes."""
    spec = way.spec
    pieces = _Pieces(way, product)
    whole = inputs_of(spec, None, product)
    two = _reducers((jnp.max, jnp.min, jnp.sum), axis=0, keepdims=True)

    def body(so_far: Partial, i: Array) -> tuple[Partial, None]:
        piece = pieces.take(i)
        part = _statistics.partial(pieces.spec, piece.inputs, piece.target)
        part = _shifted(part, piece.start)
        both = jax.tree.map(lambda a, b: jnp.stack([a, b]), so_far, part)
        merged = _statistics.merge(spec, both, two, whole)
        return jax.tree.map(lambda a: jnp.squeeze(a, 0), merged), None

    part, _ = _scan(
        body, pieces.nothing(), jnp.arange(way.plan.num_chunks, dtype=jnp.int32)
    )
    if spec.axis_name:
        shard = num_classes(way.plan.layout, product.head.kernel)
        part = _shifted(part, shard * lax.axis_index(spec.axis_name))
        over = _reducers((lax.pmax, lax.pmin, lax.psum), axis_name=spec.axis_name)
        part = _statistics.merge(spec, part, over, whole)
    return _squeezed(spec, _statistics.finish(spec, part, whole))


def _pull_classes(
    way: Way,
    product: Product,
    kept: Statistics,
    g: Cotangents,
    wanted: Product,
    linear: bool,
) -> Product:
    """Cotangents by chunks of classes, whose logits are computed again."""
    layout, head = way.plan.layout, product.head
    want_head = _flags(wanted.head)
    want_class_weights = bool(wanted.class_weights) and way.spec.smooth
    pieces = _Pieces(way, product)
    acc = _statistics.accumulation_dtype(compute_dtype(head))
    kept, g = _expanded(way.spec, kept), _expanded(way.spec, g)

    def body(carry: Any, i: Array) -> tuple[Any, None]:
        d_hidden, d_kernel, d_bias, d_class_weights, d_scale = carry
        piece = pieces.take(i)
        d = _statistics.pullback(
            pieces.spec, piece.inputs, kept, g, linear=linear, uniform=piece.uniform
        )
        here = _pull(layout, piece.head, d.logits, want_head)

        def put(a: Any, part: Any, axis: int = 0) -> Any:
            if a is None:
                return None
            return _put(a, part.astype(a.dtype), piece.start, axis, linear)

        carry = (
            None if d_hidden is None else d_hidden + here.hidden,
            put(d_kernel, here.kernel, pieces.axis),
            put(d_bias, here.bias),
            put(d_class_weights, _raveled(d.class_weights)),
            None if d_scale is None else d_scale + d.scale,
        )
        return carry, None

    start = (
        jnp.zeros(head.hidden.shape, acc) if want_head[0] else None,
        jnp.zeros_like(head.kernel) if want_head[1] else None,
        jnp.zeros(head.bias.shape, acc)
        if head.bias is not None and want_head[2]
        else None,
        jnp.zeros(product.class_weights.shape, acc)
        if product.class_weights is not None and want_class_weights
        else None,
        jnp.zeros((), acc) if wanted.scale else None,
    )
    # The last chunks may overlap others, which overwrite what they share.
    ids = jnp.arange(way.plan.num_chunks, dtype=jnp.int32)[::-1]
    (d_hidden, *d_head, d_class_weights, d_scale), _ = _scan(body, start, ids)
    return Product(
        Head(d_hidden, *d_head), d_class_weights, d_scale, Examples(None, None), None
    )


class _Piece(NamedTuple):
    """A chunk of classes, with its logits."""

    start: Array
    head: Head
    inputs: Inputs
    target: Array | None
    uniform: Uniform | None


class _Pieces:
    """The vocabulary in chunks of one size, the last of which may overlap others."""

    def __init__(self, way: Way, product: Product) -> None:
        head, layout = product.head, way.plan.layout
        self.axis = 1 if layout == "dv" else 0
        # What devices hold is merged once, after the loop.
        self.spec = dataclasses.replace(way.spec, axis_name=())
        self._way, self._product = way, product
        self._classes = num_classes(layout, head.kernel)
        self._size = -(-self._classes // way.plan.num_chunks)
        self._acc = _statistics.accumulation_dtype(compute_dtype(head))
        self._labels = product.examples.labels
        if way.spec.axis_name:
            shard = lax.axis_index(way.spec.axis_name)
            self._labels = self._labels - self._classes * shard
        self._uniform: Uniform | None = None
        if way.spec.smooth:
            shape = (*head.hidden.shape[:-1], self._classes)
            z = jax.ShapeDtypeStruct(shape, self._acc)
            inputs = inputs_of(way.spec, z, product)
            self._uniform = _statistics.uniform_of(way.spec, inputs, self._acc)

    def take(self, i: Array) -> _Piece:
        """Chunk `i`; classes that an earlier chunk has do not exist in it."""
        product, size, rank = self._product, self._size, self._product.head.hidden.ndim
        start = jnp.minimum(i * size, self._classes - size)

        def part(a: Any, axis: int = 0) -> Any:
            return None if a is None else _take(a, start, size, axis)

        head = Head(
            product.head.hidden,
            part(product.head.kernel, self.axis),
            part(product.head.bias),
        )
        exists = part(product.exists)
        if size * self._way.plan.num_chunks != self._classes:
            fresh = start + jnp.arange(size, dtype=jnp.int32) >= i * size
            exists = fresh if exists is None else exists & fresh
        here = product._replace(
            class_weights=part(product.class_weights),
            examples=product.examples._replace(labels=self._labels - start),
            exists=exists,
        )
        inputs = inputs_of(self.spec, project(self._way.plan.layout, head), here)
        target = uniform = None
        if self._uniform is not None:
            whole = self._uniform
            target = part(whole.target, rank - 1)
            uniform = Uniform(target, part(whole.others, rank - 1), whole.num_classes)
            if inputs.where is not None:
                target = jnp.where(inputs.where, target, 0)
        return _Piece(start, head, inputs, target, uniform)

    def nothing(self) -> Partial:
        """The statistics of no classes."""
        spec, labels = self.spec, self._product.examples.labels
        shape = (*labels.shape, 1)
        zero, none = jnp.zeros(shape, self._acc), jnp.full(shape, -jnp.inf, self._acc)
        return Partial(
            none,
            none,
            zero,
            zero if spec.smooth else None,
            jnp.zeros((1,) * len(shape), self._acc) if spec.smooth else None,
            jnp.full(shape, -1, jnp.int32) if spec.predicted else None,
        )


def _shifted(part: Partial, start: Array) -> Partial:
    """The same part, its class ids counted from the first of all classes."""
    if part.predicted is None:
        return part
    ids = jnp.where(part.predicted >= 0, part.predicted + start, -1)
    return part._replace(predicted=ids)


def _reducers(functions: Any, **options: Any) -> _statistics.Reducers:
    return _statistics.Reducers(*(functools.partial(f, **options) for f in functions))


# --- Pieces of arrays.


class _Cut:
    """Examples in chunks, and back."""

    def __init__(self, plan: Plan, examples: Examples) -> None:
        labels, counted = examples
        self._plan, self._total = plan, labels.shape[plan.axis]
        self._size = -(-self._total // plan.num_chunks)
        self._padding = self._size * plan.num_chunks - self._total
        self._order = self._num_counted = None
        if plan.compact and counted is not None:
            self._order = jnp.argsort(~counted, stable=True)
            self._num_counted = jnp.sum(counted)
        if self._padding and counted is None:
            counted = jnp.ones(labels.shape, bool)
        # What pads is zero: labels of class 0 that do not count.
        self.examples = self.split(Examples(labels, counted))

    def split(self, tree: Any) -> Any:
        """Every `B...` array as chunks along a new first axis."""
        return jax.tree.map(self._split, tree)

    def join(self, tree: Any) -> Any:
        """The inverse of `split`."""
        return jax.tree.map(self._join, tree)

    def loop(self, body: Any, start: Any, chunks: Any) -> tuple[Any, Any]:
        """`lax.scan` over the chunks; one without examples that count is skipped."""
        if self._num_counted is None:
            return _scan(body, start, chunks)
        num_counted, size = self._num_counted, self._size
        first = jax.tree.map(lambda a: a[0], chunks)
        start = _typed(start, jax.eval_shape(body, start, first)[0])
        _, like = jax.eval_shape(body, start, first)

        def idle(carry: Any, chunk: Any) -> tuple[Any, Any]:
            del chunk
            zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)
            return carry, _typed(zeros, like)

        def step(carry: Any, x: Any) -> tuple[Any, Any]:
            i, chunk = x
            out: tuple[Any, Any] = lax.cond(
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
        cut = cut[::-1] if plan.strided else cut
        a = a.reshape(*a.shape[: plan.axis], *cut, *a.shape[plan.axis + 1 :])
        return jnp.moveaxis(a, plan.axis + plan.strided, 0)

    def _join(self, a: Array) -> Array:
        plan = self._plan
        a = jnp.moveaxis(a, 0, plan.axis + plan.strided)
        shape = (*a.shape[: plan.axis], -1, *a.shape[plan.axis + 2 :])
        a = lax.slice_in_dim(a.reshape(shape), 0, self._total, axis=plan.axis)
        if self._order is not None:
            back = jnp.argsort(self._order)
            a = a.at[back].get(mode="promise_in_bounds", unique_indices=True)
        return a


def _scan(body: Any, start: Any, xs: Any) -> tuple[Any, Any]:
    first = jax.tree.map(lambda a: a[0], xs)
    return lax.scan(body, _typed(start, jax.eval_shape(body, start, first)[0]), xs)


def _typed(tree: Any, like: Any) -> Any:
    """Inside a `shard_map`, types constants as varying where a loop makes them so."""
    return jax.tree.map(_typed_like, tree, like)


def _varying_with(like: Array, tree: Any) -> Any:
    """Types every array as varying wherever one array is."""
    return jax.tree.map(lambda a: _typed_like(a, like), tree)


def _typed_like(a: Array, like: Any) -> Array:
    axes = tuple(sorted(_logits.varying_axes(like) - _logits.varying_axes(a)))
    return lax.pcast(a, axes, to="varying") if axes else a


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _take(a: Array, start: Array, size: Size, axis: int) -> Array:
    """`_logits.sliced`, whose tangent is a slice, too."""
    return _logits.sliced(a, start, size, axis)


@_take.defjvp
def _take_jvp(
    size: Size, axis: int, primals: Any, tangents: Any
) -> tuple[Array, Array]:
    a, start = primals
    d_a, _ = tangents
    d = lax.dynamic_slice_in_dim(d_a, start, size, axis)
    return _take(a, start, size, axis), d


def _put(a: Array, part: Array, start: Array, axis: int, linear: bool) -> Array:
    """`a` with a slice replaced."""
    if linear or a.dtype.itemsize != 2:
        return lax.dynamic_update_slice_in_dim(a, part, start, axis)
    return _put_bits(a, part, start, axis)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _put_bits(a: Array, part: Array, start: Array, axis: int) -> Array:
    """The same for 16-bit numbers, as integers for the reason in `_logits.sliced`."""

    def plain(a: Array, part: Array, start: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(a, part, start, axis)

    def of_bits(a: Array, part: Array, start: Array) -> Array:
        bits, piece = (lax.bitcast_convert_type(x, jnp.uint16) for x in (a, part))
        return lax.bitcast_convert_type(plain(bits, piece, start), a.dtype)

    return lax.platform_dependent(a, part, start, cpu=of_bits, default=plain)


@_put_bits.defjvp
def _put_bits_jvp(axis: int, primals: Any, tangents: Any) -> tuple[Array, Array]:
    a, part, start = primals
    d_a, d_part, _ = tangents
    d = lax.dynamic_update_slice_in_dim(d_a, d_part, start, axis)
    return _put_bits(a, part, start, axis), d


def inputs_of(spec: Spec, z: Any, product: Product) -> Inputs:
    """The arguments of the statistics of some logits, whose last axis are classes."""
    (axis,) = spec.axes

    def along_classes(a: Any) -> Any:
        return None if a is None else a.reshape((1,) * axis + (-1,))

    def along_examples(a: Any) -> Any:
        return None if a is None else a[..., None]

    return Inputs(
        z,
        along_examples(product.examples.labels),
        along_classes(product.exists),
        along_examples(product.examples.counted),
        along_classes(product.class_weights) if spec.smooth else None,
        product.scale,
    )


def _squeezed(spec: Spec, tree: Any) -> Any:
    return jax.tree.map(lambda a: jnp.squeeze(a, spec.axes), tree)


def _expanded(spec: Spec, tree: Any) -> Any:
    return jax.tree.map(lambda a: jnp.expand_dims(a, spec.axes), tree)


def _raveled(a: Array | None) -> Array | None:
    return None if a is None else a.ravel()


def _like(d: Array | None, value: Array) -> Array | None:
    """A cotangent in the dtype of its primal, summed over devices where that is one."""
    return None if d is None else _logits.summed_like(d, value).astype(value.dtype)


def _unzip(tree: Any) -> tuple[Any, Any]:
    """The values of the arguments of a rule, and which are differentiated."""
    is_leaf = lambda x: isinstance(x, CustomVJPPrimal)  # noqa: E731
    values = jax.tree.map(lambda x: x.value, tree, is_leaf=is_leaf)
    wanted = jax.tree.map(lambda x: x.perturbed, tree, is_leaf=is_leaf)
    return values, wanted


def _flags(wanted: Head) -> tuple[bool, bool, bool]:
    return bool(wanted.hidden), bool(wanted.kernel), bool(wanted.bias)


def _only(wanted: list[bool], values: list[Any]) -> list[Any]:
    return [x if want else None for want, x in zip(wanted, values, strict=True)]


def _filled(values: list[Any], defaults: list[Any]) -> list[Any]:
    pairs = zip(values, defaults, strict=True)
    return [default if x is None else x for x, default in pairs]
