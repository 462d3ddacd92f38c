"""Every message about shapes (on chex), dtypes and options.

House format: *argument: what came, what was expected. The fix.*
"""

import functools
import math
import numbers
import operator
from collections.abc import Callable
from typing import Any, TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

# What a caller gave, of any type.
Given = Any
# What has been checked; None is what changes nothing.
Scalar = Array | float | None
Size = Any  # an int, or an expression of the symbols of `jax.export`
Shape = tuple[Size, ...]
Function = TypeVar("Function", bound=Callable[..., Any])

_LOGITS_DTYPES = ("float16", "bfloat16", "float32", "float64")
_REDUCTIONS = ("none", "sum", "mean")
_LAYOUTS = ("dv", "vd")
_STRATEGIES = ("auto", "tokens", "recompute", "vocab", "dense")
_DIRECTIONS = ("forward", "reverse", "jensen_shannon")
# What labels are that have a number for every class.
DISTRIBUTIONS = "labels that are distributions"
TEACHERS = "divergences from a teacher"
_RESTS = ("ignore", "bucket", "renormalize")
_METRICS = ("entropy", "rank", "confidence", "label_logit")


def logits(x: Given) -> Array:
    """Floating logits of at least one axis."""
    x = _array("logits", x)
    _demand(
        x.dtype.name in _LOGITS_DTYPES,
        TypeError,
        "logits",
        f"dtype {x.dtype}",
        f"one of {', '.join(_LOGITS_DTYPES)}",
        "Convert them: logits.astype(jnp.float32).",
    )
    _demand(
        x.ndim > 0,
        ValueError,
        "logits",
        "a scalar",
        "an array with a class axis",
        "Logits have one score per class: shape (batch, classes).",
    )
    return x


def class_axes(axis: Given, ndim: int, *, allow_none: bool) -> Shape:
    """Class axes as non-negative ints, in the order given."""
    if axis is None and allow_none:
        return tuple(range(ndim))
    given = axis if isinstance(axis, tuple) else (axis,)
    expected = "an int or a tuple of ints" + (", or None" if allow_none else "")
    fix = "Pass axis=-1 where the classes are the last axis."
    _demand(
        axis is not None and len(given) > 0,
        ValueError,
        "axis",
        repr(axis),
        expected,
        fix,
    )
    entries = [_integer("axis", a, axis, expected, fix) for a in given]
    _demand(
        all(-ndim <= a < ndim for a in entries),
        ValueError,
        "axis",
        repr(axis),
        f"values from {-ndim} to {ndim - 1} for logits of {ndim} axes",
        fix,
    )
    axes = tuple(a % ndim for a in entries)
    _demand(
        len(set(axes)) == len(axes),
        ValueError,
        "axis",
        repr(axis),
        "each axis once",
        f"It names axes {axes} of the logits. Name each class axis once.",
    )
    return axes


def batch_shape(shape: Shape, axes: Shape) -> Shape:
    """The shape of the logits without the class axes."""
    return tuple(n for i, n in enumerate(shape) if i not in axes)


def integer_labels(
    x: Given, shape: Shape, axes: Shape, ignore_index: Given, *, fused: bool = False
) -> tuple[Array, int | None]:
    """Class ids, one per example, and the one that does not count.

    Labels of 64 bits that JAX would wrap are narrowed here, which can change the
    latter.
    """
    ignored = _ignore_index(ignore_index)
    x, ignored = _narrowed(x, ignored)
    x = _array("labels", x)
    is_integer("labels", x, fused=fused)
    batch = batch_shape(shape, axes)
    fix = "Give one class id per example."
    if x.ndim == len(batch) + 1 and x.shape == (*batch, 1):
        fix = f"Drop the last axis: labels[{':, ' * len(batch)}0]."
    elif x.shape == shape and fused:
        fix = "For one-hot labels pass the class ids: labels.argmax(-1)."
    elif x.shape == shape:
        fix = "For one-hot labels call softmax_cross_entropy."
    _demand_shape("labels", x, batch, f"{batch} for logits of shape {shape}", fix)
    return x, ignored


def _narrowed(
    x: Given, ignored: int | None, unfit: int = -1, apart: int = -2
) -> tuple[Any, int | None]:
    """Labels that JAX would wrap to 32 bits; those that do not fit become invalid.

    These become `unfit`, and what is ignored, if it does not fit, `apart`.
    """
    wide = _as_numpy(x)
    if not isinstance(wide, np.ndarray | np.integer) or not wide.dtype.isnative:
        return x, ignored
    if wide.dtype.kind not in "iu" or wide.dtype.itemsize < 8:
        return x, ignored
    if jax.dtypes.canonicalize_dtype(wide.dtype) == wide.dtype:
        return x, ignored
    most = np.iinfo(np.int32).max
    fits = (wide >= 0) & (wide <= most)
    ids = np.where(fits, np.where(fits, wide, 0).astype(np.int32), np.int32(unfit))
    if ignored is None or 0 <= ignored <= most:
        return ids, ignored
    return np.where(wide == ignored, np.int32(apart), ids), apart


def _as_numpy(x: Given) -> Any:
    """Python numbers and lists of them as an array of as many bits as they need."""
    if not isinstance(x, list | tuple | int):
        return x
    try:
        return np.asarray(x)
    except (TypeError, ValueError):  # traced, or ragged, for which `_array` has words
        return x


def is_integer(argument: str, x: Given, *, fused: bool = False) -> None:
    """Class ids, not numbers that look like them."""
    fix = f"class ids held as floats convert with {argument}.astype(jnp.int32)."
    if x.dtype == jnp.bool_:
        fix = f"For 0/1 labels convert with {argument}.astype(jnp.int32)."
    elif not fused:
        fix = f"For a distribution over classes call softmax_cross_entropy; {fix}"
    else:
        fix = f"Convert class ids: {argument}.astype(jnp.int32)."
    _demand(
        jnp.issubdtype(x.dtype, jnp.integer),
        TypeError,
        argument,
        f"dtype {x.dtype}",
        "an integer dtype (class ids)",
        fix,
    )


def dense_labels(x: Given, shape: Shape, axes: Shape, *, fused: bool = False) -> Array:
    """A weight per class: the logits' rank, sizes equal, or 1 on a batch axis."""
    x = _array("labels", x)
    _demand(
        _is_real(x.dtype),
        TypeError,
        "labels",
        f"dtype {x.dtype}",
        "a real dtype",
        "Labels are a weight per class: labels.astype(jnp.float32).",
    )
    batch = batch_shape(shape, axes)
    fix = "Give one weight per class and example."
    if x.shape == batch and fused:
        fix = "Convert class ids held as floats: labels.astype(jnp.int32)."
    elif x.shape == batch:
        fix = "For class ids call softmax_cross_entropy_with_integer_labels"
        whole = jnp.issubdtype(x.dtype, jnp.integer)
        fix += "." if whole else ", with labels.astype(jnp.int32)."
    elif x.shape == tuple(shape[i] for i in axes):
        fix = "Add batch axes of size 1 to share one distribution: labels[None, :]."
    allowed = [n if i in axes else {1, n} for i, n in enumerate(shape)]
    expected = f"{shape}, or 1 on a batch axis, for logits of shape {shape}"
    _demand_shape("labels", x, allowed, expected, fix)
    return x


def where(x: Given, shape: Shape, axes: Shape) -> tuple[Array | None, Array | None]:
    """A mask, as `(classes of the logits' rank, examples of the batch's shape)`."""
    if x is None:
        return None, None
    x = _mask(x)
    batch = batch_shape(shape, axes)
    if x.ndim != len(shape) and x.shape == batch:
        return None, x
    fix = "Give one flag per class, per class and example, or per example."
    if x.shape == tuple(shape[i] for i in axes):
        fix = "Index a class mask up to the logits' rank: mask[None, :]."
    expected = f"{shape} or broadcastable to it with the same rank, or {batch}"
    _demand_shape("where", x, [{1, n} for n in shape], expected, fix)
    classes = [n if i in axes else x.shape[i] for i, n in enumerate(shape)]
    return jnp.broadcast_to(x, classes), None


def _mask(x: Given) -> Array:
    x = _array("where", x)
    _demand(
        x.dtype == jnp.bool_,
        TypeError,
        "where",
        f"dtype {x.dtype}",
        "bool",
        "Compare it: mask != 0.",
    )
    return x


def weights(x: Given, batch: Shape) -> Array | None:
    """A weight per example; what is not floating is converted."""
    if x is None:
        return None
    x = _array("weights", x)
    _demand(
        _is_real(x.dtype),
        TypeError,
        "weights",
        f"dtype {x.dtype}",
        "a real dtype",
        "Weights are numbers or flags, one per example: weights.astype(jnp.float32).",
    )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        x = x.astype(jnp.asarray(0.0).dtype)
    fix = "Give one weight per example, or a constant through jnp.full."
    if x.shape == (*batch, 1):
        fix = f"Drop the last axis: weights[{':, ' * len(batch)}0]."
    _demand_shape("weights", x, batch, f"{batch}, one per example", fix)
    return x


def class_weights(x: Given, num_classes: Size) -> Array | None:
    """A weight per class."""
    if x is None:
        return None
    x = _floating("class_weights", x)
    fix = "Give one weight per class, in the order of the class ids."
    expected = f"({num_classes},), one per class"
    _demand_shape("class_weights", x, (num_classes,), expected, fix)
    return x


def hidden(x: Given, argument: str = "hidden") -> Array:
    """Features of each example, the last axis."""
    return _features(argument, x, 1, "a feature axis", "(batch, features)")


def kernel_layout(x: Given, argument: str = "kernel_layout") -> Any:
    """Which axis of the kernel has the classes."""
    _demand(
        isinstance(x, str) and x in _LAYOUTS,
        ValueError,
        argument,
        repr(x),
        'one of "dv", "vd"',
        '"dv" is the kernel of a Dense layer, (features, classes); "vd" an embedding '
        "table, (classes, features).",
    )
    return x


def kernel(x: Given, layout: Given, features: Size, of: str = "") -> Array:
    """The matrix that turns features into logits, of the student or a teacher."""
    layout = kernel_layout(layout, f"{of}kernel_layout")
    x = _features(f"{of}kernel", x, 2, "two axes", "(features, classes)")
    names = "(features, classes)" if layout == "dv" else "(classes, features)"
    fix = f'{of}kernel_layout="{layout}" is {names}.'
    if x.ndim == 2 and x.shape[1 if layout == "dv" else 0] == features:
        other = "vd" if layout == "dv" else "dv"
        fix += f' For the transposed matrix pass {of}kernel_layout="{other}".'
    shape = (features, None) if layout == "dv" else (None, features)
    expected = f"{names} with {features} features, as {of}hidden has"
    _demand_shape(f"{of}kernel", x, shape, expected, fix)
    return x


def bias(x: Given, num_classes: Size, argument: str = "bias") -> Array | None:
    """What is added to the logit of each class."""
    if x is None:
        return None
    x = _floating(argument, x)
    expected = f"({num_classes},), one per class"
    _demand_shape(argument, x, (num_classes,), expected, "Give one value per class.")
    return x


def has_head_of_teacher(
    logits: Given, hidden: Given, kernel: Given, beside: dict[str, Given]
) -> bool:
    """Whether a teacher is hidden states and a kernel, of which logits are made."""
    fix = (
        "Pass teacher_logits, or teacher_hidden and teacher_kernel, of which the "
        "logits are formed in pieces."
    )
    _demand(
        (hidden is None) == (kernel is None),
        ValueError,
        "teacher_kernel" if kernel is None else "teacher_hidden",
        "None with " + ("teacher_hidden" if kernel is None else "teacher_kernel"),
        "both or neither",
        fix,
    )
    both = logits is not None and hidden is not None
    _demand(
        (logits is None) != (hidden is None),
        ValueError,
        "teacher_logits",
        "an array beside teacher_hidden" if both else "None without teacher_hidden",
        "one of the two",
        fix,
    )
    for argument, x in beside.items():
        _demand(
            x is None or hidden is not None,
            ValueError,
            argument,
            _describe(x),
            "None with teacher_logits",
            "It belongs to a teacher_kernel.",
        )
    return hidden is not None


def teacher_head(
    hidden: Array, batch: Shape, kernel: Array, classes: tuple[Size, Size]
) -> None:
    """A teacher of the student's examples and classes."""
    shape = (*batch, None)
    expected = f"{batch} and a feature axis, the examples of hidden"
    fix = "Teacher and student see the same examples; features may differ."
    _demand_shape("teacher_hidden", hidden, shape, expected, fix)
    of_teacher, of_student = classes
    _demand(
        of_teacher == of_student,
        ValueError,
        "teacher_kernel",
        f"shape {kernel.shape} of {of_teacher} classes",
        f"{of_student} classes, as the student's kernel has",
        "Pad the smaller vocabulary and mask with where.",
    )


def fused_where(
    x: Given, num_classes: Size, batch: Shape
) -> tuple[Array | None, Array | None]:
    """A mask, as `(classes, examples)`.

    That of classes has the shape `(V,)`, or `B... V` where examples have their own.
    """
    if x is None:
        return None, None
    x = _mask(x)
    if x.shape != (num_classes,) and x.shape == batch:
        return None, x
    if x.shape == (num_classes,):
        return x, None
    shape = (*batch, num_classes)
    fix = "Give one flag per class, per class and example, or per example."
    expected = (
        f"({num_classes},), {batch}, or {shape} or broadcastable to it with the same "
        "rank"
    )
    _demand_shape("where", x, [{1, n} for n in shape], expected, fix)
    if x.shape[-1] == 1 != num_classes:
        return None, jnp.broadcast_to(x[..., 0], batch)
    if all(n == 1 for n in x.shape[:-1]):
        return x.reshape(num_classes), None
    return jnp.broadcast_to(x, shape), None


def strategy(x: Given) -> Any:
    """How the fused loss goes through the logits."""
    _demand(
        isinstance(x, str) and x in _STRATEGIES,
        ValueError,
        "strategy",
        repr(x),
        f"one of {', '.join(map(repr, _STRATEGIES))}",
        '"auto" chooses; the docstring says how.',
    )
    return x


def suits(
    strategy: str,
    reduction: str,
    every_class: str | None,
    forward_mode: bool,
) -> None:
    """A strategy that can do what is asked for.

    Labels with a number for every class are named by what they are.
    """
    if strategy in ("auto", "dense"):
        return
    _demand(
        every_class is None or strategy != "vocab",
        ValueError,
        "strategy",
        f'"vocab" with {every_class}',
        '"tokens", "recompute", "dense" or "auto"',
        "What has a number for every class is cut with its examples.",
    )
    _demand(
        every_class is None or not forward_mode,
        ValueError,
        "strategy",
        f'"{strategy}" with {every_class} and forward_mode=True',
        '"dense" or "auto"',
        "Their chunks have a rule for reverse mode alone.",
    )
    if strategy != "tokens":
        return
    _demand(
        reduction != "none",
        ValueError,
        "strategy",
        '"tokens" with reduction="none"',
        'reduction="sum" or "mean"',
        'It forms the gradient of a sum in one pass. Pass strategy="recompute" for '
        "one loss per example.",
    )
    _demand(
        not forward_mode,
        ValueError,
        "strategy",
        '"tokens" with forward_mode=True',
        '"recompute", "vocab", "dense" or "auto"',
        "Its pass forms a reverse-mode gradient.",
    )


def strategy_of_examples(x: Given) -> Any:
    """How a fused function of each example goes through the logits."""
    _demand(
        not isinstance(x, str) or x != "tokens",
        ValueError,
        "strategy",
        '"tokens" with one result per example',
        '"recompute", "vocab", "dense" or "auto"',
        "It forms the gradient of a sum in one pass: for a sum or a mean call "
        "linear_softmax_cross_entropy.",
    )
    return strategy(x)


def function(x: Given) -> Any:
    """A loss of the statistics."""
    _demand(
        callable(x),
        TypeError,
        "function",
        _describe(x),
        "a function of Rows and args",
        "Pass, say, lambda rows: rows.nll.",
    )
    try:
        hash(x)
    except TypeError:
        _demand(
            False,
            TypeError,
            "function",
            f"a {type(x).__name__} that cannot be hashed",
            "a function of Rows and args",
            "Wrap it in one: lambda rows, *args: f(rows, *args).",
        )
    return x


def function_args(x: tuple[Given, ...], batch: Shape) -> Any:
    """What a loss of the statistics takes of each example."""

    def of(path: Any, leaf: Given) -> Array:
        name = "args" + jax.tree_util.keystr(path)
        leaf = _array(name, leaf)
        fix = "Give one entry per example, and let function close over what all share."
        expected = f"{batch}, one per example"
        _demand_shape(name, leaf, batch, expected, fix)
        return leaf

    return jax.tree_util.tree_map_with_path(
        of, jax.tree.map(_held, x, is_leaf=_is_held)
    )


def of_function(values: Given, aux: Given, batch: Shape) -> None:
    """What a loss of the statistics returns: one number per example."""
    good = hasattr(values, "dtype") and _is_real(values.dtype)
    fix = "Compute it of each example by itself; the sum is taken outside."
    expected = f"floating values of shape {batch}, one per example"
    came = _describe(values)
    _demand(good, TypeError, "function", f"{came} as its result", expected, fix)
    for leaf in (values, *jax.tree.leaves(aux)):
        _demand(
            leaf.shape == batch,
            ValueError,
            "function",
            f"a result of shape {leaf.shape}",
            f"{batch}, one number per example",
            fix,
        )


def closes_over_nothing(closed: tuple[Array, ...]) -> None:
    """A function that runs inside of a `shard_map` that it was not written in."""
    _demand(
        not closed,
        ValueError,
        "function",
        "one that closes over arrays, on a mesh of explicit axes",
        "one of Rows and args alone",
        "Pass what it needs in args, as jnp.broadcast_to(x, labels.shape).",
    )


def closes_over_parts(shared: bool, strategy: str) -> None:
    """A function whose cotangents of all devices are not summed too early."""
    _demand(
        not shared or strategy != "tokens",
        ValueError,
        "strategy",
        '"tokens" with a function that closes over what all devices of a shard_map '
        "share",
        '"auto", "recompute", "vocab" or "dense"',
        "Or pass what it needs in args, as jnp.broadcast_to(x, labels.shape).",
    )


def reduced(x: Given) -> None:
    """A reduction, where the gradient of a sum is formed."""
    _demand(
        x != "none",
        ValueError,
        "reduction",
        'reduction="none"',
        '"sum" or "mean"',
        "For one number per example call linear_softmax_log_probs.",
    )


def workspace_bytes(x: Given) -> int | None:
    """Bytes that a chunk may take, or None."""
    if x is None:
        return None
    fix = "Pass a number of bytes, such as 2**28."
    number = _integer("workspace_bytes", x, x, "an int or None", fix)
    _demand(
        number > 0,
        ValueError,
        "workspace_bytes",
        repr(x),
        "a number above 0, or None",
        "None takes the default of the platform.",
    )
    return number


def compute_dtype(x: Given) -> np.dtype[Any] | None:
    """The dtype of matmuls, or None."""
    if x is None:
        return None
    fix = 'Pass "bfloat16", say, or None for what hidden and kernel promote to.'
    try:
        dtype = jnp.dtype(x)
    except TypeError:
        dtype = None
    _demand(
        dtype is not None and dtype.name in _LOGITS_DTYPES,
        TypeError,
        "compute_dtype",
        repr(x) if dtype is None else dtype.name,
        f"one of {', '.join(_LOGITS_DTYPES)}, or None",
        fix,
    )
    _demand(
        jax.dtypes.canonicalize_dtype(dtype) == dtype,
        ValueError,
        "compute_dtype",
        "float64 while 64-bit numbers are off",
        "a dtype that JAX has",
        'Call jax.config.update("jax_enable_x64", True) first.',
    )
    return dtype


def platform(x: Given, known: tuple[str, ...]) -> str | None:
    """The name of a platform, or None."""
    _demand(
        x is None or x in known,
        ValueError,
        "platform",
        repr(x),
        f"one of {', '.join(map(repr, sorted(known)))}, or None",
        "None takes JAX's default.",
    )
    return None if x is None else str(x)


def is_distribution(labels: Given) -> bool:
    """Whether labels are floating: a weight per class, not class ids."""
    labels = _array("labels", _as_numpy(_held(labels)))
    return bool(jnp.issubdtype(labels.dtype, jnp.floating))


def no_ignore_index(x: Given) -> None:
    """Distributions have no id that could be ignored."""
    _demand(
        x is None,
        ValueError,
        "ignore_index",
        f"{x!r} with labels that are distributions",
        "None",
        "Leave examples out with weights of 0.",
    )


def _ignore_index(x: Given) -> int | None:
    """A label that does not count."""
    if x is None:
        return None
    fix = "Pass the label itself, such as -100; mask several labels with weights."
    return _integer("ignore_index", x, x, "an int or None", fix)


def label_smoothing(x: Given) -> Scalar:
    """A fraction, or None for zero."""
    return _scalar("label_smoothing", x, 0.0, 1.0, "a number from 0 to 1, 1 excluded")


def z_loss(x: Given) -> Scalar:
    """A coefficient, or None for zero."""
    return _scalar("z_loss", x, 0.0, math.inf, "a finite number of 0 or more")


def logit_scale(x: Given, batch: Shape) -> Scalar:
    """A factor, of all examples or of each, or None for one."""
    x = _held(x)
    if isinstance(x, jax.Array | np.ndarray) and x.ndim and _is_real(x.dtype):
        x = _array("logit_scale", x)
        fix = "Give one number for all, or one per example."
        expected = f"(), or {batch}, one per example"
        _demand_shape("logit_scale", x, batch, expected, fix)
        return x
    return _scalar("logit_scale", x, -math.inf, math.inf, "a finite number", drop=1.0)


def logit_softcap(
    x: Given, argument: str = "logit_softcap", instead: str = "logit_scale"
) -> float | None:
    """A positive constant, or None."""
    if x is None:
        return None
    _demand_static(argument, x, "a Python number or None")
    _demand(
        _is_number(x),
        TypeError,
        argument,
        _describe(x),
        "a Python number or None",
        f"To vary the logits at run time, use {instead}.",
    )
    _demand(
        0 < x < math.inf,
        ValueError,
        argument,
        repr(x),
        "a finite number above 0, or None",
        "Pass None for no cap.",
    )
    return float(x)


def top_k_labels(
    ids: Given, probs: Given, batch: Shape, *, fused: bool = False
) -> tuple[Array, Array]:
    """Class ids, several per example, and how probable each is."""
    ids, _ = _narrowed(ids, -1, unfit=-2, apart=-1)  # -1 pads
    ids, probs = _array("ids", ids), _array("probs", probs)
    is_integer("ids", ids, fused=True)
    fix = "Give K class ids per example, with -1 for none, along a last axis."
    if ids.shape == batch:
        name = "linear_softmax_cross_entropy"
        if not fused:
            name = "softmax_cross_entropy_with_integer_labels"
        fix = f"For one class id per example call {name}."
    expected = f"{batch} and one axis more, of K"
    _demand_shape("ids", ids, (*batch, None), expected, fix)
    _demand(
        _is_real(probs.dtype),
        TypeError,
        "probs",
        f"dtype {probs.dtype}",
        "a real dtype",
        "Give a probability per id: probs.astype(jnp.float32).",
    )
    fix = "Give one probability per id."
    _demand_shape("probs", probs, ids.shape, f"{ids.shape}, as ids", fix)
    return ids, probs


def rest(x: Given) -> Any:
    """What becomes of classes that a label does not name."""
    fix = '"bucket" takes all others for one more class, "renormalize" for none.'
    return _one_of("rest", x, _RESTS, fix)


def as_divergence(x: Given, rest: str) -> bool:
    """Whether the entropy of labels is subtracted, of those that sum to one."""
    wanted = flag("as_divergence", x)
    _demand(
        not wanted or rest != "ignore",
        ValueError,
        "as_divergence",
        'True with rest="ignore"',
        'rest="bucket" or "renormalize"',
        "Labels that leave a part out are no distribution.",
    )
    return wanted


def direction(x: Given) -> Any:
    """Of a divergence."""
    fix = '"forward" is KL(teacher || student), "reverse" KL(student || teacher).'
    return _one_of("direction", x, _DIRECTIONS, fix)


def temperature(x: Given) -> Scalar:
    """What divides logits, as their factor; None for one."""
    x = _held(x)
    expected = "a finite number above 0"
    fix = "1 leaves the logits as they are."
    if _is_number(x):
        _demand(0 < x < math.inf, ValueError, "temperature", repr(x), expected, fix)
        return None if x == 1 else 1 / x
    _is_traced("temperature", x, expected, fix)
    x = jnp.asarray(x)
    return 1 / x.astype(jnp.promote_types(x.dtype, jnp.float32))


def teacher_weight(x: Given) -> Any:
    """The part of the teacher in a mixture."""
    x = _held(x)
    expected = "a number from 0 to 1, both excluded"
    if _is_number(x):
        fix = 'For one of the two divergences, pass direction="forward" or "reverse".'
        _demand(0 < x < 1, ValueError, "teacher_weight", repr(x), expected, fix)
        return x
    _is_traced("teacher_weight", x, expected)
    return x


def teacher_logits(x: Given, shape: Shape) -> Array:
    """Floating logits of the student's classes and examples."""
    x = _array("teacher_logits", x)
    _demand(
        x.dtype.name in _LOGITS_DTYPES,
        TypeError,
        "teacher_logits",
        f"dtype {x.dtype}",
        f"one of {', '.join(_LOGITS_DTYPES)}",
        "Convert them: teacher_logits.astype(jnp.float32).",
    )
    _demand_shape(
        "teacher_logits",
        x,
        shape,
        f"{shape}, as the student's",
        "Both have the same classes: pad the smaller vocabulary and mask with where.",
    )
    return x


def reduction(x: Given) -> Any:
    """One of the three reductions."""
    _demand(
        isinstance(x, str) and x in _REDUCTIONS,
        ValueError,
        "reduction",
        repr(x),
        'one of "none", "sum", "mean"',
        '"none" returns one loss per example, "sum" and "mean" a scalar.',
    )
    return x


def axis_name(x: Given) -> tuple[str, ...]:
    """Mesh axes over which the classes are split; () for none."""
    return _mesh_axes("axis_name", x, "classes", "model")


def batch_axis_name(
    x: Given, axis_name: tuple[str, ...], reduction: Given
) -> tuple[str, ...]:
    """Mesh axes over which the examples are split; () for none."""
    names = _mesh_axes("batch_axis_name", x, "examples", "data")
    _demand(
        not names or reduction != "none",
        ValueError,
        "batch_axis_name",
        f'{x!r} with reduction="none"',
        'reduction="sum" or "mean"',
        "One loss per example stays where the example is.",
    )
    _demand(
        not set(names) & set(axis_name),
        ValueError,
        "batch_axis_name",
        repr(x),
        f"other mesh axes than axis_name={axis_name!r}",
        "An axis splits the classes or the examples.",
    )
    return names


def normalizer(x: Given, reduction: Given) -> Scalar:
    """What a mean divides by, or None for its weights."""
    if x is None:
        return None
    x = _held(x)
    expected = "a finite number of 0 or more, a traced scalar, or None"
    fix = "Pass the number of tokens of all steps, say, or None for those of this call."
    if _is_number(x):
        good = bool(0 <= x < math.inf)
        _demand(good, ValueError, "normalizer", repr(x), expected, fix)
    else:
        good = isinstance(x, jax.Array | np.ndarray) and x.ndim == 0
        good = good and _is_real(x.dtype)
        _demand(good, TypeError, "normalizer", _describe(x), expected, fix)
    _demand(
        reduction == "mean",
        ValueError,
        "normalizer",
        f'one with reduction="{reduction}"',
        'reduction="mean"',
        "A sum divides by nothing.",
    )
    return float(x) if _is_number(x) else _array("normalizer", x)


def _mesh_axes(argument: str, x: Given, what: str, example: str) -> tuple[str, ...]:
    """Mesh axes of a `shard_map` over which something is split; () for none."""
    names = x if isinstance(x, tuple) else () if x is None else (x,)
    _demand(
        all(isinstance(name, str) for name in names),
        TypeError,
        argument,
        repr(x),
        "a mesh axis name, a tuple of them, or None",
        f"Name the axis that splits the {what} inside shard_map: "
        f'{argument}="{example}".',
    )
    _demand(
        len(set(names)) == len(names),
        ValueError,
        argument,
        repr(x),
        "each mesh axis once",
        "Drop the repeated name.",
    )
    expected = "a mesh axis of an enclosing shard_map"
    for name in names:
        try:
            index = jax.lax.axis_index(name)
        except NameError:
            message = (
                f"{argument}: got {x!r}, expected {expected}. Outside of shard_map, "
                "shard the arrays and pass None."
            )
            raise ValueError(message) from None
        # What is not tracked as varying between devices is summed over them by JAX as
        # though it were split: a gradient taken outside would be divided by their
        # number, or multiplied if taken inside, and no rule can tell which it is.
        if name in _varying_axes(index):
            continue
        manual = name in jax.sharding.get_abstract_mesh().manual_axes
        _demand(
            not manual,
            ValueError,
            argument,
            f"{x!r}, where {name!r} is an axis of pmap or of a shard_map with "
            "check_vma=False",
            f"{expected} with check_vma=True",
            "The gradient could not be right. Leave out check_vma=False; in place of "
            f"pmap use jax.shard_map, or drop {argument} and let jax.jit split the "
            f"{what}.",
        )
        _demand(
            manual,
            ValueError,
            argument,
            f"{x!r}, where {name!r} is the axis of a vmap",
            expected,
            "The gradient could not be right. In place of vmap use jax.shard_map, or "
            f"drop {argument} and let jax.jit split the {what}.",
        )
    return names


def split_over(option: str, names: tuple[str, ...], argument: str, x: Array) -> None:
    """What is not known to be the same wherever its classes or examples are split."""
    what = "classes" if option == "axis_name" else "examples"
    for name in names:
        _demand(
            name in _varying_axes(x) or jax.lax.axis_size(name) == 1,
            ValueError,
            option,
            f"{name!r}, over which {argument} is the same everywhere",
            f"a mesh axis that splits the {what} of {argument}",
            "Name it in the in_specs of shard_map, and leave check_vma=False out of "
            "every shard_map around; parts that are meant to be the same are marked "
            f'by jax.lax.pcast({argument}, {name!r}, to="varying").',
        )


def _varying_axes(x: Array) -> frozenset[str]:
    manual = jax.typeof(x).manual_axis_type
    return frozenset() if manual is None else manual.varying


def flag(argument: str, x: Given) -> bool:
    """A Python bool."""
    _demand_static(argument, x, "True or False")
    _demand(
        isinstance(x, bool | np.bool_),
        TypeError,
        argument,
        _describe(x),
        "True or False",
        "It is static: pass a Python bool.",
    )
    return bool(x)


def return_stats(x: Given) -> tuple[bool, tuple[Any, ...]]:
    """Whether metrics are wanted, and which by name."""
    wanted = f"True, False or a tuple of {', '.join(map(repr, _METRICS))}"
    argument = "return_stats"
    _demand_static(argument, x, wanted)
    if isinstance(x, bool | np.bool_):
        return bool(x), ()
    fix = 'One name is a tuple as well: return_stats=("rank",).'
    _demand(isinstance(x, tuple | list), TypeError, argument, _describe(x), wanted, fix)
    for name in x:
        known = isinstance(name, str) and name in _METRICS
        _demand(known, ValueError, argument, repr(name), wanted, fix)
    return True, tuple(name for name in _METRICS if name in x)


def has_own_messages(function: Function) -> Function:
    """Keeps run-time type checkers off a function that checks its arguments itself."""
    function.__no_type_check__ = True  # type: ignore[attr-defined]
    return function


def names_forward_mode(function: Function) -> Function:
    """Gives JAX's refusal of forward mode the name of the option that allows it.

    Where JAX finds out as it lowers a program around the call, the text is its own.
    """

    @functools.wraps(function)
    def named(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except TypeError as error:
            if "to a custom_vjp function" not in str(error):
                raise
            message = (
                "forward_mode: got False under jax.jvp, jax.jacfwd or jax.linearize, "
                "expected True. Pass forward_mode=True; reverse mode (jax.grad, "
                "jax.vjp) and forward over reverse (jax.hessian) need nothing."
            )
            raise TypeError(message) from error

    return named  # type: ignore[return-value]


def _demand(
    holds: bool,
    error: type[Exception],
    argument: str,
    got: str,
    expected: str,
    fix: str,
) -> None:
    if not holds:
        raise error(f"{argument}: got {got}, expected {expected}. {fix}")


def _demand_shape(argument: str, x: Array, shape: Any, expected: str, fix: str) -> None:
    try:
        chex.assert_shape(x, shape)
    except AssertionError:
        message = f"{argument}: got shape {x.shape}, expected {expected}. {fix}"
        raise ValueError(message) from None


def _demand_static(argument: str, x: Given, expected: str) -> None:
    """What a loss is compiled for cannot be a value of the compiled function."""
    _demand(
        not isinstance(x, jax.Array),
        TypeError,
        argument,
        _describe(x),
        expected,
        f"It is static. If jax.jit passes it, name it there, "
        f'jax.jit(loss, static_argnames="{argument}"), or bind it before, '
        f"functools.partial(loss, {argument}=...).",
    )


def _array(argument: str, x: Given) -> Array:
    x = _held(x)
    if isinstance(x, jax.Array):
        # An eager gradient would have it converted to what it is, and `jax_debug_nans`
        # look for a NaN in the result, where one is allowed.
        return x
    try:
        return jnp.asarray(x)
    except (TypeError, ValueError, OverflowError) as error:
        fix = "Pass a JAX or NumPy array."
        dtype = getattr(x, "dtype", None)
        if isinstance(dtype, np.dtype) and not dtype.isnative:
            fix = (
                "Its bytes are in the other order: convert them with "
                f'{argument}.astype({argument}.dtype.newbyteorder("=")).'
            )
        message = (
            f"{argument}: got {_describe(x)}, expected an array, or numbers that "
            f"jnp.asarray converts to one. {fix}"
        )
        raise TypeError(message) from error


def _is_held(x: Given) -> bool:
    return hasattr(x, "__jax_array__")


def _held(x: Given) -> Any:
    """The array that a variable of a model holds, or the argument itself."""
    held = getattr(x, "__jax_array__", None)
    return x if held is None or isinstance(x, type) else held()


def _features(argument: str, x: Given, ndim: int, axes: str, shape: str) -> Array:
    """A factor of the logits."""
    x = _array(argument, x)
    _demand(
        x.dtype.name in _LOGITS_DTYPES,
        TypeError,
        argument,
        f"dtype {x.dtype}",
        f"one of {', '.join(_LOGITS_DTYPES)}",
        f"Convert it: {argument}.astype(jnp.float32).",
    )
    _demand(
        x.ndim >= ndim,
        ValueError,
        argument,
        f"shape {x.shape}",
        f"an array with {axes}",
        f"It has the shape {shape}.",
    )
    return x


def _floating(argument: str, x: Given) -> Array:
    x = _array(argument, x)
    _demand(
        jnp.issubdtype(x.dtype, jnp.floating),
        TypeError,
        argument,
        f"dtype {x.dtype}",
        "a floating dtype",
        f"Convert it: {argument}.astype(jnp.float32).",
    )
    return x


def _scalar(
    argument: str, x: Given, low: float, high: float, expected: str, drop: float = 0.0
) -> Scalar:
    """A scalar in `[low, high)`; a Python number equal to `drop` becomes None."""
    x = _held(x)
    if _is_number(x):
        _demand(
            low <= x < high and math.isfinite(x),
            ValueError,
            argument,
            repr(x),
            expected,
            f"{drop:g} switches it off.",
        )
        return None if x == drop else float(x)
    _is_traced(argument, x, expected)
    return _array(argument, x)


def _is_traced(
    argument: str,
    x: Given,
    expected: str,
    fix: str = "Pass one number for all examples.",
) -> None:
    """A scalar, where it is not a Python number."""
    good = isinstance(x, jax.Array | np.ndarray) and x.ndim == 0 and _is_real(x.dtype)
    expected += ", or a traced scalar"
    _demand(good, TypeError, argument, _describe(x), expected, fix)


def _one_of(argument: str, x: Given, names: tuple[str, ...], fix: str) -> Any:
    known = isinstance(x, str) and x in names
    expected = f"one of {', '.join(map(repr, names))}"
    _demand(known, ValueError, argument, repr(x), expected, fix)
    return x


def _integer(argument: str, x: Given, given: Given, expected: str, fix: str) -> int:
    """An int of Python, of NumPy, or of a JAX scalar whose value is known."""
    x = _held(x)
    if isinstance(x, jax.core.Tracer):
        _demand_static(argument, x, expected)
    try:
        if isinstance(x, bool) or getattr(x, "dtype", None) == np.bool_:
            raise TypeError
        return operator.index(x)
    except TypeError:
        got = _describe(x) if hasattr(x, "dtype") and x.ndim else repr(given)
        message = f"{argument}: got {got}, expected {expected}. {fix}"
        raise TypeError(message) from None


def _is_number(x: Given) -> bool:
    return isinstance(x, numbers.Real) and not isinstance(x, bool | np.bool_)


def _is_real(dtype: Any) -> bool:
    kinds = (jnp.floating, jnp.integer, jnp.bool_)
    return any(jnp.issubdtype(dtype, kind) for kind in kinds)


def _describe(x: Given) -> str:
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"an array of shape {tuple(x.shape)} and dtype {x.dtype}"
    if isinstance(x, dict | list | tuple | set):
        return f"a {type(x).__name__}"
    return f"{x!r} of type {type(x).__name__}"
