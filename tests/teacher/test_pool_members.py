"""Who uses a shared pool, on a clock of the test: sizes, refusals, the end."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from configs.load import parse_run
from orchestrator.launch_spec import LaunchSpec
from orchestrator.pool_members import MEMBER_EXPIRY_S, STAY_S, Members, needs_of
from tests.helpers.runs import tiny_values

SPEC = LaunchSpec(
    name="run",
    run_id="run-1",
    storage_url="/storage",
    run_url="/storage/runs/run",
    address="here:1",
    code="c",
    replicas=2,
    teacher_url="elder",
    teacher_digest="e",
    start_url=None,
    start_step=0,
)


def needs(spec: LaunchSpec = SPEC, row_length: int = 32, **teacher: Any) -> dict[str, Any]:
    values: dict[str, Any] = tiny_values(Path("/storage"), "run")
    values["objective"] = {"kind": "distill"}
    values["data"]["row_length"] = row_length
    values["teacher"] = {"checkpoint": "elder", "pool": "elders", **teacher}
    return needs_of(spec, parse_run(values, "test"))


def members(taken_up: bool = False) -> Members:
    return Members("elders", needs(), 0.0, taken_up=taken_up)


def test_the_pool_has_the_sum_of_what_its_members_ask_for():
    pool = members()
    assert pool.see("a", 2, 0.0)
    assert pool.see("b", 3, 0.0)
    assert pool.replicas == 5
    assert not pool.see("a", 2, 1.0)
    assert pool.see("a", 4, 2.0)
    assert pool.replicas == 7
    assert pool.leave("b", 3.0)
    assert not pool.leave("b", 3.0)
    assert pool.replicas == 4


def test_a_member_that_is_not_seen_for_a_while_is_dropped():
    pool = members()
    pool.see("a", 2, 0.0)
    pool.see("b", 3, 0.0)
    pool.see("a", 2, MEMBER_EXPIRY_S - 1)
    assert pool.drop_unseen(MEMBER_EXPIRY_S - 0.5) == []
    assert pool.drop_unseen(MEMBER_EXPIRY_S) == ["b"]
    assert pool.replicas == 2


def test_it_is_over_when_nobody_has_been_there_for_a_while():
    pool = members()
    assert not pool.is_over(STAY_S - 1)
    pool.see("a", 1, STAY_S - 1)
    assert not pool.is_over(10 * STAY_S)
    pool.leave("a", 10 * STAY_S)
    assert not pool.is_over(11 * STAY_S - 1)
    assert pool.is_over(11 * STAY_S)


def test_a_keeper_that_takes_a_pool_up_waits_for_its_members():
    assert not members().is_gathering(0.0)
    pool = members(taken_up=True)
    pool.see("a", 1, 1.0)
    pool.leave("a", 2.0)
    last_s = MEMBER_EXPIRY_S - 1
    assert pool.is_gathering(last_s) and not pool.is_over(last_s)
    assert not pool.is_gathering(MEMBER_EXPIRY_S) and pool.is_over(MEMBER_EXPIRY_S)


@pytest.mark.parametrize(
    ("other", "field", "has", "wants"),
    [
        (needs(rows_per_batch=2), "teacher.rows_per_batch", "8", "2"),
        (needs(codec={"kind": "full"}), "teacher.codec.kind", '"hybrid"', '"full"'),
        (needs(row_length=16), "data.row_length", "32", "16"),
        (needs(tpus_per_replica=4), "teacher.tpus_per_replica", "0", "4"),
        (
            needs(dataclasses.replace(SPEC, teacher_digest="f")),
            "teacher.checkpoint",
            '"e"',
            '"f"',
        ),
        (needs(dataclasses.replace(SPEC, code="d")), "Stillhouse sources", '"c"', '"d"'),
        ({**needs(), "of a later version": 1}, "of a later version", "null", "1"),
    ],
)
def test_a_run_that_does_not_fit_is_told_what_differs(other, field, has, wants):
    pool = members()
    assert pool.refusal(other) == (
        f"teacher.pool: the pool 'elders' serves runs with {field} {has}, and this one has "
        f"{wants}; name another pool, or set null for one of the run's own"
    )


def test_what_is_the_students_own_affair_may_differ():
    other = needs(
        dataclasses.replace(SPEC, name="other", run_id="other-1", run_url="/storage/runs/other"),
        replicas=3,
        max_replicas=7,
        prefetch_steps=9,
        cache_bytes=0,
        retry_for_s=5.0,
    )
    assert members().refusal(other) is None
