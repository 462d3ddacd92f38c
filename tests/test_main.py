"""`python -m jaxlosses` on one device, and what its exit status says."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from jaxlosses import __main__ as main
from jaxlosses import _accuracy
from jaxlosses._backends import plan


@pytest.mark.long
def test_every_error_is_within_its_bar_on_one_device() -> None:
    """With one CPU device rows are blocked, as on the machines of most users."""
    run = subprocess.run(
        [sys.executable, "-m", "jaxlosses", "--json"],
        capture_output=True,
        text=True,
        check=False,
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
    )
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads(run.stdout)
    assert report["holds"]
    assert len(report["devices"]) == 1
    rows = {(row["dtype"], row["option"]): row for row in report["accuracy"]}
    assert len(rows) == 24
    plain = rows["float32", "none"]
    assert plain["loss"] <= plain["loss bar"] == 4e-6
    assert plain["gradient"] <= plain["gradient bar"] == 1e-5
    # What the bar is for: at 80 nats the difference is 0.
    assert plain["optax loss"] == 1
    entropy = {row["dtype"]: row for row in report["entropy"]}
    assert entropy["float32"]["entropy"] <= 4e-6
    # Zero or negative, and without the term of the largest class.
    assert entropy["float32"]["lse - Σ p z"] >= 1
    assert entropy["float32"]["-Σ p log p"] > 1e-2
    assert len(report["gradients"]) == 3
    assert all(row["comparisons"] >= 20 for row in report["gradients"])
    assert all(row["jaxlosses ms"] > 0 for row in report["timing"])


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_accuracy, "_OPTIONS", {"none": {}})
    monkeypatch.setattr(_accuracy, "_CLASSES", (3,))
    monkeypatch.setattr(_accuracy, "_MORE_CLASSES", ())
    monkeypatch.setattr(main, "_gradients", lambda: [{"loss": "none", "holds": True}])
    monkeypatch.setattr(main, "_timing", lambda: [{"shape": "none"}])


@pytest.mark.alternate
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("bar", "status"), [(1.0, 0), (0.0, 1)])
def test_exit_status_says_whether_all_held(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, bar: float, status: int
) -> None:
    monkeypatch.setattr(_accuracy, "_bars", lambda dtype: (bar, bar))
    assert main.main([]) == status
    text = capsys.readouterr().out
    assert ("every error is within its bar" in text) == (status == 0)
    assert "float32" in text
    assert "jax " in text


def test_plan_is_printed_for_each_platform(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "is_local", lambda: True)
    size = "8192x4096x128256"
    assert main.main(["--plan", size]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == ["cpu", "gpu", "tpu"]
    assert all(": vocab, 4 matmuls, " in line for line in lines)
    assert main.main(["--plan", size, "--dtype", "float32", "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)
    assert {found["strategy"] for found in plans.values()} == {"tokens"}
