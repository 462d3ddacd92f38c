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


# What is marked `without_llvm_passes` runs programs as XLA has fused them, without what
# LLVM does to each of their loops: enough for a rule, a transformation or a split, in
# two thirds of the time. Tests of digits and of policies run what users run.


def pytest_runtest_setup(item: pytest.Item) -> None:
    if _is_without_llvm_passes(item):
        jax.config.update("jax_disable_most_optimizations", True)


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    if _is_without_llvm_passes(item) and not _is_without_llvm_passes(nextitem):
        jax.config.update("jax_disable_most_optimizations", False)
        # JAX takes a program it has for the same, however it was compiled.
        jax.clear_caches()


def _is_without_llvm_passes(item: pytest.Item | None) -> bool:
    return (
        item is not None and item.get_closest_marker("without_llvm_passes") is not None
    )
