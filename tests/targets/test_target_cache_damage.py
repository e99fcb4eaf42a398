"""Damaged stored targets give the right bytes or a miss, and are told."""

import uuid
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.stored_rows import (
    ROWS,
    SPEC,
    Told,
    check,
    chunk_of,
    open_and_get,
    open_cache,
    rewrite,
    shards,
    store,
    targets_of,
)
from workers import storage, target_shards
from workers.dataset import RowId
from workers.target_cache import targets_folder
from workers.targets_protocol import row_digest


def damaged_at(content: bytes, position: int, bit: int) -> bytes:
    changed = bytearray(content)
    changed[position] ^= 1 << bit
    return bytes(changed)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_a_flipped_bit_or_a_cut_gives_the_right_bytes_or_a_miss(data):
    root = f"memory://{uuid.uuid4().hex}"
    store(root)
    (url,) = shards(root)
    content = storage.read_bytes(url)
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        changed = damaged_at(content, position, data.draw(st.integers(0, 7)))
    else:
        changed = content[:position]
    rewrite(url, changed)
    told = Told()
    cache = open_cache(root, told)
    found = check(cache.get(ROWS))
    assert check(cache.get(ROWS)) == found, "a miss stays one"
    if found != set(ROWS):
        assert told.events and set(told.names) == {"targets_damaged"}
        assert all(details["shard"] in url for _, details in told.events)
    # What is missing can be kept anew, beside what is damaged.
    cache.put(chunk_of(ROWS))
    cache.close()
    assert check(open_and_get(root)) == set(ROWS)


def test_damage_on_a_disk_is_told_once_for_each_row(tmp_path):
    root = str(tmp_path)
    store(root)
    (url,) = shards(root)
    content = Path(url).read_bytes()
    for position in range(0, len(content), 13):
        Path(url).write_bytes(damaged_at(content, position, position % 8))
        told = Told()
        cache = open_cache(root, told)
        found = check(cache.get(ROWS))
        cache.get(ROWS)
        cache.close()
        assert set(told.names) <= {"targets_damaged"}
        whole = [details for _, details in told.events if details["row"] is None]
        assert len(told.events) == (1 if whole else len(ROWS) - len(found)), told.events


def test_two_entries_that_changed_places_are_found_by_their_digests(root):
    """A wrong directory with every checksum in order."""
    store(root, [ROWS[0]])
    (url,) = shards(root)
    content = storage.read_bytes(url)
    content = content.replace(b"0-3.npy", b"0-4.npy")
    rewrite(url, content)
    assert told_of(root, RowId(0, 4)) == (None, "has a directory of another digest")
    extents = {RowId(0, 4): target_shards.Extent(0, content.index(b"PK\x01\x02"))}
    rewrite(url, content[:-16] + target_shards._directory_digest(extents))
    assert told_of(root, RowId(0, 4)) == ([0, 4], "has targets of another digest")


def told_of(root: str, row: RowId) -> tuple[Any, str]:
    """What is told of a shard that has nothing to give for a row."""
    told = Told()
    cache = open_cache(root, told)
    assert cache.get([row]) == {}
    cache.close()
    ((_, details),) = told.events
    return details["row"], details["reason"]


def test_another_copy_of_a_damaged_row_is_taken(root):
    store(root)
    (url,) = shards(root)
    content = storage.read_bytes(url)
    for number in range(3):
        begin = content.index(row_digest(SPEC, ROWS[number], targets_of(ROWS[number])).encode())
        copy = damaged_at(content, begin + 50, 1)
        storage.write_atomic(url.replace(".npz", f"{number}.npz"), copy)
    storage.remove_tree(url)
    cache = open_cache(root)
    assert check(cache.get(ROWS)) == set(ROWS)
    cache.close()


def test_a_shard_that_somebody_removes_is_a_miss(root):
    store(root)
    told = Told()
    cache = open_cache(root, told)
    assert check(cache.get(ROWS[:1])) == {ROWS[0]}
    storage.remove_tree(targets_folder(root, SPEC.key))
    assert cache.get(ROWS) == {}
    cache.put(chunk_of(ROWS))
    cache.close()
    assert told.events == []
    assert check(open_and_get(root)) == set(ROWS)
