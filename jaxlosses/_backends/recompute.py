"""Chunks of examples, whose logits the backward pass computes again."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float

from jaxlosses._backends import choose
from jaxlosses._backends.chunks import Cut, Plan, Plans, add
from jaxlosses._backends.examples import LossOf, Operands, in_chunks
from jaxlosses._backends.head import (
    NO_LABELS,
    Head,
    Labels,
    Product,
    Wants,
    expanded,
    inputs_of,
    project,
    squeezed,
)
from jaxlosses._math import gradient
from jaxlosses._math.classes import Inputs, Spec
from jaxlosses._math.gradient import Cotangents
from jaxlosses._math.statistics import Statistics
from jaxlosses._rules import (
    Flags,
    cotangent_like,
    flags_of,
    values_and_wanted,
    wanted_of,
)
from jaxlosses._types import Tree


@dataclasses.dataclass(frozen=True)
class ByExamples:
    """Statistics of a product, by chunks of examples; see `Backend`."""

    spec: Spec
    plans: Plans

    def evaluate(self, product: Product) -> Statistics:
        """The logits of one chunk at a time."""
        return self.plans.run(self._evaluate, product)

    def _evaluate(self, plan: Plan, product: Product) -> Statistics:
        cut = Cut(plan, product.labels)

        def body(carry: tuple[()], chunk: Tree) -> tuple[tuple[()], Statistics]:
            inputs, _ = self._chunk(product, *chunk)
            return carry, squeezed(self.spec, choose.evaluate(self.spec, inputs))

        rows = cut.split((product.head.hidden, _scale_of_each(product)))
        _, stacked = cut.loop(body, (), (cut.labels, *rows))
        out: Statistics = cut.join(stacked)
        return out

    def pullback(
        self,
        product: Product,
        kept: Statistics,
        cotangents: Cotangents,
        wanted: Product,
        linear: bool,
    ) -> Tree:
        """The logits of each chunk again, and what it adds to the gradients."""

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
        cut, of_each = Cut(plan, product.labels), _scale_of_each(product)
        acc = plan.matmul.accumulation

        def body(carry: tuple[Tree, ...], chunk: Tree) -> tuple[tuple[Tree, ...], Tree]:
            labels, hidden, scale, kept, g = chunk
            inputs, own = self._chunk(product, labels, hidden, scale)
            d = gradient.pullback(
                spec, inputs, expanded(spec, kept), expanded(spec, g), linear=linear
            )
            sums, *d_others = carry
            here = add(plan, sums, own, d.logits, wants)
            d_class_weights = jax.tree.map(jnp.ravel, d.class_weights)
            more = [
                d_class_weights if by_class else None,
                d.scale if wanted.scale and scale is None else None,
            ]
            d_others = jax.tree.map(jnp.add, d_others, more)
            d_scale = None
            if wanted.scale and scale is not None and d.scale is not None:
                d_scale = jnp.squeeze(d.scale, spec.axes)
            return (here._replace(hidden=None), *d_others), (here.hidden, d_scale)

        def zeros(like: Tree, want: bool) -> Tree:
            return jnp.zeros_like(like, dtype=acc) if want else None

        sums = Head(
            None, zeros(head.kernel, wants.kernel), zeros(head.bias, wants.bias)
        )
        start = (
            sums,
            zeros(product.class_weights, by_class),
            zeros(product.scale, bool(wanted.scale) and of_each is None),
        )
        rows = cut.split((head.hidden, of_each, kept, cotangents))
        (sums, d_class_weights, d_scale), stacked = cut.loop(
            body, start, (cut.labels, *rows)
        )
        d_hidden, d_scales = cut.join(stacked)
        d_head = sums._replace(hidden=d_hidden)
        d_scale = d_scale if d_scales is None else d_scales
        return Product(d_head, d_class_weights, d_scale, NO_LABELS, None)

    def _chunk(
        self, product: Product, labels: Labels, hidden: Tree, scale: Tree
    ) -> tuple[Inputs, Head]:
        head = product.head._replace(hidden=hidden)
        z = project(self.plans.first.matmul, head)
        _, class_weights, of_all, _, exists = product
        scale = of_all if scale is None else scale
        return inputs_of(self.spec, z, labels, exists, class_weights, scale), head


def _scale_of_each(product: Product) -> Array | None:
    """The factors of the logits, where each example has its own."""
    scale = product.scale
    return None if scale is None or scale.ndim == 0 else scale


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def of_each(
    plans: Plans, loss_of: LossOf, operands: Operands
) -> tuple[Float[Array, "*B"], Tree]:
    """The loss of each example, and what `loss_of` keeps of it.

    For a loss of more than the statistics, as one of a distribution for each example.
    """

    def run(plan: Plan, operands: Operands) -> tuple[Tree, Tree]:
        found = in_chunks(plan, loss_of, operands, each=True)
        return found.values, found.keep

    return plans.run(run, operands)


def _of_each_fwd(plans: Plans, loss_of: LossOf, marked: Operands) -> tuple[Tree, Tree]:
    operands, wanted = values_and_wanted(marked)
    return of_each(plans, loss_of, operands), (operands, flags_of(wanted))


def _of_each_bwd(
    plans: Plans, loss_of: LossOf, residuals: tuple[Operands, Flags], g: Tree
) -> tuple[Operands]:
    operands, flags = residuals
    wanted, values = wanted_of(flags, operands), g[0]
    if isinstance(values, SymbolicZero):
        values = jnp.zeros(values.shape, values.dtype)

    def run(plan: Plan, operands: Operands, g: Array) -> Operands:
        return in_chunks(plan, loss_of, operands, wanted, g=g).gradient

    tree: Any = jax.tree.structure(operands)
    gradient = tree.flatten_up_to(plans.run(run, operands, values))
    leaves = jax.tree.leaves(operands)
    return (
        tree.unflatten(
            None if d is None else cotangent_like(d, x)
            for x, d in zip(leaves, gradient, strict=True)
        ),
    )


of_each.defvjp(_of_each_fwd, _of_each_bwd, symbolic_zeros=True)
