"""The pool's size as the run's controller decides it: by hand, or by what it observes."""

from typing import Any

import pytest

from configs.run import RunConfig
from orchestrator.run_state import (
    Observed,
    Prepared,
    ScaleAsked,
    SetTeachers,
    Snapshot,
    State,
    Stepped,
)
from orchestrator.teacher_scaling import DOWN_WINDOWS, UP_WINDOWS, Bounds, Scaling, bounds_of
from tests.helpers.controller_bench import (
    FACTS,
    TO,
    Bench,
    failed,
    make_config,
    of,
    round_trip,
    said,
)
from workers.tally import Tally


def config_of(**teacher: Any) -> RunConfig:
    values = {"checkpoint": "elder", "replicas": 2, "prefetch_steps": 8} | teacher
    return make_config(objective={"kind": "distill"}, teacher=values)


AUTO = config_of(max_replicas=8)


def waits(serving: int = 2, load: float = 4.0) -> Observed:
    """The student waits three quarters of its time for two teachers that do what they can."""
    return Observed(1, Tally(10, 10.0, 7.5, teacher_busy_s=load * 2.5), serving)


def flows(serving: int, load: float) -> Observed:
    return Observed(1, Tally(20, 10.0, 0.0, teacher_busy_s=load * 10), serving)


def training(config: RunConfig = AUTO, teachers: int = 2) -> Bench:
    bench = Bench(config, Snapshot(teachers=teachers))
    bench.feed(*TO[State.TRAINING])
    return bench


def test_a_waiting_student_gets_teachers_and_the_record_tells_why_and_what_it_did():
    bench = training()
    done = bench.feed(*[waits()] * UP_WINDOWS)
    assert of(SetTeachers, done) == [SetTeachers(5)]
    seen = {"stall_share": 0.75, "utilisation": 0.5, "needed": 5}
    reason = "the student waits 75% of its time"
    assert said("scaled", done) == [{"teachers": 5, "before": 2, "reason": reason, **seen}]
    # While they start, and for a window after, nothing is judged.
    bench.feed(waits(serving=3), at_s=1020.0)
    bench.feed(flows(5, load=4.0), at_s=1030.0)
    assert bench.snapshot.teachers == 5 and not said("scaling_effect", bench.actions)
    done = bench.feed(flows(5, load=4.0), at_s=1040.0)
    effect = {"teachers": 5, "stall_share_before": 0.75, "stall_share": 0.0}
    effect |= {"utilisation": 0.8, "needed": 5}
    assert said("scaling_effect", done) == [effect]
    assert not said("scaling_effect", bench.feed(flows(5, load=4.0), at_s=1050.0))


def test_idle_teachers_are_given_back_after_a_while():
    bench = training(teachers=8)
    assert not of(SetTeachers, bench.feed(*[flows(8, load=1.0)] * (DOWN_WINDOWS - 1)))
    done = bench.feed(flows(8, load=1.0))
    assert of(SetTeachers, done) == [SetTeachers(2)]
    assert said("scaled", done)[0]["reason"] == "busy for 12% of their time, and nothing waits"


def test_every_host_counts():
    bench = training(
        make_config(
            objective={"kind": "distill"},
            teacher={"checkpoint": "elder", "replicas": 1, "max_replicas": 9},
            cluster={"num_hosts": 2},
        ),
        teachers=1,
    )
    bench.feed(waits(serving=1, load=2.0))
    assert bench.snapshot.scaling.needed == 5


def test_what_it_has_seen_outlives_the_controller():
    bench = training()
    bench.feed(*[waits()] * (UP_WINDOWS - 1))
    next_life = Bench(AUTO, round_trip(bench.snapshot))
    assert next_life.snapshot == bench.snapshot
    assert of(SetTeachers, next_life.feed(waits())) == [SetTeachers(5)]


def test_a_snapshot_of_an_earlier_version_is_read():
    values = Snapshot(teachers=3).to_json()
    del values["scaling"]
    assert Snapshot.from_json(values) == Snapshot(teachers=3)


def test_by_hand_it_stays_until_it_is_told_to_follow_the_need():
    bench = training()
    done = bench.feed(ScaleAsked(1))
    assert of(SetTeachers, done) == [SetTeachers(1)]
    assert said("scaled", done) == [{"teachers": 1, "before": 2, "reason": "by hand"}]
    for number in range(20):
        bench.feed(waits(serving=1), at_s=1020.0 + 10 * number)
    assert bench.snapshot.teachers == 1
    assert bench.snapshot.scaling.needed == 5
    bench.feed(ScaleAsked(20), at_s=1300.0)
    # The bounds hold from the moment on that it is automatic.
    assert of(SetTeachers, bench.feed(ScaleAsked(None), at_s=1310.0)) == [SetTeachers(8)]
    for number in range(2 * DOWN_WINDOWS):
        bench.feed(flows(8, load=2.4), at_s=1320.0 + 10 * number)
    assert bench.snapshot.teachers == 3


def test_scaling_by_hand_tells_its_effect_too():
    bench = training(config_of())
    bench.feed(waits(), ScaleAsked(4))
    bench.feed(flows(4, load=3.0), at_s=1020.0)
    done = bench.feed(flows(4, load=3.0), at_s=1030.0)
    effect = {"teachers": 4, "stall_share_before": 0.75, "stall_share": 0.0}
    assert said("scaling_effect", done) == [effect | {"utilisation": 0.75, "needed": 4}]


def test_without_bounds_the_need_is_told_and_the_number_stays():
    bench = training(config_of())
    assert not of(SetTeachers, bench.feed(*[waits()] * 20))
    assert bench.snapshot.scaling.needed == 5


@pytest.mark.parametrize("state", [State.STARTING, State.STOPPING, State.EVALUATING])
def test_only_what_is_seen_in_training_counts(state: State):
    bench = Bench(AUTO, Snapshot(teachers=2))
    bench.feed(*TO[state])
    before = bench.snapshot
    assert bench.feed(*[waits()] * 5) == []
    assert bench.snapshot == before


def test_what_an_older_attempt_saw_does_not_count():
    bench = Bench(AUTO, Snapshot(teachers=2))
    bench.feed(Prepared(FACTS), Stepped(1), failed(1), Stepped(2))
    assert bench.state is State.TRAINING
    assert bench.feed(*[waits()] * 5) == []


def test_the_bounds_are_those_of_the_configuration():
    config = config_of(min_replicas=2, max_replicas=3)
    assert bounds_of(config, Scaling()) == Bounds(2, 3)
    bench = training(config)
    assert of(SetTeachers, bench.feed(*[waits()] * UP_WINDOWS)) == [SetTeachers(3)]
    assert bench.snapshot.scaling.needed == 5


def test_scaling_before_the_teachers_are_there_is_remembered():
    bench = Bench()
    assert not of(SetTeachers, bench.feed(ScaleAsked(5)))
    assert of(SetTeachers, bench.feed(Prepared(FACTS))) == [SetTeachers(5)]
    done = bench.feed(Stepped(1), ScaleAsked(1))
    assert of(SetTeachers, done) == [SetTeachers(1)]
    assert said("scaled", done) == [{"teachers": 1, "before": 5, "reason": "by hand"}]
