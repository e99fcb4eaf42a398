"""The run's state machine: each edge of its table, and what a run lives through."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from configs.load import parse_run
from orchestrator.controller import MAX_WAITING_EVALUATIONS, STOP_WITHIN_S
from orchestrator.recipe import _reopen
from orchestrator.run_folder import RunFolder
from orchestrator.run_state import (
    TRANSITIONS,
    Broken,
    Committed,
    Delete,
    Evaluate,
    Evaluated,
    EvaluationFailed,
    Event,
    KillAttempt,
    Prepared,
    Release,
    Say,
    ScaleAsked,
    SetTeachers,
    Snapshot,
    StartAttempt,
    State,
    Stepped,
    StopAsked,
    Ticked,
)
from tests.controller_bench import (
    FACTS,
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
from tests.runs import tiny_values
from workers.code_identity import software

# The event that takes each edge, at a time when no pause has passed and when all have.
EDGES: dict[tuple[State, State], tuple[Event, float]] = {
    (State.PREPARING, State.STARTING): (Prepared(FACTS), 0),
    (State.PREPARING, State.STOPPED): (StopAsked(), 0),
    (State.PREPARING, State.FAILED): (Broken("no text"), 0),
    (State.STARTING, State.TRAINING): (Stepped(1), 0),
    (State.STARTING, State.RECOVERING): (failed(1), 0),
    (State.STARTING, State.STOPPING): (StopAsked(), 0),
    (State.STARTING, State.EVALUATING): (finished(1), 0),
    (State.STARTING, State.FAILED): (failed(1, USER_ERROR), 0),
    (State.TRAINING, State.RECOVERING): (failed(1), 0),
    (State.TRAINING, State.STOPPING): (StopAsked(), 0),
    (State.TRAINING, State.EVALUATING): (finished(1), 0),
    (State.TRAINING, State.FAILED): (Broken("no teachers"), 0),
    (State.RECOVERING, State.STARTING): (Ticked(), 1000),
    (State.RECOVERING, State.STOPPED): (StopAsked(), 0),
    (State.RECOVERING, State.FAILED): (Broken("no teachers"), 0),
    (State.STOPPING, State.STOPPED): (finished(1, stopped=True), 0),
    (State.STOPPING, State.EVALUATING): (finished(1), 0),
    (State.EVALUATING, State.FINISHED): (Evaluated(4, 1.5), 0),
    (State.EVALUATING, State.STOPPED): (StopAsked(), 0),
}


def test_the_table_of_edges_is_the_table_of_transitions():
    assert set(EDGES) == {(a, b) for a, afters in TRANSITIONS.items() for b in afters}


@pytest.mark.parametrize(("before", "after"), EDGES)
def test_each_transition_is_reached(before: State, after: State):
    bench = Bench()
    bench.feed(*TO[before])
    assert bench.state is before
    event, later_s = EDGES[before, after]
    done = bench.feed(event, at_s=1000.0 + later_s)
    taken = [(said["before"], said["state"]) for said in said("state", done)]
    assert taken[0] == (before.value, after.value)


def test_a_run_from_beginning_to_end():
    bench = Bench()
    bench.feed(Prepared(FACTS))
    assert [a for a in bench.actions if not isinstance(a, Say)] == [SetTeachers(2), StartAttempt(1)]
    bench.feed(Stepped(1), Committed((2,)))
    assert bench.actions[-1] == Evaluate(2)
    bench.feed(Evaluated(2, 3.0), Committed((2, 4)), finished(1))
    assert bench.state is State.EVALUATING
    done = bench.feed(Evaluated(4, 2.0))
    assert bench.state is State.FINISHED
    assert done[-1] == Release()
    assert bench.snapshot.evaluated == {2: 3.0, 4: 2.0}
    assert bench.snapshot.digest == "p-o"
    assert bench.snapshot.reason is None


def test_without_evaluation_the_end_of_training_is_the_end():
    bench = Bench(make_config(evaluation={"enabled": False}))
    bench.feed(Prepared(FACTS), Stepped(1), Committed((2, 4)), finished(1))
    assert bench.state is State.FINISHED
    assert not of(Evaluate, bench.actions)


def test_no_teachers_are_set_where_there_are_none():
    bench = Bench(snapshot=Snapshot(teachers=0))
    bench.feed(Prepared(FACTS))
    assert not of(SetTeachers, bench.actions)


# Stop.


def test_stop_before_the_first_step_kills_at_once():
    bench = Bench()
    done = bench.feed(Prepared(FACTS), StopAsked())
    assert of(KillAttempt, done) == [KillAttempt(1)]
    bench.feed(failed(1, LOST_DRIVER))
    assert bench.state is State.STOPPED


def test_stop_while_training_leaves_time_to_save_and_then_kills():
    bench = Bench()
    bench.feed(*TO[State.STOPPING], at_s=1000)
    assert not of(KillAttempt, bench.feed(Ticked(), at_s=1000 + STOP_WITHIN_S - 0.1))
    assert of(KillAttempt, bench.feed(Ticked(), at_s=1000 + STOP_WITHIN_S)) == [KillAttempt(1)]
    assert not of(KillAttempt, bench.feed(Ticked(), at_s=1000 + STOP_WITHIN_S + 1))
    bench.feed(failed(1, LOST_DRIVER), at_s=1000 + STOP_WITHIN_S + 2)
    assert bench.state is State.STOPPED


def test_a_kill_that_was_lost_with_the_controller_is_made_good():
    bench = Bench()
    bench.feed(*TO[State.STOPPING], at_s=1000)
    bench.feed(Ticked(), at_s=1000 + STOP_WITHIN_S)
    next_life = Bench(snapshot=round_trip(bench.snapshot))
    assert of(KillAttempt, next_life.feed(Ticked(), at_s=1000 + 2 * STOP_WITHIN_S))


@pytest.mark.parametrize("state", TO)
def test_a_second_stop_does_nothing(state: State):
    bench = Bench()
    bench.feed(*TO[state])
    bench.feed(StopAsked())
    before = bench.snapshot
    assert bench.feed(StopAsked()) == []
    assert bench.snapshot == before


@pytest.mark.parametrize("state", [State.PREPARING, State.RECOVERING, State.EVALUATING])
def test_stop_where_no_attempt_lives_is_the_end(state: State):
    bench = Bench()
    bench.feed(*TO[state])
    assert of(Release, bench.feed(StopAsked())) == [Release()]
    assert bench.state is State.STOPPED
    assert bench.snapshot.reason == "stopped on request"


def test_an_attempt_that_fails_while_stopping_is_not_launched_again():
    bench = Bench()
    done = bench.feed(*TO[State.STOPPING], failed(1))
    assert bench.state is State.STOPPED
    assert of(StartAttempt, done) == [StartAttempt(1)]
    assert bench.snapshot.used == {}


def test_a_run_that_ends_while_stopping_is_judged_and_finishes():
    bench = Bench()
    bench.feed(*TO[State.STOPPING], Committed((4,)), finished(1))
    assert bench.state is State.EVALUATING
    bench.feed(Evaluated(4, 1.0))
    assert bench.state is State.FINISHED


# Faults.


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


def test_a_users_error_ends_the_run_with_the_error():
    bench = Bench()
    bench.feed(Prepared(FACTS), failed(1, USER_ERROR))
    assert bench.state is State.FAILED
    assert bench.snapshot.reason == USER_ERROR.message
    assert bench.snapshot.used == {}


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


# Teachers.


def test_scaling_before_the_teachers_are_there_is_remembered():
    bench = Bench()
    assert not of(SetTeachers, bench.feed(ScaleAsked(5)))
    assert of(SetTeachers, bench.feed(Prepared(FACTS))) == [SetTeachers(5)]
    done = bench.feed(Stepped(1), ScaleAsked(1))
    assert of(SetTeachers, done) == [SetTeachers(1)]
    assert said("scaled", done) == [{"teachers": 1, "before": 5, "reason": "by hand"}]


# Evaluations and what is kept.


def test_a_dead_evaluator_costs_its_own_budget_and_never_the_run():
    bench = Bench(make_config(faults={"evaluator_died": 2}))
    bench.feed(Prepared(FACTS), Stepped(1))
    for _ in range(2):
        bench.feed(Committed((2,)))
        assert of(Evaluate, bench.feed(EvaluationFailed(2, "gone", retry=True))) == [Evaluate(2)]
    assert bench.snapshot.used == {"evaluator_died": 2}
    done = bench.feed(EvaluationFailed(2, "gone", retry=True))
    assert not of(Evaluate, done)
    assert bench.state is State.TRAINING
    assert bench.snapshot.evaluated == {2: None}
    assert of(Evaluate, bench.feed(Committed((2, 4)))) == [Evaluate(4)]
    assert of(StartAttempt, bench.feed(failed(1)))


def test_a_refused_checkpoint_is_not_tried_again():
    bench = Bench()
    done = bench.feed(*TO[State.EVALUATING], EvaluationFailed(4, "damaged", retry=False))
    assert of(Evaluate, done) == [Evaluate(4)]
    assert bench.snapshot.evaluated == {4: None}
    assert bench.snapshot.used == {}
    assert bench.state is State.FINISHED


def test_when_evaluations_fall_behind_the_oldest_are_skipped_aloud():
    bench = Bench()
    steps = tuple(range(1, MAX_WAITING_EVALUATIONS + 4))
    done = bench.feed(Prepared(FACTS), Stepped(1), Committed((1,)), Committed(steps))
    assert [entry["step"] for entry in said("evaluation_skipped", done)] == [2, 3, 4]
    # The one under way stays, and what is skipped is no longer pinned.
    assert bench.snapshot.evaluating == 1
    assert of(Delete, done) == [Delete(2), Delete(3), Delete(4)]


def test_a_checkpoint_waits_for_its_evaluation_before_it_may_go():
    bench = Bench()
    done = bench.feed(Prepared(FACTS), Stepped(1), Committed((1, 2, 3, 4)))
    assert not of(Delete, done)
    assert of(Delete, bench.feed(Evaluated(1, 9.0))) == []  # the best so far
    assert of(Delete, bench.feed(Evaluated(2, 1.0))) == [Delete(1)]
    bench.feed(Evaluated(3, 2.0), Evaluated(4, 2.0))
    assert bench.snapshot.steps == (2, 3, 4)


def test_after_training_nothing_is_left_unjudged():
    bench = Bench()
    bench.feed(Prepared(FACTS), Stepped(1), Committed((1, 2, 3)), finished(1))
    for step in (1, 2):
        bench.feed(Evaluated(step, 1.0))
        assert bench.state is State.EVALUATING
    bench.feed(Evaluated(3, 1.0))
    assert bench.state is State.FINISHED


# A run taken up again.


@pytest.mark.parametrize("facts", [FACTS, None])
def test_a_resumed_run_goes_on_with_the_next_attempt(tmp_path: Path, facts: dict[str, Any] | None):
    values = tiny_values(tmp_path, "run") | {"checkpoint": {"every_steps": 1}}
    config = parse_run(values, "test")
    bench = Bench(config, Snapshot())
    if facts:
        bench.feed(*TO[State.STOPPING], Committed((4,)), Evaluated(4, 1.0), finished(1, True))
    else:
        bench.feed(StopAsked())
    assert bench.state is State.STOPPED
    folder = RunFolder(str(tmp_path), "run")
    folder.create(config, {"software": software()})
    folder.write_snapshot(bench.snapshot.to_json())
    folder.send({"kind": "stop"})  # came after the end
    _reopen(folder, config, config)
    assert folder.commands() == []
    again = Bench(config, Snapshot.from_json(folder.snapshot() or {}))
    if facts:
        assert of(StartAttempt, again.feed(Ticked())) == [StartAttempt(2)]
        assert again.snapshot.evaluated == {4: 1.0}
        again.feed(Stepped(2), finished(2))
        assert again.state is State.FINISHED
    else:
        assert again.state is State.PREPARING
        assert of(StartAttempt, again.feed(Prepared(FACTS))) == [StartAttempt(1)]
    assert not again.snapshot.stop_asked


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
