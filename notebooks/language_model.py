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
# # A language model, without its logits
#
# A language model classifies each position of a text: the classes are the tokens
# that could come next. There are many of them, so the last layer is the widest.
# Here 1024 positions with 16384 classes each make 67 MB of float32 logits per
# step, their gradient another 67 MB, in a model whose parameters take 12 MB.
#
# `linear_softmax_cross_entropy` takes what goes into the last layer instead of what
# comes out. It computes the logits a piece at a time, and the loss and gradients of
# a piece before the next one. This page trains a small transformer with it and
# checks that nothing else changes:
#
# - The loss curve is the one that all logits at once would give.
# - The step needs less memory.
#
# The text is the source of Python's standard library, which every machine that runs
# this has; [corpus.py](corpus.py) reads it. The last section uses the same function
# for a contrastive loss.

# %%
import sys
from pathlib import Path

import corpus
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from corpus import IGNORED
from flax import nnx
from tqdm import tqdm
from transformer import Transformer

import jaxlosses as jl

QUICK = "--quick" in sys.argv[1:]
VOCABULARY = 2048 if QUICK else 16384
CONTEXT = 64 if QUICK else 256
BATCH = 4
LAYERS, WIDTH, HEADS = (2, 64, 2) if QUICK else (4, 128, 4)
STEPS = 150 if QUICK else 480
COMPARED_STEPS = 20

# %% [markdown]
# ## The text
#
# A checksum decides which files are held out, and so the split is the same on every
# run, and two copies of a file are on the same side of it. The tables of character
# sets in `encodings` are left out: they resemble each other so much that one in the
# training set gives away another.

# %%
train_texts, test_texts = corpus.read(QUICK)
for name, texts in {"train": train_texts, "held out": test_texts}.items():
    size = sum(len(text.encode()) for text in texts)
    print(f"{name:>8}: {len(texts):4d} files, {size / 1e6:5.2f} MB")

# %% [markdown]
# ## Tokens
#
# Byte-pair encoding starts from the 256 bytes and keeps merging the most frequent
# pair of neighbours into a new token, until the vocabulary is full. It is learned
# from the training files only. Every text can be written in these tokens and read
# back exactly.

# %%
tokenizer = corpus.new_tokenizer(train_texts, VOCABULARY)
example = "def __init__(self, *args, **kwargs):"
encoded = tokenizer.encode(example)
print(" | ".join(tokenizer.decode([token]) for token in encoded.ids))
assert tokenizer.decode(encoded.ids) == example

# %% [markdown]
# A model with longer tokens has fewer of them to predict, and each is harder. The
# loss per token therefore says little. Divided by the bytes of the text, it can be
# compared between vocabularies: *bits per byte* is what the model would need to
# compress the file.
#
# Each file is cut into windows. The last one is filled up with the label -100, and
# `ignore_index=-100` leaves these positions out of the loss. In the byte-level
# alphabet each character of a token stands for one byte.

# %%
bytes_of_token = corpus.bytes_of_tokens(tokenizer)


def bits_per_byte(nats, labels):
    """Of labels whose losses sum to `nats`."""
    return corpus.bits_per_byte(nats, labels, bytes_of_token)


train_inputs, train_labels = corpus.windows(tokenizer, train_texts, CONTEXT)
test_inputs, test_labels = corpus.windows(tokenizer, test_texts, CONTEXT)
counted = test_labels[test_labels != IGNORED]
assert bytes_of_token[counted].sum() == sum(len(text.encode()) for text in test_texts)

# As many as are evaluated in a few seconds, from all over the held-out files.
whole_batches = len(test_labels) // BATCH * BATCH
chosen = np.random.default_rng(0).permutation(whole_batches)[: 32 * BATCH]
test_inputs, test_labels = test_inputs[chosen], test_labels[chosen]
counted = test_labels[test_labels != IGNORED]

print(f"train    {np.sum(train_labels != IGNORED):8d} tokens")
print(
    f"evaluate {len(counted):8d} tokens of"
    f" {bytes_of_token[counted].mean():.2f} bytes on average"
)

# %% [markdown]
# The baseline knows how frequent each token is and nothing about its neighbours.
# Each count is one too high, so that no token is impossible.

# %%
frequencies = np.bincount(train_labels[train_labels != IGNORED], minlength=VOCABULARY)
log_probabilities = np.log((frequencies + 1) / (frequencies + 1).sum())
unigram = bits_per_byte(-log_probabilities[counted].sum(), test_labels)
print(f"unigram baseline: {unigram:.3f} bits per byte")


# %% [markdown]
# ## The model
#
# A transformer with the normalisation in front of each layer, in Flax NNX:
# [transformer.py](transformer.py) has it. Its output layer is *tied*: the table that
# turns a token into a vector also scores the tokens that could come next. The model
# returns the features that go into that last product. The table has one row per
# token, `vd` in the words of `linear_softmax_cross_entropy`, and is used as it is.


# %%
def new_model():
    model = Transformer(
        vocabulary=VOCABULARY,
        context=CONTEXT,
        layers=LAYERS,
        width=WIDTH,
        heads=HEADS,
        rngs=nnx.Rngs(0),
    )
    rate = optax.warmup_cosine_decay_schedule(0, 3e-3, STEPS // 10, STEPS, 1e-4)
    adam = optax.adamw(rate, b2=0.95, weight_decay=0.01)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), adam)
    return model, nnx.Optimizer(model, clipped, wrt=nnx.Param)


parameters = jax.tree.leaves(nnx.state(new_model()[0], nnx.Param))
print(f"{sum(array.size for array in parameters) / 1e6:.2f} million parameters")

# %% [markdown]
# ## Three ways to the same loss
#
# `materialised` multiplies the features by the table and gives the logits to the
# loss. `fused` gives both factors to the loss. `strategy="tokens"` cuts the
# positions into pieces and forms the gradient of a piece while its logits are there.
# It needs three matrix products, as many as `materialised`.
#
# On an accelerator these products should have 16-bit factors, while the parameters
# stay in float32. `in_16_bits` asks for that with `compute_dtype`: each piece of the
# table is rounded when its turn comes, so there is no second table, and the sums of
# the logits and of the gradient stay in float32.


# %%
def materialised(hidden, embedding, labels):
    logits = hidden @ embedding.T
    return jl.softmax_cross_entropy_with_integer_labels(
        logits, labels, ignore_index=IGNORED, reduction="mean"
    )


def fused(hidden, embedding, labels, compute_dtype=None):
    return jl.linear_softmax_cross_entropy(
        hidden,
        embedding,
        labels,
        kernel_layout="vd",
        strategy="tokens",
        compute_dtype=compute_dtype,
        ignore_index=IGNORED,
        reduction="mean",
    )


def in_16_bits(hidden, embedding, labels):
    return fused(hidden, embedding, labels, compute_dtype=jnp.bfloat16)


def make_train_step(loss):
    @nnx.jit
    def train_step(model, optimizer, inputs, labels):
        def mean_loss(model):
            return loss(model(inputs), model.tokens.embedding[...], labels)

        value, gradients = nnx.value_and_grad(mean_loss)(model)
        optimizer.update(model, gradients)
        return value

    return train_step


train_steps = {
    loss.__name__: make_train_step(loss) for loss in (materialised, fused, in_16_bits)
}


batches = corpus.Batches(len(train_labels), BATCH)


def batch(step):
    """The windows of a step."""
    chosen = batches[step]
    return train_inputs[chosen], train_labels[chosen]


# %% [markdown]
# The compiler says how much memory a step needs beside its arguments and results.
# The rest of the model needs memory, too, which is the same in all columns.

# %%
print(f"{'positions':>9} {'logits':>10}", *(f"{name:>15}" for name in train_steps))
for windows_per_step in (BATCH, 8 * BATCH):
    zeros = jnp.zeros((windows_per_step, CONTEXT), jnp.int32)
    megabytes = {
        name: train_step.lower(*new_model(), zeros, zeros)
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        / 1e6
        for name, train_step in train_steps.items()
    }
    logits = zeros.size * VOCABULARY * 4 / 1e6
    columns = (f"{size:12.0f} MB" for size in megabytes.values())
    print(f"{zeros.size:9d} {logits:7.0f} MB", *columns)
    assert QUICK or megabytes["fused"] < megabytes["materialised"]

# %% [markdown]
# ## The same curve
#
# All start from the same parameters and see the same windows. Two of them add the
# same numbers in a different order, and so differ by rounding, which every further
# step carries on. The third rounds the factors to eight bits.

# %%
runs = {name: new_model() for name in train_steps}
model, optimizer = runs["fused"]


@nnx.jit
def sum_of_losses(model, inputs, labels):
    return jl.linear_softmax_cross_entropy(
        model(inputs),
        model.tokens.embedding[...],
        labels,
        kernel_layout="vd",
        ignore_index=IGNORED,
        reduction="sum",
    )


def evaluate(model):
    """Bits per byte of held-out text."""
    nats = sum(
        float(sum_of_losses(model, inputs, labels))
        for inputs, labels in zip(
            test_inputs.reshape(-1, BATCH, CONTEXT),
            test_labels.reshape(-1, BATCH, CONTEXT),
            strict=True,
        )
    )
    return bits_per_byte(nats, test_labels)


held_out = {0: evaluate(model)}
curves = {
    name: [
        float(train_step(*runs[name], *batch(step))) for step in range(COMPARED_STEPS)
    ]
    for name, train_step in train_steps.items()
}
del runs
losses = curves["fused"]

print("step", *(f"{name:>13}" for name in curves))
for step in range(0, COMPARED_STEPS, 5):
    print(f"{step:4d}", *(f"{curve[step]:13.6f}" for curve in curves.values()))
print(f"largest relative difference in {COMPARED_STEPS} steps:")
for name, allowed in {"materialised": 1e-5, "in_16_bits": 1e-3}.items():
    worst = np.max(np.abs(np.array(losses) / np.array(curves[name]) - 1))
    print(f"  to {name:>12}: {worst:.1e}")
    assert worst < allowed

# %% [markdown]
# ## Training
#
# The fused run goes on from there.

# %%
EVALUATE_EVERY = STEPS // 5

steps = range(COMPARED_STEPS, STEPS)
bar = tqdm(steps, "steps", STEPS, initial=COMPARED_STEPS, ncols=79)
for step in bar:
    losses.append(float(train_steps["fused"](model, optimizer, *batch(step))))
    if (step + 1) % EVALUATE_EVERY == 0:
        held_out[step + 1] = evaluate(model)
        bar.set_postfix_str(f"{held_out[step + 1]:.3f} bits per byte")

# %%
print("bits per byte of held-out text")
for step, value in held_out.items():
    print(f"  after {step:3d} steps {value:.3f}")
print(f"  unigrams        {unigram:.3f}")
if not QUICK and not held_out[STEPS] < 0.9 * unigram:
    raise SystemExit("The model should be a tenth better than the unigram baseline.")

# %% [markdown]
# The curves start where every token is about equally likely. They reach the baseline
# when the model knows how frequent each token is. What lies below the dashed line is
# learned from the context. The figure can be read on a light page and on a dark one.

# %%
train_curve = [
    bits_per_byte(nats * np.sum(labels != IGNORED), labels)
    for nats, (_, labels) in zip(losses, map(batch, range(STEPS)), strict=True)
]

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
    axes.plot(
        range(10, STEPS + 1, 10),
        np.reshape(train_curve, (-1, 10)).mean(axis=-1),
        color=BLUE,
        linewidth=2,
        label="training, mean of 10 steps",
    )
    axes.plot(
        list(held_out),
        list(held_out.values()),
        color=ORANGE,
        linewidth=2,
        marker="o",
        label="held-out files",
    )
    axes.axhline(unigram, color=GREY, linestyle="--", label="unigram baseline")
    axes.set(xlabel="step", ylabel="bits per byte", ylim=(0, None))
    axes.grid(color=GREY, alpha=0.25)
    axes.legend()

    folder = Path(__file__).parent if "__file__" in globals() else Path()
    path = folder / "figures" / "language_model.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
print("saved", path.relative_to(folder))

# %% [markdown]
# ## A contrastive loss
#
# CLIP learns from pairs of an image and its caption. In a batch of pairs, each image
# has to pick its caption and each caption its image. That is a classification whose
# classes are the batch: the score is the product of the two embeddings times a
# learned scale, and the right class of row $i$ is $i$. The table of scores grows with
# the square of the batch.
#
# So the symmetric loss is two calls of the fused loss. One side of the pairs is
# `hidden` and the other is `kernel`, then they change places. The gradient reaches
# both, and the scale through `logit_scale`. The naive loss has the table of scores.


# %%
def naive_clip_loss(left, right, log_scale):
    scores = jnp.exp(log_scale) * left @ right.T
    labels = jnp.arange(len(left))
    losses = [
        optax.softmax_cross_entropy_with_integer_labels(table, labels).mean()
        for table in (scores, scores.T)
    ]
    return sum(losses) / 2


def clip_loss(left, right, log_scale):
    labels = jnp.arange(len(left))
    losses = [
        jl.linear_softmax_cross_entropy(
            rows,
            columns,
            labels,
            kernel_layout="vd",
            strategy="tokens",
            workspace_bytes=2**18,  # small, so that there are several pieces
            logit_scale=jnp.exp(log_scale),
            reduction="mean",
        )
        for rows, columns in ((left, right), (right, left))
    ]
    return sum(losses) / 2


# %% [markdown]
# The pairs here are the two halves of a window. A half is described by the average
# of one vector per token, and these vectors and the scale are learned. Each half has
# to be picked out of 256. At the end, halves of held-out windows have to find each
# other.


# %%
def without_padding(inputs, labels):
    return inputs[(labels != IGNORED).all(axis=-1)]


def embed(vectors, inputs):
    """One vector of length 1 for each left and for each right half."""
    averages = (vectors[half].mean(axis=-2) for half in jnp.split(inputs, 2, axis=-1))
    return [x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in averages]


def objective(learned, inputs, loss):
    return loss(*embed(learned["vectors"], inputs), learned["log_scale"])


def found(learned, inputs):
    """Left halves whose best match is their own right half."""
    left, right = embed(learned["vectors"], inputs)
    return np.mean(np.argmax(left @ right.T, axis=-1) == np.arange(len(left)))


pairs = without_padding(train_inputs, train_labels)
test_pairs = without_padding(test_inputs, test_labels)[:100]
learned = {
    "vectors": jax.random.normal(jax.random.key(0), (VOCABULARY, 64)),
    "log_scale": jnp.log(1 / 0.07),  # where CLIP starts
}
draw = np.random.default_rng(0)


def draw_batch():
    return pairs[draw.choice(len(pairs), 256, replace=False)]


value_and_gradient = jax.jit(jax.value_and_grad(objective), static_argnums=2)
drawn = draw_batch()
value, gradient = value_and_gradient(learned, drawn, clip_loss)
naive_value, naive_gradient = value_and_gradient(learned, drawn, naive_clip_loss)
print(f"loss: fused {value:.6f}, naive {naive_value:.6f}")
np.testing.assert_allclose(value, naive_value, rtol=1e-5)
for name in learned:
    error = jnp.linalg.norm(gradient[name] - naive_gradient[name])
    error /= jnp.linalg.norm(naive_gradient[name])
    print(f"gradient by {name}: relative difference {error:.1e}")
    assert error < 1e-4

# %%
adam = optax.adam(0.03)
state = adam.init(learned)
before = found(learned, test_pairs)
for _ in range(50 if QUICK else 200):
    value, gradient = value_and_gradient(learned, draw_batch(), clip_loss)
    updates, state = adam.update(gradient, state)
    learned = optax.apply_updates(learned, updates)

print(f"loss {naive_value:.3f}, after training {value:.3f}")
print(f"scale {1 / 0.07:.1f}, after training {jnp.exp(learned['log_scale']):.1f}")
print(f"found among {len(test_pairs)}: {before:.0%}, after training", end=" ")
print(f"{found(learned, test_pairs):.0%}")
