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
# # Logits and softmax
#
# The documentation of a classifier says that it returns logits. What are they, what
# does softmax do to them, and what does the loss want?
#
# **Logits are unscaled scores**, one per class, as the last layer computes them. They
# can be negative and need not sum to anything. **Softmax turns them into
# probabilities**: it takes the exponential of each and divides by the sum. **The loss
# wants the logits**, not the probabilities: it combines softmax and cross-entropy in
# one step.

# %%
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import jaxlosses as jl

logits = jnp.array([0.1, 0.3, 0.5, 0.9])
probabilities = jl.softmax(logits)
expected = np.array([0.16838508, 0.205666, 0.25120102, 0.37474789])
np.testing.assert_allclose(probabilities, expected, rtol=1e-6)
print("logits       ", logits)
print("probabilities", probabilities)
print("their sum    ", probabilities.sum())

# %% [markdown]
# ## Only differences matter
#
# The exponential of `z + c` is that of `z` times a constant, which the division takes
# out again. So a number added to all logits changes nothing, and a factor changes how
# sure the distribution is: from even, at 0, to all for the largest.

# %%
np.testing.assert_allclose(jl.softmax(logits + 3), probabilities, rtol=1e-6)

GREY, BLUE, ORANGE, GREEN = "#7a7a7a", "#3b82f6", "#d97706", "#16a34a"
folder = Path(__file__).parent if "__file__" in globals() else Path()
STYLE = folder / "page.mplstyle"
with plt.style.context(STYLE):
    figure, axes = plt.subplots(1, 4, figsize=(9, 2.6), layout="constrained")
    axes[0].bar(range(4), logits, color=GREY)
    axes[0].set(title="logits", xticks=range(4))
    for panel, factor in zip(axes[1:], (1, 4, 16), strict=True):
        panel.bar(range(4), jl.softmax(factor * logits), color=BLUE)
        panel.set(title=f"softmax of {factor} × logits", xticks=range(4), ylim=(0, 1))
    figure.supxlabel("class", color=GREY)
plt.show()

# %% [markdown]
# ## The loss: one number per example
#
# Cross-entropy is minus the logarithm of the probability that the model gave to the
# right class. It is measured in nats: 0 for a model that is right and certain, the
# logarithm of the number of classes for one that does not know.

# %%
labels = jnp.arange(4)  # as if each class in turn were the right one
batch = jnp.tile(logits, (4, 1))
losses = jl.softmax_cross_entropy_with_integer_labels(batch, labels)
np.testing.assert_allclose(losses, -np.log(expected), rtol=1e-6)
for label, loss in zip(labels, losses, strict=True):
    print(f"right class {label}: probability {expected[label]:.4f}, loss {loss:.4f}")

# %% [markdown]
# ## Its gradient: what the model said, less what is right
#
# The derivative of the loss by the logits is `p - q`: the probabilities, less the
# distribution of the label. The right class is pulled up, the others are pushed down
# by as much as they were believed, and the entries sum to 0.

# %%
gradient = jax.grad(jl.softmax_cross_entropy_with_integer_labels)(logits, 1)
q = jax.nn.one_hot(1, 4)
np.testing.assert_allclose(gradient, probabilities - q, rtol=1e-5)
np.testing.assert_allclose(gradient.sum(), 0, atol=1e-6)

with plt.style.context(STYLE):
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.6), layout="constrained")
    pictures = {"p": (probabilities, BLUE), "q, class 1 is right": (q, GREEN)}
    pictures["gradient: p - q"] = (gradient, ORANGE)
    for panel, (title, (values, colour)) in zip(axes, pictures.items(), strict=True):
        panel.bar(range(4), values, color=colour)
        panel.axhline(0, color=GREY, linewidth=1)
        panel.set(title=title, xticks=range(4), ylim=(-1, 1.05))
    figure.supxlabel("class", color=GREY)
plt.show()

# %% [markdown]
# ## Dense labels, and integer labels
#
# Cross-entropy compares two distributions. When each example has exactly one class, its
# distribution is a row of zeros with a single one. That array is as large as the logits
# and says nothing that the position of the one does not say. So there are two
# functions. `softmax_cross_entropy` takes distributions, for labels that are soft,
# smoothed or mixed. `softmax_cross_entropy_with_integer_labels` takes positions, and
# spares the one-hot array.

# %%
from_distributions = jl.softmax_cross_entropy(batch, jax.nn.one_hot(labels, 4))
np.testing.assert_allclose(from_distributions, losses, rtol=1e-6)
print("from distributions", from_distributions)
print("from class ids    ", losses)

mixed = jnp.array([0.5, 0.0, 0.0, 0.5])  # half of the people said 0, the others 3
print("from a mixture    ", jl.softmax_cross_entropy(logits, mixed))

# %% [markdown]
# [Why one function](one_function.ipynb) goes on: what is lost where the two steps are
# taken one after the other.
