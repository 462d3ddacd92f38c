"""The exponential of what is not positive, which is all that a softmax takes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

Values = Float[Array, "..."]

# Added to a float32 of up to 2^22, it leaves the nearest integer in the last bits.
_ROUND = np.float32(1.5 * 2**23)
# log(2), of which a multiple up to 2^7 of the first part is exact.
_LOG_2 = (355 / 512, math.log(2) - 355 / 512)
# Below, float32 has only subnormal numbers, which XLA takes for zero.
_LOWEST = np.float32(math.log(np.finfo(np.float32).tiny))


@jax.custom_jvp
def exp(x: Values) -> Values:
    """`exp(x)` for `x <= 0`, of any floating dtype, to one unit in the last place."""
    if x.dtype != jnp.float32:
        return jnp.exp(x)
    return lax.platform_dependent(x, cpu=_of_cpu, default=jnp.exp)


@exp.defjvp
def _exp_jvp(primals: tuple[Values], tangents: tuple[Values]) -> tuple[Values, Values]:
    y = exp(*primals)
    return y, y * tangents[0]


def _of_cpu(x: Values) -> Values:
    """`2^n exp(r)` with `|r| <= log(2) / 2`, of operations that LLVM vectorises.

    XLA:CPU's own takes half as long again in long rows, and is not vectorised in short
    ones.
    """
    shifted = x * np.float32(1 / math.log(2)) + _ROUND
    n = lax.bitcast_convert_type(shifted, jnp.int32) - _ROUND.view(np.int32)
    multiple = n.astype(jnp.float32)
    r = (x - multiple * np.float32(_LOG_2[0])) - multiple * np.float32(_LOG_2[1])
    series = jnp.full_like(x, 1 / math.factorial(7))
    for k in range(6, -1, -1):
        series = series * r + np.float32(1 / math.factorial(k))
    power = lax.bitcast_convert_type((n + 127) << 23, jnp.float32)
    return jnp.where(x < _LOWEST, 0, series * power)
