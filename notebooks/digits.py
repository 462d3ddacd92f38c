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
# # Logits, softmax and the loss between them
#
# Sooner or later everybody who trains a classifier asks the same three questions:
#
# - The documentation says `logits`. What are they?
# - What does softmax do to them?
# - Why is there one function called `softmax` and another called
#   `softmax_cross_entropy`, when the second seems to contain the first?
#
# jaxlosses was written to answer them, and to compute the loss without losing
# digits. This page answers them in that order, then trains a classifier of
# handwritten digits. It is a script and a notebook at once: `make demo` runs it.

# %%
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import jaxlosses as jl

# %% [markdown]
# ## Logits
#
# The last layer of a classifier gives one number per class. The numbers can be
# negative, they need not sum to one, and only their differences matter: adding the
# same amount to all of them changes nothing. These unscaled scores are the *logits*.
#
# Softmax turns logits into probabilities. It takes the exponential of each, which
# makes it positive, and divides by the sum, which makes them sum to one. The order
# of the classes stays the same.

# %%
logits = jnp.array([0.1, 0.3, 0.5, 0.9])
probabilities = jl.softmax(logits)
expected = np.array([0.16838508, 0.205666, 0.25120102, 0.37474789])
np.testing.assert_allclose(probabilities, expected, rtol=1e-6)

print("logits       ", logits)
print("probabilities", probabilities)
print("their sum    ", probabilities.sum())

# %% [markdown]
# ## Why softmax and cross-entropy are one function
#
# The loss of one example is minus the logarithm of the probability that the model
# gave to the right class $y$:
#
# $$-\log \mathrm{softmax}(z)_y
#   = -\log \frac{e^{z_y}}{\sum_j e^{z_j}}
#   = \log \sum_j e^{z_j} - z_y$$
#
# The left side, computed as it is written, takes an exponential and then undoes it
# with a logarithm. In between, the number may be too large for float32, or too
# small, or too close to one. Nothing of the kind has to happen, since the result is
# about as large as the logits themselves. So one function takes the logits and
# returns the loss, and the probabilities never exist.
#
# Below are three ways to write it, for two classes of which the first is right:
#
# - `naive` is the formula as it stands.
# - `epsilon` is the usual repair, a small number inside the logarithm.
# - `jaxlosses` gets the logits.
#
# The exact values are computed in float64 from formulas that do not cancel.


# %%
def naive(logits, label):
    exponentials = jnp.exp(logits)
    return -jnp.log(exponentials / exponentials.sum())[label]


def epsilon(logits, label):
    return -jnp.log(jax.nn.softmax(logits) + 1e-8)[label]


rows = np.array(
    [
        [0, 100],  # wrong by far
        [0, 30],  # wrong
        [1, 0],  # nearly undecided
        [100, 99],  # the same, with large logits
        [20, 0],  # right and confident
        [40, 0],  # right by far
    ],
    np.float32,
)
margin = rows[:, 0].astype(np.float64) - rows[:, 1]
exact = {
    "loss": np.logaddexp(0, -margin),
    "gradient at the right class": -1 / (1 + np.exp(margin)),
}

columns = {}
for loss in (naive, epsilon, jl.softmax_cross_entropy_with_integer_labels):
    values, gradients = jax.vmap(jax.value_and_grad(loss), (0, None))(rows, 0)
    columns[loss.__name__] = dict(zip(exact, (values, gradients[:, 0]), strict=True))
columns["jaxlosses"] = columns.pop("softmax_cross_entropy_with_integer_labels")
columns["exact"] = exact

for quantity in exact:
    print(f"\n{quantity}\n{'logits':>12}", *(f"{name:>11}" for name in columns))
    for i, row in enumerate(rows):
        cells = (f"{column[quantity][i] + 0.0:11.3g}" for column in columns.values())
        print(f"{row[0]:5.0f}, {row[1]:5.0f}", *cells)

for quantity, value in exact.items():
    np.testing.assert_allclose(columns["jaxlosses"][quantity], value, rtol=1e-5)
assert np.isinf(columns["naive"]["loss"][0])
assert np.isnan(columns["naive"]["loss"][3])
assert abs(columns["epsilon"]["loss"][0] + np.log(1e-8)) < 1e-3
assert columns["epsilon"]["gradient at the right class"][0] == 0

# %% [markdown]
# `naive` is infinite for the examples that most need to be learned, and NaN as soon
# as a logit exceeds 88, however harmless the example. One such row makes the mean of
# the batch NaN, and after the next update every parameter.
#
# `epsilon` hides that. Its loss stops at 18.4 however wrong the model is, and there
# the gradient is zero: the worst examples of the training set are the ones it does
# not learn from.
#
# Both return zero for a confident right answer. The exact loss is small, not zero,
# and so is its gradient.

# %% [markdown]
# ## One class per example: integer labels
#
# Cross-entropy is defined between two distributions. When each example belongs to
# exactly one class, its label distribution is a row of zeros with a single one. The
# array of such rows is as large as the logits and says nothing that the position of
# the one does not say. `softmax_cross_entropy_with_integer_labels` takes the
# position. `softmax_cross_entropy` takes the distribution, for labels that are
# soft, smoothed or mixed.

# %%
batch = jnp.array([[0.1, 0.3, 0.5, 0.9], [2.0, -1.0, 0.0, 1.0]])
classes = jnp.array([3, 0])

from_distributions = jl.softmax_cross_entropy(batch, jax.nn.one_hot(classes, 4))
from_classes = jl.softmax_cross_entropy_with_integer_labels(batch, classes)
np.testing.assert_allclose(from_distributions, from_classes, rtol=1e-6)

print("from distributions", from_distributions)
print("from class ids    ", from_classes)

# %% [markdown]
# ## Handwritten digits
#
# The data set is scikit-learn's: 1797 scans of handwritten digits, 8 by 8 pixels of
# 16 grey levels each. A fifth of them is set aside to test on.

# %%
QUICK = "--quick" in sys.argv[1:]
EPOCHS = 2 if QUICK else 30
BATCH = 32

digits = load_digits()
train_images, test_images, train_labels, test_labels = train_test_split(
    (digits.images[..., None] / 16).astype(np.float32),
    digits.target.astype(np.int32),
    test_size=0.2,
    random_state=0,
    stratify=digits.target,
)
print("train", train_images.shape, "test", test_images.shape)


# %% [markdown]
# The model is a small convolutional network in Flax NNX. It ends in a linear layer
# without softmax: it returns logits.


# %%
class Classifier(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.convolution = nnx.Conv(1, 32, kernel_size=(3, 3), rngs=rngs)
        self.hidden = nnx.Linear(4 * 4 * 32, 128, rngs=rngs)
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, images):
        features = nnx.relu(self.convolution(images))
        features = nnx.max_pool(features, window_shape=(2, 2), strides=(2, 2))
        features = features.reshape(len(features), -1)
        return self.head(nnx.relu(self.hidden(features)))


# %% [markdown]
# The loss is imported on one line. To train with the loss of Optax, write `optax`
# for `jaxlosses` in it and change nothing else.

# %%
from jaxlosses import softmax_cross_entropy_with_integer_labels as cross_entropy

# %%
model = Classifier(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)


@nnx.jit
def train_step(model, optimizer, images, labels):
    def mean_loss(model):
        return cross_entropy(model(images), labels).mean()

    loss, gradients = nnx.value_and_grad(mean_loss)(model)
    optimizer.update(model, gradients)
    return loss


@nnx.jit
def evaluate(model, images, labels):
    logits = model(images)
    accuracy = (logits.argmax(-1) == labels).mean()
    return cross_entropy(logits, labels).mean(), accuracy


# %%
shuffle = np.random.default_rng(0)
train_losses, test_losses = [], []

for _ in (progress := tqdm(range(EPOCHS), desc="epochs", ncols=79)):
    order = shuffle.permutation(len(train_labels))
    # The last batch would be smaller and compile the step once more.
    batches = order[: len(order) // BATCH * BATCH].reshape(-1, BATCH)
    losses = [
        train_step(model, optimizer, train_images[batch], train_labels[batch])
        for batch in batches
    ]
    test_loss, accuracy = evaluate(model, test_images, test_labels)
    train_losses.append(float(jnp.stack(losses).mean()))
    test_losses.append(float(test_loss))
    progress.set_postfix_str(f"loss {train_losses[-1]:.4f}, test {accuracy:.1%}")

# %%
print(f"training loss {train_losses[-1]:.4g}, test loss {test_losses[-1]:.4g}")
print(f"test accuracy {accuracy:.2%}")
if not QUICK and not accuracy >= 0.97:
    raise SystemExit("The test accuracy should be at least 97 %.")

# %% [markdown]
# ## Confident rows
#
# A trained classifier is sure of most training examples. The textbook formula
# `logsumexp(z) - z[y]` subtracts two numbers that are then almost equal. Where the
# difference is below the last digit of the logits, the result is zero, or noise.
# Both formulas below get the same float32 logits. The exact value is computed from
# them in float64.

# %%
logits = jax.jit(lambda model: model(train_images))(model)
at_label = jnp.take_along_axis(logits, train_labels[:, None], axis=-1)[:, 0]
textbook = jax.nn.logsumexp(logits, axis=-1) - at_label
ours = jl.softmax_cross_entropy_with_integer_labels(logits, train_labels)

wide = np.asarray(logits, np.float64)
wide -= np.take_along_axis(wide, train_labels[:, None], axis=-1)
others = np.arange(wide.shape[-1]) != train_labels[:, None]
true = np.log1p(np.exp(wide).sum(-1, where=others))

for name, loss in {"textbook": textbook, "jaxlosses": ours}.items():
    error = np.abs(loss - true) / true
    print(
        f"{name:>9}: {np.sum(loss == 0):4d} of {len(true)} losses are zero,"
        f" median relative error {np.median(error):.1e}, largest {error.max():.1e}"
    )
assert np.max(np.abs(ours - true) / true) < 1e-5

# %% [markdown]
# ## The loss over time
#
# The figure has no background of its own and mid-grey text, so that it can be read
# on a light page and on a dark one.

# %%
GREY, BLUE, ORANGE = "#7a7a7a", "#3b82f6", "#d97706"
style = {
    "axes.edgecolor": GREY,
    "axes.facecolor": "none",
    "axes.labelcolor": GREY,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "font.size": 11,
    "legend.frameon": False,
    "legend.labelcolor": GREY,
    "savefig.facecolor": "none",
    "text.color": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
}
with plt.rc_context(style):
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    epochs = range(1, EPOCHS + 1)
    axes.plot(epochs, train_losses, color=BLUE, linewidth=2, label="training")
    axes.plot(epochs, test_losses, color=ORANGE, linewidth=2, label="test")
    axes.set(xlabel="epoch", ylabel="cross-entropy in nats", yscale="log")
    axes.grid(color=GREY, alpha=0.25)
    axes.legend()

    folder = Path(__file__).parent if "__file__" in globals() else Path()
    path = folder / "figures" / "digits_loss.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
print("saved", path.relative_to(folder))
