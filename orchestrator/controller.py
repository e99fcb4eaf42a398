"""The run's state machine: what happened goes in, what to do comes out. No effects, no clock.

`orchestrator.run_state` has its states, events and actions; `Controller.on` is the one way in. The
actor in `orchestrator.controller_actor` feeds it and carries out what it says.
"""

import dataclasses
from typing import Any

from configs.checks import layout
from configs.elastic import on_slices
from configs.run import RunConfig
from orchestrator.checkpoint_care import (
    Cared,
    evaluate_next,
    judged,
    quarantine,
    retain,
    waiting_steps,
)
from orchestrator.elasticity import note_free, slices_to_launch
from orchestrator.fault_policy import (
    HUNG,
    MACHINE_FAULTS,
    PREEMPTED,
    Failure,
    FaultKind,
    GiveUp,
    Relaunch,
    cause,
    decide,
    recent,
    snapshots_useless,
)
from orchestrator.run_state import (
    TRANSITIONS,
    Action,
    AttemptFailed,
    AttemptFinished,
    Broken,
    Committed,
    DropSnapshots,
    Evaluated,
    EvaluationFailed,
    Event,
    Hung,
    KillAttempt,
    Noticed,
    Observed,
    Prepared,
    Release,
    Say,
    ScaleAsked,
    SetTeachers,
    SlicesFree,
    Snapshot,
    StartAttempt,
    State,
    Stepped,
    StopAsked,
    Ticked,
)
from orchestrator.teacher_scaling import Window, bounds_of, judge

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
            Noticed: self._on_noticed,
            Committed: self._on_committed,
            Evaluated: self._on_evaluated,
            EvaluationFailed: self._on_evaluation_failed,
            StopAsked: self._on_stop,
            ScaleAsked: self._on_scale,
            Observed: self._on_observed,
            SlicesFree: self._on_slices_free,
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
        self._launch(self._config.cluster.num_slices)

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
        if event.stopped and not self.snapshot.stop_asked:
            message = f"its machines are taken away; it saved step {event.step} before"
            failure = Failure(None, (PREEMPTED,), message)
            self._on_failed(AttemptFailed(event.attempt, (failure,)), now_s)
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
        if self.snapshot.leaving and kind in MACHINE_FAULTS:
            kind = FaultKind.PREEMPTED  # the machines went before all was saved
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
        useless = snapshots_useless(kind, failure, self.snapshot.recent, now_s, self._config.faults)
        decision = self._decide(kind, failure.message, now_s)
        if isinstance(decision, GiveUp):
            self._end(State.FAILED, decision.reason)
            return
        if kind is FaultKind.CORRUPT_CHECKPOINT and self.snapshot.resumed_from is not None:
            self._care(quarantine(self.snapshot, self.snapshot.resumed_from, failure.message))
        if useless:
            self._actions.append(DropSnapshots())
        skip_steps = sorted({*self.snapshot.skip_steps, *failure.skip_steps})
        # Which slices are left is not known yet.
        self._set(
            relaunch_at_s=now_s + decision.after_s,
            skip_steps=tuple(skip_steps),
            slices_free=None,
        )
        self._go(State.RECOVERING)

    def _on_hung(self, event: Hung, now_s: float) -> None:
        if not self._is_alive(event.attempt):
            return
        self._actions.append(KillAttempt(event.attempt))
        failure = Failure(None, (HUNG,), event.reason)
        self._on_failed(AttemptFailed(event.attempt, (failure,)), now_s)

    def _on_noticed(self, event: Noticed, now_s: float) -> None:
        """Has the gang save and leave, after its first step if it has not made one."""
        now = self.snapshot
        if self._is_alive(event.attempt) and not now.leaving and now.state is not State.STOPPING:
            self._set(leaving=True)
            self._say("preemption_noticed", attempt=event.attempt, machines=list(event.machines))

    def _on_committed(self, event: Committed, now_s: float) -> None:
        self._set(steps=event.steps, pinned=event.pinned)

    def _on_evaluated(self, event: Evaluated, now_s: float) -> None:
        self.snapshot = judged(self.snapshot, event.step, event.bits_per_byte)
        self._say("evaluated", step=event.step, bits_per_byte=event.bits_per_byte)

    def _on_evaluation_failed(self, event: EvaluationFailed, now_s: float) -> None:
        self._say("evaluation_failed", step=event.step, message=event.message)
        if event.corrupt:
            self._set(evaluating=None)
            self._care(quarantine(self.snapshot, event.step, event.message))
            if self.snapshot.state is State.EVALUATING and event.step == self.snapshot.step:
                self._set(relaunch_at_s=now_s)
                self._go(State.RECOVERING)
            return
        decision = GiveUp(event.message)
        if event.retry:
            decision = self._decide(FaultKind.EVALUATOR_DIED, event.message, now_s)
        if not isinstance(decision, GiveUp):
            self._set(evaluating=None)
        else:
            self.snapshot = judged(self.snapshot, event.step, None)

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
            bounds = bounds_of(self._config, self.snapshot.scaling)
            teachers = bounds.clip(now.teachers) if bounds else now.teachers
            reason = "as many as are needed, from now on"
        self._scale(teachers, reason)

    def _on_observed(self, event: Observed, now_s: float) -> None:
        now = self.snapshot
        if event.attempt != now.attempt or now.state is not State.TRAINING:
            return
        num_hosts = layout(on_slices(self._config, now.num_slices)).num_hosts
        window = Window.of(event.steps, num_hosts, now.teachers, event.serving)
        verdict = judge(
            now.scaling, window, now.teachers, bounds_of(self._config, self.snapshot.scaling), now_s
        )
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

    def _on_slices_free(self, event: SlicesFree, now_s: float) -> None:
        """Starts the run again when it could have had more slices for a while."""
        self.snapshot, due = note_free(self.snapshot, self._config, event.num, now_s)
        if due and not self.snapshot.leaving:
            self._actions.append(KillAttempt(self.snapshot.attempt))
            self._set(relaunch_at_s=now_s)
            self._go(State.RECOVERING)

    def _advance(self, now_s: float) -> None:
        now = self.snapshot
        if now.state is State.RECOVERING and now_s >= now.relaunch_at_s:
            num_slices = slices_to_launch(now, self._config, now_s)
            if num_slices is not None:
                self._launch(num_slices)
        if now.state is State.STOPPING and now_s >= now.kill_at_s:
            # Once more later, should this be lost with the controller.
            self._set(kill_at_s=now_s + STOP_WITHIN_S)
            self._actions.append(KillAttempt(now.attempt))
        if not now.state.is_terminal:
            self._care(evaluate_next(self.snapshot, self._config.evaluation))
            self._care(retain(self.snapshot, self._config))
        waiting = waiting_steps(self.snapshot, self._config.evaluation)
        if self.snapshot.state is State.EVALUATING and not waiting:
            self._end(State.FINISHED, None)

    def _is_alive(self, attempt: int) -> bool:
        """Whether an attempt is the one under way; what others still say is of the past."""
        under_way = (State.STARTING, State.TRAINING, State.STOPPING)
        return attempt == self.snapshot.attempt and self.snapshot.state in under_way

    def _scale(self, teachers: int, reason: str, **seen: Any) -> None:
        before = self.snapshot.teachers
        self._say("scaled", teachers=teachers, before=before, reason=reason, **seen)
        self._set(teachers=teachers)
        if self.snapshot.facts is not None:
            self._actions.append(SetTeachers(teachers))

    def _launch(self, num_slices: int) -> None:
        before = self.snapshot.num_slices
        if self.snapshot.attempt and before != num_slices:
            self._say("resized", slices=num_slices, before=before)
        newest = max(self.snapshot.steps, default=None)
        attempt = self.snapshot.attempt + 1
        # What is free now is not any more.
        self._set(attempt=attempt, num_slices=num_slices, resumed_from=newest, slices_free=None)
        self._set(leaving=False)
        self._go(State.STARTING)
        self._actions.append(StartAttempt(attempt, num_slices))

    def _care(self, cared: Cared) -> None:
        self.snapshot = cared.snapshot
        self._actions += cared.actions

    def _decide(self, kind: FaultKind, message: str, now_s: float) -> Relaunch | GiveUp:
        """Whether a fault is outlived; if so, it counts from now on."""
        now, budgets = self.snapshot, self._config.faults
        times_s = recent(now.recent.get(kind.value, ()), now_s, budgets)
        decision = decide(kind, message, len(times_s), budgets)
        if isinstance(decision, Relaunch):
            used = {**now.used, kind.value: now.used.get(kind.value, 0) + 1}
            self._set(used=used, recent={**now.recent, kind.value: (*times_s, now_s)})
        return decision

    def _end(self, state: State, reason: str | None) -> None:
        self._set(reason=reason, evaluating=None)
        self._go(state)
        self._actions.append(Release())

    def _go(self, state: State) -> None:
        before = self.snapshot.state
        assert state in TRANSITIONS[before], f"no way from {before} to {state}"
        self._set(state=state)
        attempt, reason = self.snapshot.attempt, self.snapshot.reason
        self._say("state", state=state.value, before=before.value, attempt=attempt, reason=reason)

    def _set(self, **changes: Any) -> None:
        self.snapshot = dataclasses.replace(self.snapshot, **changes)

    def _say(self, event: str, **details: Any) -> None:
        self._actions.append(Say(event, details))
