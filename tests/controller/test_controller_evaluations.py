"""When checkpoints are judged, and which are kept."""

from orchestrator.checkpoint_care import MAX_WAITING_EVALUATIONS
from orchestrator.run_state import (
    Committed,
    Delete,
    Evaluate,
    Evaluated,
    EvaluationFailed,
    Prepared,
    Quarantine,
    StartAttempt,
    State,
    Stepped,
)
from tests.helpers.controller_bench import (
    FACTS,
    TO,
    Bench,
    failed,
    finished,
    make_config,
    of,
    said,
)


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


def test_without_evaluation_the_end_of_training_is_the_end():
    bench = Bench(make_config(evaluation={"enabled": False}))
    bench.feed(Prepared(FACTS), Stepped(1), Committed((2, 4)), finished(1))
    assert bench.state is State.FINISHED
    assert not of(Evaluate, bench.actions)


def test_a_damaged_checkpoint_is_put_away_and_training_goes_on():
    bench = Bench(make_config(checkpoint={"keep_latest": 3}))
    bench.feed(Prepared(FACTS), Stepped(1), Committed((2, 4)), Evaluated(2, 3.0))
    done = bench.feed(EvaluationFailed(4, "damaged", retry=False, corrupt=True))
    assert of(Quarantine, done) == [Quarantine(4, "damaged")]
    assert bench.state is State.TRAINING
    # It counts as judged only when it has been made again.
    assert 4 not in bench.snapshot.evaluated and bench.snapshot.steps == (2,)
    assert of(Evaluate, bench.feed(Committed((2, 4)))) == [Evaluate(4)]


def test_a_run_whose_last_checkpoint_is_damaged_makes_it_again():
    bench = Bench(make_config(checkpoint={"keep_latest": 3}))
    bench.feed(Prepared(FACTS), Stepped(1), Committed((2, 4)), Evaluated(2, 3.0), finished(1))
    done = bench.feed(EvaluationFailed(4, "damaged", retry=False, corrupt=True))
    assert of(Quarantine, done) and of(StartAttempt, done) == [StartAttempt(2)]
    assert bench.state is State.STARTING and bench.snapshot.resumed_from == 2
    bench.feed(Stepped(2), Committed((2, 4)), finished(2), Evaluated(4, 2.0))
    assert bench.state is State.FINISHED


def test_what_a_user_has_pinned_stays():
    bench = Bench(make_config(checkpoint={"keep_latest": 1, "keep_best": 0}))
    bench.feed(Prepared(FACTS), Stepped(1), Committed((2,)), Evaluated(2, 3.0))
    assert not of(Delete, bench.feed(Committed((2, 4), pinned=(2,)), Evaluated(4, 2.0)))
    assert of(Delete, bench.feed(Committed((2, 4)))) == [Delete(2)]
