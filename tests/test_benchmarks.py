"""The benchmark suite runs from end to end, in its smallest size."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

import pytest

from benchmarks import cases, hlo, report

# The suite runs once, for all tests.
pytestmark = pytest.mark.together

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
        assert min(samples) >= 8
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
        assert fused["entries"][name]["worst_error"]["gradient"] < 1e-5


def test_report_needs_only_the_json(
    result: tuple[pathlib.Path, Any], tmp_path: pathlib.Path
) -> None:
    path, content = result
    folder, readme = tmp_path / "results", tmp_path / "README.md"
    folder.mkdir()
    copy, tables = folder / path.name, folder / "README.md"
    copy.write_text(path.read_text("utf-8"), "utf-8")
    for text in ("", "an old table"):
        readme.write_text(f"before\n{START}\n{text}{END}\nafter\n", "utf-8")
        tables.write_text(text, "utf-8")
        where = ("--readme", str(readme), "--tables", str(tables))
        benchmarks("report", str(copy), *where)
        rendered, page = readme.read_text("utf-8"), tables.read_text("utf-8")
        assert rendered.startswith(f"before\n{START}\n")
        assert rendered.endswith(f"{END}\nafter\n")
        assert "(results/README.md)" in rendered
        assert "an old table" not in rendered + page
        assert page.startswith("# Measurements\n")
        assert content["versions"]["jax"] in page
        assert f"]({copy.with_suffix('.svg').name})" in page
        assert f"]({copy.with_suffix('.md').name})" in page
    assert "<svg" in copy.with_suffix(".svg").read_text("utf-8")
    assert "x + 1 (floor)" in copy.with_suffix(".md").read_text("utf-8")


@pytest.mark.long
def test_the_error_is_measured_at_every_margin(tmp_path: pathlib.Path) -> None:
    effort = ("--peers", "optax", "--budget", "0.01", "--shrink", "11")
    printed = benchmarks("run", "--preset", "accuracy", *effort, "--out", str(tmp_path))
    assert "| margin | ours | optax |" in printed
    (path,) = tmp_path.glob("*.json")
    cases = json.loads(path.read_text("utf-8"))["cases"]
    assert [case["dtype"] for case in cases] == ["float32", "bfloat16"]
    for case in cases:
        ours, theirs = (
            case["entries"][name]["worst_error"] for name in ("jaxlosses", "optax")
        )
        assert list(map(float, ours)) == list(range(-10, 81))
        assert max(ours.values()) < 4e-6
        assert theirs["20"] == theirs["80"] == 1


def test_the_error_is_drawn_against_the_margin(tmp_path: pathlib.Path) -> None:
    (kept,) = (ROOT / "benchmarks" / "results").glob("cpu-*-accuracy.json")
    path, readme = tmp_path / kept.name, tmp_path / "README.md"
    path.write_text(kept.read_text("utf-8"), "utf-8")
    readme.write_text(f"{START}\n{END}\n", "utf-8")
    report.report([path], readme, tmp_path / "tables.md")
    assert f"]({path.with_suffix('.svg').name})" in readme.read_text("utf-8")
    curves = path.with_suffix(".svg").read_text("utf-8").count('<g id="line2d_')
    # Of two dtypes: ours and five peers, beside a tick or a grid line here and there.
    assert curves > 2 * 6
    assert "| 20 | " in (tmp_path / "tables.md").read_text("utf-8")


@pytest.mark.long
def test_the_gpu_preset_runs_in_small_on_a_cpu(tmp_path: pathlib.Path) -> None:
    preset = ("--preset", "gpu", "--device", "cpu", "--shrink", "256")
    effort = ("--peers", "optax", "--budget", "0.01", "--out", str(tmp_path))
    printed = benchmarks("run", *preset, *effort)
    (path,) = tmp_path.glob("*.json")
    content = json.loads(path.read_text("utf-8"))
    assert content["not_run"] == []
    assert [case["failed"] for case in content["cases"]] == [{}] * 20
    assert "share of copy bandwidth" in printed
    assert "three matmuls" in printed


MODULE = """\
HloModule jit_f, is_scheduled=true

%fused_reduce (param_0: bf16[6,50]) -> f32[6] {
  %param_0 = bf16[6,50]{1,0} parameter(0)
  %wide = f32[6,50]{1,0} convert(%param_0)
  ROOT %sum = f32[6]{0} reduce(%wide, %zero), dimensions={1}, to_apply=%add
}

%body (p: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %p = (s32[], f32[4,8]{1,0}) parameter(0)
  %a = bf16[4,2]{1,0} constant({...})
  %b = bf16[2,8]{1,0} constant({...})
  %c = f32[4,8]{1,0} get-tuple-element(%p), index=1
  %gemm = (f32[4,8]{1,0}, s8[64]{0}) custom-call(%a, %b, %c), \
custom_call_target="__cublas$lt$matmul", backend_config={"alpha_real":1,"beta":1}
}

ENTRY %main (z: bf16[6,50]) -> (f32[6], bf16[6,50]) {
  %z = bf16[6,50]{1,0:T(8,128)(2,1)} parameter(0)
  %lse = f32[6]{0:T(128)S(1)} fusion(%z), kind=kInput, calls=%fused_reduce
  %wide = f32[6,50]{1,0} fusion(%z), kind=kLoop, calls=%fused_convert
  %two = (f32[6]{0}, bf16[6,50]{1,0}) fusion(%wide, /*index=1*/%lse), kind=kLoop
  %dot = f32[6,6]{1,0} dot(%z, %z), lhs_contracting_dims={1}
  %d = bf16[6,50]{1,0} get-tuple-element(%two), index=1
  ROOT %out = (f32[6]{0}, bf16[6,50]{1,0}) tuple(%lse, %d)
}
"""


def test_passes_over_the_logits_are_counted_in_a_compiled_module() -> None:
    counted = hlo.passes(MODULE, 6 * 50)
    assert counted == {"reads": 5, "writes": 2, "float32_arrays": 1}


def test_matmuls_are_found_in_loops_too() -> None:
    assert hlo.matmuls(MODULE) == [
        {"factors": ["bf16", "bf16"], "product": "f32", "added_in_place": True},
        {"factors": ["bf16", "bf16"], "product": "f32"},
    ]


# A loop of three trips, which takes a slice, and puts one back.
LOOP = """\
HloModule loop

%slice (p: f32[12,8], i: s32[]) -> f32[4,8] {
  %p = f32[12,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %part = f32[4,8]{1,0} dynamic-slice(%p, %i, %i), dynamic_slice_sizes={4,8}
}

%put (p: f32[12,8], part: f32[4,8], i: s32[]) -> f32[12,8] {
  %p = f32[12,8]{1,0} parameter(0)
  %part = f32[4,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %new = f32[12,8]{1,0} dynamic-update-slice(%p, %part, %i, %i)
}

%condition (c: (s32[], f32[12,8])) -> pred[] {
  %c = (s32[], f32[12,8]{1,0}) parameter(0)
  %n = s32[] constant(3)
  %j = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%j, %n), direction=LT
}

%body (b: (s32[], f32[12,8])) -> (s32[], f32[12,8]) {
  %b = (s32[], f32[12,8]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%b), index=0
  %x = f32[12,8]{1,0} get-tuple-element(%b), index=1
  %part = f32[4,8]{1,0} fusion(%x, %j), kind=kLoop, calls=%slice, \
backend_config={"estimated_cycles":"10"}
  %sum = f32[4,8]{1,0} all-reduce(%part), to_apply=%add
  %new = f32[12,8]{1,0} fusion(%x, %sum, %j), kind=kLoop, calls=%put
  ROOT %out = (s32[], f32[12,8]{1,0}) tuple(%j, %new)
}

ENTRY %main (x: (s32[], f32[12,8])) -> (s32[], f32[12,8]) {
  %x = (s32[], f32[12,8]{1,0}) parameter(0)
  ROOT %w = (s32[], f32[12,8]{1,0}) while(%x), condition=%condition, body=%body
}
"""


def test_work_counts_loops_by_their_trips_and_slices_by_their_size() -> None:
    part, index = 4 * 4 * 8, 4
    work = hlo.work(LOOP)
    # The comparison, the slice, the sum over devices, and the update.
    assert work.launches == 3 * 4
    assert work.bytes_read == 3 * (2 * index + 3 * part + 2 * index)
    assert work.bytes_written == 3 * (1 + 3 * part)
    assert work.bytes_moved == 3 * part
    assert work.cycles == 3 * 10


def test_report_renders_what_compilers_made(tmp_path: pathlib.Path) -> None:
    readme, tables = tmp_path / "README.md", tmp_path / "tables.md"
    readme.write_text(f"{START}\n{END}\n", "utf-8")
    paths = sorted((ROOT / "benchmarks" / "results").glob("compiled-*.json"))
    assert len(paths) == 2
    for path in paths:
        where = ("--readme", str(readme), "--tables", str(tables))
        benchmarks("report", str(path), *where)
        rendered = tables.read_text("utf-8")
        assert "Compiled, not run" in rendered
        assert rendered.count("| ours") >= 7
        rows = re.findall(r"^\| head, .*$", readme.read_text("utf-8"), re.MULTILINE)
        assert rows
        # Nothing was timed, so no time is shown.
        assert all("| compiled for " in row and "| - | - |" in row for row in rows)


def test_first_calls_of_fused_losses_are_rendered() -> None:
    what = cases.FUSED_FIRST_CALL
    (first, _) = [c for c in cases.PRESETS["linear"].cases if c.what == what]
    entries = {
        "jaxlosses": {"ms": [29.0, 30.0, 31.0], "ratio_to_ours": [1.0, 1.0, 1.0]},
        "optax": {"ms": [9.0, 10.0, 11.0], "ratio_to_ours": [0.2, 0.25, 0.3]},
    }
    case = dataclasses.asdict(first) | {"entries": entries}
    text = report._fused_table({"cases": [case]})
    shape = "1024×512×32000"
    assert f"A first call of {shape} (to trace, lower and compile): 30.0 ms" in text
    assert "4.0 times Optax's" in text


def test_the_short_table_shows_the_newest_jax_alone() -> None:
    folder = ROOT / "benchmarks" / "results"
    old, new = folder / "cpu-jax0.10.2.json", folder / "cpu-jax0.12.0.1.json"
    for files in ([old, new], [new, old]):
        text = report.for_readme(files, ROOT, folder / "README.md")
        assert "JAX 0.12.0.1 |" in text
        assert "JAX 0.10.2" not in text
