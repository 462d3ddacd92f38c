"""Two proofs that the seams are real: a backend and a loss that the package lacks.

What a backend owes is in `jaxlosses._rules.Backend`; where a loss is added, in
`jaxlosses._combine`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import sweep
from jax.test_util import check_grads
from tolerances import assert_gradient, assert_loss

import jaxlosses as jl
from jaxlosses import _combine, _rules
from jaxlosses._backends.chunks import Plan, Plans
from jaxlosses._backends.head import Head, Labels, Matmul, Product
from jaxlosses._backends.logits import OnLogits
from jaxlosses._backends.recompute import ByExamples
from jaxlosses._backends.vocab import ByClasses
from jaxlosses._math import gradient, statistics
from jaxlosses._math.classes import Inputs, Spec
from jaxlosses._math.statistics import Statistics


@dataclasses.dataclass(frozen=True)
class RowByRow:
    """A toy: statistics of one example after the other."""

    spec: Spec

    def evaluate(self, inputs: Inputs) -> Statistics:
        row = dataclasses.replace(self.spec, axes=(0,))
        return jax.lax.map(lambda x: statistics.evaluate(row, x), inputs)

    def pullback(
        self, inputs: Inputs, kept: Any, cotangents: Any, wanted: Any, linear: bool
    ) -> Inputs:
        d = gradient.pullback(self.spec, inputs, kept, cotangents, linear=linear)
        return Inputs(d.logits, d.labels, None, None, None, d.scale)


PLANS = {
    dtype: Plans.of_all(Plan(Matmul("dv", np.dtype(dtype)), 3, local=True))
    for dtype in ("float32", "float64")
}
# What each backend takes for logits: themselves, or a product with the identity.
BACKENDS: dict[str, Any] = {
    "logits": OnLogits,
    "toy": RowByRow,
    "examples": ByExamples,
    "classes": ByClasses,
}


def nll_of(name: str, logits: Any, ids: Any, forward_mode: bool = False) -> Any:
    spec = Spec((1,), dense=False)
    backend = BACKENDS[name]
    if name in ("logits", "toy"):
        operands: Any = Inputs(logits, ids[:, None])
    else:
        backend = functools.partial(backend, plans=PLANS[logits.dtype.name])
        kernel = jnp.eye(logits.shape[1], dtype=logits.dtype)
        labels = Labels(ids, None)
        operands = Product(Head(logits, kernel, None), None, None, labels, None)
    found = _rules.statistics(backend(spec), operands, forward_mode)
    return found.nll.reshape(-1)


def value_and_gradient(name: str, logits: Any, ids: Any) -> Any:
    cotangent = jnp.asarray(np.resize([1.0, -0.5, 2.0], len(ids)), logits.dtype)
    value, pull = jax.vjp(lambda z: nll_of(name, z, ids), logits)
    return value, pull(cotangent)[0]


@pytest.mark.alternate
@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_keeps_the_digits_of_confident_examples(name: str) -> None:
    rng = np.random.default_rng(0)
    for margin in (0.0, 20.0, 80.0):
        logits, ids = oracle.confident_logits(rng, 7, 11, margin)
        value, d = jax.jit(lambda z, y: value_and_gradient(name, z, y))(logits, ids)
        exact = oracle.gradients(logits, ids, cotangent=np.resize([1.0, -0.5, 2.0], 7))
        assert_loss(value, oracle.loss(logits, ids), "float32")
        if name in ("logits", "toy"):  # a matmul adds up the gradients of a row
            assert_gradient(d, exact["logits"], "float32")


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_is_loud_about_a_label_and_a_diverged_row(name: str) -> None:
    logits = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    logits[1, 2] = np.inf if name in ("logits", "toy") else np.nan
    ids = np.array([0, 1, -1, 3, 2], np.int32)
    value, d = jax.jit(lambda z, y: value_and_gradient(name, z, y))(logits, ids)
    bad = [False, True, True, False, False]
    np.testing.assert_array_equal(np.isnan(value), bad)
    np.testing.assert_array_equal(np.isnan(d).all(1), bad)


@pytest.mark.without_llvm_passes
@pytest.mark.parametrize(
    "name", sweep(BACKENDS, lambda name: name in ("toy", "classes"))
)
def test_every_backend_serves_all_modes_to_second_order(name: str) -> None:
    with jax.enable_x64(True):
        logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))
        ids = jnp.array([0, 2, 1, 1], jnp.int32)
        rows = jnp.arange(1.0, 5)
        for forward_mode, modes in ((False, ("rev",)), (True, ("fwd", "rev"))):
            loss = jax.jit(
                lambda z, forward_mode=forward_mode: jnp.sum(
                    rows * jnp.sin(nll_of(name, z, ids, forward_mode))
                )
            )
            check_grads(loss, (logits,), 2, modes=modes, rtol=1e-6, atol=1e-6)
        batched = jax.vmap(lambda z: nll_of(name, z, ids))(jnp.stack([logits, -logits]))
        one = [nll_of(name, z, ids) for z in (logits, -logits)]
        np.testing.assert_allclose(batched, jnp.stack(one), rtol=1e-12)


# Poly-1 (Leng et al. 2022, equation 5): nll + 1 - p_y.
def poly_1(coefficients: Any, terms: Any, example: Any) -> Any:
    return terms.nll - jnp.expm1(-terms.nll)


@pytest.mark.without_llvm_passes
def test_a_loss_of_one_line_works_on_logits_and_fused_in_every_mode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_combine, "_unweighted", poly_1)
    jax.clear_caches()  # or losses that are compiled would be taken as they are
    rng = np.random.default_rng(0)
    hidden, kernel = rng.normal(size=(6, 5)), rng.normal(size=(5, 7))
    ids = rng.integers(7, size=6)
    z = hidden @ kernel
    p = np.exp(oracle.loss(z, ids) * -1)
    exact = oracle.loss(z, ids) + 1 - p
    with jax.enable_x64(True):
        h, w = jnp.asarray(hidden), jnp.asarray(kernel)

        def on_logits(h: Any, w: Any) -> Any:
            call = jl.softmax_cross_entropy_with_integer_labels
            return call(h @ w, ids, reduction="sum", forward_mode=True)

        losses = {"logits": on_logits}
        for strategy in ("dense", "tokens", "recompute", "vocab"):
            losses[strategy] = lambda h, w, strategy=strategy: (
                jl.linear_softmax_cross_entropy(
                    h, w, ids, reduction="sum", strategy=strategy, workspace_bytes=200
                )
            )
        for name, loss in losses.items():
            np.testing.assert_allclose(loss(h, w), exact.sum(), rtol=1e-12)
            modes = ("fwd", "rev") if name == "logits" else ("rev",)
            check_grads(jax.jit(loss), (h, w), 1, modes=modes, rtol=1e-6, atol=1e-6)
    jax.clear_caches()
