"""Given logits, as a backend of the rules."""

import dataclasses

from jaxlosses._backends import choose
from jaxlosses._math.classes import Inputs, Spec
from jaxlosses._math.gradient import Cotangents
from jaxlosses._math.statistics import Statistics
from jaxlosses._types import Tree


@dataclasses.dataclass(frozen=True)
class OnLogits:
    """Statistics of an array of logits; see `Backend`."""

    spec: Spec

    def evaluate(self, inputs: Inputs) -> Statistics:
        """By blocks of rows or in one piece, as the platform wants it."""
        return choose.evaluate(self.spec, inputs)

    def pullback(
        self,
        inputs: Inputs,
        kept: Statistics,
        cotangents: Cotangents,
        wanted: Tree,
        linear: bool,
    ) -> Tree:
        """All that there is: what is not wanted is removed by XLA."""
        del wanted
        d = choose.pullback(self.spec, inputs, kept, cotangents, linear)
        return Inputs(d.logits, d.labels, None, None, d.class_weights, d.scale)
