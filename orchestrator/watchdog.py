"""Whether an attempt still makes progress, by what its hosts say of themselves. No effects.

Ray looks after processes that are gone, not after those that hang: a collective that waits for a
stopped host, or a step that never ends, answers every health check.
"""

import dataclasses

from configs.run import WatchdogConfig
from workers.host_watch import BUSY_EVERY_S
from workers.phases import Doing, Phase, allowed_s

STACKS_WITHIN_S = 10.0
"""What the hosts have to write their stacks before they are ended."""
_LONGEST_LOOK_S = 2.0


@dataclasses.dataclass(frozen=True)
class Signs:
    """What has been heard of an attempt so far.

    Args:
        num_beats: heartbeats of its first host.
        num_busy: times that some host said it is busy with what is no step.
        doing: what the first host did at its last heartbeat; None before the first.
    """

    num_beats: int = 0
    num_busy: int = 0
    doing: Doing | None = None


class Watch:
    """Follows one attempt after the other; `look` often, and with a clock that only goes forward.

    Time in which nobody looked does not count: a controller that was itself held up blames none.
    """

    def __init__(self, config: WatchdogConfig):
        self._config = config
        self._looked_s = 0.0
        self._attempt = 0
        self._seen = Signs()
        self._silent_s = self._not_busy_s = 0.0

    def look(self, attempt: int, signs: Signs, now_s: float) -> str | None:
        """Why the attempt counts as hung, if it does."""
        passed_s = min(now_s - self._looked_s, _LONGEST_LOOK_S)
        self._looked_s = now_s
        new = attempt != self._attempt
        beat = new or signs.num_beats != self._seen.num_beats
        busy = new or signs.num_busy != self._seen.num_busy
        self._attempt, self._seen = attempt, signs
        self._silent_s = 0.0 if beat else self._silent_s + passed_s
        self._not_busy_s = 0.0 if busy else self._not_busy_s + passed_s
        if signs.doing is not None and self._silent_s > self._config.silent_within_s:
            return (
                f"host 0 has given no sign of life for {self._silent_s:.0f} s "
                f"(watchdog.silent_within_s is {self._config.silent_within_s:g})"
            )
        return self._judge(signs.doing or Doing(Phase.START, 0.0))

    def _judge(self, doing: Doing) -> str | None:
        for_s, limit_s = doing.for_s + self._silent_s, allowed_s(doing, self._config)
        if limit_s is None or for_s <= limit_s + STACKS_WITHIN_S:
            return None
        if doing.phase is Phase.STEP and self._not_busy_s <= 3 * BUSY_EVERY_S:
            return None  # it waits for another host, which has reasons of its own
        return (
            f"host 0 has been in phase `{doing.phase}` for {for_s:.0f} s, where {limit_s:.0f} s "
            f"are allowed{_why(doing, self._config)}"
        )


def _why(doing: Doing, config: WatchdogConfig) -> str:
    if doing.phase is not Phase.STEP:
        return f" (watchdog.{doing.phase}_within_s)"
    return (
        f" ({config.step_times:g} times the longest of its last steps, "
        f"{doing.longest_step_s:.2f} s, and at least watchdog.step_at_least_s)"
    )
