"""What a student host is doing, since when, and how long that may take. No Ray, no JAX."""

import dataclasses
import enum
import time
from collections import deque
from collections.abc import Callable

from configs.run import WatchdogConfig

_REMEMBERED_STEPS = 100


class Phase(enum.StrEnum):
    """A part of an attempt, with a time of its own that it may take."""

    START = "start"
    """The state is loaded or made."""
    COMPILE = "compile"
    """The first step, with which the program is compiled."""
    STEP = "step"
    TARGETS = "targets"
    """Waits for the teachers, as long as the run's policy on them says."""
    CHECKPOINT = "checkpoint"


@dataclasses.dataclass(frozen=True)
class Doing:
    """What a host is doing at a moment.

    Args:
        for_s: how long so far.
        longest_step_s: the longest of its last steps; 0 before the first.
    """

    phase: Phase
    for_s: float
    longest_step_s: float = 0.0


def allowed_s(doing: Doing, config: WatchdogConfig) -> float | None:
    """How long a host may do this before it counts as hung; None: as long as it likes."""
    if doing.phase is Phase.STEP:
        return max(config.step_at_least_s, config.step_times * doing.longest_step_s)
    return {
        Phase.START: config.start_within_s,
        Phase.COMPILE: config.compile_within_s,
        Phase.CHECKPOINT: config.checkpoint_within_s,
        Phase.TARGETS: None,
    }[doing.phase]


class Phases:
    """Written by the training loop, read by those who watch it from other threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._entered = Phase.START, clock()
        self._steps_s: deque[float] = deque(maxlen=_REMEMBERED_STEPS)
        self._longest_s = 0.0

    def enter(self, phase: Phase) -> None:
        """What was going on has ended, and `phase` begins."""
        before, since_s = self._entered
        now_s = self._clock()
        if before is Phase.STEP:
            self._steps_s.append(now_s - since_s)
            self._longest_s = max(self._steps_s)
        self._entered = phase, now_s

    def doing(self) -> Doing:
        phase, since_s = self._entered
        return Doing(phase, self._clock() - since_s, self._longest_s)
