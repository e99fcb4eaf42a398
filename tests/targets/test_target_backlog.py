"""Rows that cannot be stored yet wait, bounded; what is dropped is the oldest, and is told."""

import errno
import threading
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.stored_rows import Told
from workers import storage, target_cache
from workers.dataset import RowId
from workers.target_backlog import Backlog
from workers.target_cache import TargetCache, targets_folder
from workers.targets_protocol import MIXED, TargetChunk, TargetSpec, row_digest

SPEC = TargetSpec("dataset", "teacher", "codec", 0, MIXED)
PLENTY = 2**40
LONG_S = 30.0
ROWS = [RowId(0, index) for index in range(8)]


# The order and the bound, alone.


@settings(deadline=None, max_examples=200)
@given(
    max_bytes=st.integers(1, 30),
    acts=st.lists(
        st.one_of(
            st.tuples(st.just("put"), st.integers(1, 12)),
            st.tuples(st.just("begin"), st.integers(1, 20)),
            st.tuples(st.just("end"), st.booleans()),
        ),
        max_size=40,
    ),
)
def test_the_newest_rows_that_fit_wait_and_none_is_lost_untold(max_bytes, acts):
    backlog = Backlog(max_bytes)
    waiting: list[tuple[RowId, bytes]] = []
    begun: dict[RowId, bytes] = {}
    for number, (act, value) in enumerate(acts):
        if act == "put":
            row, content = RowId(0, number), bytes(value)
            fitted = backlog.fits(content)
            num_dropped = backlog.put(row, content)
            waiting.append((row, content))
            gone = [each for each in waiting if each[0] not in backlog]
            droppable = [each for each in waiting if each[0] not in begun]
            assert gone == droppable[:num_dropped], "the oldest that are not under way"
            assert not (fitted and num_dropped)
            waiting = [each for each in waiting if each not in gone]
            room = max(
                max_bytes, sum(map(len, begun.values())), max(map(len, dict(waiting).values()))
            )
            assert backlog.num_bytes <= room
        elif act == "begin" and not begun:
            begun = backlog.begin(value)
            assert list(begun.items()) == waiting[: len(begun)], "the oldest"
            whole = backlog.num_bytes <= 2 * value
            assert len(begun) == len(waiting) if whole else sum(map(len, begun.values())) >= value
        elif act == "end":
            backlog.end(bool(value))
            waiting = [each for each in waiting if not value or each[0] not in begun]
            begun = {}
        assert backlog.get([*dict(waiting), RowId(9, 9)]) == dict(waiting)
        assert backlog.num_bytes == sum(len(content) for _, content in waiting)
        assert len(backlog) == len(waiting)
    assert backlog.clear() == len(waiting)
    assert len(backlog) == backlog.num_bytes == 0


# In front of a storage that fails.


def targets_of(row: RowId) -> np.ndarray:
    return np.full((1, 100), row.index, np.uint16)


def chunk_of(rows: Sequence[RowId]) -> TargetChunk:
    arrays = {"ids": np.concatenate([targets_of(row) for row in rows])}
    digests = tuple(row_digest(SPEC, row, {"ids": targets_of(row)[0]}) for row in rows)
    return TargetChunk(tuple(rows), arrays, digests, "replica")


ROW_BYTES = len(target_cache.pack_row({"ids": targets_of(ROWS[0])[0]}, "0" * 32))


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}"


class Away:
    """Stands for `write_shard`; writes nothing while it is away."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.away = True
        self._write = target_cache.write_shard
        monkeypatch.setattr(target_cache, "write_shard", self)

    def __call__(self, url: str, rows: Any) -> Any:
        if self.away:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._write(url, rows)


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Away:
    return Away(monkeypatch)


@pytest.fixture
def _room_for_three(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_cache, "MAX_WAITING_BYTES", 3 * ROW_BYTES)


def found_in(cache: TargetCache) -> set[RowId]:
    found = cache.get(ROWS)
    for row, stored in found.items():
        np.testing.assert_array_equal(stored.arrays["ids"], targets_of(row))
    return set(found)


def stored_in(root: str) -> set[RowId]:
    cache = TargetCache(root, SPEC, PLENTY, Told())
    rows = found_in(cache)
    cache.close()
    return rows


def num_shards(root: str) -> int:
    names = storage.list_tree(targets_folder(root, SPEC.key))
    return sum(name.endswith(".npz") for name in names)


def test_rows_that_could_not_be_written_are_written_when_the_storage_is_back(root, away):
    told = Told()
    cache = TargetCache(root, SPEC, PLENTY, told)
    for row in ROWS[:2]:
        cache.put(chunk_of([row]))
        cache.flush()
        assert row in found_in(cache), "what waits is used"
    assert told.names == ["targets_cache_unwritable"]
    assert "No space left" in told.events[0][1]["reason"]
    away.away = False
    cache.put(chunk_of(ROWS[2:3]))
    cache.flush()
    assert num_shards(root) == 1
    assert stored_in(root) == set(ROWS[:3])
    cache.close()
    assert told.names == ["targets_cache_unwritable"]
    assert num_shards(root) == 1, "and nothing twice"


def test_of_too_many_rows_the_oldest_are_dropped_and_counted(root, away, _room_for_three):
    told = Told()
    cache = TargetCache(root, SPEC, PLENTY, told)
    for row in ROWS:
        cache.put(chunk_of([row]))
        cache.flush()
    assert found_in(cache) == set(ROWS[-3:])
    assert told.names == ["targets_cache_unwritable", "targets_dropped"], "not at every try"
    assert "No space left" in told.events[1][1]["reason"]
    away.away = False
    cache.flush()
    assert stored_in(root) == set(ROWS[-3:])
    assert told.num_dropped == len(ROWS) - 3
    cache.close()
    assert told.names == ["targets_cache_unwritable", "targets_dropped", "targets_dropped"]


def test_what_still_waits_at_the_end_is_told(root, away):
    told = Told()
    cache = TargetCache(root, SPEC, PLENTY, told)
    cache.put(chunk_of(ROWS))
    cache.close()
    assert told.names == ["targets_cache_unwritable", "targets_dropped"]
    assert told.num_dropped == len(ROWS)
    assert stored_in(root) == set()


def test_a_write_that_failed_at_its_very_end_is_not_made_twice(root, monkeypatch):
    """As when an object store has taken a shard and the answer is lost."""
    write = target_cache.write_shard

    def lost(url: str, rows: Any) -> Any:
        write(url, rows)
        raise TimeoutError("no answer")

    told = Told()
    cache = TargetCache(root, SPEC, PLENTY, told)
    cache.put(chunk_of(ROWS))
    monkeypatch.setattr(target_cache, "write_shard", lost)
    cache.flush()
    cache.flush()
    assert told.names == ["targets_cache_unwritable"]
    monkeypatch.setattr(target_cache, "write_shard", write)
    cache.close()
    assert told.names == ["targets_cache_unwritable"]
    assert num_shards(root) == 1
    assert stored_in(root) == set(ROWS)


def test_rows_come_and_go_while_a_write_hangs(root, monkeypatch, _room_for_three):
    begun, let = threading.Event(), threading.Event()

    def hangs(url: str, rows: Any) -> Any:
        begun.set()
        assert let.wait(LONG_S)
        raise TimeoutError("no answer")

    write = target_cache.write_shard
    monkeypatch.setattr(target_cache, "write_shard", hangs)
    monkeypatch.setattr(target_cache, "SHARD_BYTES", ROW_BYTES)
    told = Told()
    cache = TargetCache(root, SPEC, PLENTY, told)
    cache.put(chunk_of(ROWS[:1]))
    assert begun.wait(LONG_S), "a shard's worth is written at once"
    cache.put(chunk_of(ROWS[1:]))  # returns: else this test would not end
    assert found_in(cache) == {ROWS[0], *ROWS[-2:]}, "what is being written is not dropped"
    monkeypatch.setattr(target_cache, "write_shard", write)
    let.set()
    cache.close()
    assert told.num_dropped == len(ROWS) - 3
    assert stored_in(root) == {ROWS[0], *ROWS[-2:]}


def test_a_disk_without_room_for_the_run_is_left_alone_until_it_has(tmp_path, monkeypatch):
    free = target_cache.LEAVE_FREE_BYTES
    monkeypatch.setattr(target_cache, "free_bytes", lambda url: free)
    told = Told()
    cache = TargetCache(str(tmp_path), SPEC, PLENTY, told)
    cache.put(chunk_of(ROWS))
    cache.flush()
    assert not storage.exists(targets_folder(str(tmp_path), SPEC.key))
    assert told.names == ["targets_cache_unwritable"]
    assert f"{free} bytes are free on the disk" in told.events[0][1]["reason"]
    free *= 2
    cache.close()
    assert stored_in(str(tmp_path)) == set(ROWS)
    assert told.names == ["targets_cache_unwritable"]


def test_a_full_cache_lets_go_of_what_waits(root):
    told = Told()
    cache = TargetCache(root, SPEC, 1, told)
    cache.put(chunk_of(ROWS))
    cache.flush()
    assert found_in(cache) == set()
    cache.close()
    assert told.names == ["targets_cache_full"]


def test_who_wants_all_rows_kept_does_not_wait_for_a_storage_that_fails(
    root, away, _room_for_three
):
    told = Told()
    cache = TargetCache(root, SPEC, PLENTY, told, keep_all=True)
    cache.put(chunk_of(ROWS))  # returns: else this test would not end
    away.away = False
    cache.close()
    assert told.names[0] == "targets_cache_unwritable"
    assert 0 < told.num_dropped == len(ROWS) - len(stored_in(root))
