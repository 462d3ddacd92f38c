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
# # A classifier of handwritten digits
#
# A small network learns to read digits, with the loss imported on one line. This is a
# script and a notebook at once: `make demo` runs it.
#
# The network returns *logits*: unscaled scores, one per class.
# [Softmax](logits.ipynb) would turn them into probabilities. The loss does not want
# them: it combines softmax and cross-entropy in one step, [for good
# reasons](one_function.ipynb).

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

# %%
probabilities = jl.softmax(jnp.array([0.1, 0.3, 0.5, 0.9]))
expected = np.array([0.16838508, 0.205666, 0.25120102, 0.37474789])
np.testing.assert_allclose(probabilities, expected, rtol=1e-6)
print("softmax of [0.1, 0.3, 0.5, 0.9]:", probabilities)

# %% [markdown]
# ## The data
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
BLUE, ORANGE = "#3b82f6", "#d97706"
folder = Path(__file__).parent if "__file__" in globals() else Path()
with plt.style.context(folder / "page.mplstyle"):
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    epochs = range(1, EPOCHS + 1)
    axes.plot(epochs, train_losses, color=BLUE, label="training")
    axes.plot(epochs, test_losses, color=ORANGE, label="test")
    axes.set(xlabel="epoch", ylabel="cross-entropy in nats", yscale="log")
    axes.legend()

    path = folder / "figures" / "digits_loss.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
print("saved", path.relative_to(folder))
