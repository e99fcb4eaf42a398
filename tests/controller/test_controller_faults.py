"""What a fault costs a run, and what an attempt that is over still says."""

import dataclasses
from itertools import pairwise

import pytest

from orchestrator.fault_policy import Failure
from orchestrator.run_state import (
    AttemptFailed,
    Broken,
    Committed,
    DropSnapshots,
    Event,
    KillAttempt,
    Noticed,
    Prepared,
    Quarantine,
    StartAttempt,
    State,
    Stepped,
    Ticked,
)
from tests.helpers.controller_bench import (
    FACTS,
    HOST_DIED,
    LOST_DRIVER,
    TO,
    USER_ERROR,
    Bench,
    failed,
    finished,
    make_config,
    of,
    round_trip,
    said,
)

OUT_OF_MEMORY = "JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 GiB"


def test_a_dead_host_is_outlived_at_once_and_then_after_a_pause():
    bench = Bench()
    bench.feed(Prepared(FACTS), Stepped(1))
    assert of(StartAttempt, bench.feed(failed(1))) == [StartAttempt(2)]
    assert not of(StartAttempt, bench.feed(failed(2), at_s=2000))
    assert bench.state is State.RECOVERING
    assert not of(StartAttempt, bench.feed(Ticked(), at_s=2000.5))
    assert of(StartAttempt, bench.feed(Ticked(), at_s=2001.0)) == [StartAttempt(3)]
    assert bench.snapshot.used == {"host_died": 2}


def test_a_spent_budget_ends_the_run_and_says_which():
    bench = Bench(make_config(faults={"host_died": 1}))
    bench.feed(Prepared(FACTS), failed(1), failed(2))
    assert bench.state is State.FAILED
    assert "faults.host_died allows 1" in (bench.snapshot.reason or "")


def test_on_notice_the_gang_saves_and_leaves_and_the_next_one_starts():
    bench = Bench()
    bench.feed(Prepared(FACTS), Stepped(1))
    done = bench.feed(Noticed(1, ("node",)), Noticed(1, ("node", "other")))
    assert len(said("preemption_noticed", done)) == 1
    assert bench.snapshot.leaving and bench.state is State.TRAINING
    assert round_trip(bench.snapshot) == bench.snapshot
    done = bench.feed(Committed((4,)), finished(1, stopped=True), at_s=1000)
    assert [told["kind"] for told in said("attempt_failed", done)] == ["preempted"]
    # The other machines of its slice are told by then.
    assert not of(StartAttempt, bench.feed(Ticked(), at_s=1004.9))
    assert of(StartAttempt, bench.feed(Ticked(), at_s=1005)) == [StartAttempt(2)]
    assert bench.snapshot.used == {"preempted": 1} and not bench.snapshot.leaving


@pytest.mark.parametrize("how", [HOST_DIED, LOST_DRIVER, Failure(None, (), "nobody knows")])
def test_machines_that_go_before_all_is_saved_were_preempted_all_the_same(how: Failure):
    bench = Bench()
    bench.feed(Prepared(FACTS), Stepped(1), Noticed(1, ("node",)), failed(1, how))
    assert of(StartAttempt, bench.feed(Ticked(), at_s=1005)) == [StartAttempt(2)]
    assert bench.snapshot.used == {"preempted": 1}
    # What the first one was told does not hold for the next.
    bench.feed(Stepped(2), failed(2))
    assert bench.snapshot.used == {"preempted": 1, "host_died": 1}


def test_an_error_of_the_users_own_is_one_on_a_machine_that_goes_too():
    bench = Bench()
    bench.feed(Prepared(FACTS), Stepped(1), Noticed(1, ("node",)), failed(1, USER_ERROR))
    assert bench.state is State.FAILED


def test_a_gang_that_starts_makes_a_step_before_it_leaves_and_one_that_stops_just_stops():
    bench = Bench()
    bench.feed(Prepared(FACTS))
    assert not of(KillAttempt, bench.feed(Noticed(1, ("node",)), Stepped(1)))
    assert bench.snapshot.leaving and bench.state is State.TRAINING
    bench = Bench()
    bench.feed(*TO[State.STOPPING])
    assert bench.feed(Noticed(1, ("node",))) == []


def test_budgets_are_apart_and_faults_are_forgotten():
    bench = Bench(make_config(faults={"host_died": 1, "driver_died": 1, "forget_after_s": 100}))
    bench.feed(Prepared(FACTS), failed(1), failed(2, LOST_DRIVER), at_s=1000)
    assert bench.snapshot.recent == {"host_died": (1000,), "driver_died": (1000,)}
    assert round_trip(bench.snapshot) == bench.snapshot
    bench.feed(failed(3), at_s=1100)
    assert bench.state is State.STARTING and bench.snapshot.used["host_died"] == 2
    bench.feed(failed(4), at_s=1199)
    assert bench.state is State.FAILED


def test_a_users_error_ends_the_run_with_the_error():
    bench = Bench()
    bench.feed(Prepared(FACTS), failed(1, USER_ERROR))
    assert bench.state is State.FAILED
    assert bench.snapshot.reason == USER_ERROR.message
    assert bench.snapshot.used == {}


def test_devices_without_room_end_the_run_and_say_what_takes_it_up():
    bench = Bench()
    others = Failure(1, ("ActorDiedError",), "ActorDiedError: it died")
    host = Failure(0, ("JaxRuntimeError", "RuntimeError"), OUT_OF_MEMORY)
    bench.feed(Prepared(FACTS), AttemptFailed(1, (others, host)))
    assert bench.state is State.FAILED
    reason = bench.snapshot.reason or ""
    assert reason.startswith(OUT_OF_MEMORY)
    for name in ("batch.microbatches", "remat", "mesh.fsdp", "batch.rows", "data.row_length"):
        assert name in reason


def test_what_rollbacks_leave_out_is_remembered_until_the_budget_is_spent():
    bench = Bench(make_config(faults={"anomaly": 2}))
    bench.feed(Prepared(FACTS), Stepped(1))
    anomaly = Failure(0, ("RollbackError", "RuntimeError"), "Step 7", (6, 7))
    next_one = dataclasses.replace(anomaly, skip_steps=(7, 8))
    bench.feed(failed(1, anomaly), failed(2), failed(3, next_one))
    bench.feed(Ticked(), at_s=9000)
    assert bench.state is State.STARTING
    assert round_trip(bench.snapshot).skip_steps == (6, 7, 8)
    assert bench.snapshot.used == {"anomaly": 2, "host_died": 1}
    bench.feed(failed(bench.snapshot.attempt, anomaly))
    assert bench.state is State.FAILED
    assert "faults.anomaly allows 2; the last one: Step 7" in (bench.snapshot.reason or "")


@pytest.mark.parametrize("late", [Stepped(1), failed(1), finished(1), finished(1, True)])
def test_what_an_older_attempt_still_says_is_ignored(late: Event):
    bench = Bench()
    bench.feed(Prepared(FACTS), failed(1))
    before = bench.snapshot
    assert before.attempt == 2
    assert bench.feed(late) == []
    assert bench.snapshot == before


@pytest.mark.parametrize("late", [Stepped(2), failed(2), finished(2), finished(2, True)])
def test_an_attempt_that_is_over_ends_only_once(late: Event):
    bench = Bench()
    bench.feed(*TO[State.RECOVERING])
    before = bench.snapshot
    assert bench.feed(late) == []
    assert bench.snapshot == before


def test_teachers_that_cannot_be_served_do_not_matter_after_training():
    bench = Bench()
    bench.feed(*TO[State.EVALUATING])
    bench.feed(Broken("no teachers"))
    assert bench.state is State.EVALUATING


def test_attempts_are_numbered_without_gaps():
    bench = Bench()
    bench.feed(Prepared(FACTS))
    for attempt in range(1, 8):
        at_s = 1000.0 * attempt
        bench.feed(Stepped(attempt), failed(attempt), Ticked(), at_s=at_s)
        bench.feed(Ticked(), at_s=at_s + 500)
    numbers = [action.attempt for action in of(StartAttempt, bench.actions)]
    assert all(b - a == 1 for a, b in pairwise(numbers))
    assert numbers[0] == 1
    assert len(numbers) == 8


CORRUPT = Failure(0, ("CorruptOwnCheckpointError", "CorruptCheckpointError", "ValueError"), "bad")


def test_a_damaged_checkpoint_is_replaced_by_the_one_before_it():
    bench = Bench()
    bench.feed(Prepared(FACTS), Stepped(1), Committed((2, 4)))
    assert bench.snapshot.resumed_from is None
    bench.feed(failed(1))
    assert bench.snapshot.resumed_from == 4
    done = bench.feed(failed(2, CORRUPT))
    assert of(Quarantine, done) == [Quarantine(4, "bad")]
    assert of(StartAttempt, done) == [StartAttempt(3)]
    assert bench.snapshot.resumed_from == 2
    # With none left the run begins anew, which is better than to end it.
    bench.feed(failed(3, CORRUPT))
    assert bench.snapshot.steps == () and bench.snapshot.resumed_from is None
    assert bench.state is State.STARTING


def test_damage_to_what_a_run_starts_from_is_the_users_to_mend():
    bench = Bench()
    failure = Failure(0, ("CorruptCheckpointError", "ValueError"), "the teacher is damaged")
    bench.feed(Prepared(FACTS), Stepped(1), Committed((2,)), failed(1, failure))
    assert bench.state is State.FAILED and bench.snapshot.steps == (2,)


LOST = Failure(1, ("SnapshotLostError", "RuntimeError"), "gone")
DAMAGED = Failure(1, ("SnapshotDamagedError", "SnapshotLostError", "RuntimeError"), "changed")


@pytest.mark.parametrize("failures", [[DAMAGED], [LOST, LOST]])
def test_snapshots_that_are_damaged_or_lost_again_are_not_asked_for_any_more(
    failures: list[Failure],
):
    bench = Bench()
    bench.feed(Prepared(FACTS), Stepped(1), Committed((2,)), failed(1))
    done = [bench.feed(failed(2 + i, failure)) for i, failure in enumerate(failures)]
    assert [of(DropSnapshots, each) for each in done[:-1]] == [[]] * (len(done) - 1)
    assert of(DropSnapshots, done[-1]) == [DropSnapshots()]
    assert of(StartAttempt, done[-1]) == [StartAttempt(2 + len(failures))]
    assert bench.snapshot.steps == (2,) and not any(of(Quarantine, each) for each in done)
