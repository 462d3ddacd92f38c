"""What `make trust` measures, in small, and that it is what the pages say."""

import ast
import pathlib
import subprocess
import sys

import pytest

from benchmarks import trust


def test_an_import_starts_nothing_and_writes_nothing(tmp_path: pathlib.Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", trust.AUDIT],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ast.literal_eval(done.stdout) == []


def test_the_hook_sees_what_it_looks_for(tmp_path: pathlib.Path) -> None:
    one, other = "import subprocess, socket; open('x', 'w').close()", "socket.socket()"
    started = f"subprocess.run(['true']); {other}"
    code = trust.AUDIT.replace(
        "import jaxlosses, jaxlosses.testing", f"{one};{started}"
    )
    assert code != trust.AUDIT
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    seen = ast.literal_eval(done.stdout)
    assert {"open", "subprocess.Popen", "socket.__new__"} <= set(seen)


@pytest.mark.long
def test_nothing_grows_from_call_to_call() -> None:
    found = trust.long_runs(steps=2_000, calls=200)
    assert found.pop("holds"), found
    for figures in found.values():
        assert figures["compilations at first"] > 0
        assert figures["compilations later"] == 0
        assert figures["more live arrays"] <= 0


@pytest.mark.long
def test_the_bits_are_those_that_the_page_promises() -> None:
    """notebooks/questions.md, "Do the bits stay the same?"."""
    found = trust.determinism()
    assert found["holds"], found
    assert found["other bits in other chunks"] != "none"
    assert found["other bits on two devices"] != "none"
    # A matmul of XLA:CPU, not the loss.
    for name in filter(None, found["other bits on one thread"].split(", ")):
        assert name == "none" or name.endswith("by kernel")
