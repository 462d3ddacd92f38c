"""Chunks of examples, whose logits the backward pass computes again."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxlosses._backends import choose
from jaxlosses._backends.chunks import Cut, Plan, Plans, add
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
            hidden, labels = chunk
            inputs, _ = self._chunk(product, hidden, labels)
            return carry, squeezed(self.spec, choose.evaluate(self.spec, inputs))

        _, stacked = cut.loop(body, (), (cut.split(product.head.hidden), cut.labels))
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
        cut = Cut(plan, product.labels)
        acc = plan.matmul.accumulation

        def body(carry: tuple[Tree, ...], chunk: Tree) -> tuple[tuple[Tree, ...], Tree]:
            hidden, labels, kept, g = chunk
            inputs, own = self._chunk(product, hidden, labels)
            d = gradient.pullback(
                spec, inputs, expanded(spec, kept), expanded(spec, g), linear=linear
            )
            sums, *d_others = carry
            here = add(plan, sums, own, d.logits, wants)
            more = [
                jax.tree.map(jnp.ravel, d.class_weights) if by_class else None,
                d.scale if wanted.scale else None,
            ]
            d_others = jax.tree.map(jnp.add, d_others, more)
            return (here._replace(hidden=None), *d_others), here.hidden

        def zeros(like: Tree, want: bool) -> Tree:
            return jnp.zeros_like(like, dtype=acc) if want else None

        sums = Head(
            None, zeros(head.kernel, wants.kernel), zeros(head.bias, wants.bias)
        )
        start = (
            sums,
            zeros(product.class_weights, by_class),
            zeros(product.scale, bool(wanted.scale)),
        )
        chunks = map(cut.split, (head.hidden, kept, cotangents))
        hidden, *others = chunks
        xs = (hidden, cut.labels, *others)
        (sums, d_class_weights, d_scale), d_hidden = cut.loop(body, start, xs)
        d_head = sums._replace(hidden=cut.join(d_hidden))
        return Product(d_head, d_class_weights, d_scale, NO_LABELS, None)

    def _chunk(
        self, product: Product, hidden: Tree, labels: Labels
    ) -> tuple[Inputs, Head]:
        head = product.head._replace(hidden=hidden)
        z = project(self.plans.first.matmul, head)
        _, class_weights, scale, _, exists = product
        return inputs_of(self.spec, z, labels, exists, class_weights, scale), head
