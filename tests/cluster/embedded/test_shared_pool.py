"""Several students on one pool of teachers: each learns what it learns alone.

Costs two gangs, one of them launched by a process of its own, and three teachers.
"""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from ray import serve

from configs.load import parse_run
from orchestrator import history
from orchestrator.launch import create_run
from orchestrator.launch_spec import LaunchSpec
from orchestrator.pool_keeper import pool_url
from orchestrator.run_pool import make_pool
from tests.helpers.distilled_runs import ENDLESS, DistilledRun, wait_until
from tests.helpers.runs import tiny_values
from tests.helpers.same_run import assert_same_in_one_process
from workers.code_identity import code_digest

APP = "shared-teachers-elders"


def apps() -> set[str]:
    """The applications in Serve; the dead keeper's one may wait for its members."""
    return set(serve.status().applications) - {"shared-teachers-kept"}


def pool_events(storage: Path, pool: str, name: str) -> list[dict[str, Any]]:
    events = history.read_events(pool_url(str(storage), pool))
    return [event for event in events if event["event"] == name]


def test_two_students_share_a_pool_and_learn_what_they_learn_alone(
    storage: Path, address: str
) -> None:
    # What a run leaves behind is looked for in its own Ray job: two at a time need two.
    shared = [
        DistilledRun(
            storage,
            address,
            f"shared-{seed}",
            ENDLESS,
            apart=seed == 2,
            seed=seed,
            pool="elders",
        )
        for seed in (1, 2)
    ]
    wait_until(lambda: all(run.status().get("step") for run in shared))
    # Both are members, and the pool has a replica for each.
    wait_until(lambda: shared[0].status()["teachers"]["replicas"] == {"RUNNING": 2})
    for run in shared:
        run.goes_on()
    assert apps() == {APP}
    shared[0].stop()
    wait_until(lambda: shared[1].status()["teachers"]["replicas"] == {"RUNNING": 1})
    shared[1].goes_on()
    shared[1].stop()
    wait_until(lambda: APP not in apps())
    left = [event["run"] for event in pool_events(storage, "elders", "pool_left")]
    assert left == [run.folder.identity()["run_id"] for run in shared]
    assert len(pool_events(storage, "elders", "teacher_ready")) == 2
    assert len(shared[0].events("pool_joined")) == 1
    assert_same_in_one_process(*(run.folder for run in shared))
    for run in shared:
        assert {line["attempt"] for line in history.read_steps(run.folder.url)} == {1}


@pytest.mark.shows("pool keeper: killed")
def test_a_keeper_that_dies_is_back_and_takes_the_replicas_up(storage: Path, address: str) -> None:
    """The member is here: a controller's side of the pool, without students."""
    values = tiny_values(storage, "member") | {"objective": {"kind": "distill"}}
    values["teacher"] = {"checkpoint": "teacher", "pool": "kept", "cpus_per_replica": 0}
    folder = create_run(parse_run(values, "test"))
    identity = folder.identity()
    spec = LaunchSpec(
        name=folder.name,
        run_id=identity["run_id"],
        storage_url=folder.storage_url,
        run_url=folder.url,
        address=address,
        code=code_digest(),
        replicas=1,
        teacher_url=identity["teacher_url"],
        teacher_digest=identity["teacher_digest"],
        start_url=None,
        start_step=0,
    )
    member = make_pool(spec, folder.config(), lambda event, **details: None)
    assert member is not None
    member.scale(1)
    wait_until(lambda: member.status() == {"RUNNING": 1})
    (started,) = pool_events(storage, "kept", "keeper_started")
    os.kill(started["pid"], signal.SIGKILL)

    def is_member_again() -> bool:
        assert member.failure() is None
        return len(pool_events(storage, "kept", "pool_member")) == 2

    wait_until(is_member_again)
    wait_until(lambda: member.status() == {"RUNNING": 1} and member.serving() == 1)
    assert len(pool_events(storage, "kept", "keeper_started")) == 2
    assert len(pool_events(storage, "kept", "teacher_ready")) == 1
    member.remove()
    assert len(pool_events(storage, "kept", "pool_left")) == 1
