"""Teachers killed, stopped and damaged under a run, one of two and all of them: no bit changes.

Costs two gangs and some thirteen teachers, one or two at a time.
"""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from orchestrator import history
from tests.helpers.distilled_runs import ENDLESS, DistilledRun, wait_until
from tests.helpers.replicas import flip_bit_in_memory, is_actor
from tests.helpers.same_run import assert_same_in_one_process


class Run(DistilledRun):
    """A run with two teachers, that goes on until it is stopped."""

    def __init__(self, storage: Path, address: str, name: str, **teacher: Any):
        super().__init__(storage, address, name, ENDLESS, **{"replicas": 2, **teacher})

    def teachers(self, num: int) -> list[tuple[str, int]]:
        """Name and process of the replicas, once `num` serve."""

        def alive() -> list[tuple[str, int]]:
            return [(name, pid) for name, pid in ready(self).items() if is_actor(name)]

        def serving() -> bool:
            told = self.status().get("teachers", {}).get("replicas")
            return told == {"RUNNING": num} and len(alive()) == num

        wait_until(serving)
        return alive()


def ready(run: DistilledRun) -> dict[str, int]:
    """The replicas that have been ready to serve, in order, and their processes."""
    events = run.events("teacher_ready")
    return {event["who"].removeprefix("teacher-"): event["pid"] for event in events}


def origins(run: DistilledRun) -> set[str]:
    """Where a run's targets came from."""
    lines = history.read_steps(run.folder.url)
    return {origin for line in lines for origin in line["targets"]["from"]}


def kill(teacher: tuple[str, int]) -> None:
    os.kill(teacher[1], signal.SIGKILL)


def hang(teacher: tuple[str, int]) -> None:
    os.kill(teacher[1], signal.SIGSTOP)


def damage(teacher: tuple[str, int]) -> None:
    flip_bit_in_memory(teacher[0])


@pytest.fixture(scope="module")
def disturbed(storage: Path, address: str) -> Run:
    run = Run(storage, address, "harmed")
    for everybody in (False, True):
        for harm in (kill, hang, damage):
            teachers = run.teachers(2)
            for teacher in teachers if everybody else teachers[:1]:
                harm(teacher)
            gone = [name for name, _ in (teachers if everybody else teachers[:1])]
            run.goes_on()
            wait_until(lambda gone=gone: not any(map(is_actor, gone)))
    run.teachers(2)
    run.goes_on()
    run.stop()
    return run


@pytest.mark.night("test_a_disturbed_run_equals_an_undisturbed_one")
def test_faults_of_teachers_change_no_bit(disturbed: Run) -> None:
    assert_same_in_one_process(disturbed.folder)


@pytest.mark.night("test_a_disturbed_run_equals_an_undisturbed_one")
def test_what_happened_to_the_teachers_is_told(disturbed: Run) -> None:
    failed = disturbed.events("teacher_failed")
    assert any("no answer within 3 s" in event["reason"] for event in failed)
    assert any("have changed in memory" in event["reason"] for event in failed)
    damaged = [event["replica"] for event in disturbed.events("teacher_quarantined")]
    assert len(damaged) == len(set(damaged)) == 3
    assert len(disturbed.events("teacher_ready")) == 2 + 3 * (1 + 2)
    lines = history.read_steps(disturbed.folder.url)
    assert {line["attempt"] for line in lines} == {1}, "no dead teacher costs an attempt"
    assert origins(disturbed) <= ready(disturbed).keys()


@pytest.mark.night("test_each_kind_of_replica_has_an_application_and_machines_of_its_own")
def test_replicas_of_several_kinds_share_the_work(storage: Path, address: str) -> None:
    more = [{"name": "more", "replicas": 1, "cpus_per_replica": 0}]
    run = Run(storage, address, "kinds", replicas=1, sameness="mixed", groups=more)
    teachers = dict(run.teachers(2))
    wait_until(lambda: origins(run) == teachers.keys())
    assert run.events("teacher_failed") == []
    run.stop()
