"""Stored targets: what is written is read, whoever wrote it, and nobody is asked for it again."""

import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.stored_rows import SPEC, check, chunk_of, open_cache, shards, store, targets_of
from workers import storage, target_shards
from workers.dataset import RowId
from workers.target_cache import targets_folder
from workers.target_sources import CachedSource
from workers.targets_protocol import (
    CACHE,
    Answer,
    TargetRequest,
    TargetSource,
    TargetSpec,
    row_digest,
)

row_ids = st.builds(RowId, st.integers(0, 3), st.integers(0, 40))


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


@settings(max_examples=40, deadline=None)
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


@settings(max_examples=60, deadline=None)
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
