"""The benchmark suite runs from end to end, in its smallest size."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

ROOT = pathlib.Path(__file__).parents[1]
START, END = "<!-- benchmarks:start -->", "<!-- benchmarks:end -->"


def benchmarks(*arguments: str) -> str:
    # In a process of its own, with one CPU device and without the tests' settings.
    environment = {k: v for k, v in os.environ.items() if k not in ("OUT", "XLA_FLAGS")}
    command = [sys.executable, "-m", "benchmarks", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, Any]:
    folder = tmp_path_factory.mktemp("results")
    # A worker whose interpreter does not exist is a peer that is not installed.
    absent = ("--peers", "optax,torch", "--torch-python", "no-such-python")
    benchmarks("run", "--quick", *absent, "--out", str(folder))
    (path,) = folder.glob("*.json")
    return path, json.loads(path.read_text("utf-8"))


def test_every_case_compares_paired_calls(result: tuple[pathlib.Path, Any]) -> None:
    _, content = result
    assert content["not_run"] == []
    assert list(content["absent"]) == ["torch"]
    whats = {case["what"] for case in content["cases"]}
    assert whats == {"forward", "value-and-gradient", "step", "fused"}
    for case in content["cases"]:
        assert case["failed"] == {}
        ours = {"jaxlosses"}
        if case["what"] == "fused":
            ours |= {f"jaxlosses {s}" for s in ("tokens", "recompute", "vocab")}
        assert set(case["entries"]) == ours | {"optax", case["floor"]}
        samples = {len(entry["samples_ms"]) for entry in case["entries"].values()}
        assert len(samples) == 1
        assert min(samples) >= 5
        assert case["entries"]["jaxlosses"]["ratio_to_ours"] == [1, 1, 1]


def test_accuracy_stands_beside_the_time(result: tuple[pathlib.Path, Any]) -> None:
    _, content = result
    (forward,) = [c for c in content["cases"] if c["what"] == "forward"]
    ours = forward["entries"]["jaxlosses"]["worst_error"]
    assert max(ours.values()) < 4e-6
    assert forward["entries"]["optax"]["worst_error"]["confident"] > 0.1
    (fused,) = [c for c in content["cases"] if c["what"] == "fused"]
    for name in set(fused["entries"]) - {fused["floor"]}:
        assert fused["entries"][name]["worst_error"]["order 1"] < 4e-6


def test_report_needs_only_the_json(
    result: tuple[pathlib.Path, Any], tmp_path: pathlib.Path
) -> None:
    path, content = result
    copy, readme = tmp_path / path.name, tmp_path / "README.md"
    copy.write_text(path.read_text("utf-8"), "utf-8")
    for text in ("", "an old table"):
        readme.write_text(f"before\n{START}\n{text}{END}\nafter\n", "utf-8")
        benchmarks("report", str(copy), "--readme", str(readme))
        rendered = readme.read_text("utf-8")
        assert rendered.startswith(f"before\n{START}\n### ")
        assert rendered.endswith(f"{END}\nafter\n")
        assert "an old table" not in rendered
        assert content["versions"]["jax"] in rendered
        assert copy.with_suffix(".svg").name in rendered
    assert "<svg" in copy.with_suffix(".svg").read_text("utf-8")
    assert "x + 1 (floor)" in copy.with_suffix(".md").read_text("utf-8")
