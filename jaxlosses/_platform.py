"""What is known of the platform of a program and of the devices: facts, no choices.

Every question about them is asked here, and nowhere else.
"""

import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from jaxlosses._types import Size, Tree

Result = TypeVar("Result")


# What a branch of `by_platform` knows: "other" is any but a CPU.
Known = Literal["cpu", "gpu", "tpu", "other"]
_known: contextvars.ContextVar[Known | None]
_known = contextvars.ContextVar("platform", default=None)


def by_platform(
    on_cpu: Callable[..., Result],
    otherwise: Callable[..., Result],
    *args: object,
    on_tpu: Callable[..., Result] | None = None,
    lazily: bool = True,
) -> Result:
    """One of some functions of the arguments, by the platform that a program is for.

    Each may be asked for on every host; what they choose in their turn is chosen at
    once.

    Args:
        on_cpu: on a CPU.
        otherwise: on the others.
        *args: pytrees of arrays.
        on_tpu: on a TPU, or None for the others' function.
        lazily: whether the functions may be called later, when a program is lowered.
            All that is traced in them must be in the arguments.
    """
    known = _known.get()
    if known == "cpu":
        return on_cpu(*args)
    if known == "gpu" or (known is not None and on_tpu is None):
        return otherwise(*args)
    if known == "tpu" and on_tpu is not None:
        return on_tpu(*args)
    branches = {} if known else {"cpu": _within("cpu", on_cpu)}
    branches["default"] = _within("other" if on_tpu is None else "gpu", otherwise)
    if on_tpu is not None:
        branches["tpu"] = _within("tpu", on_tpu)
    # Inside a `shard_map` types tell how arrays are spread, which an operation of ours
    # would have to follow.
    if known is None and lazily and jax.sharding.get_abstract_mesh().empty:
        return _lazily(branches, args)
    return lax.platform_dependent(*args, **branches)


def _within(known: Known, run: Callable[..., Result]) -> Callable[..., Result]:
    """The function, which is traced for a platform that is known."""

    def traced(*args: object) -> Result:
        before = _known.set(known)
        try:
            return run(*args)
        finally:
            _known.reset(before)

    return traced


@dataclasses.dataclass(frozen=True, eq=False)
class _Branches:
    """Functions of flat arrays for each platform, of which one is traced already.

    JAX's own choice by platform traces all of them, which took as long as all else
    (benchmarks/NOTES.md, "Other platforms when they are asked for").

    Attributes:
        functions: of each platform, and the default; of this host, by its trace.
        types: of what they make.
        enable_x64, matmul_precision: settings of this trace, for a later one.
    """

    functions: dict[str, Callable[..., list[Array]]]
    types: list[Any]
    enable_x64: bool
    matmul_precision: Any

    def of(self, platform: str, *args: Array) -> list[Array]:
        """What the function of a platform makes of the arguments."""
        with (
            jax.enable_x64(self.enable_x64),
            jax.default_matmul_precision(self.matmul_precision),
            jax.sharding.use_abstract_mesh(_NO_MESH),
        ):
            return self.functions[_key(self.functions, platform)](*args)

    def of_any(self, *args: Array) -> list[Array]:
        """The same in operations of JAX alone, all of which are traced."""
        out: list[Array] = lax.platform_dependent(*args, **self.functions)
        return out


_NO_MESH = jax.sharding.AbstractMesh((), ())
_chosen_p = Primitive("by_platform")
_chosen_p.multiple_results = True


def _key(functions: dict[str, Any], platform: str) -> str:
    return platform if platform in functions else "default"


def _lazily(branches: dict[str, Callable[..., Result]], args: Tree) -> Result:
    """The choice by an operation of ours; this host's function is traced."""
    flat, tree = jax.tree.flatten(args)

    def flatly(run: Callable[..., Result]) -> Callable[..., list[Array]]:
        return lambda *flat: jax.tree.leaves(run(*jax.tree.unflatten(tree, flat)))

    functions = {name: flatly(run) for name, run in branches.items()}
    here = _key(branches, default_platform())
    traced, like = jax.make_jaxpr(branches[here], return_shape=True)(*args)
    functions[here] = jaxpr_as_fun(traced)
    found = _bound(functions, traced, flat)
    return jax.tree.unflatten(jax.tree.structure(like), found)


def _bound(
    functions: dict[str, Callable[..., list[Array]]],
    traced: ClosedJaxpr,
    args: list[Array],
) -> list[Array]:
    """The operation, or JAX's choice for a trace with effects or constants."""
    if traced.effects or traced.consts:
        out: list[Array] = lax.platform_dependent(*args, **functions)
        return out
    config: Any = jax.config
    settings = config.jax_enable_x64, config.jax_default_matmul_precision
    return _chosen_p.bind(
        *args, branches=_Branches(functions, traced.out_avals, *settings)
    )


def _chosen(platform: str, *args: Array, branches: _Branches) -> list[Array]:
    return branches.of(platform, *args)


def _chosen_types(*args: Any, branches: _Branches) -> list[Any]:
    del args
    return branches.types


def _chosen_jvp(
    primals: Tree, tangents: Tree, branches: _Branches
) -> tuple[Tree, Tree]:
    tangents = tuple(map(ad.instantiate_zeros, tangents))
    return jax.jvp(branches.of_any, tuple(primals), tangents)


def _chosen_transpose(g: Tree, *args: Tree, branches: _Branches) -> Tree:
    is_linear = [ad.is_undefined_primal(a) for a in args]

    def of(*linear: Array) -> list[Array]:
        given = iter(linear)
        return branches.of_any(
            *(next(given) if x else a for x, a in zip(is_linear, args, strict=True))
        )

    like = [a.aval for a in args if ad.is_undefined_primal(a)]
    pull = jax.linear_transpose(of, *like)
    d = iter(pull([ad.instantiate_zeros(x) for x in g]))
    return [next(d) if x else None for x in is_linear]


def _chosen_batch(args: Tree, axes: Tree, branches: _Branches) -> tuple[Tree, Tree]:
    functions = {
        name: jax.vmap(run, tuple(axes)) for name, run in branches.functions.items()
    }
    here = _key(functions, default_platform())
    traced = jax.make_jaxpr(functions[here])(*args)
    functions[here] = jaxpr_as_fun(traced)
    out = _bound(functions, traced, list(args))
    return out, [0] * len(out)


_chosen_p.def_impl(lambda *args, branches: branches.of(default_platform(), *args))
_chosen_p.def_abstract_eval(_chosen_types)
ad.primitive_jvps[_chosen_p] = _chosen_jvp
ad.primitive_transposes[_chosen_p] = _chosen_transpose
batching.primitive_batchers[_chosen_p] = _chosen_batch
for _platform in ("cpu", "tpu"):
    mlir.register_lowering(
        _chosen_p,
        mlir.lower_fun(functools.partial(_chosen, _platform)),
        platform=_platform,
    )
mlir.register_lowering(_chosen_p, mlir.lower_fun(functools.partial(_chosen, "gpu")))


def traced_once(
    run: Callable[..., Result], inline: bool = False
) -> Callable[..., Result]:
    """A function of a static argument and arrays, of which JAX keeps the trace.

    A value and its gradient trace the same statistics, losses of one kind as well.

    Args:
        run: the function.
        inline: whether programs have its operations in the place of a call.
    """

    @functools.partial(jax.jit, static_argnums=(0, 1), inline=inline)
    def of(known: Known | None, static: object, *args: object) -> Result:
        del known  # on which the trace depends
        return run(static, *args)

    def traced(static: object, *args: object) -> Result:
        # A gradient is traced within an empty mesh where a value is within none.
        with jax.sharding.use_abstract_mesh(jax.sharding.get_abstract_mesh()):
            return of(_known.get(), static, *args)

    return traced


def default_platform() -> str:
    """Where arrays are if nobody says otherwise: `"cpu"`, `"gpu"` or `"tpu"`."""
    return jax.default_backend()


def is_local() -> bool:
    """Whether arrays are on one device, as far as a trace can know.

    Under automatic sharding it cannot see the mesh. Certain are a process that has one
    device of every kind, and the inside of a `shard_map` over all axes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        return mesh.are_all_axes_manual
    return jax.device_count() == 1 and num_cpus() <= 1


def is_by_hand() -> bool:
    """Whether this is the inside of a `shard_map`."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def num_parts() -> int:
    """Over how many devices arrays may be spread by itself, where the mesh is known.

    One outside `jax.set_mesh` and inside `shard_map`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for name in mesh.auto_axes)


def num_cpus() -> int:
    """How many CPU devices there are."""
    try:
        return jax.device_count("cpu")
    except RuntimeError:  # JAX_PLATFORMS leaves them out
        return 0


def in_memory(x: Result) -> Result:
    """The same arrays, which XLA has to write before it goes on.

    XLA:CPU is fast at reductions of an array in memory, and slow where it has fused
    them with what comes before (benchmarks/NOTES.md, "One select, then reductions").
    """
    return lax.optimization_barrier(x)


# An array, and where a slice of it begins.
Slice = tuple[Array, Array]


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def take(a: Array, start: Array, size: Size, axis: int = 0) -> Array:
    """A slice of a static size, clamped; of 16-bit numbers on a CPU as integers.

    XLA:CPU would convert the whole array to float32, XLA:TPU would copy the integers
    (benchmarks/NOTES.md, "16-bit blocks are sliced as integers").
    """

    def plain(a: Array, start: Array) -> Array:
        return lax.dynamic_slice_in_dim(a, start, size, axis)

    def of_bits(a: Array, start: Array) -> Array:
        # Tied to the place, which changes, or the integers would be made before the
        # loop, as a copy of the whole array.
        a, start = in_memory((a, start))
        bits = plain(lax.bitcast_convert_type(a, jnp.uint16), start)
        return lax.bitcast_convert_type(bits, a.dtype)

    return plain(a, start) if _is_wide(a) else by_platform(of_bits, plain, a, start)


@take.defjvp
def _take_jvp(
    size: Size, axis: int, primals: Slice, tangents: Slice
) -> tuple[Array, Array]:
    a, start = primals
    d = lax.dynamic_slice_in_dim(tangents[0], start, size, axis)
    return take(a, start, size, axis), d


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def put(a: Array, part: Array, start: Array, axis: int) -> Array:
    """An array with a slice replaced, in the way of `take`."""

    def plain(a: Array, part: Array, start: Array) -> Array:
        return lax.dynamic_update_slice_in_dim(a, part, start, axis)

    def of_bits(a: Array, part: Array, start: Array) -> Array:
        bits, piece = (lax.bitcast_convert_type(x, jnp.uint16) for x in (a, part))
        return lax.bitcast_convert_type(plain(bits, piece, start), a.dtype)

    if _is_wide(a):
        return plain(a, part, start)
    return by_platform(of_bits, plain, a, part, start)


@put.defjvp
def _put_jvp(
    axis: int,
    primals: tuple[Array, Array, Array],
    tangents: tuple[Array, Array, Array],
) -> tuple[Array, Array]:
    (a, part, start), (d_a, d_part, _) = primals, tangents
    d = lax.dynamic_update_slice_in_dim(d_a, d_part, start, axis)
    return put(a, part, start, axis), d


def _is_wide(a: Array) -> bool:
    return a.dtype.itemsize != 2
