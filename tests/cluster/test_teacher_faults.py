"""Teachers killed, stopped and damaged under a run, one of two and all of them: no bit changes."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import ray

from orchestrator import history
from tests.helpers.distilled_runs import ENDLESS, DistilledRun, wait_until
from tests.helpers.same_run import assert_same_in_one_process

pytestmark = pytest.mark.cluster


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


def actor_name(replica: str) -> str | None:
    actors: Any = ray.util.list_named_actors(all_namespaces=True)
    names = [actor["name"] for actor in actors]
    return next((name for name in names if name.endswith(f"#{replica}")), None)


def is_actor(replica: str) -> bool:
    return actor_name(replica) is not None


def kill(teacher: tuple[str, int]) -> None:
    os.kill(teacher[1], signal.SIGKILL)


def hang(teacher: tuple[str, int]) -> None:
    os.kill(teacher[1], signal.SIGSTOP)


def damage(teacher: tuple[str, int]) -> None:
    """Flips a bit of the parameters in the replica's memory."""

    def flip(actor: Any) -> None:
        import jax.numpy as jnp

        params = actor._replica_impl._user_callable_wrapper._callable._teacher._params
        bits = params["embedding"].view(jnp.uint32)
        params["embedding"] = bits.at[3, 3].set(bits[3, 3] ^ (1 << 20)).view(jnp.float32)

    name = actor_name(teacher[0])
    assert name is not None
    ray.get(ray.get_actor(name, "serve").__ray_call__.remote(flip))


@pytest.fixture(scope="module")
def disturbed(storage: Path, address: str) -> Run:
    run = Run(storage, address, "disturbed")
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


def test_faults_of_teachers_change_no_bit(disturbed: Run) -> None:
    assert_same_in_one_process(disturbed.folder)


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


def test_replicas_of_several_kinds_share_the_work(storage: Path, address: str) -> None:
    more = [{"name": "more", "replicas": 1, "cpus_per_replica": 0}]
    run = Run(storage, address, "kinds", replicas=1, sameness="mixed", groups=more)
    teachers = dict(run.teachers(2))
    wait_until(lambda: origins(run) == teachers.keys())
    assert run.events("teacher_failed") == []
    run.stop()
