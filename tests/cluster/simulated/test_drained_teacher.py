"""A node that is about to be taken away: its teacher is replaced first, and answers to the end.

Costs three replicas that compute nothing, and a machine that joins.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.serve.context import _get_global_client

from benchmarks.scripted_teacher import (
    SPEC,
    ScriptedJob,
    ScriptedReplica,
    ScriptedTeacher,
    request_of,
    scripted_job,
)
from orchestrator.teacher_pool import TeacherPool
from tests.chaos.world import World
from tests.helpers.distilled_runs import wait_until
from tests.helpers.preemption import announce_preemption
from workers.asking import PatientSource
from workers.code_identity import code_digest
from workers.patience import Patience
from workers.serve_replicas import ServeReplicas
from workers.serve_teacher import DEPLOYMENT
from workers.targets_protocol import Answer, Row, Scored, row_digest

APP = "teachers-drained"
THIRD = 2
# More than any machine takes: nobody hedges, gives up or is replaced for being slow.
LONG_S = 600.0
MAX_REQUESTS, ROWS_EACH = 16, 4
# Four of them are too many to travel inside a reply: they lie in the store of the node.
ROW_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True)
class GatedJob(ScriptedJob):
    gate: str = ""
    """A folder: batches wait for a file `open` in it, and leave one named after their node."""


class GatedTeacher(ScriptedTeacher):
    def __init__(self, job: GatedJob):
        super().__init__(job)
        self._gate = Path(job.gate)
        self._node = ray.get_runtime_context().get_node_id()

    def score_rows(self, rows: Sequence[Row]) -> Scored:
        (self._gate / self._node).touch()
        while not (self._gate / "open").exists():
            time.sleep(0.02)
        return super().score_rows(rows)


class GatedReplica(ScriptedReplica):
    def _load(self, job: Any) -> GatedTeacher:
        return GatedTeacher(job)


@contextlib.contextmanager
def opened(gate: Path) -> Iterator[None]:
    """Opens it at the end, whatever happens: somebody waits for it."""
    try:
        yield
    finally:
        gate.touch()


@pytest.fixture
def pool(shared_world: World, tmp_path: Path) -> Iterator[TeacherPool]:
    """Two replicas on three machines that have room for one each."""
    job = scripted_job(str(tmp_path), ROWS_EACH, 0.0, ROW_BYTES)
    settings = {"tpus_per_replica": 4, "answer_within_s": LONG_S}
    job = dataclasses.replace(job, config=job.config.model_copy(update=settings))
    job = GatedJob(**vars(job), gate=str(tmp_path))
    shared_world.cluster.add_slice(THIRD)
    pool = TeacherPool(APP, job, str(tmp_path), code_digest(), GatedReplica)
    pool.scale(2)
    wait_until(lambda: pool.status() == {"RUNNING": 2})
    yield pool
    pool.remove()
    shared_world.replace_taken_back()
    shared_world.cluster.lose_slice(THIRD)


def replicas() -> dict[str, tuple[str, str]]:
    """State and node of each replica of the pool; no node ("") as long as it has none."""
    client: Any = _get_global_client()
    deployment = client.get_serve_details()["applications"][APP]["deployments"][DEPLOYMENT]
    return {
        each["replica_id"]: (str(each["state"].value), each.get("node_id") or "")
        for each in deployment["replicas"]
    }


def check(answers: list[Answer], rows: range) -> set[str]:
    """Each row came once, with the bytes that the teacher makes; who scored them."""
    x = np.arange(ROW_BYTES, dtype=np.uint8)
    came = [row for answer in answers for row in answer.chunk.rows]
    assert sorted(row.index for row in came) == list(rows)
    for chunk in (answer.chunk for answer in answers):
        assert list(chunk.digests) == [row_digest(SPEC, row, {"x": x}) for row in chunk.rows]
        assert (chunk.arrays["x"] == x).all()
    return {answer.chunk.origin for answer in answers}


@pytest.mark.shows("teacher's machine: preempted")
def test_a_teacher_on_a_node_that_is_taken_back_is_replaced_first_and_loses_nothing(
    pool: TeacherPool, tmp_path: Path
) -> None:
    told: list[tuple[str, dict[str, Any]]] = []
    source = PatientSource(
        ServeReplicas([APP], LONG_S),
        lambda event, **details: told.append((event, details)),
        Patience(hedge_after_at_least_s=LONG_S),
    )
    before = replicas()
    (leaving, (_, node)), (staying, _) = before.items()

    def ask(number: int) -> set[str]:
        rows = range(number * ROWS_EACH, (number + 1) * ROWS_EACH)
        return check(list(source.ask(request_of(rows))), rows)

    with ThreadPoolExecutor(MAX_REQUESTS) as students, opened(tmp_path / "open"):
        asked: list[Future[set[str]]] = []

        def both_work() -> bool:
            """Asks once more: until a request is accepted, those after it go the same way."""
            asked.append(students.submit(ask, len(asked)))
            return all((tmp_path / at).exists() for _, at in before.values())

        wait_until(both_work)
        announce_preemption(node, LONG_S)

        def leaves() -> bool:
            assert pool.serving() >= 2, "a replica went before another had come"
            return replicas()[leaving][0] == "STOPPING"

        wait_until(leaves)
        assert not any(each.done() for each in asked)
    assert set.union(*(each.result() for each in asked)) >= {leaving, staying}
    wait_until(lambda: leaving not in replicas())
    after = replicas()
    assert {state for state, _ in after.values()} == {"RUNNING"}
    assert len(after) == 2 and node not in {at for _, at in after.values()}
    for number in range(len(asked), len(asked) + MAX_REQUESTS):
        assert ask(number) <= after.keys()
    assert told == []
