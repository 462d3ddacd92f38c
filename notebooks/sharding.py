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
# # Losses over many devices
#
# The output layer of a language model is split over devices sooner than anything
# else: over examples, because there are many, and over classes, because one device
# does not hold the kernel, let alone the logits. A loss that is written for one
# device may then make the compiler collect what was split, and its largest array is
# the logits.
#
# This page splits the losses of `jaxlosses` in each of the ways that JAX has, and
# reads in the compiled program what the devices send to each other. Eight CPU devices
# stand for eight accelerators; the partitioner is the same.

# %%
import functools
import math
import re

import jax

jax.config.update("jax_num_cpu_devices", 8)  # before JAX looks for its devices

import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxlosses as jl

EXAMPLES, FEATURES, CLASSES = 1024, 64, 1536
AXES = ("data", "vocabulary")

auto = jax.make_mesh((2, 4), AXES, axis_types=(AxisType.Auto,) * 2)
explicit = jax.make_mesh((2, 4), AXES, axis_types=(AxisType.Explicit,) * 2)

rng = np.random.default_rng(0)
hidden = rng.normal(size=(EXAMPLES, FEATURES)).astype(np.float32)
kernel = (rng.normal(size=(FEATURES, CLASSES)) / 8).astype(np.float32)
labels = rng.integers(0, CLASSES, EXAMPLES).astype(np.int32)
logits = hidden @ kernel


def place(mesh, array, *partition):
    return jax.device_put(array, NamedSharding(mesh, P(*partition)))


# %% [markdown]
# Two rows of devices have half of the examples each. Within a row, each device has a
# quarter of the classes.

# %%
split_logits = place(auto, logits, "data", "vocabulary")
split_labels = place(auto, labels, "data")
jax.debug.visualize_array_sharding(split_logits, use_color=False)

# %% [markdown]
# ## Nothing but `jit`
#
# With mesh axes of the type `Auto`, the loss is called as on one device. The compiler
# sees how its arguments lie and splits the work.


# %%
def mean_loss(logits, labels):
    return jl.softmax_cross_entropy_with_integer_labels(
        logits, labels, reduction="mean"
    )


whole = jax.value_and_grad(mean_loss)(logits, labels)
split = jax.jit(jax.value_and_grad(mean_loss))(split_logits, split_labels)
print(f"loss on one device {whole[0]:.7f}, on eight {split[0]:.7f}")
np.testing.assert_allclose(split[0], whole[0], rtol=2e-6)
np.testing.assert_allclose(split[1], whole[1], rtol=1e-5, atol=1e-9)
jax.debug.visualize_array_sharding(split[1], use_color=False)  # the gradient

# %% [markdown]
# The compiled program names each *collective*, an operation in which devices send
# something to each other. Shapes are those of one device. Its own part of the logits
# is 512 × 384 here.

# %%
COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)"
    r"(?:-start)?\("
)


def collectives(function, *arguments):
    """Kind, shapes, and whether it is in a loop, of every collective."""
    compiled = jax.jit(function).lower(*arguments).compile()
    found = []
    for line in compiled.as_text().splitlines():
        match = COLLECTIVE.search(line)
        if match:
            shapes = [
                tuple(int(n) for n in shape.split(",") if n)
                for shape in re.findall(r"f32\[([\d,]*)\]", match[1])
            ]
            found.append((match[2], shapes, "while/body" in line))
    return found


def show(found):
    for kind, shapes, in_loop in found:
        arrays = ", ".join("×".join(map(str, shape)) or "scalar" for shape in shapes)
        print(f"  {kind}: {arrays}{' (for each chunk)' if in_loop else ''}")


found = collectives(jax.value_and_grad(mean_loss), split_logits, split_labels)
show(found)
local_logits = logits.size // 8
assert all(
    kind == "all-reduce" and math.prod(shape) <= EXAMPLES // 2
    for kind, shapes, _ in found
    for shape in shapes
)

# %% [markdown]
# For each example there are three numbers: the largest logit, the sum of exponentials
# and the logit of the label. That is all that a device has to know of the classes of
# the others. The gradient needs nothing more.
#
# Each device adds up the exponentials of the classes that are not the label, as on one
# device. So confident rows keep their digits:

# %%
confident = np.zeros((8, CLASSES), np.float32)
confident[:, 5] = np.arange(8) * 10
fives = np.full(8, 5, np.int32)
sharded = jax.jit(jl.softmax_cross_entropy_with_integer_labels)(
    place(auto, confident, "data", "vocabulary"), place(auto, fives, "data")
)
exact = np.log1p((CLASSES - 1) * np.exp(-confident[:, 5].astype(np.float64)))
for margin, ours, truth in zip(confident[:, 5], sharded, exact, strict=True):
    print(f"margin {margin:3.0f}: {ours:.7e}, exactly {truth:.7e}")
np.testing.assert_allclose(sharded, exact, rtol=4e-6)

# %% [markdown]
# ## Axes that are part of the type
#
# On axes of the type `Explicit`, `jax.typeof` tells how an array is split, and each
# operation checks it before anything is compiled. A lookup of one column per row
# cannot be typed there. The losses have none.

# %%
with jax.set_mesh(explicit):
    typed_logits = place(explicit, logits, "data", "vocabulary")
    typed_labels = place(explicit, labels, "data")
    print(jax.typeof(typed_logits))
    losses = jl.softmax_cross_entropy_with_integer_labels(typed_logits, typed_labels)
    print(jax.typeof(losses))

# %% [markdown]
# ## By hand
#
# Inside `jax.shard_map` each device runs the program on its part. The loss has to be
# told over which axis the classes are split. Labels stay class ids of the whole
# vocabulary.


# %%
@functools.partial(
    jax.shard_map,
    mesh=auto,
    in_specs=(P("data", "vocabulary"), P("data")),
    out_specs=P("data"),
)
def by_hand(logits, labels):
    return jl.softmax_cross_entropy_with_integer_labels(
        logits, labels, axis_name="vocabulary"
    )


np.testing.assert_allclose(by_hand(logits, labels), losses, rtol=2e-6)
show(collectives(by_hand, split_logits, split_labels))

# %% [markdown]
# All devices get an equal part. If their number does not divide the classes, fill the
# kernel up and say with `where` which classes exist. The others have probability 0 and
# gradient 0.
#
# ## The fused loss
#
# `linear_softmax_cross_entropy` takes the features and the kernel, and cuts the logits
# into chunks. Beside the three numbers per example, two gradients cross devices. A
# device knows what its classes say of the features, and the gradient of the features
# is the sum over the vocabulary axis. It knows what its examples say of the kernel,
# and the gradient of the kernel is the sum over the data axis.

# %%
CHUNKS = 8
parts = (("data",), (None, "vocabulary"), ("data",))


def head(strategy, hidden, kernel, labels):
    return jl.linear_softmax_cross_entropy(
        hidden,
        kernel,
        labels,
        strategy=strategy,
        workspace_bytes=EXAMPLES * CLASSES * 4 // CHUNKS,
        reduction="mean",
    )


def gradients(strategy):
    return jax.value_and_grad(functools.partial(head, strategy), argnums=(0, 1))


for mesh in (auto, explicit):
    with jax.set_mesh(mesh):
        placed = [
            place(mesh, array, *part)
            for array, part in zip((hidden, kernel, labels), parts, strict=True)
        ]
        print(f"tokens, {mesh.axis_types[0].name} axes:")
        found = collectives(gradients("tokens"), *placed)
        show(found)
        split = jax.jit(gradients("tokens"))(*placed)
    np.testing.assert_allclose(split[0], whole[0], rtol=2e-6)
assert all(kind == "all-reduce" for kind, _, _ in found)
assert not any(in_loop and (FEATURES, CLASSES // 4) in s for _, s, in_loop in found)

# %% [markdown]
# The gradient of the kernel has 64 × 384 numbers on each device. On explicit axes,
# and by hand, it crosses the data axis once. The partitioner of automatic axes cannot
# put off a sum, and leaves it in the loop. Compiled for an H100 and for a TPU v5e, XLA
# then moves it out; for the CPU that ran this it does not, and the sum crosses once per
# chunk. By hand there is nothing to hope for:


# %%
@functools.partial(
    jax.shard_map,
    mesh=auto,
    in_specs=tuple(P(*part) for part in parts),
    out_specs=P(),
)
def head_by_hand(hidden, kernel, labels):
    mean = jl.linear_softmax_cross_entropy(
        hidden,
        kernel,
        labels,
        strategy="tokens",
        workspace_bytes=EXAMPLES * CLASSES * 4 // 8 // CHUNKS,
        reduction="mean",
        axis_name="vocabulary",
    )
    return jax.lax.pmean(mean, "data")  # each row has as many examples


placed = [
    place(auto, array, *part)
    for array, part in zip((hidden, kernel, labels), parts, strict=True)
]
found = collectives(jax.value_and_grad(head_by_hand, argnums=(0, 1)), *placed)
show(found)
value = jax.jit(head_by_hand)(*placed)
np.testing.assert_allclose(value, whole[0], rtol=2e-6)

# %% [markdown]
# ## How to choose
#
# | if | then |
# |---|---|
# | one device holds the kernel | split examples only |
# | it does not, or has few examples | split classes, over devices that are close |
# | features are split (FSDP) | leave them so: the kernel is gathered once a step |
# | the logits fit | either loss, with `jit` and nothing else |
# | the logits do not fit, a few devices | the fused loss, with `jit` and nothing else |
# | the logits do not fit, many devices | the fused loss on explicit axes, or by hand |
# | the kernel is huge and examples are few | by hand with `strategy="vocab"` |
#
# The last two rows are there because of automatic axes: the sum of the kernel's
# gradient in the loop that was seen above, and the slices that `strategy="vocab"` takes
# of the kernel, which XLA gathers if the kernel is split. `jax.set_mesh` helps: if it
# is known how many devices there are, no slice is larger than what one of them has. By
# hand and on explicit axes neither happens.
#
# ## Several processes
#
# [sharded_language_model.py](sharded_language_model.py) trains a language model with
# its examples split over one mesh axis and its vocabulary over the other, and keeps
# checkpoints. In the environment that `make demo` makes, one process with eight CPU
# devices:
#
# ```sh
# .venv/bin/python notebooks/sharded_language_model.py --cpu-devices 8
# ```
#
# The same run in two processes, which print the same losses:
#
# ```sh
# for i in 0 1; do
#   .venv/bin/python notebooks/sharded_language_model.py --cpu-devices 4 \
#     --coordinator 127.0.0.1:9876 --processes 2 --process $i &
# done
# wait
# ```
#
# On a pod, start the script on every host. On Cloud TPU, under Slurm and under Open
# MPI, JAX finds the hosts itself:
#
# ```sh
# python notebooks/sharded_language_model.py --distributed --vocabulary-axis 8 \
#   --checkpoints /shared/run-1
# ```
#
# Elsewhere, name the coordinator as above. If a process dies, the others end with an
# error, about `--timeout` seconds (60) later if they do not notice before. Start all of
# them again, and they go on from the last checkpoint, on another mesh if you like.
#
# ## On paper: 256 and 4096 devices
#
# What happens to the output layer when the number of devices grows and each keeps its
# share of the work? Take $N = d\,m$ devices: $m$ of them share the classes, and there
# are $d$ such groups with $T$ tokens each. An all-reduce of $n$ bytes among $p$
# devices, done in a ring, makes each of them send $2\,\frac{p-1}{p}\,n$ bytes. Per
# device and step:
#
# | what | among | bytes |
# |---|---|---|
# | three numbers per token | $m$ | $2\,\frac{m-1}{m}\cdot 3\cdot 4\,T$ |
# | gradient of the features | $m$ | $2\,\frac{m-1}{m}\cdot 4\,T D$ |
# | gradient of the kernel | $d$ | $2\,\frac{d-1}{d}\cdot 4\,D\,\frac{V}{m}$ |
# | three matrix products | | $6\,T D\,\frac{V}{m}$ operations, no bytes |
#
# The collectives that were read above have these sizes:

# %%
d, m = auto.devices.shape
tokens = EXAMPLES // d
vectors = [s for _, shapes, in_loop in found if in_loop for s in shapes]
once = sorted(s for _, shapes, in_loop in found if not in_loop for s in shapes if s)
assert len(vectors) == 3
assert len({math.prod(s) for s in vectors}) == 1  # the tokens of a chunk
assert once == sorted([(tokens, FEATURES), (FEATURES, CLASSES // m)])

# %% [markdown]
# The sizes of Llama 3 8B, 16384 tokens for each group of 8 devices. The rates are
# assumptions of the size that current accelerators reach, not measurements: 400
# teraflop/s in the products, 300 GB/s among the 8 devices, 40 GB/s from each device
# to other groups. Each step of an all-reduce waits 1.5 µs among the 8, where a ring has
# $2(m-1)$ steps, and 10 µs between groups, where a tree has $2\log_2 d$. 32 chunks.

# %%
T, D, V, M = 16384, 4096, 128256, 8
RATE, NEAR, FAR, PIECES = 400e12, 300e9, 40e9, 32
STEP_NEAR, STEP_FAR = 1.5e-6, 10e-6


def sent(p, size):
    """Bytes that each of p devices sends in an all-reduce of `size` bytes."""
    return 2 * (p - 1) / p * size


def milliseconds(devices):
    d = devices // M
    products = 6 * T * D * V / M / RATE
    ring, tree = 2 * (M - 1) * STEP_NEAR, 2 * math.log2(d) * STEP_FAR
    vectors = (
        sent(M, 3 * 4 * T) / NEAR + PIECES * 2 * ring
    )  # the maximum, then two sums
    features = sent(M, 4 * T * D) / NEAR + ring
    kernel = sent(d, 4 * D * V / M) / FAR + tree
    return [1e3 * seconds for seconds in (products, vectors, features, kernel)]


print(f"{'':16}|{'milliseconds':^35}|{'share of the time in products':^32}")
print(f"{'devices':>8}{'d × m':>8}|{'products':>9}{'vectors':>8}", end="")
print(f"{'features':>9}{'kernel':>8} |{'nothing at once':>16}{'kernel at once':>15}")
for devices in (8, 64, 256, 1024, 4096):
    products, vectors, features, kernel_sum = times = milliseconds(devices)
    apart, together = products / sum(times), products / sum(times[:3])
    print(
        f"{devices:8d}{f'{devices // M} × {M}':>8}|{products:9.1f}{vectors:8.1f}"
        f"{features:9.1f}{kernel_sum:8.1f} |{apart:16.0%}{together:15.0%}"
    )
gathered = (M - 1) / M * 4 * T * V / NEAR
print(f"gathering the logits instead: {1e3 * gathered:.0f} ms more")

# %% [markdown]
# From 256 to 4096 devices next to nothing changes: what a device sends does not grow
# with $d$, only the number of steps does, by its logarithm. The sum of the kernel's
# gradient is the largest part. Any training on several groups has it, for every
# parameter. This one is known first in the backward pass and needed last, and so can
# be sent while the rest of the model is differentiated: the last column is for that
# case.
#
# More tokens per group make the products longer and not the sum of the kernel's
# gradient. What is inside a group does grow with the tokens, as the products do: the
# share of the features is $2(m-1)\cdot 4\,T D$ bytes against $6\,T D\,V$ operations,
# and depends on the vocabulary and on $m$ alone.
