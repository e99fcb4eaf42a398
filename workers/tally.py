"""Sums over the steps of an attempt, from which averages over any span of it can be told."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Tally:
    """So many steps, and the seconds that went into them."""

    steps: int = 0
    step_s: float = 0.0
    teacher_stall_s: float = 0.0
    """The part of `step_s` that the student waited for teachers."""
    teacher_busy_s: float = 0.0
    """Time of all replicas that scored the rows of this host."""

    def plus(self, line: Mapping[str, Any]) -> "Tally":
        """With one more step, by its line in the record."""
        return Tally(
            self.steps + 1,
            self.step_s + line["step_s"],
            self.teacher_stall_s + line["stall_s"]["teacher"],
            self.teacher_busy_s + line["teacher_busy_s"],
        )

    def since(self, earlier: "Tally") -> "Tally":
        """Of the steps that came after an earlier tally of the same attempt."""
        return Tally(
            self.steps - earlier.steps,
            self.step_s - earlier.step_s,
            self.teacher_stall_s - earlier.teacher_stall_s,
            self.teacher_busy_s - earlier.teacher_busy_s,
        )
