"""What a fused loss is going to do: for people, and for tests."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxlosses import _checks
from jaxlosses._backends import plan as plans
from jaxlosses._backends.head import Head, Layout, classes_of, matmul_of
from jaxlosses._backends.plan import Platform, Strategy, Way
from jaxlosses._combine import Reduction
from jaxlosses._platform import default_platform
from jaxlosses._types import Tree

_MATMULS = {"dense": 3, "tokens": 3, "recompute": 4, "vocab": 4}
_PLATFORMS: dict[str, Platform] = {
    **{"cpu": "cpu", "tpu": "tpu"},
    **{"gpu": "gpu", "cuda": "gpu", "rocm": "gpu"},
}


class Plan(NamedTuple):
    """What a fused loss does for shapes, dtypes, options and a platform.

    Attributes:
        strategy: the one that is asked for, or that `"auto"` takes.
        chunks: in how many pieces it goes through the logits.
        chunk_shape: examples and classes of a piece.
        matmuls: of hidden states, kernel and logits, for value and gradient.
        temporary_bytes: estimate of what value and gradient hold beyond arguments and
            results.
        materialised_bytes: what a loss on all logits holds at least.
    """

    strategy: Way
    chunks: int
    chunk_shape: tuple[int, int]
    matmuls: int
    temporary_bytes: int
    materialised_bytes: int


@_checks.has_own_messages
def plan(
    hidden: Tree,
    kernel: Tree,
    *,
    kernel_layout: Layout = "dv",
    strategy: Strategy = "auto",
    workspace_bytes: int | None = None,
    compute_dtype: DTypeLike | None = None,
    reduction: Reduction = "mean",
    forward_mode: bool = False,
    distributions: bool = False,
    platform: str | None = None,
) -> Plan:
    """What `linear_softmax_cross_entropy` is going to do, without doing it.

    The strategy depends on shapes, dtypes and sharding alone; the chunks on the
    platform, too. Under `jax.set_mesh` with automatic axes the examples count as
    spread over all of them. A process with several devices may have split the kernel,
    whose slices `"auto"` then leaves alone, unless `jax.set_mesh` says how many devices
    there are and each has whole tiles of the classes.

    Args:
        hidden: an array, or a `jax.ShapeDtypeStruct`: `B... D`.
        kernel: likewise, `D V` or `V D`.
        `kernel_layout`, `strategy`, `workspace_bytes`, `compute_dtype`: as in
        `linear_softmax_cross_entropy`.
        reduction: `"none"`, or `"sum"` or `"mean"`, which are the same here.
        forward_mode: whether it is asked for.
        distributions: whether labels are distributions.
        platform: `"cpu"`, `"gpu"`, `"cuda"`, `"rocm"` or `"tpu"`; None for JAX's
            default.

    Returns:
        A `Plan`.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument is none of what it may be, or a strategy cannot do
            what is asked for.

    Differentiation:
        None: it computes nothing.

    Example:
        >>> import jax
        >>> from jaxlosses import testing
        >>> hidden = jax.ShapeDtypeStruct((8192, 4096), "float32")
        >>> kernel = jax.ShapeDtypeStruct((4096, 128256), "float32")
        >>> found = testing.plan(hidden, kernel, platform="tpu")
        >>> found.strategy, found.matmuls, found.chunk_shape
        ('tokens', 3, (2048, 128256))

    Source:
        The strategies of `linear_softmax_cross_entropy`.
    """
    hidden = _shape_of(_checks.hidden, hidden)
    layout = _checks.kernel_layout(kernel_layout)
    of_features = functools.partial(
        _checks.kernel, layout=layout, features=hidden.shape[-1]
    )
    head = Head(hidden, _shape_of(of_features, kernel), None)
    asked = _checks.strategy(strategy)
    forward_mode = _checks.flag("forward_mode", forward_mode)
    distributions = _checks.flag("distributions", distributions)
    every_class = _checks.DISTRIBUTIONS if distributions else None
    _checks.suits(asked, _checks.reduction(reduction), every_class, forward_mode)
    on = _checks.platform(platform, tuple(_PLATFORMS)) or default_platform()
    matmul = matmul_of(layout, head, _checks.compute_dtype(compute_dtype))
    request = plans.Request(distributions, reduction != "none", forward_mode)
    workspace = _checks.workspace_bytes(workspace_bytes)
    way, found = plans.choose(matmul, head, request, asked, workspace)
    kind = _PLATFORMS.get(on, "gpu")
    chosen = found.of(kind)
    sizes = plans.sizes_of(matmul, head)
    examples, classes = math.prod(hidden.shape[:-1]), classes_of(layout, head.kernel)
    if way == "vocab":
        shape = (examples, chosen.strips_of(classes).in_chunk)
    else:
        shape = (-(-examples // chosen.num_chunks), classes)
    return Plan(
        way,
        chosen.num_chunks,
        shape,
        _MATMULS[way],
        plans.temporary_bytes(way, chosen, sizes, kind),
        sizes.materialised_on(kind),
    )


def _shape_of(checked: Callable[[Tree], Array], x: Tree) -> jax.ShapeDtypeStruct:
    """Of what passes a check, which may be a shape alone."""
    if isinstance(x, jax.ShapeDtypeStruct):
        x = jax.eval_shape(checked, x)
    else:
        x = checked(x)
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
