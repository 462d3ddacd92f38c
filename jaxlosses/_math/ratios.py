"""What a class adds to a divergence, of two probabilities and their log-ratio.

`lead` is `log t - log s`, with digits that a difference of the two logarithms has lost.
By it the functions take what is left over of a ratio near 1, and of no other.
"""

import jax
import jax.numpy as jnp

from jaxlosses._elementary import exp, expm1, log1p
from jaxlosses._math import pairs
from jaxlosses._math.classes import Mask, Values

# Terms of `sum_k (-d)^(k - 2) / k!` for `|d| <= 1`, by the bytes of a number.
_LAST_OF_EXP = {4: 11, 8: 20}
# Terms of `log((1 + s) / (1 - s)) / 2`, for `|d| <= 1 / 2`.
_LAST_OF_LOG = {4: 13, 8: 29}
# Where `exp(y)` does not overflow, and `log(1 + b exp(y))` grows as `y` does.
_FAR = 60


@jax.custom_jvp
def excess(log_s: Values, log_t: Values, lead: Values) -> Values:
    """`t_j - s_j`; the teacher is a constant."""
    is_near, near = _near(lead)
    student = exp(log_s)
    last = _LAST_OF_EXP[student.dtype.itemsize]
    beside = student * (near * pairs.series_of_exp(near, 1, last))
    return jnp.where(is_near, beside, exp(log_t) - student)


@excess.defjvp
def _excess_jvp(
    primals: tuple[Values, Values, Values], tangents: tuple[Values, Values, Values]
) -> tuple[Values, Values]:
    return excess(*primals), -exp(primals[0]) * tangents[0]


def relative_entropy(p: Values, q: Values, lead: Values) -> tuple[Values, Values]:
    """`p (d + exp(-d) - 1)` with `d = log p - log q`, and `p - q`."""
    is_near, near = _near(lead)
    series = pairs.series_of_exp(-near, 2, _LAST_OF_EXP[p.dtype.itemsize])
    small = near * near * series
    # Where there is nothing of one of them, `0 * inf` would be NaN.
    terms = p * jnp.where(jnp.isinf(lead), 0, lead) - (p - q)
    terms = jnp.where(lead == jnp.inf, jnp.inf, terms)
    return (
        jnp.where(is_near, p * small, terms),
        jnp.where(is_near, p * (near - small), p - q),
    )


def _near(lead: Values) -> tuple[Mask, Values]:
    """Where a difference of the two would cancel, and the log-ratio there."""
    is_near = jnp.abs(lead) <= 1
    return is_near, jnp.where(is_near, lead, 0)


def to_mixture(
    student: Values, teacher: Values, lead: Values, teacher_weight: Values
) -> Values:
    """`b t log(t / m) + (1 - b) s log(s / m)` with the mixture `m = b t + (1 - b) s`.

    `log(1 + u)` has `2 (s + s^3 / 3 + ...)` with `s = u / (2 + u)`, so that

        u - log(1 + u) = u s - 2 (s^3 / 3 + s^5 / 5 + ...)
    """
    p, q = _ordered(lead, teacher, student)
    a, b = _ordered(lead, teacher_weight, 1 - teacher_weight)
    u, v, log_p, log_q = _of_mixture(a, b, jnp.abs(lead))
    last = _LAST_OF_LOG[p.dtype.itemsize]

    def beyond(u: Values) -> Values:
        s = u / (2 + u)
        square = s * s
        series = jnp.full_like(s, 2 / last)
        for k in range(last - 2, 2, -2):
            series = series * square + 2 / k
        return u * s - s * square * series

    near = jnp.abs(lead) <= 0.5
    u, v = jnp.where(near, u, 0), jnp.where(near, v, 0)
    small = a * p * beyond(u) + b * q * beyond(v)
    large = -a * p * log_p - b * jnp.where(q == 0, 0, q * log_q)
    return jnp.where(near, small, large)


@jax.custom_jvp
def log_of_mixture(lead: Values, teacher: Values, student: Values) -> Values:
    """`log(b exp(d) + c)` of weights `b` and `c` with the sum 1."""
    near = jnp.minimum(lead, _FAR)
    power, behind = exp(near), expm1(-jnp.abs(near))
    x = teacher * jnp.where(lead <= 0, behind, -behind * power)
    # No log1p of a sum that cancels, and one logarithm for both.
    mixture, lost = pairs.add(x, jnp.ones_like(x))
    mixture = jnp.where(x > -0.5, mixture, student + teacher * power)
    lost = jnp.where(jnp.abs(x) < 0.5, lost, 0)
    return (jnp.log(mixture) + lost) + jnp.maximum(lead - _FAR, 0)


@log_of_mixture.defjvp
def _log_of_mixture_jvp(
    primals: tuple[Values, Values, Values], tangents: tuple[Values, Values, Values]
) -> tuple[Values, Values]:
    lead, teacher, student = primals
    share = jax.nn.sigmoid(lead + (jnp.log(teacher) - jnp.log(student)))
    return log_of_mixture(*primals), share * tangents[0]


def _ordered(lead: Values, teacher: Values, student: Values) -> tuple[Values, Values]:
    """Those of the larger probability and of the smaller one."""
    ahead = lead >= 0
    return jnp.where(ahead, teacher, student), jnp.where(ahead, student, teacher)


def _of_mixture(a: Values, b: Values, size: Values) -> tuple[Values, ...]:
    """The mixture `m` beside the larger probability `p` and the smaller one, `q`.

    Returns:
        `m / p - 1`, `m / q - 1`, and their logarithms `log(m / p)` and `log(m / q)`,
        for `log(p / q)` of some size.
    """
    behind, near = expm1(-size), jnp.minimum(size, _FAR)
    u, v = b * behind, a * (-behind / exp(-near))
    return u, v, log1p(u), log1p(v) + (size - near)
