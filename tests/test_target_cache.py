"""Stored targets are the right bytes or none, whoever wrote them and whatever became of them."""

import errno
import threading
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from workers import storage, target_cache, target_index, target_shards
from workers.rows import RowId
from workers.target_cache import TargetCache, targets_folder
from workers.target_sources import CachedSource
from workers.targets_protocol import (
    CACHE,
    MIXED,
    Answer,
    TargetChunk,
    TargetRequest,
    TargetSource,
    TargetSpec,
    row_digest,
)

SPEC = TargetSpec("dataset", "teacher", "hybrid(k=3,draws=0)", 0, MIXED)
LENGTH = 6
PLENTY = 2**40
KEPT = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
row_ids = st.builds(RowId, st.integers(0, 3), st.integers(0, 40))


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}"


def targets_of(row: RowId) -> dict[str, np.ndarray]:
    """One row's wire arrays: odd sizes, an empty one, and each row's own numbers."""
    rng = np.random.default_rng((row.source, row.index))
    return {
        "head_ids": rng.integers(0, 2**16, (LENGTH, 3), np.uint16),
        "head_probs:float32": rng.random((LENGTH, 3), np.float32).view(np.uint32),
        "draw_ids": np.zeros((LENGTH, 0), np.uint16),
        "odd": rng.integers(0, 256, (LENGTH, 1), np.uint8),
    }


def chunk_of(rows: Sequence[RowId], origin: str = "replica") -> TargetChunk:
    parts = [targets_of(row) for row in rows]
    arrays = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    digests = tuple(row_digest(SPEC, *pair) for pair in zip(rows, parts, strict=True))
    return TargetChunk(tuple(rows), arrays, digests, origin)


class Told:
    """What a cache has told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, event: str, **details: Any) -> None:
        self.events.append((event, details))

    @property
    def names(self) -> list[str]:
        return [event for event, _ in self.events]


def open_cache(root: str, told: Told | None = None, max_bytes: int = PLENTY) -> TargetCache:
    return TargetCache(root, SPEC, max_bytes, told or Told())


def store(root: str, rows: Sequence[RowId]) -> None:
    if rows:
        cache = open_cache(root)
        cache.put(chunk_of(rows))
        cache.close()


def check(found: dict[RowId, Any]) -> set[RowId]:
    """That what was found is what was written; which rows it is."""
    for row, stored in found.items():
        expected = targets_of(row)
        assert stored.digest == row_digest(SPEC, row, expected)
        assert stored.arrays.keys() == expected.keys()
        for name, array in stored.arrays.items():
            assert array.dtype == expected[name].dtype
            np.testing.assert_array_equal(array, expected[name][None])
    return set(found)


def shards(root: str) -> list[str]:
    folder = targets_folder(root, SPEC.key)
    names = [name for name in storage.list_names(folder) if name.endswith(".npz")]
    return [storage.join(folder, name) for name in names]


def rewrite(url: str, content: bytes) -> None:
    storage.remove_tree(url)
    storage.write_atomic(url, content)


# What is written is read.


def test_a_new_cache_holds_nothing_and_writes_nothing(root):
    cache = open_cache(root)
    assert cache.get([RowId(0, 1)]) == {}
    cache.close()
    assert not storage.exists(targets_folder(root, SPEC.key))


def test_rows_are_there_before_and_after_they_are_on_storage(root):
    rows = [RowId(1, 5), RowId(0, 7), RowId(1, 4)]
    cache = open_cache(root)
    cache.put(chunk_of(rows))
    assert check(cache.get([*rows, RowId(9, 9)])) == set(rows)
    cache.flush()
    assert check(cache.get([*rows, RowId(9, 9)])) == set(rows)
    cache.close()
    again = open_cache(root)
    assert check(again.get(rows[:2])) == set(rows[:2])
    again.close()
    values = storage.read_json(storage.join(targets_folder(root, SPEC.key), "spec.json"))
    assert TargetSpec(**values) == SPEC


def test_a_shard_is_an_archive_that_numpy_opens(tmp_path):
    row = RowId(2, 17)
    store(str(tmp_path), [row, RowId(0, 0)])
    (url,) = shards(str(tmp_path))
    packed = target_shards.pack_row(targets_of(row), "0" * 32)
    assert Path(url).stat().st_size == target_shards.shard_bytes({row: packed, RowId(0, 0): packed})
    with np.load(url) as archive:
        assert set(archive) == {"2-17", "0-0"}
        record = archive["2-17"]
    assert record["digest"].item().decode() == row_digest(SPEC, row, targets_of(row))
    np.testing.assert_array_equal(record["head_ids"], targets_of(row)["head_ids"])


@settings(max_examples=40, **KEPT)
@given(
    written=st.lists(st.lists(row_ids, unique=True, max_size=12), max_size=5),
    asked=st.lists(row_ids, max_size=30),
    data=st.data(),
)
def test_any_number_of_writers_in_any_order(written, asked, data):
    root = f"memory://{uuid.uuid4().hex}"
    caches = [open_cache(root) for _ in written]
    for index in data.draw(st.permutations(range(len(written)))):
        if written[index]:
            caches[index].put(chunk_of(written[index]))
        if data.draw(st.booleans()):
            caches[index].flush()
    for cache in caches:
        cache.close()
    everything = {row for rows in written for row in rows}
    reader = open_cache(root)
    assert check(reader.get(asked)) == everything & set(asked)
    assert check(reader.get(everything)) == everything
    reader.close()
    sizes = storage.list_tree(targets_folder(root, SPEC.key)) if everything else {}
    assert sum(1 for name in sizes if name.endswith(".npz")) <= len(written)


def test_a_writer_sees_what_others_have_written_and_does_not_write_it_again(root):
    one, other = open_cache(root), open_cache(root)
    assert one.get([RowId(0, 1)]) == other.get([RowId(0, 1)]) == {}
    one.put(chunk_of([RowId(0, 1)]))
    other.put(chunk_of([RowId(0, 1)]))
    one.flush()
    other.flush()
    assert len(shards(root)) == 1
    assert check(other.get([RowId(0, 1)])) == {RowId(0, 1)}
    one.close()
    other.close()


def test_only_the_rows_that_are_wanted_are_read(root, monkeypatch):
    rows = [RowId(0, index) for index in range(100)]
    store(root, rows)
    (url,) = shards(root)
    fs, _ = storage.open_storage(url)
    num_bytes, read_bytes = len(storage.read_bytes(url)), 0
    cat_file = type(fs).cat_file

    def counted(self: Any, path: str, start: Any = None, end: Any = None, **more: Any) -> bytes:
        nonlocal read_bytes
        content = cat_file(self, path, start, end, **more)
        assert isinstance(content, bytes)
        read_bytes += len(content)
        return content

    monkeypatch.setattr(type(fs), "cat_file", counted)
    cache = open_cache(root)
    assert len(cache.get(rows[3:5])) == 2
    cache.close()
    assert 0 < read_bytes < num_bytes / 40


# Damage.


def damaged_at(content: bytes, position: int, bit: int) -> bytes:
    changed = bytearray(content)
    changed[position] ^= 1 << bit
    return bytes(changed)


ROWS = [RowId(0, 3), RowId(1, 12), RowId(1, 2)]


@settings(max_examples=400, **KEPT)
@given(st.data())
def test_a_flipped_bit_or_a_cut_gives_the_right_bytes_or_a_miss(data):
    root = f"memory://{uuid.uuid4().hex}"
    store(root, ROWS)
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


def open_and_get(root: str) -> dict[RowId, Any]:
    cache = open_cache(root)
    found = cache.get(ROWS)
    cache.close()
    return found


def test_damage_on_a_disk_is_told_once_for_each_row(tmp_path):
    root = str(tmp_path)
    store(root, ROWS)
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
    store(root, ROWS)
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
    store(root, ROWS)
    told = Told()
    cache = open_cache(root, told)
    assert check(cache.get(ROWS[:1])) == {ROWS[0]}
    storage.remove_tree(targets_folder(root, SPEC.key))
    assert cache.get(ROWS) == {}
    cache.put(chunk_of(ROWS))
    cache.close()
    assert told.events == []
    assert check(open_and_get(root)) == set(ROWS)


# Storage that does not answer, or has no room.


def test_storage_that_does_not_answer_is_a_miss_and_told_once(root, monkeypatch):
    store(root, ROWS)
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
    store(root, ROWS)
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


# The source in front of it.


class Teachers(TargetSource):
    """Answers every row in a chunk of its own."""

    def __init__(self) -> None:
        self.asked: list[RowId] = []

    def sameness(self) -> str:
        return "class"

    def ask(self, request: TargetRequest) -> Iterator[Answer]:
        self.asked += request.rows
        for row, tokens in zip(request.rows, request.inputs, strict=True):
            assert tokens.tolist() == [row.source, row.index], "the request is that of its rows"
            chunk = chunk_of([row])
            yield Answer(chunk, 0.0)


def request_of(rows: Sequence[RowId]) -> TargetRequest:
    tokens = np.array([list(row) for row in rows], np.int32)
    return TargetRequest(SPEC, tuple(rows), tokens, tokens, tokens)


@settings(max_examples=60, **KEPT)
@given(
    requests=st.lists(st.lists(row_ids, min_size=1, max_size=10, unique=True), max_size=6),
    flushes=st.booleans(),
)
def test_each_row_is_asked_for_once_and_the_rest_is_read(requests, flushes):
    root = f"memory://{uuid.uuid4().hex}"
    teachers = Teachers()
    cache = open_cache(root)
    source = CachedSource(lambda: cache, teachers)
    seen: set[RowId] = set()
    for rows in requests:
        answers = list(source.ask(request_of(rows)))
        origins = {row: a.chunk.origin for a in answers for row in a.chunk.rows}
        assert origins == {row: CACHE if row in seen else "replica" for row in rows}
        for answer in answers:
            for index, row in enumerate(answer.chunk.rows):
                part = {name: array[index] for name, array in answer.chunk.arrays.items()}
                assert answer.chunk.digests[index] == row_digest(SPEC, row, targets_of(row))
                assert answer.chunk.digests[index] == row_digest(SPEC, row, part)
        seen |= set(rows)
        if flushes:
            cache.flush()
    cache.close()
    assert Counter(teachers.asked) == Counter(seen)
