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
# # A small model learns from a larger one
#
# A text says of each position which token came next. A model that was trained on it
# says more: which others could have come, and how likely each was. A smaller model
# can learn from that. Here a student learns in three ways, from the same start and
# the same windows of text:
#
# - from the text alone,
# - from the head of a teacher: the divergence of the student's distribution from the
#   teacher's, by `linear_softmax_kl_divergence`,
# - from the text and what was stored of the teacher: the 16 likeliest tokens of each
#   position, and one more class for all others, by
#   `linear_softmax_cross_entropy_with_top_k_labels`.
#
# The usual way to the second holds two arrays of a number for every position and
# token, with their logarithms and gradients. Neither is ever held here: the teacher's
# logits are formed for a piece of the positions, from its hidden states, just as the
# student's are.
#
# [corpus.py](corpus.py) reads the text and cuts it into tokens; what it does is
# described in [language_model.ipynb](language_model.ipynb).

# %%
import sys
import time
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
VOCABULARY = 1024 if QUICK else 4096
CONTEXT = 64 if QUICK else 256
BATCH = 4
K = 16
TEACHER = {"layers": 2, "width": 64, "heads": 2}
STUDENT = {"layers": 1, "width": 32, "heads": 1}
if not QUICK:
    TEACHER = {"layers": 3, "width": 192, "heads": 6}
    STUDENT = {"layers": 2, "width": 64, "heads": 2}
TEACHER_STEPS, STEPS = (100, 50) if QUICK else (300, 120)

train_texts, test_texts = corpus.read(QUICK)
tokenizer = corpus.new_tokenizer(train_texts, VOCABULARY)
bytes_of_token = corpus.bytes_of_tokens(tokenizer)
train_inputs, train_labels = corpus.windows(tokenizer, train_texts, CONTEXT)
test_inputs, test_labels = corpus.windows(tokenizer, test_texts, CONTEXT)
batches = corpus.Batches(len(train_labels), BATCH)
# As many as are evaluated in a second, from all over the held-out files.
chosen = np.random.default_rng(0).permutation(len(test_labels))[: 16 * BATCH]
test_inputs, test_labels = test_inputs[chosen], test_labels[chosen]
print(f"train    {np.sum(train_labels != IGNORED):8d} tokens")
print(f"evaluate {np.sum(test_labels != IGNORED):8d} tokens")


# %% [markdown]
# ## The teacher
#
# The teacher has three times the width of the student. It learns from
# the text, by the loss that [language_model.ipynb](language_model.ipynb) is about.


# %%
def new_model(sizes, steps, seed=0):
    rngs = nnx.Rngs(seed)
    model = Transformer(vocabulary=VOCABULARY, context=CONTEXT, rngs=rngs, **sizes)
    rate = optax.warmup_cosine_decay_schedule(0, 3e-3, steps // 10, steps, 1e-4)
    adam = optax.adamw(rate, b2=0.95, weight_decay=0.01)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), adam)
    return model, nnx.Optimizer(model, clipped, wrt=nnx.Param)


def of_text(hidden, embedding, labels, reduction="mean"):
    return jl.linear_softmax_cross_entropy(
        hidden,
        embedding,
        labels,
        kernel_layout="vd",
        strategy="tokens",
        ignore_index=IGNORED,
        reduction=reduction,
    )


def from_text(model, inputs, labels):
    return of_text(model(inputs), model.tokens.embedding[...], labels)


def make_train_step(loss):
    @nnx.jit
    def train_step(model, optimizer, *given):
        value, gradients = nnx.value_and_grad(loss)(model, *given)
        optimizer.update(model, gradients)
        return value

    return train_step


@nnx.jit
def sum_of_losses(model, inputs, labels):
    return of_text(model(inputs), model.tokens.embedding[...], labels, "sum")


def evaluate(model):
    """Bits per byte of held-out text."""
    parts = (a.reshape(-1, BATCH, CONTEXT) for a in (test_inputs, test_labels))
    nats = sum(float(sum_of_losses(model, *part)) for part in zip(*parts, strict=True))
    return corpus.bits_per_byte(nats, test_labels, bytes_of_token)


teacher, optimizer = new_model(TEACHER, TEACHER_STEPS)
train_step = make_train_step(from_text)
for step in tqdm(range(TEACHER_STEPS), "teacher", ncols=79):
    of_step = batches[step]
    train_step(teacher, optimizer, train_inputs[of_step], train_labels[of_step])
of_teacher = evaluate(teacher)
print(f"teacher: {of_teacher:.3f} bits per byte")

# %% [markdown]
# ## What is stored of it
#
# The likeliest tokens of a position and their probabilities take 8 bytes each. This is
# done once, a batch at a time, and the teacher is not needed any more. What the stored
# probabilities leave to one is what the teacher gave to all other tokens together: the
# label of the bucket.


# %%
@nnx.jit
def likeliest(model, inputs):
    logits = model(inputs) @ model.tokens.embedding[...].T
    probs, ids = jax.lax.top_k(jl.softmax(logits), K)
    return ids, probs


stored = [
    likeliest(teacher, train_inputs[batches[step]])
    for step in tqdm(range(STEPS), "stored", ncols=79)
]
megabytes = sum(a.nbytes for pair in stored for a in pair) / 1e6
every = STEPS * BATCH * CONTEXT * VOCABULARY * 4 / 1e6
left = 1 - np.mean([probs.sum(-1).mean() for _, probs in stored])
print(f"{megabytes:.0f} MB in the place of {every:.0f} MB of logits")
print(f"left to the bucket: {left:.3f} on average")

# %% [markdown]
# ## Three students
#
# `from_head` gives both heads to the divergence. `on_logits` is the same as it is
# usually written, with two arrays of all logits, here to compare what they cost.
# Positions without a label have weight 0.
#
# The bucket says how often the next token is none of the likeliest, and nothing about
# which one it is then. The text does, so `from_likeliest` is the mean of the two.


# %%
def from_head(model, inputs, labels, teacher):
    return jl.linear_softmax_kl_divergence(
        model(inputs),
        model.tokens.embedding[...],
        teacher_hidden=teacher(inputs),
        teacher_kernel=teacher.tokens.embedding[...],
        kernel_layout="vd",
        strategy="tokens",
        weights=labels != IGNORED,
        reduction="mean",
    )


def from_likeliest(model, inputs, labels, ids, probs):
    hidden, embedding = model(inputs), model.tokens.embedding[...]
    of_stored = jl.linear_softmax_cross_entropy_with_top_k_labels(
        hidden,
        embedding,
        ids,
        probs,
        rest="bucket",
        as_divergence=True,
        kernel_layout="vd",
        strategy="tokens",
        weights=labels != IGNORED,
        reduction="mean",
    )
    return (of_stored + of_text(hidden, embedding, labels)) / 2


def on_logits(model, inputs, labels, teacher):
    student, of_teacher = (
        jax.nn.log_softmax(m(inputs) @ m.tokens.embedding[...].T)
        for m in (model, teacher)
    )
    of_teacher = jax.lax.stop_gradient(of_teacher)
    losses = jnp.sum(jnp.exp(of_teacher) * (of_teacher - student), -1)
    return jnp.mean(losses, where=labels != IGNORED)


def given(step, loss):
    """What a loss takes beside the model."""
    chosen = batches[step]
    beside = {
        from_head: (teacher,),
        on_logits: (teacher,),
        from_likeliest: stored[step],
    }
    return train_inputs[chosen], train_labels[chosen], *beside.get(loss, ())


# %% [markdown]
# ## What each costs
#
# The compiler says how much memory a step needs beside its arguments and results, and
# a clock how long it takes. The last two run the teacher's layers as well.

# %%
losses = (from_text, from_likeliest, from_head, on_logits)
seconds, megabytes, first = {}, {}, {}
for loss in losses:
    train_step = make_train_step(loss)
    student = new_model(STUDENT, STEPS)
    lowered = train_step.lower(*student, *given(0, loss))
    megabytes[loss] = lowered.compile().memory_analysis().temp_size_in_bytes / 1e6
    first[loss] = float(train_step(*student, *given(0, loss)))
    clock = time.perf_counter()
    for step in range(1, 6):
        train_step(*student, *given(step, loss)).block_until_ready()
    seconds[loss] = (time.perf_counter() - clock) / 5
print(f"{'loss':>15} {'memory':>9} {'step':>9}")
for loss in losses:
    name = loss.__name__
    print(f"{name:>15} {megabytes[loss]:6.0f} MB {1e3 * seconds[loss]:6.0f} ms")
np.testing.assert_allclose(first[from_head], first[on_logits], rtol=1e-4)
assert QUICK or megabytes[from_head] < megabytes[on_logits]

# %% [markdown]
# ## What each learns
#
# All three are measured on the text that was held out, in bits per byte, whatever
# they learned from.

# %%
EVERY = STEPS // 10
curves = {}
for loss in losses[:3]:
    student, optimizer = new_model(STUDENT, STEPS)
    train_step = make_train_step(loss)
    curve = {0: evaluate(student)}
    for step in tqdm(range(STEPS), loss.__name__, ncols=79):
        train_step(student, optimizer, *given(step, loss))
        if (step + 1) % EVERY == 0:
            curve[step + 1] = evaluate(student)
    curves[loss] = curve

print("bits per byte of held-out text")
print("step", *(f"{loss.__name__:>15}" for loss in curves))
for step in curves[from_text]:
    print(f"{step:4d}", *(f"{curve[step]:15.3f}" for curve in curves.values()))
print(f"the teacher: {of_teacher:.3f}")
if not QUICK:
    assert curves[from_head][STEPS] < curves[from_text][STEPS]

# %%
GREY = "#7a7a7a"
COLOURS = {from_text: "#3b82f6", from_head: "#d97706", from_likeliest: "#16a34a"}
NAMES = {
    from_text: "from the text",
    from_head: "from the teacher's head",
    from_likeliest: f"from the text and its {K} likeliest tokens",
}
folder = Path(__file__).parent if "__file__" in globals() else Path()
with plt.style.context(folder / "page.mplstyle"):
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for loss, curve in curves.items():
        steps, values = zip(*list(curve.items())[1:], strict=True)
        axes.plot(steps, values, color=COLOURS[loss], marker="o", label=NAMES[loss])
    axes.axhline(of_teacher, color=GREY, linestyle="--", label="the teacher")
    axes.set(xlabel="step", ylabel="bits per byte of held-out text")
    axes.legend()
    path = folder / "figures" / "distillation.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
print("saved", path.relative_to(folder))
