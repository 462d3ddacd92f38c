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
# # Check a loss of your own
#
# `jl.testing.check_loss` compares a loss and each of its gradients with what they
# should be: with the same function in float64, with finite differences along random
# directions, and forward mode with reverse mode. It works for any loss, whoever wrote
# it. Here it finds three faults that were planted, all of which somebody shipped.

# %%
import jax
import jax.numpy as jnp

import jaxlosses as jl
from jaxlosses.testing import check_loss

# %% [markdown]
# ## A loss that is right
#
# With no arguments given, it gets logits of shape `(6, 11)` and integer labels. The
# scales are what the logits are multiplied by: ordinary rows, confident ones, extreme
# ones. `strict=True` asks for a small error relative to each entry alone, so it holds
# only for a loss that keeps its digits where the model is sure.

# %%
checks = check_loss(jl.softmax_cross_entropy_with_integer_labels, strict=True)
print(len(checks), "comparisons hold")


# %%
def find(loss, *args, **how):
    """What `check_loss` says of a loss in which it has to find something."""
    try:
        check_loss(loss, *args, **how)
    except AssertionError as error:
        print(error)
    else:
        raise SystemExit("nothing was found")


# %% [markdown]
# ## Fault 1: a cap without its derivative
#
# A soft cap `c tanh(z / c)` has the derivative `1 - tanh²`. A rule that is written by
# hand forgets it easily; the loss is right, and it even trains. Finite differences
# know nothing of the rule.


# %%
@jax.custom_vjp
def capped(logits, labels):
    z = 5 * jnp.tanh(logits / 5)
    return jl.softmax_cross_entropy_with_integer_labels(z, labels)


def capped_fwd(logits, labels):
    return capped(logits, labels), (logits, labels)


def capped_bwd(kept, g):
    logits, labels = kept
    z = 5 * jnp.tanh(logits / 5)
    one_hot = jax.nn.one_hot(labels, z.shape[-1], dtype=z.dtype)
    return g[..., None] * (jax.nn.softmax(z) - one_hot), None


capped.defvjp(capped_fwd, capped_bwd)
find(capped, scales=(1.0, 10.0))

# %% [markdown]
# ## Fault 2: a padding block that joins the sum
#
# Classes that do not fill the last block are filled up with zeros, and a zero is a
# logit like any other. The function agrees with itself in every dtype and its gradient
# is that of the wrong value, so it takes a `reference` to see it.


# %%
def padded(logits, labels):
    z = jnp.pad(logits, ((0, 0), (0, -logits.shape[-1] % 8)))
    return jl.softmax_cross_entropy_with_integer_labels(z, labels)


check_loss(padded)  # alone it is a fine function
find(padded, reference=jl.softmax_cross_entropy_with_integer_labels)


# %% [markdown]
# ## Fault 3: a sum of 16 bits
#
# In float32 nothing is wrong. In bfloat16 each of 300 additions rounds to two or three
# digits, and the errors add up.


# %%
def narrow(logits, labels):
    z = logits - logits.max(-1, keepdims=True)

    def add(total, column):
        return total + jnp.exp(column), None

    total, _ = jax.lax.scan(add, jnp.zeros_like(z[:, 0]), z.T)
    return jnp.log(total) - jnp.take_along_axis(z, labels[:, None], -1)[:, 0]


logits, labels = jax.random.normal(jax.random.key(0), (6, 300)), jnp.arange(6)
check_loss(narrow, logits, labels, dtypes=("float32",), scales=(1.0,))
find(narrow, logits, labels, dtypes=("bfloat16",), scales=(1.0,))

# %% [markdown]
# `check_labels` is for the data: it names the first label that is no class.

# %%
try:
    jl.testing.check_labels(jnp.array([[2, 0], [11, 1]]), num_classes=11)
except ValueError as error:
    print(error)
