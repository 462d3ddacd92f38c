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
# # One loss, three ways to write a model
#
# The loss takes logits and labels, and does not care who made them. Here the same
# network learns handwritten digits in Flax NNX, in Flax Linen and in plain JAX. Each
# step sees its batch in four parts, one after the other, as is done where a batch does
# not fit: the gradients are summed up and applied once.
#
# Some labels are missing: they are -100. The parts have different numbers of labels, so
# the mean of their means is not the mean of the batch. `normalizer` is what the loss
# of every part divides by: the number of labels of the whole batch.

# %%
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx
from sklearn.datasets import load_digits

import jaxlosses as jl

QUICK = "--quick" in sys.argv[1:]
STEPS = 20 if QUICK else 300
PARTS, ROWS, MISSING = 4, 32, -100

data = load_digits()
rng = np.random.default_rng(0)
order = rng.permutation(len(data.target))
images = (data.data[order] / 16).astype(np.float32)
classes = data.target[order].astype(np.int32)
train = slice(0, 1400)
test = slice(1400, None)
given = np.where(rng.random(1400) < 0.3, MISSING, classes[train]).astype(np.int32)
print(f"{np.mean(given == MISSING):.0%} of the labels are missing")


def batch(step):
    rows = np.random.default_rng(step).choice(1400, PARTS * ROWS, replace=False)
    return (
        images[train][rows].reshape(PARTS, ROWS, -1),
        given[rows].reshape(PARTS, ROWS),
    )


def loss_of_part(logits, labels, all_labels):
    return jl.softmax_cross_entropy_with_integer_labels(
        logits,
        labels,
        ignore_index=MISSING,
        reduction="mean",
        normalizer=jnp.sum(all_labels != MISSING),
    )


# %% [markdown]
# ## Plain JAX
#
# The parameters are a dictionary, the model a function. `scan` goes through the parts.


# %%
def initial():
    keys = jax.random.split(jax.random.key(0))
    return {
        "hidden": {
            "kernel": jax.random.normal(keys[0], (64, 64)) / 8,
            "bias": jnp.zeros(64),
        },
        "head": {
            "kernel": jax.random.normal(keys[1], (64, 10)) / 8,
            "bias": jnp.zeros(10),
        },
    }


def apply(parameters, images):
    hidden, head = parameters["hidden"], parameters["head"]
    features = jax.nn.relu(images @ hidden["kernel"] + hidden["bias"])
    return features @ head["kernel"] + head["bias"]


def accumulated(apply, parameters, images, labels):
    """Loss and gradient of a batch, a part at a time."""

    def add(so_far, part):
        def loss(parameters):
            return loss_of_part(apply(parameters, part[0]), part[1], labels)

        return jax.tree.map(jnp.add, so_far, jax.value_and_grad(loss)(parameters)), None

    zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, parameters)
    return jax.lax.scan(add, zeros, (images, labels))[0]


adam = optax.adam(2e-3)


def new_step(apply):
    @jax.jit
    def step(parameters, state, images, labels):
        loss, gradient = accumulated(apply, parameters, images, labels)
        updates, state = adam.update(gradient, state)
        return optax.apply_updates(parameters, updates), state, loss

    return step


# The parts add up to the batch.
parts = batch(0)
whole = [a.reshape(1, PARTS * ROWS, *a.shape[2:]) for a in parts]
for a, b in zip(
    *(jax.tree.leaves(accumulated(apply, initial(), *b)) for b in (parts, whole)),
    strict=True,
):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)

parameters = initial()
state, plain = adam.init(parameters), []
train_step = new_step(apply)
for step in range(STEPS):
    parameters, state, loss = train_step(parameters, state, *batch(step))
    plain.append(float(loss))
right = np.mean(np.argmax(apply(parameters, images[test]), -1) == classes[test])
print(f"plain JAX  loss {plain[-1]:.4f}, right {right:.1%}")

# %% [markdown]
# ## Flax Linen
#
# A Linen module has its parameters outside: the step above takes it as it is.


# %%
class Linen(linen.Module):
    @linen.compact
    def __call__(self, images):
        features = linen.relu(linen.Dense(64, name="hidden")(images))
        return linen.Dense(10, name="head")(features)


module = Linen()
parameters = initial()
state, of_linen = adam.init(parameters), []
train_step = new_step(
    lambda parameters, images: module.apply({"params": parameters}, images)
)
for step in range(STEPS):
    parameters, state, loss = train_step(parameters, state, *batch(step))
    of_linen.append(float(loss))
print(f"Linen      loss {of_linen[-1]:.4f}")
np.testing.assert_allclose(of_linen, plain, rtol=1e-3)

# %% [markdown]
# ## Flax NNX
#
# An NNX module holds its parameters. `nnx.split` takes them out for the `scan`, and the
# optimizer updates them in place.


# %%
class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 64, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, images):
        return self.head(nnx.relu(self.hidden(images)))


model = Nnx(nnx.Rngs(0))
for name, of_layer in initial().items():
    layer = getattr(model, name)
    layer.kernel[...], layer.bias[...] = of_layer["kernel"], of_layer["bias"]
optimizer = nnx.Optimizer(model, adam, wrt=nnx.Param)


@nnx.jit
def nnx_step(model, optimizer, images, labels):
    graph, parameters = nnx.split(model)
    loss, gradient = accumulated(
        lambda parameters, images: nnx.merge(graph, parameters)(images),
        parameters,
        images,
        labels,
    )
    optimizer.update(model, gradient)
    return loss


of_nnx = [float(nnx_step(model, optimizer, *batch(step))) for step in range(STEPS)]
print(f"NNX        loss {of_nnx[-1]:.4f}")
np.testing.assert_allclose(of_nnx, plain, rtol=1e-3)
assert QUICK or right > 0.9
