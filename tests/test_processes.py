"""Two processes: a policy has the numbers of one, and so has a sharded language model.

The latter also when one of them dies, and after a restart.
"""

import ast
import contextlib
import pathlib
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import one_device
import pytest

# The story is told once, for all tests.
pytestmark = [pytest.mark.together, pytest.mark.long]

NOTEBOOKS = pathlib.Path(__file__).parent.parent / "notebooks"
SCRIPT = NOTEBOOKS / "sharded_language_model.py"
STEPS = 24
# Seconds without a sign of life, after which JAX takes a process for dead.
TIMEOUT = 20
# What the survivor may take beyond that, on a machine that is busy.
GRACE = 40
PATIENCE = 240

Losses = dict[int, float]


@contextlib.contextmanager
def started(
    *arguments: object, script: pathlib.Path = SCRIPT
) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, str(script), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=one_device.environment(),
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@contextlib.contextmanager
def two_started(*arguments: object) -> Iterator[list[subprocess.Popen[str]]]:
    address = free_address()
    connection = ("--coordinator", address, "--processes", 2, "--timeout", TIMEOUT)
    both = [("--cpu-devices", 4, *connection, "--process", i) for i in range(2)]
    with started(*both[0], *arguments) as one, started(*both[1], *arguments) as other:
        yield [one, other]


def losses(text: str) -> Losses:
    found = re.findall(r"^step +(\d+)  loss (\S+)$", text, re.MULTILINE)
    return {int(step): float(loss) for step, loss in found}


def finish(process: subprocess.Popen[str]) -> str:
    text, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, text
    return text


class Story(NamedTuple):
    alone: Losses
    interrupted: Losses
    code: int
    text: str
    seconds: float
    first: int
    restarted: Losses


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Story:
    """One process; two, of which the second is killed; two that go on from there."""
    with started("--cpu-devices", 8, "--steps", STEPS) as process:
        alone = losses(finish(process))

    saving = ("--checkpoints", tmp_path_factory.mktemp("saved"), "--save-every", 3)
    with two_started("--steps", 10**6, *saving) as (survivor, victim):
        assert survivor.stdout is not None
        text = ""
        for line in survivor.stdout:
            text += line
            if line.startswith("step    8 "):
                break
        victim.kill()
        killed = time.monotonic()
        rest, _ = survivor.communicate(timeout=TIMEOUT + GRACE)
        seconds = time.monotonic() - killed
        text += rest

    # On another mesh: here each process has half of every example's classes.
    with two_started("--steps", STEPS, "--vocabulary-axis", 8, *saving) as processes:
        restarted, _ = map(finish, processes)
    (first,) = map(int, re.findall(r", from (\d+)$", restarted, re.MULTILINE))
    return Story(
        alone,
        losses(text),
        survivor.returncode,
        text,
        seconds,
        first,
        losses(restarted),
    )


def agree(got: Losses, want: Losses) -> None:
    both = sorted(got.keys() & want.keys())
    # Sums are taken in another order, which each further step carries on. The
    # losses fall by 0.1 per step.
    np.testing.assert_allclose(
        [got[step] for step in both], [want[step] for step in both], rtol=2e-6
    )


def test_two_processes_have_the_losses_of_one(story: Story) -> None:
    assert list(story.alone) == list(range(STEPS))
    assert story.alone[STEPS - 1] < story.alone[0] - 1
    assert set(range(9)) <= story.interrupted.keys()
    agree(story.interrupted, story.alone)


def test_the_death_of_a_process_ends_the_other_with_an_error(story: Story) -> None:
    assert story.code != 0
    assert story.seconds < TIMEOUT + GRACE
    assert "Traceback" in story.text
    assert max(story.interrupted) < 1000


def test_a_restart_from_a_checkpoint_goes_on_with_the_same_losses(
    story: Story,
) -> None:
    assert 3 <= story.first <= max(story.interrupted) + 1
    assert story.first < STEPS
    assert list(story.restarted) == list(range(story.first, STEPS))
    agree(story.restarted, story.alone)


def test_two_processes_have_the_policy_of_one() -> None:
    script = pathlib.Path(__file__).parent / "policy_in_parts.py"
    address = free_address()
    with (
        started(script=script) as alone,
        started(address, 0, script=script) as first,
        started(address, 1, script=script) as second,
    ):
        texts = [finish(process) for process in (alone, first, second)]
    one, *others = (
        np.array(ast.literal_eval(text.rpartition("results ")[2])) for text in texts
    )
    assert np.all(np.isfinite(one))
    for found in others:
        np.testing.assert_allclose(found, one, rtol=1e-5)
