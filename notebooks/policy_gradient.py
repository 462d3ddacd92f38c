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
# # A policy gradient, without its logits
#
# A language model can learn from examples of the right answer. It can also learn from
# its own answers, if somebody says how good each of them is. This page does both: a
# small transformer is shown sorted letters for a short while, and then practises with
# a program that counts how many letters are in their place.
#
# The second part is GRPO ([Shao et al. 2024](https://arxiv.org/abs/2402.03300)). Its
# loss needs the log-probability of each token that was drawn and, for a bonus, the
# entropy of what it was drawn from. Codes for it often hold all probabilities of all
# tokens. `linear_softmax_loss` takes the loss as a function of these two numbers:
#
# - No array of `[tokens, vocabulary]` exists, and value and gradient take three
#   matrix products, entropy included.
# - Two equal policies have a ratio of exactly 1.
#
# The vocabulary has the size that one of a language model might have; the task uses
# 26 letters of it. The model does not know that, and neither does the loss.

# %%
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm
from transformer import Transformer

import jaxlosses as jl

QUICK = "--quick" in sys.argv[1:]
VOCABULARY = 1024 if QUICK else 4096
LETTERS, LENGTH = 26, 6
LAYERS, WIDTH, HEADS = 2, 64, 4
PROMPTS, GROUP = (16, 4) if QUICK else (64, 8)
SUPERVISED_STEPS = 40 if QUICK else 120
POLICY_STEPS = 6 if QUICK else 200
IGNORED = -100

# %% [markdown]
# ## The task
#
# A prompt is six letters and a separator; the answer is the same letters in the order
# of the alphabet. The reward of an answer is the share of its letters that are in
# their place: a program can tell.

# %%
SEPARATOR = LETTERS


def prompts(draw, number):
    """Letters to sort, each with the separator behind them."""
    letters = draw.integers(0, LETTERS, (number, LENGTH), dtype=np.int32)
    return np.pad(letters, ((0, 0), (0, 1)), constant_values=SEPARATOR)


def reward(prompt, answer):
    """The share of letters that are in their place."""
    return jnp.mean(answer == jnp.sort(prompt[:, :LENGTH]), axis=-1)


def inputs_and_labels(prompt, answer):
    """What the model reads, and what it has to say: nothing before the separator."""
    text = jnp.concatenate([prompt, answer], axis=-1)
    labels = jnp.concatenate([jnp.full_like(prompt, IGNORED), answer], axis=-1)
    return text[:, :-1], labels[:, 1:]


for letters in prompts(np.random.default_rng(1), 3)[:, :LENGTH]:
    words = ("".join(chr(ord("a") + i) for i in x) for x in (letters, sorted(letters)))
    print(" -> ".join(words))

# %% [markdown]
# ## The model
#
# The transformer of the [language model](language_model.ipynb), smaller. It returns
# what goes into its last layer, whose kernel is the table of tokens.
#
# To answer, it draws one letter after the other. Only here are there logits: those of
# one position.


# %%
def optimizer_of(model, rate):
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.95))
    return nnx.Optimizer(model, adam, wrt=nnx.Param)


model = Transformer(
    vocabulary=VOCABULARY,
    context=2 * LENGTH + 1,
    layers=LAYERS,
    width=WIDTH,
    heads=HEADS,
    rngs=nnx.Rngs(0),
)


@nnx.jit
def sample(model, prompt, key):
    """One answer to each prompt, letter by letter."""
    text = jnp.pad(prompt, ((0, 0), (0, LENGTH - 1)))
    answer = []
    for i, own_key in enumerate(jax.random.split(key, LENGTH)):
        hidden = model(text)[:, LENGTH + i]
        logits = hidden @ model.tokens.embedding[...].T
        answer.append(jax.random.categorical(own_key, logits).astype(jnp.int32))
        text = text.at[:, LENGTH + 1 + i].set(answer[-1], mode="drop")
    return jnp.stack(answer, axis=-1)


test_prompts = prompts(np.random.default_rng(2), 512)


def mean_reward(model):
    """Of answers to prompts that no training has."""
    answer = sample(model, test_prompts, jax.random.key(0))
    return float(reward(test_prompts, answer).mean())


# %% [markdown]
# ## First, from right answers
#
# The usual cross-entropy, of the positions that have a label. It stops early, so that
# something is left to learn.


# %%
@nnx.jit
def supervised_step(model, optimizer, prompt):
    inputs, labels = inputs_and_labels(prompt, jnp.sort(prompt[:, :LENGTH]))

    def loss(model):
        return jl.linear_softmax_cross_entropy(
            model(inputs),
            model.tokens.embedding[...],
            labels,
            kernel_layout="vd",
            ignore_index=IGNORED,
            reduction="mean",
        )

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


draw = np.random.default_rng(0)
optimizer = optimizer_of(model, 3e-3)
untrained = mean_reward(model)
for _ in tqdm(range(SUPERVISED_STEPS), "supervised", ncols=79):
    supervised_step(model, optimizer, prompts(draw, PROMPTS))
before = mean_reward(model)
print(f"letters in their place: {untrained:.1%}, then {before:.1%}")


# %% [markdown]
# ## Then, from rewards
#
# Each prompt is answered several times. An answer is worth what its reward is above
# the mean of its group, in units of the spread of all groups: its *advantage*. The
# loss makes the tokens of good answers more probable. The clipped ratio of the new
# probability to the one that a token was drawn with keeps a step from going far, and
# a little entropy is rewarded so that the answers stay different from each other.
#
# The function sees one number per token. `rows.nll` is minus the log-probability of
# the token, and keeps its digits where the model is sure.


# %%
def policy_loss(rows, old, advantage):
    ratio = jnp.exp(-rows.nll - old)
    gain = jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage)
    return -gain - 0.003 * rows.entropy, {"ratio": ratio, "entropy": rows.entropy}


def fused(hidden, embedding, labels, old, advantage):
    return jl.linear_softmax_loss(
        policy_loss,
        hidden,
        embedding,
        labels,
        old,
        advantage,
        kernel_layout="vd",
        ignore_index=IGNORED,
        uses_entropy=True,
        reduction="mean",
    )


def materialised(hidden, embedding, labels, old, advantage):
    """The same from the logits, as it is often written."""
    log_p = jax.nn.log_softmax(hidden @ embedding.T)
    counted = labels != IGNORED
    ids = jnp.where(counted, labels, 0)[..., None]
    rows = jl.Rows(
        nll=-jnp.take_along_axis(log_p, ids, axis=-1)[..., 0],
        lse=None,
        entropy=-jnp.sum(jnp.exp(log_p) * log_p, axis=-1),
        label_logit=None,
    )
    values, beside = policy_loss(rows, old, advantage)
    return jnp.sum(jnp.where(counted, values, 0)) / jnp.sum(counted), beside


def log_probs(hidden, embedding, labels):
    return jl.linear_softmax_log_probs(
        hidden, embedding, labels, kernel_layout="vd", ignore_index=IGNORED
    )


@nnx.jit
def experience(model, prompt, key):
    """Answers, and what each of their tokens is worth."""
    prompt = jnp.repeat(prompt, GROUP, axis=0)
    answer = sample(model, prompt, key)
    inputs, labels = inputs_and_labels(prompt, answer)
    score = reward(prompt, answer)
    above = score.reshape(-1, GROUP)
    above -= above.mean(axis=-1, keepdims=True)
    advantage = (above / (above.std() + 1e-4)).reshape(-1, 1)
    advantage = jnp.broadcast_to(advantage, labels.shape)
    return score.mean(), (inputs, labels, advantage)


@nnx.jit
def policy_step(model, optimizer, inputs, labels, advantage, old=None):
    """One step; without `old`, the policy is still the one that answered."""

    def objective(model):
        factors = model(inputs), model.tokens.embedding[...]
        own = old
        if own is None:
            own = jax.lax.stop_gradient(log_probs(*factors, labels))
        value, beside = fused(*factors, labels, own, advantage)
        return value, beside | {"old": own}

    (_, beside), gradients = nnx.value_and_grad(objective, has_aux=True)(model)
    optimizer.update(model, gradients)
    return beside


# %% [markdown]
# ## What it costs
#
# Value and gradient of the loss alone, for one batch of answers, beside the form with
# all logits. The two agree, and the fused one holds a part of the memory.

# %%
_, batch = experience(model, prompts(draw, PROMPTS), jax.random.key(1))
inputs, labels, advantage = batch
factors = model(inputs), model.tokens.embedding[...]
rest = labels, log_probs(*factors, labels), advantage
print(f"{inputs.size} positions, {inputs.size * VOCABULARY * 4 / 1e6:.0f} MB of logits")

results, megabytes = {}, {}
for loss in (materialised, fused):
    gradient = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    compiled = jax.jit(gradient).lower(*factors, *rest).compile()
    results[loss] = jax.block_until_ready(compiled(*factors, *rest))
    seconds = []
    for _ in range(3 if QUICK else 9):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*factors, *rest))
        seconds.append(time.perf_counter() - start)
    megabytes[loss] = compiled.memory_analysis().temp_size_in_bytes / 1e6
    milliseconds = 1e3 * np.median(seconds)
    print(f"{loss.__name__:>12}: {megabytes[loss]:4.0f} MB, {milliseconds:4.0f} ms")
assert QUICK or megabytes[fused] < megabytes[materialised] / 2

(value, _), gradients = results[fused]
(naive_value, _), naive_gradients = results[materialised]
print(f"loss: fused {value:.7f}, materialised {naive_value:.7f}")
assert abs(value - naive_value) < 1e-5
for name, ours, naive in zip(
    ("hidden", "embedding"), gradients, naive_gradients, strict=True
):
    error = float(jnp.linalg.norm(ours - naive) / jnp.linalg.norm(naive))
    print(f"gradient by {name}: relative difference {error:.1e}")
    assert error < 1e-4

# %% [markdown]
# ## Practice
#
# Every batch of answers is used twice. The first time, the policy is still the one
# that drew them. Each ratio is then 1, to the last bit: of the same hidden states,
# log-probabilities are the same numbers in `linear_softmax_log_probs` and in the loss.
# The hidden states have to be the same for that. Two programs may round a transformer
# in two ways, and so the step itself notes the log-probabilities. The second time, the
# policy has moved a little.

# %%
optimizer = optimizer_of(model, 1e-3)
scores, entropies, moved = [], [], []
bar = tqdm(range(POLICY_STEPS), "policy", ncols=79)
for step in bar:
    key = jax.random.fold_in(jax.random.key(3), step)
    score, batch = experience(model, prompts(draw, PROMPTS), key)
    counted = np.asarray(batch[1]) != IGNORED
    first = policy_step(model, optimizer, *batch)
    second = policy_step(model, optimizer, *batch, first["old"])
    assert np.all(np.asarray(first["ratio"])[counted] == 1)
    scores.append(float(score))
    entropies.append(float(np.asarray(first["entropy"])[counted].mean()))
    moved.append(float(np.abs(np.asarray(second["ratio"])[counted] - 1).mean()))
    bar.set_postfix_str(f"reward {score:.2f}")

after = mean_reward(model)
print(f"letters in their place: {before:.1%}, after practice {after:.1%}")
print("mean |ratio - 1|: first use exactly 0,", f"second use {np.mean(moved):.3f}")
print(f"entropy per letter: {entropies[0]:.3f}, at the end {entropies[-1]:.3f} nats")
if not QUICK and not after > before + 0.2:
    raise SystemExit("Practice should bring a fifth of all letters to their place.")

# %% [markdown]
# The curve is the mean reward of the answers that a step learns from. The dashed line
# is where the right answers have brought the model. The figure can be read on a light
# page and on a dark one.

# %%
GREY, BLUE, ORANGE = "#7a7a7a", "#3b82f6", "#d97706"
style = {
    "axes.edgecolor": GREY,
    "axes.facecolor": "none",
    "axes.labelcolor": GREY,
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
    steps = range(1, POLICY_STEPS + 1)
    axes.plot(steps, scores, color=BLUE, linewidth=2, label="reward")
    axes.axhline(before, color=GREY, linestyle="--", label="before practice")
    axes.set(xlabel="step", ylabel="letters in their place", ylim=(0, 1.02))
    axes.grid(color=GREY, alpha=0.25)
    right = axes.twinx()
    right.plot(steps, entropies, color=ORANGE, linewidth=1, label="entropy")
    right.set(ylabel="entropy per letter, nats", ylim=(0, None))
    figure.legend(loc="outside upper center", ncols=3)

    folder = Path(__file__).parent if "__file__" in globals() else Path()
    path = folder / "figures" / "policy_gradient.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
print("saved", path.relative_to(folder))
