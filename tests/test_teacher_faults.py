"""Teachers killed, stopped and damaged under a run, one of two and all of them: no bit changes."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from orchestrator import history
from tests.distilled_runs import ENDLESS, DistilledRun, embedded_ray, wait_until
from tests.runs import make_teacher, text_folder
from tests.same_run import assert_same_run


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("storage")
    make_teacher(path, text_folder(path))
    return path


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with embedded_ray() as address:
        yield address


class Run(DistilledRun):
    """A run with two teachers."""

    def __init__(self, storage: Path, address: str, name: str, steps: int, **teacher: Any):
        super().__init__(storage, address, name, steps, **{"replicas": 2, **teacher})

    def teachers(self, num: int) -> list[tuple[str, int]]:
        """Name and process of the replicas, once `num` serve."""

        def alive() -> list[tuple[str, int]]:
            ready = self.events("teacher_ready")
            named = [(e["who"].removeprefix("teacher-"), e["pid"]) for e in ready]
            return [(replica, pid) for replica, pid in named if is_actor(replica)]

        def serving() -> bool:
            told = self.status().get("teachers", {}).get("replicas")
            return told == {"RUNNING": num} and len(alive()) == num

        wait_until(serving)
        return alive()


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
    run = Run(storage, address, "disturbed", ENDLESS)
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


def test_faults_of_teachers_change_no_bit(disturbed: Run, storage: Path, address: str) -> None:
    num_steps = len(history.read_steps(disturbed.folder.url))
    undisturbed = Run(storage, address, "undisturbed", num_steps)
    undisturbed.end("finished")
    assert_same_run(disturbed.folder, undisturbed.folder)
    assert undisturbed.events("teacher_failed") == []


def test_what_happened_to_the_teachers_is_told(disturbed: Run) -> None:
    failed = disturbed.events("teacher_failed")
    assert any(event["died"] for event in failed)
    assert any("no answer within 3 s" in event["reason"] for event in failed)
    assert any("have changed in memory" in event["reason"] for event in failed)
    damaged = [event["replica"] for event in disturbed.events("teacher_quarantined")]
    assert len(damaged) == len(set(damaged)) == 3
    assert len(disturbed.events("teacher_ready")) == 2 + 3 * (1 + 2)
    lines = history.read_steps(disturbed.folder.url)
    assert {line["attempt"] for line in lines} == {1}, "no dead teacher costs an attempt"
    ready = {e["who"].removeprefix("teacher-") for e in disturbed.events("teacher_ready")}
    assert {origin for line in lines for origin in line["targets"]["from"]} <= ready


def test_replicas_of_several_kinds_share_the_work(storage: Path, address: str) -> None:
    more = [{"name": "more", "replicas": 1, "cpus_per_replica": 0}]
    run = Run(storage, address, "kinds", ENDLESS, replicas=1, sameness="mixed", groups=more)
    teachers = dict(run.teachers(2))

    def all_asked() -> bool:
        lines = history.read_steps(run.folder.url)
        return {name for line in lines for name in line["targets"]["from"]} == teachers.keys()

    wait_until(all_asked)
    run.stop()
