"""Logits as the product of hidden states and a kernel, and its cotangents.

Matmuls run in the *compute dtype*, the promoted one of hidden states and kernel unless
another is given, and accumulate in float32 (float64 for float64); so do gradients,
which are rounded once.
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Integer

from jaxlosses._math.classes import (
    Inputs,
    Mask,
    Shaped,
    Spec,
    Values,
    accumulation_dtype,
    both,
)
from jaxlosses._rules import cotangent_like
from jaxlosses._types import DType, Size, Tree

Layout = Literal["dv", "vd"]


class Head(NamedTuple):
    """What the logits are the product of.

    Attributes:
        hidden: `B... D`.
        kernel: `D V` or `V D`, by the layout.
        bias: `V`, or None.

    As a cotangent, None stands for zero.
    """

    hidden: Tree
    kernel: Tree
    bias: Float[Array, " V"] | None


class Matmul(NamedTuple):
    """How logits are formed; static.

    Attributes:
        layout: of the kernel.
        dtype: the compute dtype.
    """

    layout: Layout
    dtype: DType

    @property
    def accumulation(self) -> DType:
        """The dtype of logits and of sums."""
        return accumulation_dtype(self.dtype)


class Labels(NamedTuple):
    """What belongs to each example; masks of None stand for all.

    Attributes:
        ids: class ids, `B...`.
        counted: whether it counts, `B...`.
        exists: classes of its own that exist, `B... V`.
        picks: ids of classes, as in `Inputs`, `B... K`.
    """

    ids: Integer[Array, "*B"]
    counted: Bool[Array, "*B"] | None
    exists: Bool[Array, "*B V"] | None = None
    picks: Integer[Array, "*B K"] | None = None


_nothing: Any = None
# In the place of their cotangents.
NO_LABELS = Labels(_nothing, None)


class Product(NamedTuple):
    """What the statistics of logits `hidden @ kernel` depend on.

    Attributes:
        head: the factors of the logits.
        class_weights: `V`, or None for ones.
        scale: factor of the logits, a scalar or `B...`, or None for one.
        labels: ids and masks.
        exists: classes that exist for every example, or None for all.
    """

    head: Head
    class_weights: Float[Array, " V"] | None
    scale: Float[Array, "..."] | None
    labels: Labels
    exists: Bool[Array, " V"] | None


class Wants(NamedTuple):
    """Which cotangents of a head are asked for."""

    hidden: bool
    kernel: bool
    bias: bool


def matmul_of(layout: Layout, head: Head, dtype: DType | None = None) -> Matmul:
    """Of a head, in a given dtype or the one that its factors promote to."""
    if dtype is None:
        # What strict promotion refuses is documented here.
        with jax.numpy_dtype_promotion("standard"):
            dtype = jnp.promote_types(head.hidden.dtype, head.kernel.dtype)
    return Matmul(layout, jnp.dtype(dtype))


def classes_of(layout: Layout, kernel: Shaped) -> Size:
    """How many classes the kernel has."""
    return kernel.shape[1 if layout == "dv" else 0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def logits(matmul: Matmul, head: Head) -> Float[Array, "*B V"]:
    """All logits, in the accumulation dtype."""
    return project(matmul, head)


def _logits_fwd(matmul: Matmul, head: Head) -> tuple[Array, Head]:
    return project(matmul, head), head


def _logits_bwd(matmul: Matmul, head: Head, d_logits: Array) -> tuple[Head]:
    d_head = pull(matmul, head, d_logits, Wants(True, True, True))
    return (jax.tree.map(cotangent_like, d_head, head),)


logits.defvjp(_logits_fwd, _logits_bwd)


def project(matmul: Matmul, head: Head) -> Float[Array, "*B V"]:
    """The logits, by rules of JAX itself: for forward mode."""
    hidden, kernel, bias = head
    features = (0 if matmul.layout == "dv" else 1,)
    out = _dot(hidden, kernel, (hidden.ndim - 1,), features, matmul.dtype)
    if bias is None:
        return out
    return out + jnp.broadcast_to(bias.astype(out.dtype), out.shape)


def pull(
    matmul: Matmul,
    head: Head,
    d_logits: Array,
    wants: Wants,
    kernel_dtype: DType | None = None,
) -> Head:
    """Cotangents of the head, those that are asked for, in the accumulation dtype.

    The one of the kernel may be asked for in another, rounded by its matmul.
    """
    layout, dtype = matmul
    batch = tuple(range(d_logits.ndim - 1))
    d_hidden = d_kernel = d_bias = None
    # A float32 cotangent would have 16-bit operands converted to float32.
    dz = d_logits.astype(dtype)
    if wants.hidden:
        classes = (1 if layout == "dv" else 0,)
        d_hidden = _dot(dz, head.kernel, (dz.ndim - 1,), classes, dtype)
    if wants.kernel:
        a, b = (head.hidden, dz) if layout == "dv" else (dz, head.hidden)
        d_kernel = _dot(a, b, batch, batch, dtype, kernel_dtype)
    if wants.bias and head.bias is not None:
        d_bias = jnp.sum(d_logits, batch)
    return Head(d_hidden, d_kernel, d_bias)


def _dot(
    a: Array,
    b: Array,
    a_axes: tuple[int, ...],
    b_axes: tuple[int, ...],
    dtype: DType,
    out: DType | None = None,
) -> Array:
    return lax.dot_general(
        a.astype(dtype),
        b.astype(dtype),
        ((a_axes, b_axes), ((), ())),
        preferred_element_type=out or accumulation_dtype(dtype),
    )


def inputs_of(
    spec: Spec,
    z: Shaped | None,
    labels: Labels,
    exists: Mask | None,
    class_weights: Values | None,
    scale: Values | None,
) -> Inputs:
    """The arguments of the statistics of some logits, whose last axis are classes."""
    (axis,) = spec.axes

    def along_classes(a: Array | None) -> Array | None:
        return None if a is None else a.reshape((1,) * axis + (-1,))

    def along_examples(a: Array | None) -> Array | None:
        return None if a is None else a[..., None]

    logits: Any = z
    return Inputs(
        logits,
        along_examples(labels.ids),
        both(along_classes(exists), labels.exists),
        along_examples(labels.counted),
        along_classes(class_weights) if spec.smooth or spec.dense else None,
        along_examples(scale) if scale is not None and scale.ndim else scale,
        labels.picks,
    )


def squeezed(spec: Spec, tree: Tree) -> Tree:
    """Statistics without their class axis; picks keep theirs."""
    out = jax.tree.map(lambda a: jnp.squeeze(a, spec.axes), tree._replace(picks=None))
    return out._replace(picks=tree.picks)


def expanded(spec: Spec, tree: Tree) -> Tree:
    """The inverse of `squeezed`."""
    few = tree._replace(picks=None)
    out = jax.tree.map(lambda a: jnp.expand_dims(a, spec.axes), few)
    return out._replace(picks=tree.picks)
