"""What a type checker is told about the public losses is true."""

import ast
import inspect
import os
import pathlib
import subprocess
import sys

import pytest

import jaxlosses as jl

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = pathlib.Path(jl.__file__).parent
STUB = ast.parse((PACKAGE / "__init__.pyi").read_text("utf-8"))
LOSSES = {
    "softmax_cross_entropy": (
        "x, labels=x, axis=None, where=x, class_weights=x, reduction='mean'"
    ),
    "softmax_cross_entropy_with_integer_labels": (
        "x, x, (0, 1), label_smoothing=0.1, ignore_index=-100"
    ),
    "linear_softmax_cross_entropy": (
        "x, x, labels=x, bias=None, where=x, ignore_index=-100, strategy='tokens'"
    ),
    "softmax_cross_entropy_with_top_k_labels": "x, x, x, (0, 1), rest='bucket'",
    "linear_softmax_cross_entropy_with_top_k_labels": (
        "x, x, x, probs=x, bias=None, as_divergence=True, strategy='vocab'"
    ),
}
LOG_PROBS = {
    "softmax_log_probs": "x, x, (0, 1), where=x, ignore_index=-100, logit_scale=2.0",
    "linear_softmax_log_probs": "x, x, x, bias=None, where=x, strategy='vocab'",
}
OF_ROWS = """\
def values(rows: Rows) -> Array: return rows.nll
def pair(rows: Rows) -> tuple[Array, dict[str, Array]]: return rows.nll, {}
def losses(x: Array) -> None:
    assert_type(jl.linear_softmax_loss(values, x, x, x, x, weights=x), Array)
    both = jl.linear_softmax_loss(pair, x, x, x, uses_entropy=True)
    assert_type(both, tuple[Array, dict[str, Array]])
"""
# What decides about the result, and what comes beside it.
FLAGS = dict.fromkeys(LOSSES, ("return_stats", "Stats"))
FLAGS |= dict.fromkeys(LOG_PROBS, ("return_entropy", "Array"))
OVERLOADED = LOSSES | LOG_PROBS
SNIPPET = """\
from typing import assert_type
import jaxlosses as jl
from jax import Array
from jaxlosses import Rows, Stats
def check(x: Array, flag: bool) -> None:
"""


def returns(flag: str, beside: str) -> list[tuple[str, str]]:
    pair = f"tuple[Array, {beside}]"
    return [
        ("", "Array"),
        (f"{flag}=False", "Array"),
        (f"{flag}=True", pair),
        (f"{flag}=flag", f"Array | tuple[Array, {beside}]"),
        *([(f'{flag}=("rank",)', pair)] if flag == "return_stats" else []),
    ]


def test_a_type_checker_knows_a_loss_from_a_pair(tmp_path: pathlib.Path) -> None:
    checks = [
        f"    assert_type(jl.{name}({arguments}, {given}), {result})\n"
        for name, arguments in OVERLOADED.items()
        for given, result in returns(*FLAGS[name])
    ]
    # Strict mypy refuses a comment that no error needs.
    checks += [
        f"    jl.{name}({arguments}, {mistake})  # type: ignore[call-overload]\n"
        for name, arguments in OVERLOADED.items()
        for mistake in (
            "smoothing=0.1",
            "axis_name=1",
            f"{FLAGS[name][0]}=None",
        )
    ]
    path = tmp_path / "snippet.py"
    path.write_text(SNIPPET + "".join(checks) + OF_ROWS, "utf-8")
    # With the settings of `make lint`, whose cache saves ten seconds.
    run = subprocess.run(
        [sys.executable, "-m", "mypy", str(path)],
        cwd=ROOT,
        env=os.environ | {"MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def annotated(arguments: list[ast.arg]) -> dict[str, str]:
    return {a.arg: ast.unparse(a.annotation) for a in arguments if a.annotation}


def fields(name: str) -> dict[str, str]:
    """Those of a `TypedDict` of the stub, and of its bases."""
    found: dict[str, str] = {}
    for node in STUB.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            for base in node.bases:
                found |= fields(ast.unparse(base))
            for field in node.body:
                if isinstance(field, ast.Expr):  # nothing of its own
                    continue
                assert isinstance(field, ast.AnnAssign)
                found[ast.unparse(field.target)] = ast.unparse(field.annotation)
    return found


@pytest.mark.parametrize("name", OVERLOADED)
def test_overloads_take_what_the_loss_takes(name: str) -> None:
    (loss,) = ast.parse(inspect.getsource(getattr(jl, name))).body
    assert isinstance(loss, ast.FunctionDef)
    positional = annotated(loss.args.args)
    keywords = annotated(loss.args.kwonlyargs)
    flag = "bool" if name in LOG_PROBS else "bool | tuple[Metric, ...]"
    assert keywords.pop(FLAGS[name][0]) == flag
    overloads = [
        node.args
        for node in STUB.body
        if isinstance(node, ast.FunctionDef) and node.name == name
    ]
    assert len(overloads) == 3
    for told in overloads:
        assert list(annotated(told.args).items()) == list(positional.items())
        defaults = [list(map(ast.unparse, a.defaults)) for a in (told, loss.args)]
        assert defaults[0] == defaults[1]
        assert told.kwarg is not None
        unpacked = annotated([told.kwarg])["options"]
        assert fields(unpacked.removeprefix("Unpack[").removesuffix("]")) == keywords


def test_a_loss_of_rows_takes_what_the_stub_says() -> None:
    (loss,) = ast.parse(inspect.getsource(jl.linear_softmax_loss)).body
    assert isinstance(loss, ast.FunctionDef)
    assert fields("_OfRows") == annotated(loss.args.kwonlyargs)


def test_a_type_checker_is_told_every_public_name() -> None:
    package = ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))
    told, exported = (
        {
            alias.asname
            for node in tree.body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
            if alias.asname
        }
        for tree in (STUB, package)
    )
    assert sorted([*told, *OVERLOADED, "linear_softmax_loss"]) == sorted(exported)
