"""Where a run's time went: each second between its begin and its end in exactly one category.

The controller's events tell in which state the run was, those of an attempt's first host when its
processes began and when its state was there, and the lines of its steps follow one another from
then on without a gap. What is known best is painted over what is known less well, so whatever the
order of the events and however clocks of machines differ, the categories divide the time up.

A step that is made again, since the attempt that made it died before the next checkpoint, counts as
`lost` the first time: the line that counts in the record, and the state that is trained on, are
those of the second time.
"""

import bisect
import dataclasses
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from orchestrator.history import AttemptLines, Line
from orchestrator.ledger import STALLS, Category, Ledger, Span, painted
from orchestrator.run_state import State

_OF_STATE = {
    State.PREPARING: Category.PREPARING,
    State.STARTING: Category.CAPACITY,
    State.TRAINING: Category.UNTOLD,
    State.RECOVERING: Category.PAUSE,
    State.STOPPING: Category.ENDING,
    State.EVALUATING: Category.EVALUATING,
    State.FINISHED: Category.STOPPED,
    State.STOPPED: Category.STOPPED,
    State.FAILED: Category.FAILED,
}
_COLUMNS = 3 + len(STALLS)  # step, step_s, compile_s, and the stalls
_UNDER_WAY = (State.STARTING, State.TRAINING, State.STOPPING)
_TELLING = {
    "controller_started",
    "state",
    "host_started",
    "host_ready",
    "attempt_failed",
    "attempt_ended",
}


class StepTimes:
    """The seconds of one attempt's steps, in little memory. Lines come in the order of steps."""

    def __init__(self, start_step: int):
        self.start_step = start_step
        self.total_s = 0.0
        self._rows = array("d")

    @classmethod
    def of(cls, attempt: AttemptLines) -> "StepTimes":
        times = cls(attempt.start_step)
        for line in attempt.lines:
            times.add(line)
        return times

    def add(self, line: Mapping[str, Any]) -> None:
        """One more step, by its line in the record; a line that comes again adds nothing."""
        if self._rows and line["step"] <= self._rows[-_COLUMNS]:
            return
        stall_s = [line["stall_s"].get(part, 0.0) for part in STALLS]
        self.total_s += max(line["step_s"], 0.0)
        # Only an attempt's first step compiles.
        self._rows.extend((line["step"], line["step_s"], line.get("compile_s", 0.0), *stall_s))

    def widths_s(self, first_lost: float) -> Float[np.ndarray, "steps categories"]:
        """The seconds of each step by `ledger.OF_STEP`.

        Args:
            first_lost: steps from this one on were made again.
        """
        rows = np.array(self._rows).reshape(-1, _COLUMNS)
        step_s, parts_s = np.maximum(rows[:, 1], 0), np.maximum(rows[:, 2:], 0)
        # The longest waits of several hosts may add up to more than the step.
        longer_s = np.maximum(parts_s.sum(axis=1), step_s)
        parts_s *= (step_s / np.where(longer_s > 0, longer_s, 1))[:, None]
        rest_s = np.maximum(step_s - parts_s.sum(axis=1), 0)
        lost = rows[:, 0] >= first_lost
        kept_s = np.column_stack([parts_s[:, 1:], rest_s]) * ~lost[:, None]
        lost_s = (parts_s[:, 1:].sum(axis=1) + rest_s) * lost
        return np.column_stack([parts_s[:, :1], kept_s, lost_s])


@dataclasses.dataclass
class _Attempt:
    """When an attempt came how far; None where nothing tells it."""

    launched_s: float | None = None
    started_s: float | None = None
    ready_s: float | None = None
    trained_s: float | None = None
    stopping_s: float | None = None
    left_s: float | None = None
    after_last_step: Category | None = None


@dataclasses.dataclass
class _Story:
    """What the events tell."""

    states: list[tuple[float, State]] = dataclasses.field(default_factory=list)
    away: list[Span] = dataclasses.field(default_factory=list)
    attempts: dict[int, _Attempt] = dataclasses.field(default_factory=dict)
    last_s: float = 0.0


def account(
    events: Iterable[Line], steps: Mapping[int, StepTimes], now_s: float | None
) -> Ledger | None:
    """Divides a run's time up; None where it has not begun.

    Args:
        events: those of the run, in any order; `is_telling` ones are enough.
        steps: by attempt.
        now_s: until when a run counts that has not ended, in seconds since 1970; None where
            nobody works on it: until the last that is heard of it.
    """
    story = _read(events)
    if not story.states:
        return None
    began_s, (last_s, last_state) = story.states[0][0], story.states[-1]
    made = {
        number: Span(number, times.ready_s, times.ready_s + steps[number].total_s)
        for number, times in story.attempts.items()
        if times.ready_s is not None and number in steps
    }
    if last_state.is_terminal:
        end_s = last_s
    else:
        heard_s = max([story.last_s, *(span.end_s for span in made.values())])
        end_s = heard_s if now_s is None else max(now_s, began_s)
    spans = _spans(story, made, end_s)
    return painted(spans, began_s, end_s, _step_edges(made, steps))


def is_telling(event: Line) -> bool:
    """Whether an event says anything of where the time went; of the hosts the first one tells."""
    if event["event"] == "host_ready" and event.get("host", 0) != 0:
        return False
    return event["event"] in _TELLING


def _read(events: Iterable[Line]) -> _Story:
    story = _Story()
    for event in sorted(filter(is_telling, events), key=lambda event: event["time_s"]):
        time_s, name = event["time_s"], event["event"]
        story.last_s = time_s
        if name == "controller_started":
            before_s, before = story.states[-1] if story.states else (time_s, State.FINISHED)
            if (away_s := event.get("away_s")) is not None and not before.is_terminal:
                story.away.append(Span(Category.AWAY, max(before_s, time_s - away_s), time_s))
            story.states.append((time_s, State(event["state"])))
        elif name == "state":
            story.states.append((time_s, State(event["state"])))
        if event.get("attempt") is not None:
            _note(story.attempts.setdefault(event["attempt"], _Attempt()), event)
    return story


def _note(attempt: _Attempt, event: Line) -> None:
    name, time_s = event["event"], event["time_s"]
    if name == "state":
        state = State(event["state"])
        if state is State.STARTING:
            attempt.launched_s = time_s
        elif state is State.TRAINING:
            attempt.trained_s = time_s
        elif state is State.STOPPING:
            attempt.stopping_s = time_s
    elif name == "host_started":
        attempt.started_s = time_s - event["process_s"]
    elif name == "host_ready":
        attempt.ready_s = time_s
    elif name == "attempt_failed":
        attempt.left_s, attempt.after_last_step = time_s, Category.DETECT
        if event.get("kind") == "preempted":  # the last checkpoint, most often
            attempt.after_last_step = Category.ENDING
    elif name == "attempt_ended":
        attempt.left_s, attempt.after_last_step = time_s, Category.ENDING


def _spans(story: _Story, made: Mapping[int, Span], end_s: float) -> list[Span]:
    """All that is told of the time; what comes later is known better."""
    times = [time_s for time_s, _ in story.states[1:]]
    states = [
        Span(_OF_STATE[state], begin_s, next_s)
        for (begin_s, state), next_s in zip(story.states, [*times, end_s], strict=True)
    ]
    still: list[Span] = []
    certain: list[Span] = []
    steps: list[Span] = []
    leaving = [(time_s, state) for time_s, state in story.states if state not in _UNDER_WAY]
    next_s = end_s
    for number, attempt in sorted(story.attempts.items(), reverse=True):
        if (window := _window(attempt, leaving, next_s, end_s)) is None:
            continue
        next_s = window.begin_s
        spans = _ways(attempt, window, made.get(number))
        # How long the last of them went on without a controller is not known.
        still += spans[-1:]
        certain += spans[:-1]
        if number in made:
            steps.append(made[number].within(window))
    return [*states, *still, *story.away, *certain, *steps]


def _window(
    attempt: _Attempt, leaving: Sequence[tuple[float, State]], next_s: float, end_s: float
) -> Span | None:
    """From an attempt's launch to its end, and what its time after the last step counts as."""
    signs = (attempt.launched_s, attempt.started_s, attempt.ready_s, attempt.trained_s)
    begin_s = next((time_s for time_s in signs if time_s is not None), None)
    if begin_s is None:
        return None
    left_s, after = attempt.left_s, attempt.after_last_step
    place = bisect.bisect_right(leaving, begin_s, key=lambda each: each[0])
    if place < len(leaving):
        left_s, state = leaving[place]
        failed = state in (State.RECOVERING, State.FAILED)
        after = after or (Category.DETECT if failed else Category.ENDING)
    left_s = min(next_s, end_s if left_s is None else left_s)
    return Span(after or Category.UNTOLD, begin_s, max(left_s, begin_s))


def _ways(attempt: _Attempt, window: Span, made: Span | None) -> list[Span]:
    """The stretches of an attempt, of which its steps hide a part."""
    trained_s = made.end_s if made is not None and made.end_s > made.begin_s else attempt.trained_s
    points = [
        (Category.CAPACITY, window.begin_s),
        (Category.START, attempt.started_s),
        (Category.COMPILE, attempt.ready_s),
        (window.what, trained_s),
        (Category.ENDING, attempt.stopping_s),
    ]
    known = [(what, time_s) for what, time_s in points if time_s is not None]
    times = np.maximum.accumulate([time_s for _, time_s in known]).tolist()
    ends = [*times[1:], max(window.end_s, times[-1])]
    return [
        Span(what, begin_s, finish_s).within(window)
        for (what, _), begin_s, finish_s in zip(known, times, ends, strict=True)
    ]


def _step_edges(
    made: Mapping[int, Span], steps: Mapping[int, StepTimes]
) -> dict[int, Float[np.ndarray, " edges"]]:
    """When each part of each step of an attempt began, and when the last one ended."""
    edges = {}
    first_lost = np.inf
    for number in sorted(steps, reverse=True):
        if number in made:
            widths = steps[number].widths_s(first_lost).ravel()
            edges[number] = made[number].begin_s + np.concatenate([[0.0], np.cumsum(widths)])
        first_lost = min(first_lost, steps[number].start_step + 1)
    return edges
