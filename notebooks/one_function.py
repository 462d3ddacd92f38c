# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Why softmax and cross-entropy are one function
#
# The loss of one example is minus the logarithm of the probability of the right
# class $y$:
#
# $$-\log \mathrm{softmax}(z)_y
#   = -\log \frac{e^{z_y}}{\sum_j e^{z_j}}
#   = \log \sum_j e^{z_j} - z_y$$
#
# The left side, computed as it is written, takes an exponential and then undoes it
# with a logarithm. In between, the number may be too large for float32, too small, or
# too close to one. The right side subtracts two numbers that are nearly equal when the
# model is sure. Below are four ways to write it, for two classes of which the first is
# right:
#
# - `naive` is the formula as it stands,
# - `epsilon` is the usual repair, a small number inside the logarithm,
# - `log_softmax` is the right side, as most libraries have it,
# - `jaxlosses` leaves the right class out of the sum: with $r$ the largest other logit,
#   the loss is $\log(1 + \sum_{j \ne y} e^{z_j - r} \cdot e^{r - z_y})$, in which
#   nothing cancels.

# %%
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import jaxlosses as jl

QUICK = "--quick" in sys.argv[1:]


def naive(logits, label):
    exponentials = jnp.exp(logits)
    return -jnp.log(exponentials / exponentials.sum())[label]


def epsilon(logits, label):
    return -jnp.log(jax.nn.softmax(logits) + 1e-8)[label]


def log_softmax(logits, label):
    return -jax.nn.log_softmax(logits)[label]


WAYS = {
    "naive": naive,
    "epsilon": epsilon,
    "log_softmax": log_softmax,
    "jaxlosses": jl.softmax_cross_entropy_with_integer_labels,
}

# %% [markdown]
# ## On one axis
#
# The margin is how far the right class leads: negative for a model that is wrong,
# large for one that is sure. The exact value is computed in float64 from formulas that
# do not cancel. Plotted is the relative error of the loss and of its gradient at the
# right class, in float32; an error of 1 means that nothing is right, and points at the
# top are infinite or NaN.

# %%
margins = np.linspace(-110, 80, 381).astype(np.float32)
rows = np.stack([margins, np.zeros_like(margins)], axis=-1)
wide = margins.astype(np.float64)
exact = {
    "loss": np.logaddexp(0, -wide),
    "gradient": -1 / (1 + np.exp(wide)),
}
errors = {}
for name, loss in WAYS.items():
    values, gradients = jax.vmap(jax.value_and_grad(loss), (0, None))(rows, 0)
    found = {"loss": values, "gradient": gradients[:, 0]}
    errors[name] = {
        quantity: abs(np.asarray(found[quantity], np.float64) / exact[quantity] - 1)
        for quantity in exact
    }

GREY = "#7a7a7a"
COLOURS = dict(zip(WAYS, ("#dc2626", "#d97706", "#a855f7", "#3b82f6"), strict=True))
folder = Path(__file__).parent if "__file__" in globals() else Path()
STYLE = folder / "page.mplstyle"
TOP, BOTTOM = 10.0, 3e-9
with plt.style.context(STYLE):
    figure, panels = plt.subplots(
        1, 2, figsize=(9, 3.6), sharey=True, layout="constrained"
    )
    for panel, quantity in zip(panels, exact, strict=True):
        for name in WAYS:
            error = np.nan_to_num(errors[name][quantity], nan=TOP, posinf=TOP)
            shown = np.clip(error, BOTTOM, TOP)
            panel.semilogy(margins, shown, ".", color=COLOURS[name], markersize=3)
            panel.plot([], [], ".", color=COLOURS[name], markersize=8, label=name)
        panel.set(title=f"error of the {quantity}", xlabel="margin in nats")
    panels[0].set(ylabel="relative error")
    panels[1].legend()
plt.show()

for quantity in exact:
    worst = {name: np.nanmax(errors[name][quantity]) for name in WAYS}
    print(f"{quantity:>8}", *(f"{name} {worst[name]:.1e}" for name in WAYS), sep="  ")
    assert worst["jaxlosses"] < 1e-6

# %% [markdown]
# `naive` is NaN or infinite as soon as an exponential overflows or vanishes: for the
# examples that most need to be learned, and, with large logits, for any others. One
# such row makes the mean of the batch NaN, and after the next update every parameter.
#
# `epsilon` hides that. Its loss stops at 18.4 however wrong the model is, and there its
# gradient is zero: the worst examples of the training set are the ones it does not
# learn from. A sure and right answer gets a loss below zero.
#
# `log_softmax` is right for wrong answers, and loses a digit with every two nats of
# margin until, from 17 on, loss and gradient are exactly zero.

# %%
(sure,) = rows[margins == 20]
assert jnp.isinf(naive(jnp.array([0.0, 100.0]), 0))
assert jnp.isnan(naive(jnp.array([100.0, 99.0]), 0))
assert jax.grad(epsilon)(jnp.array([0.0, 100.0]), 0)[0] == 0
assert epsilon(sure, 0) <= 0
assert log_softmax(sure, 0) == 0
loss = jl.softmax_cross_entropy_with_integer_labels(sure, 0)
print(f"a margin of 20 nats: {loss:.8g}, exactly {np.logaddexp(0, -20.0):.8g}")

# %% [markdown]
# ## What it does to a training
#
# Often nothing. In float32, on ordinary data, what is left to learn from a row of 17
# nats is little, and the test accuracy is the same. A better loss is an uncorrupted
# gradient, not a better model.
#
# It matters where the logits have 16 bits, as the logits of a mixed-precision model
# often have. A loss that stays in their dtype has two or three digits, and a gradient
# of zero from a margin of 5 nats on. Here the same small network learns handwritten
# digits by gradient descent, with bfloat16 logits and with float32 ones. The plot is
# the exact loss of the training set in float64, whatever was trained on.

# %%
data = load_digits()
images = jnp.asarray(data.data / 16, jnp.float32)
classes = jnp.asarray(data.target)
STEPS = 200 if QUICK else 8000
LOSSES = {
    "Optax, bfloat16": (
        optax.softmax_cross_entropy_with_integer_labels,
        jnp.bfloat16,
    ),
    "jaxlosses, bfloat16": (
        jl.softmax_cross_entropy_with_integer_labels,
        jnp.bfloat16,
    ),
    "jaxlosses, float32": (
        jl.softmax_cross_entropy_with_integer_labels,
        jnp.float32,
    ),
}


def initial():
    keys = jax.random.split(jax.random.key(0))
    return {
        "in": jax.random.normal(keys[0], (64, 64)) / 8,
        "out": jax.random.normal(keys[1], (64, 10)) / 8,
    }


def model(weights, dtype):
    hidden = jax.nn.relu(images @ weights["in"])
    return (hidden @ weights["out"]).astype(dtype)


def train(loss, dtype):
    def mean(weights):
        return loss(model(weights, dtype), classes).astype(jnp.float32).mean()

    descent = optax.sgd(0.1, momentum=0.9)

    @jax.jit
    def steps(state):
        def step(state, _):
            weights, moments = state
            updates, moments = descent.update(jax.grad(mean)(weights), moments)
            return (optax.apply_updates(weights, updates), moments), None

        return jax.lax.scan(step, state, length=STEPS // 20)[0]

    weights = initial()
    state, curve = (weights, descent.init(weights)), []
    for _ in range(20):
        state = steps(state)
        curve.append(exact_loss(state[0]))
    return state[0], curve


def exact_loss(weights):
    logits = np.asarray(model(weights, jnp.float32), np.float64)
    behind = logits - np.take_along_axis(logits, np.asarray(classes)[:, None], -1)
    np.put_along_axis(behind, np.asarray(classes)[:, None], -np.inf, -1)
    return np.log1p(np.exp(behind).sum(-1)).mean()


curves = {}
for name, (loss, dtype) in LOSSES.items():
    weights, curves[name] = train(loss, dtype)
    right = jnp.mean(model(weights, jnp.float32).argmax(-1) == classes)
    norm = optax.global_norm(weights)
    print(f"{name:>20}: loss {curves[name][-1]:.2e}, {right:.2%}, norm {norm:.1f}")
if not QUICK:
    ends = [curve[-1] for curve in curves.values()]
    assert ends[1] < 1.5 * ends[2] < ends[0]

with plt.style.context(STYLE):
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    at = np.arange(1, 21) * STEPS // 20
    colours = ("#d97706", "#3b82f6", GREY)
    for (name, curve), colour in zip(curves.items(), colours, strict=True):
        dashes = "--" if colour == GREY else "-"
        axes.semilogy(at, curve, dashes, color=colour, label=name)
    axes.set(xlabel="step", ylabel="exact training loss in nats")
    axes.legend()
plt.show()

# %% [markdown]
# [A classifier](digits.ipynb) trains with the loss, in three ways of writing a model;
# [a loss of your own](your_own.ipynb) shows how to find such faults in any other.
