"""Two processes: a policy has the numbers of one, and so has a sharded language model.

The latter also when one of them dies, in any phase of a step, and after a restart, on
the same mesh and on another.
"""

import ast
import contextlib
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import one_device
import pytest

# Each story is told once, for all tests.
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
        env=one_device.environment() | {"PYTHONUNBUFFERED": "1"},
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
    """What was printed, and when.

    Attributes:
        interrupted: losses until the death of a process.
        code: exit status of the survivor.
        text: all that it printed.
        seconds: from the death to its end.
        saved: steps of which there is a whole checkpoint then.
        half: names of what is left of others.
        first: step from which the next two processes went on.
        restarted: their losses.
    """

    interrupted: Losses
    code: int
    text: str
    seconds: float
    saved: list[int]
    half: list[str]
    first: int
    restarted: Losses


@pytest.fixture(scope="module")
def alone() -> Losses:
    with started("--cpu-devices", 8, "--steps", STEPS) as process:
        return losses(finish(process))


BEFORE, INSIDE, SAVING = "before a step", "inside a collective", "while it is saved"
# Of a mesh (data, vocabulary) after the restart: the same, and each process with half
# of every example's classes.
MESHES = {BEFORE: 4, INSIDE: 4, SAVING: 8}


def read_until(process: subprocess.Popen[str], sign: str) -> str:
    text = ""
    assert process.stdout is not None
    for line in process.stdout:
        text += line
        if sign in line:
            return text
    raise AssertionError(text)


def kill(
    phase: str,
    survivor: subprocess.Popen[str],
    victim: subprocess.Popen[str],
    folder: pathlib.Path,
) -> str:
    """Kills one process in a phase of the other; what that one had printed."""
    if phase == BEFORE:
        text = read_until(survivor, "from 0")
    elif phase == INSIDE:
        text = read_until(survivor, "step    7 ")
        victim.send_signal(signal.SIGSTOP)
        time.sleep(3)  # the other waits for its part of a sum
    else:
        text = read_until(survivor, "step    4 ")
        began = time.monotonic()
        # A folder of step 6 that has not got its name yet.
        while not [f for f in folder.iterdir() if re.match(r"6\D", f.name)]:
            assert time.monotonic() - began < PATIENCE
    victim.kill()
    return text


@pytest.fixture(scope="module", params=MESHES)
def story(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Story:
    """Two processes, of which one is killed, and two that go on from there."""
    folder = tmp_path_factory.mktemp("saved")
    saving = ("--checkpoints", folder, "--save-every", 3)
    with two_started("--steps", 10**6, *saving) as (survivor, victim):
        text = kill(request.param, survivor, victim, folder)
        killed = time.monotonic()
        rest, _ = survivor.communicate(timeout=TIMEOUT + GRACE)
        seconds = time.monotonic() - killed
        text += rest
    names = [f.name for f in folder.iterdir()]
    saved = sorted(int(name) for name in names if name.isdigit())
    half = [name for name in names if not name.isdigit()]

    mesh = ("--vocabulary-axis", MESHES[request.param])
    with two_started("--steps", STEPS, *mesh, *saving) as processes:
        restarted, _ = map(finish, processes)
    (first,) = map(int, re.findall(r", from (\d+)$", restarted, re.MULTILINE))
    return Story(
        losses(text),
        survivor.returncode,
        text,
        seconds,
        saved,
        half,
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


def test_two_processes_have_the_losses_of_one(alone: Losses, story: Story) -> None:
    assert list(alone) == list(range(STEPS))
    assert alone[STEPS - 1] < alone[0] - 1
    if story.saved:
        assert set(range(story.saved[-1])) <= story.interrupted.keys()
    agree(story.interrupted, alone)


def test_the_death_of_a_process_ends_the_other_with_an_error(story: Story) -> None:
    assert story.code != 0
    assert story.seconds < TIMEOUT + GRACE
    assert "Traceback" in story.text
    assert max(story.interrupted, default=0) < 1000


def test_a_restart_from_a_checkpoint_goes_on_with_the_same_losses(
    alone: Losses, story: Story
) -> None:
    # Never from one that is half there.
    assert story.first == max(story.saved, default=0) < STEPS
    assert list(story.restarted) == list(range(story.first, STEPS))
    agree(story.restarted, alone)


def test_each_phase_is_what_it_is_called(
    story: Story, request: pytest.FixtureRequest
) -> None:
    phase = request.node.callspec.params["story"]
    if phase == BEFORE:
        assert story.saved == []
    elif phase == INSIDE:
        assert story.saved[-1] == 6
        assert story.interrupted.keys() >= set(range(8))
    else:
        assert story.saved[-1] == 3
        assert [name for name in story.half if name.startswith("6")]


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
