"""What type checkers and editors see: overloads on `return_stats` beside the names."""

from collections.abc import Callable
from typing import Any, Literal, TypedDict, TypeVar, Unpack, overload

from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike

from jaxlosses import testing as testing
from jaxlosses._backends.head import Layout
from jaxlosses._backends.plan import Strategy
from jaxlosses._combine import Metric, Reduction
from jaxlosses._combine import Stats as Stats
from jaxlosses._divergence import softmax_kl_divergence as softmax_kl_divergence
from jaxlosses._linear_divergence import (
    linear_softmax_kl_divergence as linear_softmax_kl_divergence,
)
from jaxlosses._log_probs import softmax_entropy as softmax_entropy
from jaxlosses._math.top_k import Rest
from jaxlosses._rows import Rows as Rows
from jaxlosses._softmax import log_softmax as log_softmax
from jaxlosses._softmax import softmax as softmax

__version__: str

class _Transform(TypedDict, total=False):
    logit_softcap: float | None
    logit_scale: float | Array
    axis_name: str | tuple[str, ...] | None
    forward_mode: bool

class _LogProbs(_Transform, total=False):
    ignore_index: int | None

class _Options(_Transform, total=False):
    class_weights: ArrayLike | None
    label_smoothing: float | Array
    z_loss: float | Array
    weights: ArrayLike | None
    reduction: Reduction
    normalizer: float | Array | None
    batch_axis_name: str | tuple[str, ...] | None

class _TopK(_Transform, total=False):
    rest: Rest
    as_divergence: bool
    z_loss: float | Array
    weights: ArrayLike | None
    reduction: Reduction
    normalizer: float | Array | None
    batch_axis_name: str | tuple[str, ...] | None

class _OfIds(_Options, total=False):
    ignore_index: int | None

class _Head(TypedDict, total=False):
    kernel_layout: Layout
    where: ArrayLike | None
    strategy: Strategy
    workspace_bytes: int | None
    compute_dtype: DTypeLike | None

class _Fused(_OfIds, _Head, total=False): ...
class _FusedTopK(_TopK, _Head, total=False): ...

class _OfRows(_Transform, _Head, total=False):
    bias: ArrayLike | None
    ignore_index: int | None
    uses_entropy: bool
    weights: ArrayLike | None
    reduction: Literal["sum", "mean"]
    normalizer: float | Array | None
    batch_axis_name: str | tuple[str, ...] | None

_Aux = TypeVar("_Aux")

class _FusedLogProbs(_LogProbs, _Head, total=False): ...

@overload
def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | tuple[int, ...] | None = -1,
    where: ArrayLike | None = None,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[_Options],
) -> Array: ...
@overload
def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | tuple[int, ...] | None = -1,
    where: ArrayLike | None = None,
    *,
    return_stats: Literal[True] | tuple[Metric, ...],
    **options: Unpack[_Options],
) -> tuple[Array, Stats]: ...
@overload
def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | tuple[int, ...] | None = -1,
    where: ArrayLike | None = None,
    *,
    return_stats: bool | tuple[Metric, ...],
    **options: Unpack[_Options],
) -> Array | tuple[Array, Stats]: ...
@overload
def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | tuple[int, ...] = -1,
    where: ArrayLike | None = None,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[_OfIds],
) -> Array: ...
@overload
def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | tuple[int, ...] = -1,
    where: ArrayLike | None = None,
    *,
    return_stats: Literal[True] | tuple[Metric, ...],
    **options: Unpack[_OfIds],
) -> tuple[Array, Stats]: ...
@overload
def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | tuple[int, ...] = -1,
    where: ArrayLike | None = None,
    *,
    return_stats: bool | tuple[Metric, ...],
    **options: Unpack[_OfIds],
) -> Array | tuple[Array, Stats]: ...
@overload
def linear_softmax_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[_Fused],
) -> Array: ...
@overload
def linear_softmax_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    return_stats: Literal[True] | tuple[Metric, ...],
    **options: Unpack[_Fused],
) -> tuple[Array, Stats]: ...
@overload
def linear_softmax_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    return_stats: bool | tuple[Metric, ...],
    **options: Unpack[_Fused],
) -> Array | tuple[Array, Stats]: ...
@overload
def softmax_cross_entropy_with_top_k_labels(
    logits: ArrayLike,
    ids: ArrayLike,
    probs: ArrayLike,
    axis: int | tuple[int, ...] = -1,
    where: ArrayLike | None = None,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[_TopK],
) -> Array: ...
@overload
def softmax_cross_entropy_with_top_k_labels(
    logits: ArrayLike,
    ids: ArrayLike,
    probs: ArrayLike,
    axis: int | tuple[int, ...] = -1,
    where: ArrayLike | None = None,
    *,
    return_stats: Literal[True] | tuple[Metric, ...],
    **options: Unpack[_TopK],
) -> tuple[Array, Stats]: ...
@overload
def softmax_cross_entropy_with_top_k_labels(
    logits: ArrayLike,
    ids: ArrayLike,
    probs: ArrayLike,
    axis: int | tuple[int, ...] = -1,
    where: ArrayLike | None = None,
    *,
    return_stats: bool | tuple[Metric, ...],
    **options: Unpack[_TopK],
) -> Array | tuple[Array, Stats]: ...
@overload
def linear_softmax_cross_entropy_with_top_k_labels(
    hidden: ArrayLike,
    kernel: ArrayLike,
    ids: ArrayLike,
    probs: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    return_stats: Literal[False] = False,
    **options: Unpack[_FusedTopK],
) -> Array: ...
@overload
def linear_softmax_cross_entropy_with_top_k_labels(
    hidden: ArrayLike,
    kernel: ArrayLike,
    ids: ArrayLike,
    probs: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    return_stats: Literal[True] | tuple[Metric, ...],
    **options: Unpack[_FusedTopK],
) -> tuple[Array, Stats]: ...
@overload
def linear_softmax_cross_entropy_with_top_k_labels(
    hidden: ArrayLike,
    kernel: ArrayLike,
    ids: ArrayLike,
    probs: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    return_stats: bool | tuple[Metric, ...],
    **options: Unpack[_FusedTopK],
) -> Array | tuple[Array, Stats]: ...
@overload
def softmax_log_probs(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | tuple[int, ...] = -1,
    where: ArrayLike | None = None,
    *,
    return_entropy: Literal[False] = False,
    **options: Unpack[_LogProbs],
) -> Array: ...
@overload
def softmax_log_probs(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | tuple[int, ...] = -1,
    where: ArrayLike | None = None,
    *,
    return_entropy: Literal[True],
    **options: Unpack[_LogProbs],
) -> tuple[Array, Array]: ...
@overload
def softmax_log_probs(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | tuple[int, ...] = -1,
    where: ArrayLike | None = None,
    *,
    return_entropy: bool,
    **options: Unpack[_LogProbs],
) -> Array | tuple[Array, Array]: ...
@overload
def linear_softmax_log_probs(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    return_entropy: Literal[False] = False,
    **options: Unpack[_FusedLogProbs],
) -> Array: ...
@overload
def linear_softmax_log_probs(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    return_entropy: Literal[True],
    **options: Unpack[_FusedLogProbs],
) -> tuple[Array, Array]: ...
@overload
def linear_softmax_log_probs(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    return_entropy: bool,
    **options: Unpack[_FusedLogProbs],
) -> Array | tuple[Array, Array]: ...
@overload
def linear_softmax_loss(
    function: Callable[..., Array],
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *args: Any,
    **options: Unpack[_OfRows],
) -> Array: ...
@overload
def linear_softmax_loss(
    function: Callable[..., tuple[Array, _Aux]],
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *args: Any,
    **options: Unpack[_OfRows],
) -> tuple[Array, _Aux]: ...
