"""Chunks of classes, merged; the backward pass computes their logits again."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxlosses._backends.chunks import Plan, Plans
from jaxlosses._backends.head import (
    NO_LABELS,
    Head,
    Product,
    Wants,
    classes_of,
    expanded,
    inputs_of,
    project,
    pull,
    squeezed,
)
from jaxlosses._math import gradient, online, picks, statistics
from jaxlosses._math.classes import (
    Inputs,
    Shaped,
    Spec,
    Stacked,
    Uniform,
    Values,
    Whole,
    uniform_of,
)
from jaxlosses._math.gradient import Cotangents
from jaxlosses._math.statistics import Partial, Statistics
from jaxlosses._platform import by_platform
from jaxlosses._sharding import scan, summed_like, varying_axes
from jaxlosses._types import Tree


@dataclasses.dataclass(frozen=True)
class ByClasses:
    """Statistics of a product, by chunks of classes; see `Backend`."""

    spec: Spec
    plans: Plans

    def evaluate(self, product: Product) -> Statistics:
        """What each chunk has, merged with what was there before."""
        return self.plans.run(self._by_plan, product)

    def _by_plan(self, plan: Plan, product: Product) -> Statistics:
        on_cpu = functools.partial(self._evaluate, plan, statistics.partial)
        if self.spec.softcap is not None:  # as in `choose.evaluate`
            return on_cpu(product)
        # The reduction may be one with the matmul, and no logit written.
        once = functools.partial(self._evaluate, plan, online.partial)
        return by_platform(on_cpu, once, product)

    def _evaluate(
        self, plan: Plan, partial: Callable[..., Partial], product: Product
    ) -> Statistics:
        spec = self.spec
        if product.labels.picks is not None:  # what is left out is of no label
            spec = dataclasses.replace(spec, dense=False)
        pieces = _Pieces(spec, plan, product)
        whole = _inputs(spec, None, product)
        of_two = whole
        if whole.scale is not None and whole.scale.ndim:
            of_two = whole._replace(scale=whole.scale[None])

        def of(i: Array) -> tuple[Partial, Values | None]:
            piece = pieces.take(i)
            inputs, picked = piece.inputs, None
            if inputs.picks is not None:
                picked = picks.picked(pieces.spec, inputs)
                inputs = picks.rest_of(pieces.spec, inputs)
                inputs = inputs._replace(labels=whole.labels)
            part = partial(pieces.spec, inputs, piece.target)
            return pieces.numbered(part, piece.begin), picked

        def body(so_far: Tree, i: Array) -> tuple[Tree, None]:
            (before, picked), (part, more) = so_far, of(i)
            both = jax.tree.map(lambda a, b: jnp.stack([a, b]), before, part)
            merged = statistics.merge(spec, both, Stacked(), of_two)
            merged = jax.tree.map(lambda a: jnp.squeeze(a, 0), merged)
            return (merged, jax.tree.map(jnp.add, picked, more)), None

        of_part, of_picks = jax.eval_shape(of, pieces.starts[0])
        start = _nothing(of_part), jax.tree.map(jnp.zeros_like, of_picks)
        (part, picked), _ = scan(body, start, pieces.starts)
        if spec.shards != Whole():
            first = spec.shards.first_id(pieces.num_classes)
            part = _renamed(part, lambda ids: ids + first)
            part = statistics.merge(spec, part, spec.shards, whole)
        found = statistics.finish(spec, part, whole)
        if picked is not None:
            some = part.rival != -jnp.inf
            found = picks.with_rest(whole, found, some, spec.shards.sum(picked))
        if spec.rank:
            found = self._ranked(pieces, whole, found, part.label)
        out: Statistics = squeezed(spec, found)
        return out

    def _ranked(
        self, pieces: "_Pieces", whole: Inputs, found: Statistics, label: Values
    ) -> Statistics:
        """The same with the rank of a label, which only all chunks have found."""

        def body(number: Array, i: Array) -> tuple[Array, None]:
            piece = pieces.take(i)
            more = statistics.number_ahead(pieces.spec, piece.inputs, label)
            return number + more, None

        number, _ = scan(body, jnp.zeros(label.shape, jnp.int32), pieces.starts)
        number = self.spec.shards.sum(number)
        every = pieces.num_classes * self.spec.shards.count()
        return statistics.ranked(whole, found, number, every)

    def pullback(
        self,
        product: Product,
        kept: Statistics,
        cotangents: Cotangents,
        wanted: Product,
        linear: bool,
    ) -> Tree:
        """The logits of each chunk again, and its part of the gradients."""

        def run(plan: Plan, product: Product, kept: Statistics, g: Cotangents) -> Tree:
            return self._pullback(plan, product, kept, g, wanted, linear)

        return self.plans.run(run, product, kept, cotangents)

    def _pullback(
        self,
        plan: Plan,
        product: Product,
        kept: Statistics,
        cotangents: Cotangents,
        wanted: Product,
        linear: bool,
    ) -> Tree:
        spec, head = self.spec, product.head
        wants = Wants(*map(bool, wanted.head))
        # Without smoothing, no statistic depends on class weights.
        by_class = bool(wanted.class_weights) and spec.smooth
        pieces = _Pieces(spec, plan, product)
        acc = plan.matmul.accumulation
        kept, g = expanded(spec, kept), expanded(spec, cotangents)

        def body(carry: Product, i: Array) -> tuple[Product, None]:
            piece = pieces.take(i)
            d = gradient.pullback(
                pieces.spec, piece.inputs, kept, g, linear=linear, uniform=piece.uniform
            )
            # Devices add up what each has of a piece before they round it.
            apart = varying_axes(d.logits) - varying_axes(head.kernel)
            rounded = head.kernel.dtype if plan.rounds and not apart else None
            here = pull(plan.matmul, piece.head, d.logits, wants, rounded)
            if here.kernel is not None and head.kernel.dtype != acc:
                here = here._replace(kernel=summed_like(here.kernel, head.kernel))

            def placed(a: Tree, part: Tree, axis: int = 0) -> Tree:
                if a is None:
                    return None
                part = part.astype(a.dtype)
                return pieces.strips.place(a, part, piece.begin, axis, linear)

            d_head = Head(
                jax.tree.map(jnp.add, carry.head.hidden, here.hidden),
                placed(carry.head.kernel, here.kernel, pieces.axis),
                placed(carry.head.bias, here.bias),
            )
            d_class_weights = carry.class_weights
            if d_class_weights is not None and d.class_weights is not None:
                d_class_weights = placed(d_class_weights, d.class_weights.ravel())
            d_scale = carry.scale
            if d_scale is not None and d.scale is not None:
                d_scale = d_scale + d.scale.reshape(d_scale.shape)
            return Product(d_head, d_class_weights, d_scale, NO_LABELS, None), None

        def zeros(like: Tree, want: bool) -> Tree:
            return jnp.zeros_like(like, dtype=acc) if want else None

        def unwritten(like: Array) -> Array:
            # Of the kernel's size; the pieces write every entry of it.
            return jnp.zeros_like(like) if linear else lax.empty(like.shape, like.dtype)

        folded = pieces.product
        start = Product(
            Head(
                zeros(head.hidden, wants.hidden),
                unwritten(folded.head.kernel) if wants.kernel else None,
                zeros(folded.head.bias, wants.bias),
            ),
            zeros(folded.class_weights, by_class),
            zeros(product.scale, bool(wanted.scale)),
            NO_LABELS,
            None,
        )
        # The last chunks may overlap others, which overwrite what they share.
        out, _ = scan(body, start, pieces.starts[::-1])
        unfold = pieces.strips.unfold
        d_head = out.head._replace(
            kernel=unfold(out.head.kernel, pieces.axis), bias=unfold(out.head.bias)
        )
        return out._replace(head=d_head, class_weights=unfold(out.class_weights))


class _Piece(NamedTuple):
    """A chunk of classes, with its logits, and where it begins in every strip."""

    begin: Array
    head: Head
    inputs: Inputs
    target: Values | None
    uniform: Uniform | None


class _Pieces:
    """The vocabulary in chunks of one size, the last of which may overlap others."""

    def __init__(self, spec: Spec, plan: Plan, product: Product) -> None:
        head = product.head
        self.axis = 1 if plan.matmul.layout == "dv" else 0
        # What devices hold is merged once, after the loop.
        self.spec = dataclasses.replace(spec, shards=Whole())
        self._axis = head.hidden.ndim - 1  # of the classes, in logits
        self.num_classes = classes_of(plan.matmul.layout, head.kernel)
        self.strips = strips = plan.strips_of(self.num_classes)
        self.starts = strips.starts
        self._matmul = plan.matmul
        first = spec.shards.first_id(self.num_classes)
        self._labels = product.labels.ids - first
        self._picks: Array | None = None
        if product.labels.picks is not None:
            self._picks = product.labels.picks - first
        self._uniform: Uniform | None = None
        if spec.smooth:
            shape = (*head.hidden.shape[:-1], self.num_classes)
            z = jax.ShapeDtypeStruct(shape, plan.matmul.accumulation)
            whole = uniform_of(spec, _inputs(spec, z, product), z.dtype)
            self._uniform = whole._replace(
                target=strips.fold(whole.target, self._axis),
                others=strips.fold(whole.others, self._axis),
            )
        labels = product.labels
        self.product = product._replace(
            head=head._replace(
                kernel=strips.fold(head.kernel, self.axis), bias=strips.fold(head.bias)
            ),
            class_weights=strips.fold(product.class_weights),
            labels=labels._replace(exists=strips.fold(labels.exists, self._axis)),
            exists=strips.fold(product.exists),
        )

    def take(self, start: Array) -> _Piece:
        """A chunk; classes that an earlier chunk has do not exist in it."""
        product, strips = self.product, self.strips
        begin = strips.begin(start)

        def part(a: Tree, axis: int = 0) -> Tree:
            return strips.take(a, begin, axis)

        def placed(ids: Array) -> Array:
            return strips.places(ids, start)

        head = product.head._replace(
            kernel=part(product.head.kernel, self.axis), bias=part(product.head.bias)
        )
        exists = part(product.exists)
        if strips.overlap:
            fresh = strips.fresh(start)
            exists = fresh if exists is None else exists & fresh
        here = product._replace(
            class_weights=part(product.class_weights),
            labels=product.labels._replace(
                ids=placed(self._labels),
                exists=part(product.labels.exists, self._axis),
                picks=jax.tree.map(placed, self._picks),
            ),
            exists=exists,
        )
        inputs = _inputs(self.spec, project(self._matmul, head), here)
        target = uniform = None
        if self._uniform is not None:
            whole = self._uniform
            target = part(whole.target, self._axis)
            others = part(whole.others, self._axis)
            uniform = Uniform(target, others, whole.num_classes)
            if inputs.where is not None:
                target = jnp.where(inputs.where, target, 0)
        return _Piece(begin, head, inputs, target, uniform)

    def numbered(self, part: Partial, begin: Array) -> Partial:
        """What is known of a chunk, its class ids counted from the first of all."""
        return _renamed(part, lambda ids: self.strips.ids(ids, begin))


def _nothing(like: Partial) -> Partial:
    """The statistics of no classes, of the shapes and dtypes of those of some."""
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), like)
    none = jnp.full_like(zeros.label, -jnp.inf)
    out: Partial = zeros._replace(label=none, rival=none)
    if like.predicted is not None:
        out = out._replace(predicted=jnp.full_like(zeros.predicted, -1))
    if like.tail is not None:
        tail = zeros.tail._replace(peak=none, excess=jnp.full_like(none, -1))
        out = out._replace(tail=tail)
    return out


def _inputs(spec: Spec, z: Shaped | None, product: Product) -> Inputs:
    _, class_weights, scale, labels, exists = product
    return inputs_of(spec, z, labels, exists, class_weights, scale)


def _renamed(part: Partial, ids: Callable[[Array], Array]) -> Partial:
    """The same part with other class ids."""
    if part.predicted is None:
        return part
    there = part.predicted >= 0
    return part._replace(predicted=jnp.where(there, ids(part.predicted), -1))
