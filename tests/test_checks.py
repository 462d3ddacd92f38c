"""What every wrong argument is told: argument, what came, what was expected, the fix.

One row per mistake. Each message is checked on a call with arrays, and once more
with everything that is an array traced, which shows that it is raised before running.
"""

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlosses as jl
from jaxlosses import testing

B, V = 4, 6
LOGITS = jnp.zeros((B, V))
IDS = jnp.zeros(B, jnp.int32)
DISTRIBUTIONS = jnp.full((B, V), 1 / V)
NAN, INF = math.nan, math.inf

integer = jl.softmax_cross_entropy_with_integer_labels
dense = jl.softmax_cross_entropy
linear = jl.linear_softmax_cross_entropy
linear_log_probs = jl.linear_softmax_log_probs
linear_loss = jl.linear_softmax_loss
divergence = jl.softmax_kl_divergence
named = jl.softmax_cross_entropy_with_top_k_labels
linear_named = jl.linear_softmax_cross_entropy_with_top_k_labels
TWO_IDS = jnp.zeros((B, 2), jnp.int32)
linear_divergence = jl.linear_softmax_kl_divergence
DEFAULTS: dict[Callable[..., Any], dict[str, Any]] = {
    integer: {"logits": LOGITS, "labels": IDS},
    dense: {"logits": LOGITS, "labels": DISTRIBUTIONS},
    jl.softmax: {"logits": LOGITS},
    jl.log_softmax: {"logits": LOGITS},
    linear: {"hidden": jnp.zeros((B, 3)), "kernel": jnp.zeros((3, V)), "labels": IDS},
    testing.plan: {"hidden": jnp.zeros((B, 3)), "kernel": jnp.zeros((3, V))},
    jl.softmax_log_probs: {"logits": LOGITS, "labels": IDS},
    jl.softmax_entropy: {"logits": LOGITS},
    divergence: {"logits": LOGITS, "teacher_logits": LOGITS},
    named: {"logits": LOGITS, "ids": TWO_IDS, "probs": jnp.ones((B, 2))},
    linear_named: {
        **{"hidden": jnp.zeros((B, 3)), "kernel": jnp.zeros((3, V))},
        **{"ids": TWO_IDS, "probs": jnp.ones((B, 2))},
    },
    linear_divergence: {
        **{"hidden": jnp.zeros((B, 3)), "kernel": jnp.zeros((3, V))},
        **{"teacher_hidden": jnp.zeros((B, 5)), "teacher_kernel": jnp.zeros((5, V))},
    },
}
DEFAULTS[linear_log_probs] = DEFAULTS[linear]
DEFAULTS[linear_loss] = DEFAULTS[linear] | {"function": lambda rows: rows.nll}


class Mistake(NamedTuple):
    function: Callable[..., Any]
    arguments: dict[str, Any]
    error: type[Exception]
    message: str


def zeros(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    return jnp.zeros(shape, dtype)


FLOATS = "one of float16, bfloat16, float32, float64"
TO_FLOAT32 = "Convert them: logits.astype(jnp.float32)."
LAST_AXIS = "Pass axis=-1 where the classes are the last axis."
MASK_SHAPES = "(4, 6) or broadcastable to it with the same rank, or (4,)"
SMOOTHING = "a number from 0 to 1, 1 excluded"
ONE_NUMBER = "Pass one number for all examples."
NO_CAP = "a finite number above 0, or None. Pass None for no cap."
STATIC = (
    "It is static. If jax.jit passes it, name it there, "
    'jax.jit(loss, static_argnames="{0}"), or bind it before, '
    "functools.partial(loss, {0}=...)."
)
ONE_EXAMPLE = "one per example. Give one weight per example"
IGNORE = (
    "an int or None. Pass the label itself, such as -100; mask several labels with "
    "weights."
)
OF_EACH = "Compute it of each example by itself; the sum is taken outside."
MESH_AXIS = (
    "a mesh axis name, a tuple of them, or None. Name the axis that splits the "
    'classes inside shard_map: axis_name="model".'
)
TOKENS_OF_ALL = (
    "Pass the number of tokens of all steps, say, or None for those of this call."
)
FLAG = "True or False. It is static: pass a Python bool."
STATS = "True, False or a tuple of 'entropy', 'rank', 'confidence', 'label_logit'"
ONE_NAME = 'One name is a tuple as well: return_stats=("rank",).'

DV = 'kernel_layout="dv" is (features, classes).'
VD = 'kernel_layout="vd" is (classes, features).'
TO_VD = ' For the transposed matrix pass kernel_layout="vd".'
TO_DV = ' For the transposed matrix pass kernel_layout="dv".'
HAS_DV = "expected (features, classes) with 3 features, as hidden has."
HAS_VD = "expected (classes, features) with 3 features, as hidden has."
LAYOUTS = (
    'expected one of "dv", "vd". "dv" is the kernel of a Dense layer, (features, '
    'classes); "vd" an embedding table, (classes, features).'
)
OF_LOGITS = "for logits of shape (4, 6)."
ONE_PASS = (
    'expected reduction="sum" or "mean". It forms the gradient of a sum in one pass. '
    'Pass strategy="recompute" for one loss per example.'
)

OF_TEACHER = (
    "Pass teacher_logits, or teacher_hidden and teacher_kernel, of which the logits "
    "are formed in pieces."
)
PADDED = "Pad the smaller vocabulary and mask with where."

K_IDS = "expected (4,) and one axis more, of K"
MISTAKES = {
    # labels of some classes
    "one id per example": Mistake(
        named,
        {"ids": IDS},
        ValueError,
        f"ids: got shape (4,), {K_IDS}. For one class id per example call "
        "softmax_cross_entropy_with_integer_labels.",
    ),
    "head: one id per example": Mistake(
        linear_named,
        {"ids": IDS},
        ValueError,
        f"ids: got shape (4,), {K_IDS}. For one class id per example call "
        "linear_softmax_cross_entropy.",
    ),
    "ids of other examples": Mistake(
        named,
        {"ids": zeros((B + 1, 2), jnp.int32)},
        ValueError,
        f"ids: got shape (5, 2), {K_IDS}. Give K class ids per example, with -1 for "
        "none, along a last axis.",
    ),
    "ids that are floats": Mistake(
        named,
        {"ids": zeros((B, 2))},
        TypeError,
        "ids: got dtype float32, expected an integer dtype (class ids). Convert class "
        "ids: ids.astype(jnp.int32).",
    ),
    "probabilities of other ids": Mistake(
        named,
        {"probs": zeros((B, 3))},
        ValueError,
        "probs: got shape (4, 3), expected (4, 2), as ids. Give one probability per "
        "id.",
    ),
    "probabilities that are complex": Mistake(
        named,
        {"probs": zeros((B, 2), jnp.complex64)},
        TypeError,
        "probs: got dtype complex64, expected a real dtype. Give a probability per "
        "id: probs.astype(jnp.float32).",
    ),
    "an unknown rest": Mistake(
        named,
        {"rest": "drop"},
        ValueError,
        "rest: got 'drop', expected one of 'ignore', 'bucket', 'renormalize'. "
        '"bucket" takes all others for one more class, "renormalize" for none.',
    ),
    "a divergence from a part": Mistake(
        named,
        {"as_divergence": True},
        ValueError,
        'as_divergence: got True with rest="ignore", expected rest="bucket" or '
        '"renormalize". Labels that leave a part out are no distribution.',
    ),
    # a teacher
    "an unknown direction": Mistake(
        divergence,
        {"direction": "backward"},
        ValueError,
        "direction: got 'backward', expected one of 'forward', 'reverse', "
        '\'jensen_shannon\'. "forward" is KL(teacher || student), "reverse" '
        "KL(student || teacher).",
    ),
    "no temperature": Mistake(
        divergence,
        {"temperature": 0.0},
        ValueError,
        "temperature: got 0.0, expected a finite number above 0. 1 leaves the logits "
        "as they are.",
    ),
    "a temperature of each example": Mistake(
        divergence,
        {"temperature": zeros((B,))},
        TypeError,
        "temperature: got an array of shape (4,) and dtype float32, expected a finite "
        "number above 0, or a traced scalar. 1 leaves the logits as they are.",
    ),
    "all of the teacher": Mistake(
        divergence,
        {"teacher_weight": 1.0},
        ValueError,
        "teacher_weight: got 1.0, expected a number from 0 to 1, both excluded. For "
        'one of the two divergences, pass direction="forward" or "reverse".',
    ),
    "a weight of each teacher": Mistake(
        divergence,
        {"teacher_weight": zeros((B,))},
        TypeError,
        "teacher_weight: got an array of shape (4,) and dtype float32, expected a "
        f"number from 0 to 1, both excluded, or a traced scalar. {ONE_NUMBER}",
    ),
    "a teacher's cap of 0": Mistake(
        divergence,
        {"teacher_logit_softcap": 0.0},
        ValueError,
        f"teacher_logit_softcap: got 0.0, expected {NO_CAP}",
    ),
    "a teacher of other classes": Mistake(
        divergence,
        {"teacher_logits": zeros((B, V + 1))},
        ValueError,
        "teacher_logits: got shape (4, 7), expected (4, 6), as the student's. Both "
        "have the same classes: pad the smaller vocabulary and mask with where.",
    ),
    "a teacher of integers": Mistake(
        divergence,
        {"teacher_logits": zeros((B, V), jnp.int32)},
        TypeError,
        f"teacher_logits: got dtype int32, expected {FLOATS}. Convert them: "
        "teacher_logits.astype(jnp.float32).",
    ),
    "no teacher": Mistake(
        linear_divergence,
        {"teacher_hidden": None, "teacher_kernel": None},
        ValueError,
        "teacher_logits: got None without teacher_hidden, expected one of the two. "
        + OF_TEACHER,
    ),
    "two teachers": Mistake(
        linear_divergence,
        {"teacher_logits": LOGITS},
        ValueError,
        "teacher_logits: got an array beside teacher_hidden, expected one of the two. "
        + OF_TEACHER,
    ),
    "a teacher without a kernel": Mistake(
        linear_divergence,
        {"teacher_kernel": None},
        ValueError,
        "teacher_kernel: got None with teacher_hidden, expected both or neither. "
        + OF_TEACHER,
    ),
    "a bias without a teacher's kernel": Mistake(
        linear_divergence,
        {
            **{"teacher_hidden": None, "teacher_kernel": None},
            **{"teacher_logits": LOGITS, "teacher_bias": zeros((V,))},
        },
        ValueError,
        "teacher_bias: got an array of shape (6,) and dtype float32, expected None "
        "with teacher_logits. It belongs to a teacher_kernel.",
    ),
    "a teacher of other examples": Mistake(
        linear_divergence,
        {"teacher_hidden": zeros((B + 1, 5))},
        ValueError,
        "teacher_hidden: got shape (5, 5), expected (4,) and a feature axis, the "
        "examples of hidden. Teacher and student see the same examples; features may "
        "differ.",
    ),
    "a teacher's kernel of other classes": Mistake(
        linear_divergence,
        {"teacher_kernel": zeros((5, V + 1))},
        ValueError,
        "teacher_kernel: got shape (5, 7) of 7 classes, expected 6 classes, as the "
        f"student's kernel has. {PADDED}",
    ),
    "a teacher's kernel of another layout": Mistake(
        linear_divergence,
        {"teacher_kernel": zeros((V, 5))},
        ValueError,
        "teacher_kernel: got shape (6, 5), expected (features, classes) with 5 "
        'features, as teacher_hidden has. teacher_kernel_layout="dv" is (features, '
        'classes). For the transposed matrix pass teacher_kernel_layout="vd".',
    ),
    "a divergence in chunks of classes": Mistake(
        linear_divergence,
        {"strategy": "vocab"},
        ValueError,
        'strategy: got "vocab" with divergences from a teacher, expected "tokens", '
        '"recompute", "dense" or "auto". What has a number for every class is cut with '
        "its examples.",
    ),
    # logits
    "logits of integers": Mistake(
        integer,
        {"logits": zeros((B, V), jnp.int32)},
        TypeError,
        f"logits: got dtype int32, expected {FLOATS}. {TO_FLOAT32}",
    ),
    "logits of booleans": Mistake(
        dense,
        {"logits": zeros((B, V), jnp.bool_)},
        TypeError,
        f"logits: got dtype bool, expected {FLOATS}. {TO_FLOAT32}",
    ),
    "complex logits": Mistake(
        integer,
        {"logits": zeros((B, V), jnp.complex64)},
        TypeError,
        f"logits: got dtype complex64, expected {FLOATS}. {TO_FLOAT32}",
    ),
    "logits of float8": Mistake(
        jl.softmax,
        {"logits": zeros((B, V), jnp.float8_e4m3fn)},
        TypeError,
        f"logits: got dtype float8_e4m3fn, expected {FLOATS}. {TO_FLOAT32}",
    ),
    "scalar logits": Mistake(
        integer,
        {"logits": jnp.zeros(()), "labels": jnp.zeros((), jnp.int32)},
        ValueError,
        "logits: got a scalar, expected an array with a class axis. Logits have one "
        "score per class: shape (batch, classes).",
    ),
    "scalar logits of softmax": Mistake(
        jl.log_softmax,
        {"logits": 1.0},
        ValueError,
        "logits: got a scalar, expected an array with a class axis. Logits have one "
        "score per class: shape (batch, classes).",
    ),
    # labels, integer
    "class ids as floats": Mistake(
        integer,
        {"labels": zeros((B,))},
        TypeError,
        "labels: got dtype float32, expected an integer dtype (class ids). For a "
        "distribution over classes call softmax_cross_entropy; class ids held as "
        "floats convert with labels.astype(jnp.int32).",
    ),
    "class ids with an axis of one": Mistake(
        integer,
        {"labels": IDS[:, None]},
        ValueError,
        "labels: got shape (4, 1), expected (4,) for logits of shape (4, 6). Drop the "
        "last axis: labels[:, 0].",
    ),
    "class ids of a sequence with an axis of one": Mistake(
        integer,
        {"logits": zeros((2, 3, V)), "labels": zeros((2, 3, 1), jnp.int32)},
        ValueError,
        "labels: got shape (2, 3, 1), expected (2, 3) for logits of shape (2, 3, 6). "
        "Drop the last axis: labels[:, :, 0].",
    ),
    "class id of one row with an axis of one": Mistake(
        integer,
        {"logits": zeros((V,)), "labels": IDS[:1]},
        ValueError,
        "labels: got shape (1,), expected () for logits of shape (6,). Drop the last "
        "axis: labels[0].",
    ),
    "one-hot integers for class ids": Mistake(
        integer,
        {"labels": zeros((B, V), jnp.int32)},
        ValueError,
        "labels: got shape (4, 6), expected (4,) for logits of shape (4, 6). For "
        "one-hot labels call softmax_cross_entropy.",
    ),
    "too few class ids": Mistake(
        integer,
        {"labels": IDS[:3]},
        ValueError,
        "labels: got shape (3,), expected (4,) for logits of shape (4, 6). Give one "
        "class id per example.",
    ),
    "one class id for all": Mistake(
        integer,
        {"labels": 0},
        ValueError,
        "labels: got shape (), expected (4,) for logits of shape (4, 6). Give one "
        "class id per example.",
    ),
    # labels, dense
    "class ids for distributions": Mistake(
        dense,
        {"labels": IDS},
        ValueError,
        "labels: got shape (4,), expected (4, 6), or 1 on a batch axis, for logits of "
        "shape (4, 6). For class ids call softmax_cross_entropy_with_integer_labels.",
    ),
    "one distribution without a batch axis": Mistake(
        dense,
        {"labels": DISTRIBUTIONS[0]},
        ValueError,
        "labels: got shape (6,), expected (4, 6), or 1 on a batch axis, for logits of "
        "shape (4, 6). Add batch axes of size 1 to share one distribution: "
        "labels[None, :].",
    ),
    "distributions over other classes": Mistake(
        dense,
        {"labels": DISTRIBUTIONS[:, :5]},
        ValueError,
        "labels: got shape (4, 5), expected (4, 6), or 1 on a batch axis, for logits "
        "of shape (4, 6). Give one weight per class and example.",
    ),
    "distributions broadcast along classes": Mistake(
        dense,
        {"labels": DISTRIBUTIONS[:, :1]},
        ValueError,
        "labels: got shape (4, 1), expected (4, 6), or 1 on a batch axis, for logits "
        "of shape (4, 6). Give one weight per class and example.",
    ),
    "too few distributions": Mistake(
        dense,
        {"labels": DISTRIBUTIONS[:3]},
        ValueError,
        "labels: got shape (3, 6), expected (4, 6), or 1 on a batch axis, for logits "
        "of shape (4, 6). Give one weight per class and example.",
    ),
    "distributions of higher rank": Mistake(
        dense,
        {"labels": DISTRIBUTIONS[None]},
        ValueError,
        "labels: got shape (1, 4, 6), expected (4, 6), or 1 on a batch axis, for "
        "logits of shape (4, 6). Give one weight per class and example.",
    ),
    "complex distributions": Mistake(
        dense,
        {"labels": zeros((B, V), jnp.complex64)},
        TypeError,
        "labels: got dtype complex64, expected a real dtype. Labels are a weight per "
        "class: labels.astype(jnp.float32).",
    ),
    # axis
    "axis above the rank": Mistake(
        integer,
        {"axis": 2},
        ValueError,
        "axis: got 2, expected values from -2 to 1 for logits of 2 axes. " + LAST_AXIS,
    ),
    "axis below the rank": Mistake(
        dense,
        {"axis": -3},
        ValueError,
        "axis: got -3, expected values from -2 to 1 for logits of 2 axes. " + LAST_AXIS,
    ),
    "axis of the tuple out of range": Mistake(
        jl.softmax,
        {"axis": (0, 2)},
        ValueError,
        "axis: got (0, 2), expected values from -2 to 1 for logits of 2 axes. "
        + LAST_AXIS,
    ),
    "axis twice": Mistake(
        dense,
        {"axis": (1, -1)},
        ValueError,
        "axis: got (1, -1), expected each axis once. It names axes (1, 1) of the "
        "logits. Name each class axis once.",
    ),
    "no axis": Mistake(
        dense,
        {"axis": ()},
        ValueError,
        "axis: got (), expected an int or a tuple of ints, or None. " + LAST_AXIS,
    ),
    "axis as a float": Mistake(
        integer,
        {"axis": 1.0},
        TypeError,
        "axis: got 1.0, expected an int or a tuple of ints. " + LAST_AXIS,
    ),
    "axis as a list": Mistake(
        dense,
        {"axis": [0, 1]},
        TypeError,
        "axis: got [0, 1], expected an int or a tuple of ints, or None. " + LAST_AXIS,
    ),
    "axis as a bool": Mistake(
        jl.log_softmax,
        {"axis": True},
        TypeError,
        "axis: got True, expected an int or a tuple of ints, or None. " + LAST_AXIS,
    ),
    "axis None for class ids": Mistake(
        integer,
        {"axis": None},
        ValueError,
        "axis: got None, expected an int or a tuple of ints. " + LAST_AXIS,
    ),
    # where
    "where of floats": Mistake(
        integer,
        {"where": zeros((B, V))},
        TypeError,
        "where: got dtype float32, expected bool. Compare it: mask != 0.",
    ),
    "where of integers": Mistake(
        jl.softmax,
        {"where": zeros((B, V), jnp.int32)},
        TypeError,
        "where: got dtype int32, expected bool. Compare it: mask != 0.",
    ),
    "where of classes without a batch axis": Mistake(
        integer,
        {"where": zeros((V,), jnp.bool_)},
        ValueError,
        f"where: got shape (6,), expected {MASK_SHAPES}. Index a class mask up to the "
        "logits' rank: mask[None, :].",
    ),
    # ignore_index
    "ignore_index as a float": Mistake(
        integer,
        {"ignore_index": -100.0},
        TypeError,
        f"ignore_index: got -100.0, expected {IGNORE}",
    ),
    "ignore_index as a bool": Mistake(
        integer,
        {"ignore_index": True},
        TypeError,
        f"ignore_index: got True, expected {IGNORE}",
    ),
    "several labels to ignore": Mistake(
        integer,
        {"ignore_index": (0, -100)},
        TypeError,
        f"ignore_index: got (0, -100), expected {IGNORE}",
    ),
    # class_weights
    "too few class_weights": Mistake(
        integer,
        {"class_weights": zeros((5,))},
        ValueError,
        "class_weights: got shape (5,), expected (6,), one per class. Give one weight "
        "per class, in the order of the class ids.",
    ),
    "class_weights with a batch axis": Mistake(
        dense,
        {"class_weights": zeros((1, V))},
        ValueError,
        "class_weights: got shape (1, 6), expected (6,), one per class. Give one "
        "weight per class, in the order of the class ids.",
    ),
    "class_weights over two class axes": Mistake(
        dense,
        {"axis": (0, 1), "class_weights": zeros((B, V))},
        ValueError,
        "class_weights: got shape (4, 6), expected (24,), one per class. Give one "
        "weight per class, in the order of the class ids.",
    ),
    "class_weights of integers": Mistake(
        integer,
        {"class_weights": zeros((V,), jnp.int32)},
        TypeError,
        "class_weights: got dtype int32, expected a floating dtype. Convert it: "
        "class_weights.astype(jnp.float32).",
    ),
    # label_smoothing
    "label_smoothing of one": Mistake(
        integer,
        {"label_smoothing": 1.0},
        ValueError,
        f"label_smoothing: got 1.0, expected {SMOOTHING}. 0 switches it off.",
    ),
    "label_smoothing of the integer one": Mistake(
        dense,
        {"label_smoothing": 1},
        ValueError,
        f"label_smoothing: got 1, expected {SMOOTHING}. 0 switches it off.",
    ),
    "negative label_smoothing": Mistake(
        dense,
        {"label_smoothing": -0.1},
        ValueError,
        f"label_smoothing: got -0.1, expected {SMOOTHING}. 0 switches it off.",
    ),
    "label_smoothing of NaN": Mistake(
        integer,
        {"label_smoothing": NAN},
        ValueError,
        f"label_smoothing: got nan, expected {SMOOTHING}. 0 switches it off.",
    ),
    "label_smoothing per example": Mistake(
        integer,
        {"label_smoothing": zeros((B,))},
        TypeError,
        "label_smoothing: got an array of shape (4,) and dtype float32, expected "
        f"{SMOOTHING}, or a traced scalar. {ONE_NUMBER}",
    ),
    "complex label_smoothing": Mistake(
        integer,
        {"label_smoothing": zeros((), jnp.complex64)},
        TypeError,
        "label_smoothing: got an array of shape () and dtype complex64, expected "
        f"{SMOOTHING}, or a traced scalar. {ONE_NUMBER}",
    ),
    "label_smoothing as a string": Mistake(
        dense,
        {"label_smoothing": "0.1"},
        TypeError,
        f"label_smoothing: got '0.1' of type str, expected {SMOOTHING}, or a traced "
        f"scalar. {ONE_NUMBER}",
    ),
    "label_smoothing None": Mistake(
        dense,
        {"label_smoothing": None},
        TypeError,
        f"label_smoothing: got None of type NoneType, expected {SMOOTHING}, or a "
        f"traced scalar. {ONE_NUMBER}",
    ),
    # z_loss
    "negative z_loss": Mistake(
        integer,
        {"z_loss": -1e-4},
        ValueError,
        "z_loss: got -0.0001, expected a finite number of 0 or more. 0 switches it "
        "off.",
    ),
    "z_loss of NaN": Mistake(
        dense,
        {"z_loss": NAN},
        ValueError,
        "z_loss: got nan, expected a finite number of 0 or more. 0 switches it off.",
    ),
    "z_loss per example": Mistake(
        integer,
        {"z_loss": zeros((B,))},
        TypeError,
        "z_loss: got an array of shape (4,) and dtype float32, expected a finite "
        f"number of 0 or more, or a traced scalar. {ONE_NUMBER}",
    ),
    # logit_softcap
    "logit_softcap of zero": Mistake(
        integer,
        {"logit_softcap": 0},
        ValueError,
        f"logit_softcap: got 0, expected {NO_CAP}",
    ),
    "negative logit_softcap": Mistake(
        dense,
        {"logit_softcap": -30.0},
        ValueError,
        f"logit_softcap: got -30.0, expected {NO_CAP}",
    ),
    "infinite logit_softcap": Mistake(
        integer,
        {"logit_softcap": INF},
        ValueError,
        f"logit_softcap: got inf, expected {NO_CAP}",
    ),
    "logit_softcap of NaN": Mistake(
        integer,
        {"logit_softcap": NAN},
        ValueError,
        f"logit_softcap: got nan, expected {NO_CAP}",
    ),
    "traced logit_softcap": Mistake(
        dense,
        {"logit_softcap": jnp.full((), 30.0)},
        TypeError,
        "logit_softcap: got an array of shape () and dtype float32, expected "
        "a Python number or None. " + STATIC.format("logit_softcap"),
    ),
    "logit_softcap as a bool": Mistake(
        dense,
        {"logit_softcap": True},
        TypeError,
        "logit_softcap: got True of type bool, expected a Python number or None. To "
        "vary the logits at run time, use logit_scale.",
    ),
    # logit_scale
    "logit_scale of NaN": Mistake(
        integer,
        {"logit_scale": NAN},
        ValueError,
        "logit_scale: got nan, expected a finite number. 1 switches it off.",
    ),
    "infinite logit_scale": Mistake(
        dense,
        {"logit_scale": -INF},
        ValueError,
        "logit_scale: got -inf, expected a finite number. 1 switches it off.",
    ),
    "logit_scale per class": Mistake(
        integer,
        {"logit_scale": zeros((V,))},
        ValueError,
        f"logit_scale: got shape ({V},), expected (), or (4,), one per example. Give "
        "one number for all, or one per example.",
    ),
    # weights
    "too few weights": Mistake(
        integer,
        {"weights": zeros((3,))},
        ValueError,
        f"weights: got shape (3,), expected (4,), {ONE_EXAMPLE}, or a constant "
        "through jnp.full.",
    ),
    "one weight for all": Mistake(
        dense,
        {"weights": 0.5},
        ValueError,
        f"weights: got shape (), expected (4,), {ONE_EXAMPLE}, or a constant through "
        "jnp.full.",
    ),
    "weights with an axis of one": Mistake(
        integer,
        {"weights": zeros((B, 1))},
        ValueError,
        "weights: got shape (4, 1), expected (4,), one per example. Drop the last "
        "axis: weights[:, 0].",
    ),
    "complex weights": Mistake(
        dense,
        {"weights": zeros((B,), jnp.complex64)},
        TypeError,
        "weights: got dtype complex64, expected a real dtype. Weights are numbers or "
        "flags, one per example: weights.astype(jnp.float32).",
    ),
    # the rest
    "axis_name as a number": Mistake(
        integer, {"axis_name": 3}, TypeError, f"axis_name: got 3, expected {MESH_AXIS}"
    ),
    "axis_name as a list": Mistake(
        dense,
        {"axis_name": ["model"]},
        TypeError,
        f"axis_name: got ['model'], expected {MESH_AXIS}",
    ),
    "axis_name with a number": Mistake(
        dense,
        {"axis_name": ("model", 1)},
        TypeError,
        f"axis_name: got ('model', 1), expected {MESH_AXIS}",
    ),
    "negative normalizer": Mistake(
        integer,
        {"normalizer": -1.0, "reduction": "mean"},
        ValueError,
        "normalizer: got -1.0, expected a finite number of 0 or more, a traced scalar, "
        "or None. " + TOKENS_OF_ALL,
    ),
    "normalizer per example": Mistake(
        dense,
        {"normalizer": zeros((4,)), "reduction": "mean"},
        TypeError,
        "normalizer: got an array of shape (4,) and dtype float32, expected a finite "
        "number of 0 or more, a traced scalar, or None. " + TOKENS_OF_ALL,
    ),
    "normalizer of a sum": Mistake(
        linear,
        {"normalizer": 8, "reduction": "sum"},
        ValueError,
        'normalizer: got one with reduction="sum", expected reduction="mean". A sum '
        "divides by nothing.",
    ),
    "batch_axis_name as a number": Mistake(
        integer,
        {"batch_axis_name": 0, "reduction": "sum"},
        TypeError,
        "batch_axis_name: got 0, expected a mesh axis name, a tuple of them, or None. "
        "Name the axis that splits the examples inside shard_map: "
        'batch_axis_name="data".',
    ),
    "forward_mode as an integer": Mistake(
        integer,
        {"forward_mode": 1},
        TypeError,
        f"forward_mode: got 1 of type int, expected {FLAG}",
    ),
    "traced forward_mode": Mistake(
        dense,
        {"forward_mode": jnp.full((), True)},
        TypeError,
        "forward_mode: got an array of shape () and dtype bool, expected True or "
        "False. " + STATIC.format("forward_mode"),
    ),
    "return_entropy None": Mistake(
        jl.softmax_log_probs,
        {"return_entropy": None},
        TypeError,
        f"return_entropy: got None of type NoneType, expected {FLAG}",
    ),
    "log-probabilities by tokens": Mistake(
        linear_log_probs,
        {"strategy": "tokens"},
        ValueError,
        'strategy: got "tokens" with one result per example, expected "recompute", '
        '"vocab", "dense" or "auto". It forms the gradient of a sum in one pass: for a '
        "sum or a mean call linear_softmax_cross_entropy.",
    ),
    "a loss that is none": Mistake(
        linear_loss,
        {"function": 0.5},
        TypeError,
        "function: got 0.5 of type float, expected a function of Rows and args. Pass, "
        "say, lambda rows: rows.nll.",
    ),
    "a loss of all examples": Mistake(
        linear_loss,
        {"function": lambda rows: rows.nll.mean()},
        ValueError,
        "function: got a result of shape (), expected (4,), one number per example. "
        + OF_EACH,
    ),
    "a loss without values": Mistake(
        linear_loss,
        {"function": lambda rows: None},
        TypeError,
        "function: got None of type NoneType as its result, expected floating values "
        f"of shape (4,), one per example. {OF_EACH}",
    ),
    "a loss with one number beside": Mistake(
        linear_loss,
        {"function": lambda rows: (rows.nll, rows.nll.max())},
        ValueError,
        "function: got a result of shape (), expected (4,), one number per example. "
        + OF_EACH,
    ),
    "a loss of each example": Mistake(
        linear_loss,
        {"reduction": "none"},
        ValueError,
        'reduction: got reduction="none", expected "sum" or "mean". For one number per '
        "example call linear_softmax_log_probs.",
    ),
    "return_stats None": Mistake(
        integer,
        {"return_stats": None},
        TypeError,
        f"return_stats: got None of type NoneType, expected {STATS}. {ONE_NAME}",
    ),
    "return_stats as a string": Mistake(
        dense,
        {"return_stats": "rank"},
        TypeError,
        f"return_stats: got 'rank' of type str, expected {STATS}. {ONE_NAME}",
    ),
    "return_stats of an unknown name": Mistake(
        linear,
        {"return_stats": ("rank", "top5")},
        ValueError,
        f"return_stats: got 'top5', expected {STATS}. {ONE_NAME}",
    ),
    # the head
    "head: hidden of integers": Mistake(
        linear,
        {"hidden": zeros((4, 3), jnp.int32)},
        TypeError,
        f"hidden: got dtype int32, expected {FLOATS}. Convert it: "
        "hidden.astype(jnp.float32).",
    ),
    "head: a scalar hidden": Mistake(
        linear,
        {"hidden": zeros(())},
        ValueError,
        "hidden: got shape (), expected an array with a feature axis. It has the "
        "shape (batch, features).",
    ),
    "head: hidden as a string": Mistake(
        linear,
        {"hidden": "x"},
        TypeError,
        "hidden: got 'x' of type str, expected an array, or numbers that jnp.asarray "
        "converts to one. Pass a JAX or NumPy array.",
    ),
    "head: kernel of booleans": Mistake(
        linear,
        {"kernel": zeros((3, 6), jnp.bool_)},
        TypeError,
        f"kernel: got dtype bool, expected {FLOATS}. Convert it: "
        "kernel.astype(jnp.float32).",
    ),
    "head: kernel of one axis": Mistake(
        linear,
        {"kernel": zeros((3,))},
        ValueError,
        "kernel: got shape (3,), expected an array with two axes. It has the shape "
        "(features, classes).",
    ),
    "head: kernel of three axes": Mistake(
        linear,
        {"kernel": zeros((1, 3, 6))},
        ValueError,
        f"kernel: got shape (1, 3, 6), {HAS_DV} {DV}",
    ),
    "head: kernel of other features": Mistake(
        linear,
        {"kernel": zeros((5, 6))},
        ValueError,
        f"kernel: got shape (5, 6), {HAS_DV} {DV}",
    ),
    "head: an embedding table as the kernel of a layer": Mistake(
        linear,
        {"kernel": zeros((6, 3))},
        ValueError,
        f"kernel: got shape (6, 3), {HAS_DV} {DV}{TO_VD}",
    ),
    "head: the kernel of a layer as an embedding table": Mistake(
        linear,
        {"kernel": zeros((3, 6)), "kernel_layout": "vd"},
        ValueError,
        f"kernel: got shape (3, 6), {HAS_VD} {VD}{TO_DV}",
    ),
    "head: unknown kernel_layout": Mistake(
        linear,
        {"kernel_layout": "DV"},
        ValueError,
        f"kernel_layout: got 'DV', {LAYOUTS}",
    ),
    "head: kernel_layout None": Mistake(
        linear,
        {"kernel_layout": None},
        ValueError,
        f"kernel_layout: got None, {LAYOUTS}",
    ),
    "head: bias of one number": Mistake(
        linear,
        {"bias": zeros(())},
        ValueError,
        "bias: got shape (), expected (6,), one per class. Give one value per class.",
    ),
    "head: bias with a batch axis": Mistake(
        linear,
        {"bias": zeros((1, 6))},
        ValueError,
        "bias: got shape (1, 6), expected (6,), one per class. Give one value per "
        "class.",
    ),
    "head: bias of integers": Mistake(
        linear,
        {"bias": zeros((6,), jnp.int32)},
        TypeError,
        "bias: got dtype int32, expected a floating dtype. Convert it: "
        "bias.astype(jnp.float32).",
    ),
    "head: where of floats": Mistake(
        linear,
        {"where": zeros((6,))},
        TypeError,
        "where: got dtype float32, expected bool. Compare it: mask != 0.",
    ),
    "head: where of other examples": Mistake(
        linear,
        {"where": zeros((3, 6), jnp.bool_)},
        ValueError,
        "where: got shape (3, 6), expected (6,), (4,), or (4, 6) or broadcastable to "
        "it with the same rank. Give one flag per class, per class and example, or per "
        "example.",
    ),
    "head: one-hot labels of integers": Mistake(
        linear,
        {"labels": zeros((4, 6), jnp.int32)},
        ValueError,
        f"labels: got shape (4, 6), expected (4,) {OF_LOGITS} For one-hot labels pass "
        "the class ids: labels.argmax(-1).",
    ),
    "head: class ids as floats": Mistake(
        linear,
        {"labels": zeros((4,))},
        ValueError,
        f"labels: got shape (4,), expected (4, 6), or 1 on a batch axis, {OF_LOGITS} "
        "Convert class ids held as floats: labels.astype(jnp.int32).",
    ),
    "head: complex labels": Mistake(
        linear,
        {"labels": zeros((4,), jnp.complex64)},
        TypeError,
        "labels: got dtype complex64, expected an integer dtype (class ids). Convert "
        "class ids: labels.astype(jnp.int32).",
    ),
    "head: labels with an axis of one": Mistake(
        linear,
        {"labels": zeros((4, 1), jnp.int32)},
        ValueError,
        f"labels: got shape (4, 1), expected (4,) {OF_LOGITS} Drop the last axis: "
        "labels[:, 0].",
    ),
    "head: too few labels": Mistake(
        linear,
        {"labels": zeros((3,), jnp.int32)},
        ValueError,
        f"labels: got shape (3,), expected (4,) {OF_LOGITS} Give one class id per "
        "example.",
    ),
    "head: boolean labels": Mistake(
        linear,
        {"labels": zeros((4,), jnp.bool_)},
        TypeError,
        "labels: got dtype bool, expected an integer dtype (class ids). For 0/1 "
        "labels convert with labels.astype(jnp.int32).",
    ),
    "head: distributions over other classes": Mistake(
        linear,
        {"labels": zeros((4, 5))},
        ValueError,
        f"labels: got shape (4, 5), expected (4, 6), or 1 on a batch axis, {OF_LOGITS} "
        "Give one weight per class and example.",
    ),
    "head: unknown strategy": Mistake(
        linear,
        {"strategy": "Tokens"},
        ValueError,
        "strategy: got 'Tokens', expected one of 'auto', 'tokens', 'recompute', "
        "'vocab', 'dense'. \"auto\" chooses; the docstring says how.",
    ),
    "head: strategy None": Mistake(
        linear,
        {"strategy": None},
        ValueError,
        "strategy: got None, expected one of 'auto', 'tokens', 'recompute', "
        "'vocab', 'dense'. \"auto\" chooses; the docstring says how.",
    ),
    "head: tokens with one loss per example": Mistake(
        linear,
        {"strategy": "tokens", "reduction": "none"},
        ValueError,
        f'strategy: got "tokens" with reduction="none", {ONE_PASS}',
    ),
    "head: tokens in forward mode": Mistake(
        linear,
        {"strategy": "tokens", "reduction": "sum", "forward_mode": True},
        ValueError,
        'strategy: got "tokens" with forward_mode=True, expected "recompute", '
        '"vocab", "dense" or "auto". Its pass forms a reverse-mode gradient.',
    ),
    "head: workspace_bytes as a float": Mistake(
        linear,
        {"workspace_bytes": 1e9},
        TypeError,
        "workspace_bytes: got 1000000000.0, expected an int or None. Pass a number of "
        "bytes, such as 2**28.",
    ),
    "head: workspace_bytes as a bool": Mistake(
        linear,
        {"workspace_bytes": True},
        TypeError,
        "workspace_bytes: got True, expected an int or None. Pass a number of bytes, "
        "such as 2**28.",
    ),
    "head: workspace_bytes of zero": Mistake(
        linear,
        {"workspace_bytes": 0},
        ValueError,
        "workspace_bytes: got 0, expected a number above 0, or None. None takes the "
        "default of the platform.",
    ),
    "head: compute_dtype of integers": Mistake(
        linear,
        {"compute_dtype": "int8"},
        TypeError,
        "compute_dtype: got int8, expected one of float16, bfloat16, float32, float64, "
        'or None. Pass "bfloat16", say, or None for what hidden and kernel promote to.',
    ),
    "head: compute_dtype that is none": Mistake(
        linear,
        {"compute_dtype": "half-ish"},
        TypeError,
        "compute_dtype: got 'half-ish', expected one of float16, bfloat16, float32, "
        'float64, or None. Pass "bfloat16", say, or None for what hidden and kernel '
        "promote to.",
    ),
    "head: compute_dtype of 64 bits that are off": Mistake(
        linear,
        {"compute_dtype": jnp.float64},
        ValueError,
        "compute_dtype: got float64 while 64-bit numbers are off, expected a dtype "
        'that JAX has. Call jax.config.update("jax_enable_x64", True) first.',
    ),
    "plan: a platform that is none": Mistake(
        testing.plan,
        {"platform": "cpus"},
        ValueError,
        "platform: got 'cpus', expected one of 'cpu', 'cuda', 'gpu', 'rocm', 'tpu', or "
        "None. None takes JAX's default.",
    ),
    "head: ignore_index for distributions": Mistake(
        linear,
        {"labels": DISTRIBUTIONS, "ignore_index": -100},
        ValueError,
        "ignore_index: got -100 with labels that are distributions, expected None. "
        "Leave examples out with weights of 0.",
    ),
    "head: weights of the classes": Mistake(
        linear,
        {"weights": zeros((6,))},
        ValueError,
        "weights: got shape (6,), expected (4,), one per example. Give one weight per "
        "example, or a constant through jnp.full.",
    ),
    "head: too few class_weights": Mistake(
        linear,
        {"class_weights": zeros((4,))},
        ValueError,
        "class_weights: got shape (4,), expected (6,), one per class. Give one weight "
        "per class, in the order of the class ids.",
    ),
}
MISTAKES |= {
    "head: distributions in chunks of classes": Mistake(
        linear,
        {"labels": DISTRIBUTIONS, "strategy": "vocab", "reduction": "sum"},
        ValueError,
        'strategy: got "vocab" with labels that are distributions, expected "tokens", '
        '"recompute", "dense" or "auto". What has a number for every class is cut with '
        "its examples.",
    ),
    "head: chunks of distributions in forward mode": Mistake(
        linear,
        {"labels": DISTRIBUTIONS, "strategy": "recompute", "forward_mode": True},
        ValueError,
        'strategy: got "recompute" with labels that are distributions and '
        'forward_mode=True, expected "dense" or "auto". Their chunks have a '
        "rule for reverse mode alone.",
    ),
}


def message_of(
    function: Callable[..., Any], error: type[Exception], /, **arguments: Any
) -> str:
    """What the call raises, which must be the same with traced arrays."""
    given = DEFAULTS[function] | arguments
    arrays = {k: v for k, v in given.items() if isinstance(v, jax.Array)}
    static = {k: v for k, v in given.items() if k not in arrays}
    with pytest.raises(error) as called:
        function(**given)
    # Nothing runs in eval_shape.
    with pytest.raises(error) as traced:
        jax.eval_shape(lambda arrays: function(**static, **arrays), arrays)
    assert type(called.value) is type(traced.value) is error
    assert str(called.value) == str(traced.value)
    return str(called.value)


@pytest.mark.parametrize("name", MISTAKES)
def test_message_says_what_came_what_was_expected_and_the_fix(name: str) -> None:
    mistake = MISTAKES[name]
    message = message_of(mistake.function, mistake.error, **mistake.arguments)
    assert message == mistake.message


def test_every_argument_has_a_message() -> None:
    tested = {argument for m in MISTAKES.values() for argument in m.arguments}
    tested |= {"reduction"}  # below
    for function in (integer, dense, linear):
        assert set(inspect.signature(function).parameters) - tested == set()


@pytest.mark.parametrize("value", ["avg", "Mean", None, 1])
@pytest.mark.parametrize("function", [integer, dense])
def test_unknown_reduction_lists_the_three(
    function: Callable[..., Any], value: Any
) -> None:
    message = message_of(function, ValueError, reduction=value)
    expected = f'reduction: got {value!r}, expected one of "none", "sum", "mean". '
    assert message.startswith(expected)


@pytest.mark.parametrize(
    ("function", "argument"),
    [
        (integer, "logits"),
        (integer, "labels"),
        (integer, "class_weights"),
        (dense, "labels"),
        (dense, "weights"),
        (dense, "where"),
        (jl.softmax, "logits"),
        (jl.log_softmax, "where"),
    ],
)
@pytest.mark.parametrize(
    ("value", "description"),
    [
        ("0.1", "'0.1' of type str"),
        ([[1.0, 2.0], [3.0]], "a list"),
        (np.array(["a"]), "an array of shape (1,) and dtype <U1"),
        (np.array([None]), "an array of shape (1,) and dtype object"),
    ],
    ids=["string", "ragged", "strings", "objects"],
)
def test_what_is_no_array_is_a_type_error_that_names_the_argument(
    function: Callable[..., Any], argument: str, value: Any, description: str
) -> None:
    message = message_of(function, TypeError, **{argument: value})
    expected = f"{argument}: got {description}, expected an array"
    assert message.startswith(expected)


@pytest.mark.parametrize("argument", ["logits", "labels"])
@pytest.mark.parametrize("function", [integer, dense])
def test_none_for_a_required_array_names_the_argument(
    function: Callable[..., Any], argument: str
) -> None:
    message = message_of(function, TypeError, **{argument: None})
    assert message.startswith(f"{argument}: got None of type NoneType, expected ")


def test_message_does_not_print_a_whole_array() -> None:
    message = message_of(integer, TypeError, logits={"logits": np.zeros((100, 100))})
    assert message.startswith("logits: got ")
    assert len(message) < 300


JITTED: dict[str, tuple[Any, Any, str]] = {
    "axis": (-1, "int32", "an int or a tuple of ints"),
    "ignore_index": (-100, "int32", "an int or None"),
    "logit_softcap": (30.0, "float32", "a Python number or None"),
    "forward_mode": (True, "bool", "True or False"),
    "return_stats": (True, "bool", STATS),
    "workspace_bytes": (2**20, "int32", "an int or None"),
}


@pytest.mark.parametrize("argument", JITTED)
def test_what_jit_traces_is_told_that_it_is_static_and_how_to_keep_it_so(
    argument: str,
) -> None:
    value, dtype, expected = JITTED[argument]
    loss: Any = integer
    given: tuple[Any, ...] = (LOGITS, IDS)
    if argument == "workspace_bytes":
        loss, given = jl.linear_softmax_cross_entropy, (LOGITS, zeros((V, V)), IDS)
    with pytest.raises(TypeError) as raised:
        jax.jit(loss)(*given, **{argument: value})
    assert str(raised.value) == (
        f"{argument}: got an array of shape () and dtype {dtype}, expected {expected}. "
        + STATIC.format(argument)
    )
    # Each of the two ways that the message names.
    named = jax.jit(loss, static_argnames=argument)(*given, **{argument: value})
    bound = jax.jit(functools.partial(loss, **{argument: value}))(*given)
    jax.tree.map(np.testing.assert_array_equal, named, bound)


def test_an_axis_that_jit_traces_by_position_is_told_so_too() -> None:
    with pytest.raises(TypeError, match=r"^axis: got an array of shape \(\) and dtype"):
        jax.jit(dense)(LOGITS, DISTRIBUTIONS, -1)
    jitted = jax.jit(dense, static_argnames="axis")
    np.testing.assert_array_equal(
        jitted(LOGITS, DISTRIBUTIONS, -1), dense(LOGITS, DISTRIBUTIONS)
    )


@pytest.mark.parametrize("argument", ["labels", "logits", "weights", "class_weights"])
def test_bytes_in_the_other_order_are_told_how_to_turn(argument: str) -> None:
    given: dict[str, Any] = {
        "logits": np.zeros((B, V), np.float32),
        "labels": np.zeros(B, np.int32),
        "weights": np.ones(B, np.float32),
        "class_weights": np.ones(V, np.float32),
    }
    native = given[argument]
    turned = native.astype(native.dtype.newbyteorder("S"))
    with pytest.raises(TypeError) as raised:
        integer(**given | {argument: turned})
    fix = f'{argument}.astype({argument}.dtype.newbyteorder("="))'
    assert str(raised.value).startswith(f"{argument}: got an array of shape ")
    assert str(raised.value).endswith(
        f"Its bytes are in the other order: convert them with {fix}."
    )
    mended = turned.astype(turned.dtype.newbyteorder("="))
    np.testing.assert_array_equal(
        integer(**given | {argument: mended}), integer(**given)
    )


# A fix that does not fit is worse than none.


def test_boolean_class_ids_are_not_taken_for_floats() -> None:
    message = message_of(integer, TypeError, labels=IDS == 0)
    assert message.startswith("labels: got dtype bool, expected an integer dtype")
    assert "floats" not in message


def test_labels_of_a_wrong_size_are_not_told_to_add_an_axis() -> None:
    # (1, 4) would be wrong as well: only the classes' shape can be shared.
    message = message_of(dense, ValueError, labels=zeros((B,)))
    assert message.startswith("labels: got shape (4,), expected (4, 6)")
    assert "labels[None, :]" not in message


@pytest.mark.parametrize("shape", [(B, 5), (5,), (), (1, 1, B, V)])
def test_mask_of_a_wrong_size_is_not_told_to_add_an_axis(
    shape: tuple[int, ...],
) -> None:
    message = message_of(integer, ValueError, where=zeros(shape, jnp.bool_))
    assert message.startswith(f"where: got shape {shape}, expected {MASK_SHAPES}")
    assert "mask[None, :]" not in message


def test_infinite_z_loss_is_told_that_it_must_be_finite() -> None:
    message = message_of(integer, ValueError, z_loss=INF)
    assert message.startswith("z_loss: got inf, expected ")
    assert "finite" in message


def test_axis_name_outside_of_its_mesh_is_named() -> None:
    with pytest.raises(Exception, match=r"axis.* model\b|'model'") as raised:
        integer(LOGITS, IDS, axis_name="model")
    assert isinstance(raised.value, NameError | ValueError)


# What must not be refused


@pytest.mark.parametrize("name", ["label_smoothing", "z_loss", "logit_scale"])
@pytest.mark.parametrize(
    "value", [0, 0.25, np.float32(0.25), np.float64(0.25), np.array(0.25, np.float32)]
)
def test_scalars_of_every_kind_are_taken(name: str, value: Any) -> None:
    from_float = integer(LOGITS + 1, IDS, **{name: float(value)})
    np.testing.assert_array_equal(integer(LOGITS + 1, IDS, **{name: value}), from_float)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "uint32"])
def test_class_ids_of_every_integer_dtype_are_taken(dtype: str) -> None:
    logits = jnp.arange(B * V, dtype=jnp.float32).reshape(B, V)
    ids = jnp.arange(B)
    expected = integer(logits, ids)
    np.testing.assert_array_equal(integer(logits, ids.astype(dtype)), expected)


def test_lists_and_numpy_arrays_are_converted() -> None:
    rows = [[0.0, 1.0], [2.0, 3.0]]
    expected = integer(jnp.asarray(rows), jnp.asarray([0, 1]))
    np.testing.assert_array_equal(integer(rows, [0, 1]), expected)
    given = np.asarray(rows, np.float32), np.array([0, 1], np.int32)
    np.testing.assert_array_equal(integer(*given), expected)


def test_what_a_loss_takes_of_each_example_is_named() -> None:
    with pytest.raises(ValueError, match=r"^args") as raised:
        linear_loss(
            lambda rows, given: given["old"] * rows.nll,
            *DEFAULTS[linear].values(),
            {"old": zeros((3,))},
        )
    assert str(raised.value) == (
        "args[0]['old']: got shape (3,), expected (4,), one per example. Give one "
        "entry per example, and let function close over what all share."
    )


def test_an_entropy_that_is_not_asked_for_is_explained() -> None:
    with pytest.raises(TypeError) as raised:
        linear_loss(
            lambda rows: rows.nll - 0.1 * rows.entropy, *DEFAULTS[linear].values()
        )
    assert "Rows.entropy is None without uses_entropy=True." in raised.value.__notes__
