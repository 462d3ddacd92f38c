"""Runs a function of a test module where JAX has one CPU device, as users have."""

import ast
import os
import pathlib
import subprocess
import sys
from typing import Any


def environment() -> dict[str, str]:
    """This one, without the eight devices that the tests ask for."""
    folder = pathlib.Path(__file__).parent
    paths = [str(folder), str(folder.parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "JAX_PLATFORMS": "cpu",
        "MPLBACKEND": "Agg",
        "XLA_FLAGS": "",
    }


def results(module: str, function: str, cases: list[Any]) -> list[Any]:
    """What the function returns for each case, in a process of its own.

    As `without_llvm_passes`, which changes no memory.
    """
    code = f"import {module} as m; print([m.{function}(*c) for c in {cases}])"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=environment() | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return ast.literal_eval(run.stdout)
