"""What becomes of a run's checkpoints: which is judged next, kept, deleted, put away. Pure."""

import dataclasses
from typing import Any, NamedTuple

from configs.run import EvaluationConfig, RunConfig
from orchestrator.catalogue import steps_to_delete
from orchestrator.run_state import Action, Delete, Evaluate, Quarantine, Say, Snapshot

MAX_WAITING_EVALUATIONS = 8


class Cared(NamedTuple):
    """What the controller remembers from now on, and what is to be done."""

    snapshot: Snapshot
    actions: list[Action]


def waiting_steps(snapshot: Snapshot, config: EvaluationConfig) -> list[int]:
    """Checkpoints that are still to be judged, oldest first."""
    if not config.enabled:
        return []
    return [step for step in snapshot.steps if step not in snapshot.evaluated]


def judged(snapshot: Snapshot, step: int, bits_per_byte: float | None) -> Snapshot:
    """A checkpoint has been judged, or (None) cannot be."""
    evaluating = None if snapshot.evaluating == step else snapshot.evaluating
    evaluated = {**snapshot.evaluated, step: bits_per_byte}
    return dataclasses.replace(snapshot, evaluated=evaluated, evaluating=evaluating)


def evaluate_next(snapshot: Snapshot, config: EvaluationConfig) -> Cared:
    """The oldest that waits is judged next; where too many wait, some never are."""
    actions: list[Action] = []
    waiting = waiting_steps(snapshot, config)
    while len(waiting) > MAX_WAITING_EVALUATIONS:
        skipped = next(step for step in waiting if step != snapshot.evaluating)
        waiting.remove(skipped)
        snapshot = _with(snapshot, evaluated={**snapshot.evaluated, skipped: None})
        actions.append(Say("evaluation_skipped", {"step": skipped, "waiting": len(waiting)}))
    if waiting and snapshot.evaluating is None:
        snapshot = _with(snapshot, evaluating=waiting[0])
        actions.append(Evaluate(waiting[0]))
    return Cared(snapshot, actions)


def retain(snapshot: Snapshot, config: RunConfig) -> Cared:
    """What no rule keeps goes. Waiting checkpoints stay: each is judged before it may go."""
    values = {step: value for step, value in snapshot.evaluated.items() if value is not None}
    pinned = {*waiting_steps(snapshot, config.evaluation), *snapshot.pinned}
    gone = steps_to_delete(snapshot.steps, values, pinned, config.checkpoint)
    if not gone:
        return Cared(snapshot, [])
    left = tuple(step for step in snapshot.steps if step not in gone)
    return Cared(_with(snapshot, steps=left), [Delete(step) for step in gone])


def quarantine(snapshot: Snapshot, step: int, reason: str) -> Cared:
    """The checkpoint before it is used from now on; where there is none, the run's start."""
    left = tuple(each for each in snapshot.steps if each != step)
    if left == snapshot.steps:
        return Cared(snapshot, [])
    told = {"step": step, "reason": reason, "newest": max(left, default=None)}
    actions = [Quarantine(step, reason), Say("checkpoint_quarantined", told)]
    return Cared(_with(snapshot, steps=left), actions)


def _with(snapshot: Snapshot, **changes: Any) -> Snapshot:
    return dataclasses.replace(snapshot, **changes)
