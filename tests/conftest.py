"""Strict promotion, and eight CPU devices to split arrays over."""

from collections.abc import Iterator

import jax
import numpy as np
import pytest

# Before anything asks JAX for its devices.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def without_llvm_passes() -> Iterator[None]:
    """Programs as XLA has fused them, without what LLVM does to each of their loops.

    For tests of a rule, a transformation or a split, in two thirds of the time. Those
    of digits and of policies run what users run.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
