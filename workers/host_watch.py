"""Looks after one host of an attempt, from a thread beside its training loop."""

import faulthandler
import logging
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

from configs.run import WatchdogConfig
from workers.phases import Doing, Phase, Phases, allowed_s
from workers.storage import join, list_names, remove_tree, write_atomic

STACKS = "stacks"
BUSY_EVERY_S = 5.0
_LOOK_EVERY_S = 1.0

_log = logging.getLogger(__name__)


class HostWatch:
    """Says that its host is busy where the others wait for it, and where it stands if it hangs.

    A host that waits for a teacher or for storage holds up a step of all the others. One that is
    at something for longer than it may be puts every thread's stack into the run's folder; one
    that is stopped as a whole cannot, and so is the one whose stacks are missing.

    Args:
        tell_busy: called now and then while it does something that may take longer than a step.
    """

    def __init__(
        self,
        stacks_url: str,
        phases: Phases,
        config: WatchdogConfig,
        tell_busy: Callable[[], None],
    ):
        self._url, self._phases, self._config = stacks_url, phases, config
        self._tell_busy = tell_busy
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watch")
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _watch(self) -> None:
        written, told_at_s = False, 0.0
        while not self._closed.wait(_LOOK_EVERY_S):
            doing = self._phases.doing()
            limit_s = allowed_s(doing, self._config)
            overdue = limit_s is not None and doing.for_s > limit_s
            try:
                if overdue and not written:
                    write_atomic(self._url, _stacks(doing))
                elif written and not overdue:  # it went on after all
                    remove_tree(self._url)
                written = overdue
            except OSError as error:
                _log.warning("Storage does not take the stacks: %s", error)
            told_at_s = min(told_at_s, doing.for_s)
            busy = doing.phase is not Phase.STEP and not overdue
            if busy and doing.for_s - told_at_s >= BUSY_EVERY_S:
                told_at_s = doing.for_s
                self._tell_busy()


def stacks_url(run_url: str, attempt: int, host: int) -> str:
    """Where a host puts its stacks."""
    return join(run_url, STACKS, f"{_prefix(attempt)}{host:04d}.txt")


def hosts_with_stacks(run_url: str, attempt: int) -> list[int]:
    """The hosts of an attempt that wrote their stacks."""
    prefix = _prefix(attempt)
    names = [name for name in list_names(join(run_url, STACKS)) if name.startswith(prefix)]
    return [int(name.removeprefix(prefix).removesuffix(".txt")) for name in names]


def _prefix(attempt: int) -> str:
    return f"a{attempt:04d}-h"


def _stacks(doing: Doing) -> bytes:
    with tempfile.NamedTemporaryFile() as file:
        faulthandler.dump_traceback(file.fileno(), all_threads=True)
        text = Path(file.name).read_bytes()
    return f"In phase `{doing.phase}` for {doing.for_s:.0f} s\n\n".encode() + text
