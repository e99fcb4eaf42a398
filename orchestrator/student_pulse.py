"""The newest that the students' first host has told the controller."""

from dataclasses import replace
from typing import Any

from orchestrator.teacher_scaling import is_whole
from orchestrator.watchdog import Signs
from workers.phases import Doing
from workers.tally import Tally


class StudentPulse:
    """Written by heartbeats, read by the controller's loop; each may have a thread of its own."""

    def __init__(self) -> None:
        self._newest: tuple[int, dict[str, Any], Tally] = (0, {}, Tally())
        self._seen: tuple[int, Tally] = (0, Tally())
        self._signs: tuple[int, Signs] = (0, Signs())

    def beat(self, attempt: int, line: dict[str, Any], tally: Tally, doing: Doing) -> None:
        """Takes in a heartbeat; before an attempt's first step its line is empty."""
        signs = self.signs(attempt)
        self._signs = attempt, replace(signs, num_beats=signs.num_beats + 1, doing=doing)
        if line:
            self._newest = attempt, line, tally

    def busy(self, attempt: int) -> None:
        """Some host is at what may take longer than a step."""
        signs = self.signs(attempt)
        self._signs = attempt, replace(signs, num_busy=signs.num_busy + 1)

    def signs(self, attempt: int) -> Signs:
        """What has been heard of the attempt's hosts."""
        heard, signs = self._signs
        return signs if heard == attempt else Signs()

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
