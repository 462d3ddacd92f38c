"""How given logits are read: by rows in blocks, whole, or by one reduction."""

import functools
from collections.abc import Callable

from jaxlosses._backends import cpu, once
from jaxlosses._math import gradient, online, picks, statistics, tails
from jaxlosses._math.classes import Inputs, Spec, Values, Whole
from jaxlosses._math.divergence import evaluate as evaluate_divergence
from jaxlosses._math.gradient import Cotangents, Gradients
from jaxlosses._math.statistics import Statistics
from jaxlosses._math.teacher import Found, Operands, Rule
from jaxlosses._platform import by_platform, is_local
from jaxlosses._sharding import explicit_mesh
from jaxlosses._types import are_numbers

# Slices of a row of given logits, on a TPU.
_SLICES_ON_TPU = 4


def evaluate(spec: Spec, inputs: Inputs) -> Statistics:
    """Statistics of given logits, read as the platform of the program wants it."""
    if inputs.picks is not None:
        rest = picks.rest_of(spec, inputs)
        return picks.beside(spec, inputs, rest, evaluate(spec, rest))
    return statistics.with_rank(spec, inputs, _evaluate(spec, inputs))


def _evaluate(spec: Spec, inputs: Inputs) -> Statistics:
    """All but the rank.

    Off a CPU a reduction of several numbers at once reads them once. XLA:CPU would take
    it one by one, and XLA:GPU writes the slices of a row that help XLA:TPU
    (benchmarks/NOTES.md, "One read, by a reduction of several numbers").
    """
    on_cpu: Callable[[Inputs], Statistics]
    on_cpu = functools.partial(statistics.evaluate, spec)
    if _may_block(spec, inputs):
        on_cpu = cpu.in_blocks(spec, _may_block)
    if spec.softcap is not None:  # arithmetic of pairs in every step costs more
        return by_platform(on_cpu, functools.partial(statistics.evaluate, spec), inputs)
    once = functools.partial(online.evaluate, spec)
    on_tpu = None  # no slices: one trace less
    # Slices of an axis that is split would move between devices.
    if is_local() and online.may_slice(spec, inputs, _SLICES_ON_TPU):
        on_tpu = functools.partial(once, slices=_SLICES_ON_TPU)
    return by_platform(on_cpu, once, inputs, on_tpu=on_tpu)


def pullback(
    spec: Spec, inputs: Inputs, kept: Statistics, cotangents: Cotangents, linear: bool
) -> Gradients:
    """Cotangents of what given logits depend on."""
    general = functools.partial(gradient.pullback, spec, linear=linear)
    plain = cotangents.smooth is None and cotangents.entropy is None
    if plain and _may_block(spec, inputs) and cpu.shares_terms(spec, inputs):
        on_cpu = functools.partial(once.pullback, spec, linear=linear)
        return by_platform(on_cpu, general, inputs, kept, cotangents)
    return general(inputs, kept, cotangents)


def normalizer(spec: Spec, inputs: Inputs) -> tuple[Values, Values]:
    """What turns logits into probabilities, `peak` and `spread`, likewise."""
    on_cpu = functools.partial(_whole_normalizer, spec)
    return by_platform(on_cpu, functools.partial(_normalizer, spec), inputs)


def _whole_normalizer(spec: Spec, inputs: Inputs) -> tuple[Values, Values]:
    return tails.peak_and_spread(statistics.normalize(spec, inputs)[1])


def _normalizer(spec: Spec, inputs: Inputs) -> tuple[Values, Values]:
    """Off a CPU, but for a cap as above."""
    once = _whole_normalizer if spec.softcap is not None else online.normalizer
    return once(spec, inputs)


def divergence(rule: Rule, operands: Operands) -> Found:
    """Divergences of given logits, likewise."""

    def on_cpu(operands: Operands) -> Found:
        inputs = Inputs(operands.student, operands.teacher, operands.where)
        if _may_block(rule.spec, inputs):
            return cpu.divergence(rule, operands)
        return evaluate_divergence(rule, _whole_normalizer, operands)

    once = functools.partial(evaluate_divergence, rule, _normalizer)
    return by_platform(on_cpu, once, operands)


def _may_block(spec: Spec, inputs: Inputs) -> bool:
    """Whether a loop over rows is sound and of use, were the platform a CPU.

    A loop over an axis that turns out to be sharded would make every device compute
    everything.
    """
    *batch, num_classes = inputs.logits.shape
    if spec.axes != (len(batch),) or num_classes == 0:
        return False
    if not are_numbers(*inputs.logits.shape):  # so many blocks, of so many rows
        return False
    shape = None if inputs.labels is None else inputs.labels.shape
    if spec.dense and shape not in (None, inputs.logits.shape):
        return False
    if spec.shards != Whole():  # every block would wait for its own collectives
        return False
    if explicit_mesh(inputs.logits) is not None:  # also one of one device
        return False
    if inputs.where is not None and inputs.where.size not in (
        num_classes,
        inputs.logits.size,
    ):
        return False
    return is_local()
