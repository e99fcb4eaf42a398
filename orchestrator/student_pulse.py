"""The newest that the students' first host has told the controller."""

from typing import Any

from orchestrator.teacher_scaling import is_whole
from workers.tally import Tally


class StudentPulse:
    """Written by heartbeats, read by the controller's loop; each may have a thread of its own."""

    def __init__(self) -> None:
        self._newest: tuple[int, dict[str, Any], Tally] = (0, {}, Tally())
        self._seen: tuple[int, Tally] = (0, Tally())

    def beat(self, attempt: int, line: dict[str, Any], tally: Tally) -> None:
        """Takes in a heartbeat; before an attempt's first step it is empty."""
        if line:
            self._newest = attempt, line, tally

    def line(self, attempt: int) -> dict[str, Any]:
        """The attempt's newest step; {} before its first."""
        heard, line, _ = self._newest
        return line if heard == attempt else {}

    def window(self, attempt: int) -> Tally | None:
        """The steps since the last window, once there are enough of them."""
        heard, _, tally = self._newest
        if heard != attempt:
            return None
        if self._seen[0] != attempt:
            self._seen = attempt, tally
        steps = tally.since(self._seen[1])
        if not is_whole(steps):
            return None
        self._seen = attempt, tally
        return steps
