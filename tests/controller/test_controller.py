"""The run's state machine: each edge of its table, stop, and a run taken up again."""

from pathlib import Path
from typing import Any

import pytest

from configs.load import parse_run
from orchestrator.controller import STOP_WITHIN_S
from orchestrator.recipe import _reopen
from orchestrator.run_folder import RunFolder
from orchestrator.run_state import (
    TRANSITIONS,
    Broken,
    Committed,
    Evaluate,
    Evaluated,
    EvaluationFailed,
    Event,
    KillAttempt,
    Prepared,
    Release,
    Say,
    SetTeachers,
    Snapshot,
    StartAttempt,
    State,
    Stepped,
    StopAsked,
    Ticked,
)
from tests.helpers.controller_bench import (
    FACTS,
    LOST_DRIVER,
    TO,
    USER_ERROR,
    Bench,
    failed,
    finished,
    of,
    round_trip,
    said,
)
from tests.helpers.runs import tiny_values
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
    (State.EVALUATING, State.RECOVERING): (EvaluationFailed(4, "damaged", False, True), 0),
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
