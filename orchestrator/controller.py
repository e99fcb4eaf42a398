"""The run's state machine: what happened goes in, what to do comes out. No effects, no clock.

`orchestrator.run_state` has its states, events and actions; `Controller.on` is the one way in. The
actor in `orchestrator.controller_actor` feeds it and carries out what it says.
"""

import dataclasses
from typing import Any

from configs.checks import layout
from configs.run import RunConfig
from orchestrator.catalogue import steps_to_delete
from orchestrator.fault_policy import HUNG, Failure, FaultKind, GiveUp, cause, decide
from orchestrator.run_state import (
    TRANSITIONS,
    Action,
    AttemptFailed,
    AttemptFinished,
    Broken,
    Committed,
    Delete,
    Evaluate,
    Evaluated,
    EvaluationFailed,
    Event,
    Hung,
    KillAttempt,
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
from orchestrator.teacher_scaling import Bounds, Window, judge

MAX_WAITING_EVALUATIONS = 8
STOP_WITHIN_S = 60.0


class Controller:
    """Decides; the caller acts. `snapshot` is the whole state."""

    def __init__(self, config: RunConfig, snapshot: Snapshot):
        self._config = config
        self.snapshot = snapshot
        self._actions: list[Action] = []

    def on(self, event: Event, now_s: float) -> list[Action]:
        """Takes in one event and returns what is to be done, in order."""
        if self.snapshot.state.is_terminal:
            return []
        self._actions = []
        handlers = {
            Prepared: self._on_prepared,
            Broken: self._on_broken,
            Stepped: self._on_stepped,
            AttemptFinished: self._on_finished,
            AttemptFailed: self._on_failed,
            Hung: self._on_hung,
            Committed: self._on_committed,
            Evaluated: self._on_evaluated,
            EvaluationFailed: self._on_evaluation_failed,
            StopAsked: self._on_stop,
            ScaleAsked: self._on_scale,
            Observed: self._on_observed,
            Ticked: lambda event, now_s: None,
        }
        handlers[type(event)](event, now_s)
        self._advance(now_s)
        return self._actions

    # The handlers take note; `_advance` draws the conclusions.

    def _on_prepared(self, event: Prepared, now_s: float) -> None:
        self._set(facts=event.facts)
        self._say("prepared", **event.facts)
        if self.snapshot.teachers:
            self._actions.append(SetTeachers(self.snapshot.teachers))
        self._launch()

    def _on_broken(self, event: Broken, now_s: float) -> None:
        # A gang that saves or is done needs nothing any more.
        if self.snapshot.state not in (State.STOPPING, State.EVALUATING):
            self._end(State.FAILED, event.reason)

    def _on_stepped(self, event: Stepped, now_s: float) -> None:
        if self._is_alive(event.attempt) and self.snapshot.state is State.STARTING:
            self._go(State.TRAINING)

    def _on_finished(self, event: AttemptFinished, now_s: float) -> None:
        if not self._is_alive(event.attempt):
            return
        self._set(digest=event.digest, step=event.step)
        self._say(
            "attempt_ended",
            attempt=event.attempt,
            step=event.step,
            digest=event.digest,
            stopped=event.stopped,
        )
        if event.stopped:
            self._end(State.STOPPED, "stopped on request")
        else:
            self._go(State.EVALUATING)

    def _on_failed(self, event: AttemptFailed, now_s: float) -> None:
        if not self._is_alive(event.attempt):
            return
        kind, failure = cause(event.failures)
        self._say(
            "attempt_failed",
            attempt=event.attempt,
            kind=kind.value,
            host=failure.host,
            message=failure.message,
        )
        if self.snapshot.stop_asked:
            self._end(State.STOPPED, "stopped on request; the students had failed meanwhile")
            return
        decision = decide(kind, failure.message, self.snapshot.used, self._config.faults)
        if isinstance(decision, GiveUp):
            self._end(State.FAILED, decision.reason)
            return
        self._use(kind)
        skip_steps = sorted({*self.snapshot.skip_steps, *failure.skip_steps})
        self._set(relaunch_at_s=now_s + decision.after_s, skip_steps=tuple(skip_steps))
        self._go(State.RECOVERING)

    def _on_hung(self, event: Hung, now_s: float) -> None:
        if not self._is_alive(event.attempt):
            return
        self._actions.append(KillAttempt(event.attempt))
        failure = Failure(None, (HUNG,), event.reason)
        self._on_failed(AttemptFailed(event.attempt, (failure,)), now_s)

    def _on_committed(self, event: Committed, now_s: float) -> None:
        self._set(steps=event.steps)

    def _on_evaluated(self, event: Evaluated, now_s: float) -> None:
        self._judged(event.step, event.bits_per_byte)
        self._say("evaluated", step=event.step, bits_per_byte=event.bits_per_byte)

    def _on_evaluation_failed(self, event: EvaluationFailed, now_s: float) -> None:
        self._say("evaluation_failed", step=event.step, message=event.message)
        kind = FaultKind.EVALUATOR_DIED
        decision = decide(kind, event.message, self.snapshot.used, self._config.faults)
        if event.retry and not isinstance(decision, GiveUp):
            self._use(kind)
            self._set(evaluating=None)
        else:
            self._judged(event.step, None)

    def _on_stop(self, event: StopAsked, now_s: float) -> None:
        if self.snapshot.stop_asked:
            return
        self._set(stop_asked=True)
        self._say("stop_asked")
        if self.snapshot.state in (State.STARTING, State.TRAINING):
            # A gang that has not made a step has nothing to save.
            grace_s = STOP_WITHIN_S if self.snapshot.state is State.TRAINING else 0.0
            self._set(kill_at_s=now_s + grace_s)
            self._go(State.STOPPING)
        else:
            self._end(State.STOPPED, "stopped on request")

    def _on_scale(self, event: ScaleAsked, now_s: float) -> None:
        now = self.snapshot
        by_hand = event.teachers is not None
        self._set(scaling=dataclasses.replace(now.scaling.changed(now_s), by_hand=by_hand))
        teachers, reason = event.teachers, "by hand"
        if teachers is None:
            bounds = self._bounds()
            teachers = bounds.clip(now.teachers) if bounds else now.teachers
            reason = "as many as are needed, from now on"
        self._scale(teachers, reason)

    def _on_observed(self, event: Observed, now_s: float) -> None:
        now = self.snapshot
        if event.attempt != now.attempt or now.state is not State.TRAINING:
            return
        num_hosts = layout(self._config).num_hosts
        window = Window.of(event.steps, num_hosts, now.teachers, event.serving)
        verdict = judge(now.scaling, window, now.teachers, self._bounds(), now_s)
        self._set(scaling=verdict.scaling)
        seen = {
            "stall_share": round(window.stall_share, 4),
            "utilisation": round(window.utilisation, 4),
            "needed": verdict.scaling.needed,
        }
        if verdict.stall_before is not None:
            before = round(verdict.stall_before, 4)
            self._say("scaling_effect", teachers=now.teachers, stall_share_before=before, **seen)
        if verdict.teachers != now.teachers:
            self._scale(verdict.teachers, verdict.reason, **seen)

    def _advance(self, now_s: float) -> None:
        now = self.snapshot
        if now.state is State.RECOVERING and now_s >= now.relaunch_at_s:
            self._launch()
        if now.state is State.STOPPING and now_s >= now.kill_at_s:
            # Once more later, should this be lost with the controller.
            self._set(kill_at_s=now_s + STOP_WITHIN_S)
            self._actions.append(KillAttempt(now.attempt))
        if not now.state.is_terminal:
            self._evaluate_next()
            self._retain()
        if self.snapshot.state is State.EVALUATING and not self._waiting():
            self._end(State.FINISHED, None)

    def _is_alive(self, attempt: int) -> bool:
        """Whether an attempt is the one under way; what others still say is of the past."""
        under_way = (State.STARTING, State.TRAINING, State.STOPPING)
        return attempt == self.snapshot.attempt and self.snapshot.state in under_way

    def _bounds(self) -> Bounds | None:
        """Between which the number of teachers follows the need; None where it stays.

        More than there can be requests on their way would never all be busy.
        """
        teacher = self._config.teacher
        if teacher is None or teacher.max_replicas is None or self.snapshot.scaling.by_hand:
            return None
        num_requests = layout(self._config).num_hosts * teacher.prefetch_steps
        high = min(teacher.max_replicas, num_requests)
        return Bounds(teacher.min_replicas, max(high, teacher.min_replicas))

    def _scale(self, teachers: int, reason: str, **seen: Any) -> None:
        before = self.snapshot.teachers
        self._say("scaled", teachers=teachers, before=before, reason=reason, **seen)
        self._set(teachers=teachers)
        if self.snapshot.facts is not None:
            self._actions.append(SetTeachers(teachers))

    def _launch(self) -> None:
        self._set(attempt=self.snapshot.attempt + 1)
        self._go(State.STARTING)
        self._actions.append(StartAttempt(self.snapshot.attempt))

    def _waiting(self) -> list[int]:
        """Checkpoints that are still to be judged, oldest first."""
        if not self._config.evaluation.enabled:
            return []
        return [step for step in self.snapshot.steps if step not in self.snapshot.evaluated]

    def _evaluate_next(self) -> None:
        waiting = self._waiting()
        while len(waiting) > MAX_WAITING_EVALUATIONS:
            skipped = next(step for step in waiting if step != self.snapshot.evaluating)
            waiting.remove(skipped)
            self._set(evaluated={**self.snapshot.evaluated, skipped: None})
            self._say("evaluation_skipped", step=skipped, waiting=len(waiting))
        if waiting and self.snapshot.evaluating is None:
            self._set(evaluating=waiting[0])
            self._actions.append(Evaluate(waiting[0]))

    def _retain(self) -> None:
        """Waiting checkpoints are pinned: each is judged before it may go."""
        judged = {s: v for s, v in self.snapshot.evaluated.items() if v is not None}
        pinned = set(self._waiting())
        for step in steps_to_delete(self.snapshot.steps, judged, pinned, self._config.checkpoint):
            self._set(steps=tuple(s for s in self.snapshot.steps if s != step))
            self._actions.append(Delete(step))

    def _judged(self, step: int, bits_per_byte: float | None) -> None:
        evaluating = None if self.snapshot.evaluating == step else self.snapshot.evaluating
        evaluated = {**self.snapshot.evaluated, step: bits_per_byte}
        self._set(evaluated=evaluated, evaluating=evaluating)

    def _use(self, kind: FaultKind) -> None:
        used = self.snapshot.used
        self._set(used={**used, kind.value: used.get(kind.value, 0) + 1})

    def _end(self, state: State, reason: str | None) -> None:
        self._set(reason=reason, evaluating=None)
        self._go(state)
        self._actions.append(Release())

    def _go(self, state: State) -> None:
        before = self.snapshot.state
        assert state in TRANSITIONS[before], f"no way from {before} to {state}"
        self._set(state=state)
        self._say("state", state=state.value, before=before.value, reason=self.snapshot.reason)

    def _set(self, **changes: Any) -> None:
        self.snapshot = dataclasses.replace(self.snapshot, **changes)

    def _say(self, event: str, **details: Any) -> None:
        self._actions.append(Say(event, details))
