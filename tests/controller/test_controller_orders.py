"""The run's state machine under every order of events, on a clock of its own."""

from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from orchestrator.checkpoint_care import MAX_WAITING_EVALUATIONS
from orchestrator.controller import Controller
from orchestrator.fault_policy import Failure
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
    Noticed,
    Observed,
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
from tests.helpers.controller_bench import (
    FACTS,
    HOST_DIED,
    LOST_DRIVER,
    USER_ERROR,
    failed,
    finished,
    make_config,
    round_trip,
)
from workers.tally import Tally


class AnyOrder(RuleBasedStateMachine):
    """A cluster that does anything that can happen, and checks all that it is told to do."""

    @initialize(
        keep_latest=st.integers(1, 3),
        keep_best=st.integers(0, 2),
        budget=st.integers(0, 8),
        patience=st.integers(0, 40),
    )
    def begin(self, keep_latest: int, keep_best: int, budget: int, patience: int) -> None:
        # So many events come before any that may end the run, or it would never grow old.
        self.patience = patience
        keeping = {"every_steps": 1, "keep_latest": keep_latest, "keep_best": keep_best}
        budgets = dict.fromkeys(("host_died", "evaluator_died", "driver_died"), budget)
        self.config = make_config(
            checkpoint=keeping,
            faults=budgets,
            objective={"kind": "distill"},
            teacher={"checkpoint": "elder", "max_replicas": 6},
        )
        self.controller = Controller(self.config, Snapshot(teachers=1))
        self.now_s = 0.0
        self.state = State.PREPARING
        self.alive: int | None = None
        self.killed = False
        self.attempts = self.releases = 0
        self.evaluating: int | None = None
        self.storage: list[int] = []
        self.seen: set[int] = set()

    # What can happen.

    @precondition(lambda self: self.state is State.PREPARING)
    @rule()
    def prepared(self) -> None:
        self.feed(Prepared(FACTS))

    @precondition(lambda self: self.alive is not None and not self.killed)
    @rule()
    def stepped(self) -> None:
        self.feed(Stepped(self.attempts))

    @precondition(lambda self: self.alive is not None and not self.killed)
    @rule(number=st.integers(1, 3) | st.integers(1, 12))
    def committed(self, number: int) -> None:
        newest = max(self.storage, default=0)
        self.storage += range(newest + 1, newest + 1 + number)
        self.seen |= set(self.storage)
        self.feed(Committed(tuple(self.storage)))

    @precondition(lambda self: self.alive is not None and (self.patience <= 0 or self.killed))
    @rule(stopped=st.booleans())
    def attempt_ends(self, stopped: bool) -> None:
        attempt, self.alive, self.killed = self.attempts, None, False
        snapshot = self.controller.snapshot
        stopped = stopped and (snapshot.stop_asked or snapshot.leaving)
        self.feed(finished(attempt, stopped))

    @precondition(lambda self: self.alive is not None and not self.killed)
    @rule()
    def noticed(self) -> None:
        self.feed(Noticed(self.attempts, ("node",)))

    @precondition(lambda self: self.alive is not None)
    @rule(failure=st.sampled_from([HOST_DIED, LOST_DRIVER, USER_ERROR]))
    def attempt_fails(self, failure: Failure) -> None:
        if self.patience > 0 and failure is USER_ERROR:
            return
        attempt, self.alive, self.killed = self.attempts, None, False
        self.feed(failed(attempt, failure))

    @precondition(lambda self: self.attempts > (self.alive is not None))
    @rule(data=st.data())
    def late_words(self, data: st.DataObject) -> None:
        last = self.attempts - (self.alive is not None)
        attempt = data.draw(st.integers(1, last))
        make = data.draw(st.sampled_from([Stepped, failed, finished]))
        self.feed(Ticked())  # what was due anyway
        if attempt != self.alive:
            before = self.controller.snapshot
            assert self.feed(make(attempt)) == []
            assert self.controller.snapshot is before

    @precondition(lambda self: self.evaluating is not None)
    @rule(bits=st.floats(0, 10) | st.just(float("nan")))
    def evaluated(self, bits: float) -> None:
        step, self.evaluating = self.evaluating, None
        assert step is not None
        self.feed(Evaluated(step, bits))

    @precondition(lambda self: self.evaluating is not None)
    @rule(retry=st.booleans())
    def evaluation_fails(self, retry: bool) -> None:
        step, self.evaluating, before = self.evaluating, None, self.controller.snapshot
        assert step is not None
        self.feed(EvaluationFailed(step, "no", retry))
        assert self.state in (before.state, State.FINISHED, State.STARTING)
        others = {k: v for k, v in self.controller.snapshot.used.items() if k != "evaluator_died"}
        assert others == {k: v for k, v in before.used.items() if k != "evaluator_died"}

    @rule(teachers=st.integers(1, 9) | st.none())
    def scaled(self, teachers: int | None) -> None:
        self.feed(ScaleAsked(teachers))
        by_hand = self.controller.snapshot.scaling.by_hand
        assert self.state.is_terminal or by_hand is (teachers is not None)

    @rule(
        times=st.integers(1, 15),
        attempt=st.integers(1, 4),
        stall=st.floats(0, 10),
        busy_s=st.floats(0, 1e3),
        serving=st.integers(0, 9),
    )
    def observed(self, times: int, attempt: int, stall: float, busy_s: float, serving: int) -> None:
        by_hand, before = (
            self.controller.snapshot.scaling.by_hand,
            self.controller.snapshot.teachers,
        )
        for _ in range(times):
            self.now_s += 10.0
            self.feed(Observed(attempt, Tally(5, 10.0, stall, busy_s), serving))
        self.patience += times - 1
        after = self.controller.snapshot.teachers
        assert after == before or (not by_hand and 1 <= after <= 6)

    @rule(seconds=st.sampled_from([0.0, 1.0, 30.0, 100.0]))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds
        self.feed(Ticked())

    @rule()
    def controller_dies(self) -> None:
        snapshot = round_trip(self.controller.snapshot)
        values = {**snapshot.to_json(), "evaluating": None}
        self.controller = Controller(self.config, Snapshot.from_json(values))
        self.evaluating = None

    @precondition(lambda self: self.patience <= 0)
    @rule()
    def stop_asked(self) -> None:
        self.feed(StopAsked())

    @precondition(lambda self: self.patience <= 0)
    @rule()
    def broken(self) -> None:
        self.feed(Broken("no teachers"))

    # What must hold of the answers.

    def feed(self, event: Event) -> list[Any]:
        self.patience -= 1
        was = self.controller.snapshot
        twin = Controller(self.config, round_trip(was))
        actions = self.controller.on(event, self.now_s)
        # By text, since NaN is not equal to itself.
        assert str(twin.on(event, self.now_s)) == str(actions)
        assert str(twin.snapshot) == str(self.controller.snapshot)
        if was.state.is_terminal:
            assert actions == []
            assert self.controller.snapshot is was
        for action in actions:
            self.act(action)
        assert self.state is self.controller.snapshot.state
        return actions

    def act(self, action: Any) -> None:
        assert not self.releases or isinstance(action, Say)
        if isinstance(action, Say):
            if action.event == "state":
                assert action.details["before"] == self.state.value
                after = State(action.details["state"])
                assert after in TRANSITIONS[self.state]
                self.state = after
        elif isinstance(action, StartAttempt):
            assert self.alive is None
            self.attempts += 1
            self.alive = action.attempt
            assert self.alive == self.attempts
        elif isinstance(action, KillAttempt):
            assert action.attempt == self.alive
            assert self.state is State.STOPPING
            self.killed = True
        elif isinstance(action, SetTeachers):
            assert action.replicas == self.controller.snapshot.teachers
        elif isinstance(action, Evaluate):
            assert self.evaluating is None
            assert action.step in self.storage
            self.evaluating = action.step
        elif isinstance(action, Delete):
            self.delete(action.step)
        else:
            assert isinstance(action, Release)
            assert self.state.is_terminal
            self.releases += 1
            self.alive = self.evaluating = None

    def delete(self, step: int) -> None:
        assert step in self.controller.snapshot.evaluated
        assert step != self.evaluating
        assert step not in sorted(self.storage)[-self.config.checkpoint.keep_latest :]
        self.storage.remove(step)

    @invariant()
    def what_is_remembered_is_what_is(self) -> None:
        if not hasattr(self, "controller"):
            return
        snapshot = self.controller.snapshot
        assert self.releases == snapshot.state.is_terminal
        assert snapshot.attempt == self.attempts
        assert snapshot.steps == tuple(self.storage)
        assert snapshot.evaluating == self.evaluating
        waiting = [step for step in self.storage if step not in snapshot.evaluated]
        assert len(waiting) <= MAX_WAITING_EVALUATIONS
        if snapshot.state is State.FINISHED:
            assert self.seen <= snapshot.evaluated.keys()
        for kind in snapshot.used:
            assert snapshot.used[kind] <= getattr(self.config.faults, kind)


AnyOrder.TestCase.settings = settings(
    max_examples=150,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestAnyOrder = AnyOrder.TestCase
