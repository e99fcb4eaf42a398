"""Targets kept on the run's storage: what a teacher has answered once is not asked again.

Below `STORAGE/targets/KEY/` lie `spec.json`, which says in words what the key stands for, and
shards (`workers.target_shards`) with unique names that never change. So any number of runs and
hosts write side by side; where a row lies twice, either will do.
"""

import dataclasses
import errno
import logging
import threading
import uuid
from collections.abc import Callable, Iterable

from workers.dataset import RowId
from workers.storage import free_bytes, join, read_json, write_json
from workers.target_backlog import Backlog
from workers.target_index import Place, ShardIndex
from workers.target_shards import (
    SUFFIX,
    DamagedTargetsError,
    StoredRow,
    entry_content,
    pack_row,
    shard_bytes,
    unpack_row,
    write_shard,
)
from workers.targets_protocol import TargetChunk, TargetSpec, row_digest

SPEC_FILE = "spec.json"
SHARD_BYTES = 64 * 2**20
SHARD_AGE_S = 10.0
MAX_WAITING_BYTES = 4 * SHARD_BYTES
LEAVE_FREE_BYTES = 2**30

_log = logging.getLogger(__name__)


def targets_folder(storage_url: str, key: str) -> str:
    """Where the targets of a `TargetSpec.key` lie."""
    return join(storage_url, "targets", key)


class TargetCache:
    """The stored targets of one key; all of it may be used from any thread.

    Nothing that happens to the storage raises, and `tell` says so: rows that cannot be read are
    misses; rows that cannot be written wait in memory, up to `MAX_WAITING_BYTES`, and are tried
    again every `SHARD_AGE_S`. Where more come, the oldest of them are dropped.

    Args:
        max_bytes: of all shards of the key, whoever wrote them. Writers look before each shard,
            so several at once may go beyond by one shard each.
        tell: takes an event and its details: `targets_damaged` (shard, row, reason),
            `targets_cache_unreadable`, `targets_cache_unwritable` and `targets_cache_full`
            (reason), `targets_dropped` (rows, reason). Each shard or row is told once, and an
            obstacle once until it is gone.
        keep_all: where the storage is behind, `put` waits for it; it drops rows only while the
            storage cannot be written at all.
    """

    def __init__(
        self,
        storage_url: str,
        spec: TargetSpec,
        max_bytes: int,
        tell: Callable[..., None],
        keep_all: bool = False,
    ):
        self._folder_url = targets_folder(storage_url, spec.key)
        self._spec, self._max_bytes, self._tell = spec, max_bytes, tell
        self._keep_all = keep_all
        self._index = ShardIndex(self._folder_url, self._damaged_shard, self._unreadable)
        self._obstacles: dict[str, str] = {}  # the reason of each, while it lasts
        self._lock = threading.Lock()
        self._written = threading.Condition(self._lock)
        self._writing = threading.Lock()
        self._backlog = Backlog(MAX_WAITING_BYTES)
        self._num_dropped = 0
        self._takes = True  # until it is full or closed
        self._closed = threading.Event()
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._write_often, daemon=True, name="target-cache")
        self._thread.start()

    def get(self, rows: Iterable[RowId]) -> dict[RowId, StoredRow]:
        """Those of `rows` that are here, each with its digest verified."""
        self._index.refresh_once()
        wanted = set(rows)
        with self._lock:
            waiting = self._backlog.get(wanted)
        found = {row: unpack_row(content) for row, content in waiting.items()}
        tried: set[tuple[RowId, Place]] = set()
        while places := [
            (row, place)
            for row in sorted(wanted - found.keys())
            if (place := self._untried(row, tried)) is not None
        ]:
            tried.update(places)
            entries = self._index.read([place for _, place in places])
            for (row, place), entry in zip(places, entries, strict=True):
                stored = self._opened(row, place, entry)
                if stored is not None:
                    found[row] = stored
        return found

    def put(self, chunk: TargetChunk) -> None:
        """Has the rows of a chunk written by and by, but for those that are here already.

        Returns at once, unless all are to be kept.
        """
        for index, row in enumerate(chunk.rows):
            if not self._takes or row in self._index:
                continue
            arrays = {name: array[index] for name, array in chunk.arrays.items()}
            content = pack_row(arrays, chunk.digests[index])
            with self._lock:
                while self._waits_for_room(content):
                    self._wake.set()
                    self._written.wait()
                if not self._takes or row in self._backlog:
                    continue
                self._num_dropped += self._backlog.put(row, content)
                if self._backlog.num_bytes >= SHARD_BYTES and not self._fails:
                    self._wake.set()

    def flush(self) -> None:
        """Tries to write every row put so far; those that cannot be written wait on."""
        with self._writing:
            with self._lock:
                num_left = len(self._backlog)
            done = True
            while done and num_left > 0 and (rows := self._begin()):
                num_left -= len(rows)
                self._index.refresh()
                new = {row: content for row, content in rows.items() if row not in self._index}
                done = self._write(new)
                with self._lock:
                    self._backlog.end(done)
                    self._written.notify_all()
            self._tell_dropped(f"more than {MAX_WAITING_BYTES} bytes waited for the storage", done)

    def close(self) -> None:
        """Writes what waits, or tells that it cannot, and ends the background thread.

        Rows put later are not kept.
        """
        self._closed.set()
        self._wake.set()
        self._thread.join()
        with self._lock:
            self._takes = False
        self.flush()
        with self._lock:
            self._num_dropped += self._backlog.clear()
        self._tell_dropped("the storage did not take them before the end", True)

    @property
    def _fails(self) -> bool:
        return "targets_cache_unwritable" in self._obstacles

    def _begin(self) -> dict[RowId, bytes]:
        with self._lock:
            return self._backlog.begin(SHARD_BYTES)

    def _waits_for_room(self, content: bytes) -> bool:
        wants = self._keep_all and self._takes and not self._fails
        return wants and not self._backlog.fits(content)

    def _write_often(self) -> None:
        while not self._closed.is_set():
            self._wake.wait(SHARD_AGE_S)
            self._wake.clear()
            self.flush()

    def _write(self, rows: dict[RowId, bytes]) -> bool:
        """Whether the rows need not be tried again."""
        num_bytes, shard = shard_bytes(rows), f"{uuid.uuid4().hex}{SUFFIX}"
        try:
            if rows and self._has_room(num_bytes):
                self._write_spec()
                extents = write_shard(join(self._folder_url, shard), rows)
                self._index.add(shard, num_bytes, extents)
        except Exception as error:  # object stores raise errors of their own kinds
            self._obstacle("targets_cache_unwritable", error)
            return False
        self._works_again("targets_cache_unwritable")
        return True

    def _has_room(self, num_bytes: int) -> bool:
        """Whether the key may have another shard; if not, none is written from now on.

        Raises:
            OSError: the disk has no room at present.
        """
        used, free = self._index.num_bytes, free_bytes(self._folder_url)
        if used + num_bytes > self._max_bytes:
            with self._lock:
                self._takes = False
                self._backlog.clear()
            reason = f"{used} of {self._max_bytes} bytes are in use (teacher.cache_bytes)"
            self._tell("targets_cache_full", folder=self._folder_url, reason=reason)
            return False
        if free is not None and free - num_bytes < LEAVE_FREE_BYTES:
            reason = f"{free} bytes are free on the disk, which the run's own files may need"
            raise OSError(errno.ENOSPC, reason)
        return True

    def _tell_dropped(self, reason: str, ended: bool) -> None:
        """Tells of rows that were dropped: the first time, and the rest when that has `ended`."""
        event = "targets_dropped"
        with self._lock:
            num_rows, told = self._num_dropped, event in self._obstacles
            if ended:
                self._obstacles.pop(event, None)
            if not num_rows or (told and not ended):
                return
            self._num_dropped = 0
            if not ended:
                self._obstacles[event] = reason
            if self._fails:
                reason += f" ({self._obstacles['targets_cache_unwritable']})"
        self._tell(event, folder=self._folder_url, rows=num_rows, reason=reason)

    def _write_spec(self) -> None:
        url = join(self._folder_url, SPEC_FILE)
        values = dataclasses.asdict(self._spec)
        try:
            if read_json(url) == values:
                return
        except FileNotFoundError:
            pass  # this is the key's first shard
        except ValueError as error:
            _log.warning("%s; it is written anew", error)
        write_json(url, values)

    def _untried(self, row: RowId, tried: set[tuple[RowId, Place]]) -> Place | None:
        return next((p for p in self._index.places(row) if (row, p) not in tried), None)

    def _opened(self, row: RowId, place: Place, entry: bytes | Exception) -> StoredRow | None:
        if isinstance(entry, FileNotFoundError):
            self._index.forget(place.shard)
            return None  # somebody removed it: a miss like any other
        if isinstance(entry, Exception):
            self._unreadable(entry)
            return None
        self._works_again("targets_cache_unreadable")
        try:
            return verified(self._spec, row, entry)
        except DamagedTargetsError as error:
            if self._index.drop(row, place):
                self._tell("targets_damaged", shard=place.shard, row=list(row), reason=str(error))
            return None

    def _damaged_shard(self, shard: str, reason: str) -> None:
        self._tell("targets_damaged", shard=shard, row=None, reason=reason)

    def _unreadable(self, error: Exception) -> None:
        self._obstacle("targets_cache_unreadable", error)

    def _obstacle(self, event: str, error: Exception) -> None:
        reason = f"{type(error).__name__}: {error}"
        with self._lock:
            told = event in self._obstacles
            self._obstacles[event] = reason
        if not told:
            self._tell(event, folder=self._folder_url, reason=reason)

    def _works_again(self, event: str) -> None:
        with self._lock:
            self._obstacles.pop(event, None)


def verified(spec: TargetSpec, row: RowId, entry: bytes) -> StoredRow:
    """The row of a shard's entry.

    Raises:
        DamagedTargetsError: the bytes, the name or the key are not those that were written.
    """
    stored = unpack_row(entry_content(entry, row))
    arrays = {name: array[0] for name, array in stored.arrays.items()}
    if row_digest(spec, row, arrays) != stored.digest:
        raise DamagedTargetsError("has targets of another digest")
    return stored
