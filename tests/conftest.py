"""Strict promotion, eight CPU devices to split arrays over, and the suite's time."""

import collections
import os
import tempfile

import hypothesis
import jax
import numpy as np
import pytest

# Before anything asks JAX for its devices.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Of tests/test_properties.py. `--hypothesis-profile` chooses another.
_DRAWS = {"deadline": None, "suppress_health_check": list(hypothesis.HealthCheck)}
_SAME = {"derandomize": True, "database": None}
hypothesis.settings.register_profile("short", max_examples=2, **_SAME, **_DRAWS)
hypothesis.settings.register_profile("long", max_examples=60, **_SAME, **_DRAWS)
hypothesis.settings.register_profile("fuzz", max_examples=60, **_DRAWS)
hypothesis.settings.load_profile("short")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


# Two thirds of the time is XLA's. What one process has compiled the others take from a
# folder, which is new for each run, unless JAX was told of one: nothing depends on what
# ran before.


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        return  # a worker has the environment of the process that started it
    name = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if name is None:
        folder = tempfile.TemporaryDirectory(prefix="jaxlosses-")
        config.add_cleanup(folder.cleanup)
        name = folder.name
    # Programs of any size and time.
    settings = {
        "jax_compilation_cache_dir": name,
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


# What is marked `without_llvm_passes` runs programs as XLA has fused them, without what
# LLVM does to each of their loops: enough for a rule, a transformation or a split, in
# two thirds of the time. Tests of digits and of policies run what users run.


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    _leave_others(items)

    def place(item: pytest.Item) -> int:
        # The first tests of all go to one worker, which makes what they share once.
        if item.get_closest_marker("together"):
            return 0
        # Between the two kinds caches are cleared: one kind after the other.
        return 1 if _is_without_llvm_passes(item) else 2

    items.sort(key=place)


def _leave_others(items: list[pytest.Item]) -> None:
    """Of a test marked `alternate(n)`, one case of so many stays, of two by default.

    Not each n-th one: an inner parameter of n values would then have one value only.
    The sum of digits to the base n takes them in turns.
    """
    seen: collections.Counter[str] = collections.Counter()
    for item in items:
        marker = item.get_closest_marker("alternate")
        if item.get_closest_marker("long") or marker is None:
            continue
        (of,) = marker.args or (2,)
        name = item.nodeid.partition("[")[0]
        place, digits = seen[name], 0
        while place:
            place, digit = divmod(place, of)
            digits += digit
        if digits % of:
            item.add_marker(pytest.mark.long)
        seen[name] += 1


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
