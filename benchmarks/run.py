"""A whole run: every case of a preset, into one JSON file."""

import dataclasses
import datetime
import gc
import json
import os
import pathlib
import platform
import re
import subprocess
import time
from collections.abc import Iterable
from typing import Any

import jax
import tqdm

from benchmarks.cases import INPUTS, PRESETS, Case
from benchmarks.measure import Measurement
from benchmarks.peers import Peers, first_line


def run(
    preset_name: str,
    *,
    device: str,
    only: str,
    peers: Iterable[str],
    pythons: dict[str, str],
    budget: float,
    time_limit: float,
    shrink: int,
    out: pathlib.Path,
) -> pathlib.Path:
    """Measures and returns the path of the file, which is written after each case."""
    began = time.monotonic()
    cases = (case.shrunk(shrink) for case in PRESETS[preset_name].cases)
    chosen = [case for case in cases if only.lower() in case.name.lower()]
    started = Peers(peers, pythons, device, _threads())
    result: dict[str, Any] = {
        "preset": preset_name,
        "only": only,
        "shrink": shrink,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "environment": environment(device),
        "versions": {"python": platform.python_version()} | started.versions,
        "absent": started.absent,
        "inputs": INPUTS,
        "budget_s": budget,
        "not_run": [case.name for case in chosen],
        "cases": [],
    }
    path = out / f"{_file_name(result)}.json"
    slowest = 0.0
    bar = tqdm.tqdm(chosen, unit="case", dynamic_ncols=True)
    for case in bar:
        bar.set_postfix_str(case.name)
        case_began = time.monotonic()
        if case_began - began + slowest > time_limit:
            break
        result["not_run"].remove(case.name)
        try:
            measured = _run_case(case, started, budget, on_gpu=device == "gpu")
            result["cases"].append(measured)
        except jax.errors.JaxRuntimeError as error:  # its inputs alone do not fit
            result["not_run"].append(f"{case.name} ({first_line(error)})")
        result["seconds"] = round(time.monotonic() - began)
        slowest = max(slowest, time.monotonic() - case_began)
        write(result, path)
    bar.close()
    started.close()
    return path


def _run_case(
    case: Case, peers: Peers, budget: float, *, on_gpu: bool
) -> dict[str, Any]:
    contestants, floor, failed = peers.contestants(case)
    measurement = Measurement(case, contestants, floor)
    entries = measurement.entries(budget, on_gpu=on_gpu)
    failed |= measurement.failed
    # Arrays of one case must not press on the next.
    del contestants, measurement
    peers.release()
    jax.clear_caches()
    gc.collect()
    described = dataclasses.asdict(case)
    return described | {"floor": floor, "failed": failed, "entries": entries}


def write(result: dict[str, Any], path: pathlib.Path) -> None:
    """One line per case, so that a difference between two runs can be read."""
    head = json.dumps(result | {"cases": []}, indent=1, ensure_ascii=False)
    lines = ",\n".join(json.dumps(c, ensure_ascii=False) for c in result["cases"])
    path.parent.mkdir(parents=True, exist_ok=True)
    text = head.replace('"cases": []', f'"cases": [\n{lines}\n]')
    path.write_text(text + "\n", "utf-8")


def _file_name(result: dict[str, Any]) -> str:
    environment, preset = result["environment"], result["preset"]
    kind = "cpu" if environment["platform"] == "cpu" else environment["device"]
    parts = [kind, f"jax{result['versions']['jax']}"]
    if preset not in ("cpu", "gpu"):
        parts.append(preset)
    if result["shrink"] > 1:
        parts += ["shrink", str(result["shrink"])]
    if result["only"]:
        parts += ["only", result["only"]]
    return "-".join(re.sub(r"[^a-z0-9.]+", "-", part.lower()) for part in parts)


def environment(device: str) -> dict[str, Any]:
    first = jax.devices()[0]
    if first.platform != device:
        raise SystemExit(
            f"--device: JAX found {first.platform}, expected {device}. Install the "
            f"JAX of that device, or pass --device {first.platform}."
        )
    return {
        "platform": first.platform,
        "device": first.device_kind,
        "processor": _processor(),
        "threads": _threads(),
        "system": platform.system(),
        "load_average": round(os.getloadavg()[0], 2),
        "revision": revision(),
    }


def _threads() -> int:
    """Cores that this process may use; every contestant gets them all."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return platform.processor()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor()


def revision() -> str:
    """What was measured, by its commit."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    root = pathlib.Path(__file__).parent
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
