"""Which class of teachers a new run agrees on, where targets of some classes are stored already."""

import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable, Container, Iterable, Mapping
from typing import NamedTuple

from workers.dataset import RowId
from workers.target_cache import targets_folder
from workers.target_index import ShardIndex
from workers.target_shards import DamagedTargetsError
from workers.target_store import read_spec, stored_keys
from workers.targets_protocol import MIXED, TargetSpec, TeacherUnavailableError

_ASK_AGAIN_AFTER_S = 0.5

_log = logging.getLogger(__name__)


class Choice(NamedTuple):
    """A class, and why this one."""

    sameness: str
    reason: str


class StoredClasses:
    """The classes of which there are targets for a run.

    Args:
        rows: names the run's rows of all hosts and steps, some of them perhaps twice.
        stored: the rows that are stored, by class.
    """

    def __init__(self, rows: Callable[[], Iterable[RowId]], stored: Mapping[str, Container[RowId]]):
        self._rows, self._stored = rows, stored
        self.names = sorted(stored)

    @functools.cached_property
    def complete(self) -> list[str]:
        """Those that have all targets of the run."""
        return [
            name for name in self.names if all(row in self._stored[name] for row in self._rows())
        ]

    def num_rows(self, name: str) -> int:
        """How many of the run's rows a class has."""
        return len({row for row in self._rows() if row in self._stored[name]})


def find_classes(storage_url: str, spec: TargetSpec) -> dict[str, ShardIndex]:
    """What is stored, by class, of exactly what `spec` says, its own class left aside.

    Raises:
        OSError: storage does not answer.
    """
    found: dict[str, ShardIndex] = {}
    for key in stored_keys(storage_url):
        try:
            other = read_spec(storage_url, key)
        except (DamagedTargetsError, FileNotFoundError) as error:
            _log.warning("What is stored under the key %s is unknown: %s", key, error)
            continue
        if other.sameness != MIXED and other == dataclasses.replace(spec, sameness=other.sameness):
            folder = targets_folder(storage_url, key)
            index = ShardIndex(folder, _log_damage, _log_error)
            index.refresh()
            if index.rows():
                found[other.sameness] = index
    return found


def choose_class(
    stored: StoredClasses, offered: Callable[[], str], retry_for_s: float, closed: threading.Event
) -> Choice:
    """The class to take: that of the replicas, or one of which enough is stored.

    Args:
        offered: asks the pool for its class.
        retry_for_s: how long that is repeated without an answer.
        closed: ends the wait with the pool's last error.

    Raises:
        TeacherUnavailableError: no teacher answered in time, and nothing is stored.
    """
    deadline = time.monotonic() + retry_for_s
    if len(stored.names) == 1 and stored.complete:
        return _complete(stored.names[0])
    while True:
        try:
            live = offered()
        except TeacherUnavailableError as error:
            if stored.complete:
                return _complete(stored.complete[0])
            if time.monotonic() > deadline:
                reason = f"No teacher answered within {retry_for_s:.0f} s (teacher.retry_for_s)"
                if stored.names:
                    return _fullest(stored, reason)
                raise TeacherUnavailableError(f"{reason}; the last try met: {error}") from error
            if closed.wait(_ASK_AGAIN_AFTER_S):
                raise
            continue
        if stored.complete and live not in stored.names:
            return _complete(stored.complete[0])
        return Choice(live, "A teacher of that class answers")


def _complete(name: str) -> Choice:
    return Choice(name, "All targets of the run are stored")


def _fullest(stored: StoredClasses, reason: str) -> Choice:
    num_rows = {name: stored.num_rows(name) for name in stored.names}
    name = max(stored.names, key=num_rows.__getitem__)
    return Choice(name, f"{reason}, and {num_rows[name]} rows of the run are stored")


def _log_damage(shard: str, reason: str) -> None:
    _log.warning("Shard %s of stored targets %s", shard, reason)


def _log_error(error: Exception) -> None:
    _log.warning("Stored targets cannot be read: %s", error)
