"""Storage that does not answer, is full or is slow costs stored targets and never the run."""

import errno
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from tests.helpers.stored_rows import (
    PLENTY,
    ROWS,
    SPEC,
    Told,
    check,
    chunk_of,
    open_and_get,
    open_cache,
    store,
    targets_of,
)
from workers import storage, target_cache, target_index
from workers.dataset import RowId
from workers.target_cache import TargetCache, targets_folder


def test_storage_that_does_not_answer_is_a_miss_and_told_once(root, monkeypatch):
    store(root)
    told = Told()
    cache = open_cache(root, told)
    assert len(cache.get(ROWS)) == 3
    read = target_index.ShardIndex.read

    def fails(self: Any, places: Sequence[Any]) -> list[Any]:
        return [OSError(errno.EIO, "Input/output error")] * len(places)

    monkeypatch.setattr(target_index.ShardIndex, "read", fails)
    assert cache.get(ROWS) == cache.get(ROWS) == {}
    assert told.names == ["targets_cache_unreadable"]
    monkeypatch.setattr(target_index.ShardIndex, "read", read)
    assert check(cache.get(ROWS)) == set(ROWS), "it is only away for a while"
    monkeypatch.setattr(target_index.ShardIndex, "read", fails)
    cache.get(ROWS)
    assert told.names == ["targets_cache_unreadable"] * 2
    cache.close()


def test_a_listing_that_fails_is_told_and_made_later(root, monkeypatch):
    store(root)
    told = Told()

    def fails(url: str) -> dict[str, int]:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(target_index, "list_tree", fails)
    cache = open_cache(root, told)
    assert cache.get(ROWS) == {}
    monkeypatch.undo()
    assert check(cache.get(ROWS)) == set(ROWS)
    assert told.names == ["targets_cache_unreadable"]
    cache.close()


def test_no_more_is_written_than_allowed_and_that_is_told_once(root):
    told = Told()
    store(root, [RowId(3, 3)])
    used = storage.list_tree(targets_folder(root, SPEC.key))
    (num_bytes,) = (size for name, size in used.items() if name.endswith(".npz"))
    cache = open_cache(root, told, max_bytes=3 * num_bytes - 1)
    for row in ROWS:
        cache.put(chunk_of([row]))
        cache.flush()
    cache.close()
    assert told.names == ["targets_cache_full"]
    assert f"of {3 * num_bytes - 1} bytes" in told.events[0][1]["reason"]
    assert check(open_and_get(root)) == {ROWS[0]}


def test_a_slow_storage_holds_up_nobody(root, monkeypatch):
    told = Told()
    begun, let = threading.Event(), threading.Event()
    write = target_cache.write_shard

    def slow(url: str, rows: Any) -> Any:
        begun.set()
        assert let.wait(30)
        return write(url, rows)

    size = len(target_cache.pack_row(targets_of(ROWS[0]), "0" * 32))
    monkeypatch.setattr(target_cache, "write_shard", slow)
    monkeypatch.setattr(target_cache, "SHARD_BYTES", size)
    monkeypatch.setattr(target_cache, "MAX_WAITING_BYTES", 2 * size)
    cache = open_cache(root, told)
    cache.put(chunk_of(ROWS[:1]))
    assert begun.wait(30), "a shard's worth is written at once"
    cache.put(chunk_of(ROWS[1:]))
    let.set()
    cache.close()
    assert told.names == ["targets_dropped"]
    assert told.events[0][1]["rows"] == 1
    assert check(open_and_get(root)) == {ROWS[0], ROWS[2]}, "the oldest that is not under way"


@pytest.mark.parametrize("has_room", [True, False])
def test_who_wants_all_rows_kept_waits_for_a_slow_storage(root, monkeypatch, has_room):
    told = Told()
    size = len(target_cache.pack_row(targets_of(ROWS[0]), "0" * 32))
    monkeypatch.setattr(target_cache, "SHARD_BYTES", 2 * size)
    monkeypatch.setattr(target_cache, "MAX_WAITING_BYTES", size)
    cache = TargetCache(root, SPEC, PLENTY if has_room else 1, told, keep_all=True)
    cache.put(chunk_of(ROWS))
    cache.close()
    assert told.names == ([] if has_room else ["targets_cache_full"])
    assert check(open_and_get(root)) == (set(ROWS) if has_room else set())
