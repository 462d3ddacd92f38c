"""Strict promotion, and eight CPU devices to split arrays over."""

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
