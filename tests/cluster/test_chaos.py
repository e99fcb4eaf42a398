"""A part of the chaos: one run, disturbed by a few mechanisms, equals an undisturbed one."""

import subprocess
import sys

import pytest

from tests.chaos.faults import FAULTS

pytestmark = pytest.mark.cluster

CHOSEN = (
    "slice: preempted on notice, and back",
    "newest checkpoint: a bit flipped",
    "storage: write-protected",
    "clock: an hour behind for a while",
)


def test_a_disturbed_run_equals_an_undisturbed_one() -> None:
    only = [part for name in CHOSEN for part in ("--only", name)]
    # In a process of its own: it changes the environment of all that it starts.
    chaos = subprocess.Popen(
        [sys.executable, "-m", "tests.chaos", *only],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = chaos.communicate(timeout=1800)
    finally:
        chaos.terminate()
    assert chaos.returncode == 0, output
    assert f"{len(CHOSEN)} faults" in output or "may not make a disk" in output


def test_there_are_faults_of_at_least_twenty_mechanisms() -> None:
    assert len({fault.mechanism for fault in FAULTS.values()}) >= 20
