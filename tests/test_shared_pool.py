"""Several students on one pool of teachers: each learns what it learns alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray import serve

from orchestrator import history
from orchestrator.pool_keeper import pool_url
from tests.distilled_runs import ENDLESS, DistilledRun, embedded_ray, wait_until
from tests.runs import make_teacher, text_folder
from tests.same_run import assert_same_run

APP = "shared-teachers-elders"


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("storage")
    make_teacher(path, text_folder(path))
    return path


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with embedded_ray() as address:
        yield address


def apps() -> set[str]:
    return set(serve.status().applications)


def test_two_students_share_a_pool_and_learn_what_they_learn_alone(
    storage: Path, address: str
) -> None:
    shared = [
        DistilledRun(storage, address, f"shared-{seed}", ENDLESS, seed, pool="elders")
        for seed in (1, 2)
    ]

    def pool_events(name: str) -> list[dict[str, Any]]:
        events = history.read_events(pool_url(str(storage), "elders"))
        return [event for event in events if event["event"] == name]

    wait_until(lambda: all(run.status().get("step") for run in shared))
    # Both are members, and the pool has a replica for each.
    wait_until(lambda: shared[0].status()["teachers"]["replicas"] == {"RUNNING": 2})
    for run in shared:
        run.goes_on()
    assert apps() == {APP}
    assert len(pool_events("teacher_ready")) == 2
    misfit = DistilledRun(storage, address, "misfit", 4, pool="elders", rows_per_batch=2)
    misfit.end("failed")
    reason = misfit.status()["reason"]
    assert "teacher.pool: the pool 'elders' serves runs with teacher.rows_per_batch 4" in reason
    assert "this one has 2" in reason
    steps = [shared[0].stop()]
    wait_until(lambda: shared[1].status()["teachers"]["replicas"] == {"RUNNING": 1})
    shared[1].goes_on()
    assert apps() == {APP}
    steps.append(shared[1].stop())
    wait_until(lambda: not apps())
    assert [event["run"] for event in pool_events("pool_left")] == [
        run.folder.identity()["run_id"] for run in shared
    ]
    assert [event["replicas"] for event in shared[0].events("pool_joined")] == [1]
    alone = [
        DistilledRun(storage, address, f"alone-{seed}", num_steps, seed)
        for seed, num_steps in zip((1, 2), steps, strict=True)
    ]
    for run, with_others in zip(alone, shared, strict=True):
        run.end("finished")
        assert_same_run(with_others.folder, run.folder)
