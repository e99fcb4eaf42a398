"""How many teachers a run should have, from what it measures: no clock, no effects.

One figure decides: the **load**, the teachers' busy seconds per second that the student would
take if it never waited for them. It is worth so many replicas that never rest; divided by the
share of its time that a replica may be busy, it gives the number that is needed. It does not
depend on the number there is, so replicas that are still starting count as there.

What keeps the number still: more teachers need a student that waits, fewer need a long time in
which none of the windows asked for as many as there are, the mildest of the windows counts (but
for the first: it may have begun before the need changed), and nothing is judged while a change
takes effect.
"""

import dataclasses
import math
from typing import NamedTuple

from configs.checks import layout
from configs.run import RunConfig
from workers.tally import Tally

TARGET_UTILISATION = 0.8
STALL_SHARE = 0.02
"""A student that waits for less of its time does not wait."""
LEAST_CAPACITY = 0.5
WINDOW_S = 5.0
MIN_STEPS = 3
UP_WINDOWS, DOWN_WINDOWS = 3, 12
SETTLE_S, START_WITHIN_S = 10.0, 300.0
_MIN_OWN_SHARE = 0.001


class Bounds(NamedTuple):
    """The fewest and the most teachers that a run may have by itself."""

    low: int
    high: int

    def clip(self, teachers: int) -> int:
        return max(self.low, min(self.high, teachers))


@dataclasses.dataclass(frozen=True)
class Window:
    """What was measured over some steps."""

    stall_share: float
    load: float
    utilisation: float
    """Share of their time that the replicas that serve were busy."""
    all_serve: bool
    """Whether none of the replicas asked for was missing."""

    @classmethod
    def of(cls, tally: Tally, num_hosts: int, teachers: int, serving: int) -> "Window":
        """Of the first host's steps: the gang goes in step, and its hosts ask for alike rows."""
        busy_s = tally.teacher_busy_s * num_hosts
        stall_share = min(tally.teacher_stall_s / tally.step_s, 1 - _MIN_OWN_SHARE)
        return cls(
            stall_share=stall_share,
            load=busy_s / (tally.step_s * (1 - stall_share)),
            utilisation=busy_s / (tally.step_s * max(serving, 1)),
            all_serve=serving >= teachers,
        )

    @property
    def stalled(self) -> bool:
        return self.stall_share > STALL_SHARE


def is_whole(tally: Tally) -> bool:
    """Whether steps make a window; their own seconds are the time that has passed."""
    return tally.step_s >= WINDOW_S and tally.steps >= MIN_STEPS


@dataclasses.dataclass(frozen=True)
class Scaling:
    """What is remembered from one window to the next."""

    by_hand: bool = False
    changed_at_s: float = 0.0
    settling: bool = False
    """Whether the last change has yet to show in the windows."""
    stall_before: float | None = None
    """Before the last change, until what it did has been told."""
    stall_share: float | None = None
    needed: int | None = None
    """By the newest window, whatever the bounds."""
    capacity: float = 1.0
    """How busy a replica is whose student waits; below 1 by what its busy seconds leave out."""
    streak: int = 0
    """Windows in a row that asked for more (positive) or for fewer (negative) teachers."""
    mildest: int = 0
    """The least change that the windows of the streak asked for after its first."""

    def changed(self, now_s: float) -> "Scaling":
        """After another number of teachers was asked for."""
        return dataclasses.replace(
            self,
            changed_at_s=now_s,
            settling=True,
            stall_before=self.stall_share,
            streak=0,
        )


class Verdict(NamedTuple):
    """What a window led to."""

    scaling: Scaling
    teachers: int
    reason: str = ""
    stall_before: float | None = None
    """Set once after a change: the window is the first to show what the change did."""


def judge(
    scaling: Scaling, window: Window, teachers: int, bounds: Bounds | None, now_s: float
) -> Verdict:
    """Takes in a window.

    Args:
        teachers: the number asked for now.
        bounds: None where the number is not to be changed.
    """
    if scaling.settling:
        return Verdict(_settle(scaling, window, now_s), teachers)
    scaling = _measure(scaling, window, teachers)
    told = scaling.stall_before
    scaling = dataclasses.replace(scaling, stall_before=None)
    if bounds is None:
        return Verdict(scaling, teachers, stall_before=told)
    scaling = _count(scaling, window, teachers, bounds)
    if -DOWN_WINDOWS < scaling.streak < UP_WINDOWS:
        return Verdict(scaling, teachers, stall_before=told)
    reason = (
        f"the student waits {window.stall_share:.0%} of its time"
        if scaling.streak > 0
        else f"busy for {window.utilisation:.0%} of their time, and nothing waits"
    )
    return Verdict(scaling.changed(now_s), scaling.mildest, reason, told)


def _settle(scaling: Scaling, window: Window, now_s: float) -> Scaling:
    """The window at whose end all is in place still saw some of what was before."""
    passed_s = now_s - scaling.changed_at_s
    over = passed_s >= SETTLE_S and (window.all_serve or passed_s >= START_WITHIN_S)
    return dataclasses.replace(scaling, settling=not over)


def _measure(scaling: Scaling, window: Window, teachers: int) -> Scaling:
    """Notes what a window says about the student and about the replicas."""
    capacity = scaling.capacity
    explained = _needed(window.load, capacity) > teachers
    if window.stalled and window.all_serve and not (explained and window.utilisation <= capacity):
        # The student waits for replicas that look idle: their busy seconds leave something out.
        # Not for all of it, since they may be idle in truth: too little is asked for ahead.
        seen = max(LEAST_CAPACITY, min(window.utilisation, 1.0))
        capacity = (capacity + seen) / 2
    return dataclasses.replace(
        scaling,
        capacity=capacity,
        stall_share=window.stall_share,
        needed=_needed(window.load, capacity),
    )


def _count(scaling: Scaling, window: Window, teachers: int, bounds: Bounds) -> Scaling:
    """Counts the windows in a row that ask for a change of one direction."""
    assert scaling.needed is not None, "a window was measured"
    asked = bounds.clip(scaling.needed)
    asked = max(asked, teachers) if window.stalled else min(asked, teachers)
    if asked == teachers:
        return dataclasses.replace(scaling, streak=0)
    way = 1 if asked > teachers else -1
    if scaling.streak * way <= 0:
        return dataclasses.replace(scaling, streak=way, mildest=asked)
    seen = asked if abs(scaling.streak) == 1 else scaling.mildest
    mildest = way * min(way * asked, way * seen)
    return dataclasses.replace(scaling, streak=scaling.streak + way, mildest=mildest)


def _needed(load: float, capacity: float) -> int:
    # Rounded, so that a load of exactly n replicas does not need another for its last bit.
    return max(1, math.ceil(round(load / (capacity * TARGET_UTILISATION), 6)))


def bounds_of(config: RunConfig, scaling: Scaling) -> Bounds | None:
    """Between which the number of teachers follows the need; None where it stays.

    More than there can be requests on their way would never all be busy.
    """
    teacher = config.teacher
    if teacher is None or teacher.max_replicas is None or scaling.by_hand:
        return None
    num_requests = layout(config).num_hosts * teacher.prefetch_steps
    high = min(teacher.max_replicas, num_requests)
    return Bounds(teacher.min_replicas, max(high, teacher.min_replicas))
