"""The order of rows, and the arrays that are made of them."""

from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.dataset import DatasetManifest, RowId, Shard, SourceManifest, SplitManifest, encode_row
from workers.rows import RowReader, Rows, batch_arrays, row_at


def split_manifest(num_rows: int, shards: tuple[Shard, ...] = ()) -> SplitManifest:
    counts = dict.fromkeys(
        ("num_tokens", "num_bytes", "num_documents", "num_skipped", "num_empty"), 0
    )
    return SplitManifest(num_rows=num_rows, shards=shards, **counts)


def manifest_of(
    num_rows: list[int], held_out: list[SplitManifest] | None = None, row_length: int = 4
) -> DatasetManifest:
    held_out = held_out or [split_manifest(0) for _ in num_rows]
    return DatasetManifest(
        format_version=1,
        digest="d",
        tokenizer_digest="t",
        row_length=row_length,
        token_type="uint16",
        seed=0,
        held_out_fraction=0.1,
        sources=tuple(
            SourceManifest(name=f"s{i}", train=split_manifest(n), held_out=held)
            for i, (n, held) in enumerate(zip(num_rows, held_out, strict=True))
        ),
    )


FIXED_ORDER = [(0, 865), (0, 520), (1, 3), (0, 8945), (2, 3), (0, 887), (0, 9113), (0, 1525)]

sizes = st.lists(st.integers(1, 40), min_size=1, max_size=4)
seeds = st.integers(0, 2**31 - 1)


@settings(deadline=None, max_examples=15)
@given(sizes, st.data(), seeds)
def test_each_epoch_is_a_permutation_of_a_source(num_rows, data, seed):
    weights = data.draw(st.lists(st.integers(1, 5), min_size=len(num_rows), max_size=len(num_rows)))
    manifest = manifest_of(num_rows)
    visits: list[list[int]] = [[] for _ in num_rows]
    for position in range(400):
        row = row_at(manifest, weights, seed, position)
        visits[row.source].append(row.index)
    for n, visited in zip(num_rows, visits, strict=True):
        for start in range(0, len(visited) - n + 1, n):
            assert sorted(visited[start : start + n]) == list(range(n))
        assert len(set(visited[len(visited) // n * n :])) == len(visited) % n


def test_an_epoch_of_a_large_source_is_a_permutation_too():
    manifest = manifest_of([5000])
    rows = [row_at(manifest, [1], 7, 5000 + i).index for i in range(5000)]
    assert rows != sorted(rows) == list(range(5000))


def test_epochs_sources_and_seeds_have_orders_of_their_own():
    manifest = manifest_of([50, 50])

    def order(source: int, seed: int, epoch: int) -> tuple[int, ...]:
        stream = (row_at(manifest, (1, 1), seed, i) for i in range(100 * epoch, 100 * epoch + 100))
        return tuple(row.index for row in stream if row.source == source)

    orders = {
        order(source, seed, epoch) for source in (0, 1) for seed in (0, 1) for epoch in (0, 1)
    }
    assert len(orders) == 8
    assert tuple(range(50)) not in orders


@settings(deadline=None, max_examples=10)
@given(
    st.lists(st.floats(0.01, 10), min_size=1, max_size=5),
    st.integers(0, 10**9),
)
def test_sources_are_mixed_in_proportion_to_weight(weights, start):
    manifest = manifest_of([1000] * len(weights))
    num_rows = 2000
    counts = np.zeros(len(weights))
    for position in range(start, start + num_rows):
        counts[row_at(manifest, weights, 0, position).source] += 1
    expected = num_rows * np.array(weights) / sum(weights)
    # At most a visit off at either end, and the rounding of weights to a cycle of 10,000.
    assert (np.abs(counts - expected) <= 2 + num_rows * len(weights) / 10_000).all()


def test_whole_weights_are_kept_exactly_within_each_cycle():
    manifest = manifest_of([7, 9])
    for first in range(0, 40, 4):
        sources = [row_at(manifest, (0.75, 0.25), 3, first + i).source for i in range(4)]
        assert sorted(sources) == [0, 0, 0, 1]


@settings(deadline=None, max_examples=40)
@given(sizes, seeds, st.integers(0, 10**6), st.sampled_from([1, 2, 3, 4, 6, 12]))
def test_the_stream_does_not_depend_on_the_division_between_hosts(num_rows, seed, step, num_hosts):
    manifest, weights, batch = manifest_of(num_rows), [1.0] * len(num_rows), 12
    whole = [row_at(manifest, weights, seed, step * batch + row) for row in range(batch)]
    per_host = batch // num_hosts
    parts = [
        [
            row_at(manifest, weights, seed, step * batch + host * per_host + row)
            for row in range(per_host)
        ]
        for host in reversed(range(num_hosts))
    ]
    assert [row for part in reversed(parts) for row in part] == whole


def test_the_order_is_fixed():
    """Resumed runs depend on these very rows: a change here is a change of format."""
    manifest = manifest_of([10_000, 10, 7])
    found = [tuple(row_at(manifest, (3, 1, 0.5), 42, i)) for i in (0, 1, 2, 3, 4, 5, 10**6, 10**9)]
    assert found == FIXED_ORDER


def test_weights_must_fit_the_sources():
    with pytest.raises(ValueError, match="1 weights for a dataset of 2 sources"):
        row_at(manifest_of([1, 1]), [1.0], 0, 0)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=5), min_size=1, max_size=4))
def test_segments_do_not_see_each_other(lengths_of_rows):
    num_slots = max(map(sum, lengths_of_rows)) + 1
    segments = np.zeros((len(lengths_of_rows), num_slots), np.int32)
    for row, lengths in enumerate(lengths_of_rows):
        segments[row, : sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    tokens = np.arange(segments.size, dtype=np.int32).reshape(segments.shape)
    batch = batch_arrays(Rows(tokens, segments))
    assert (batch.inputs == tokens[:, :-1]).all()
    assert (batch.labels == batch.inputs + 1).all()
    for row, lengths in enumerate(lengths_of_rows):
        mask, positions = [], []
        for length in lengths:
            mask += [True] * (length - 1) + [False]
            positions += list(range(length))
        padding = num_slots - 1 - len(mask)
        assert batch.mask[row].tolist() == mask + [False] * padding
        assert batch.positions[row].tolist() == positions + list(range(padding))
        assert batch.segments[row].tolist() == segments[row, :-1].tolist()
    assert {array.dtype for array in batch[:4]} == {np.dtype(np.int32)}
    assert batch.mask.dtype == np.bool_


def stored(folder: Path, rows_of_shards: list[list[list[int]]], source: int) -> SplitManifest:
    shards = []
    for number, rows in enumerate(rows_of_shards):
        name = f"{source}-{number}.arrayrecord"
        path = folder / "datasets" / "d" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for row in rows:
            writer.write(encode_row(row, [len(row)], 5, 0, "uint16"))
        writer.close()
        num_bytes = path.stat().st_size
        shards.append(Shard(name=name, num_rows=len(rows), num_bytes=num_bytes, sha256=""))
    return split_manifest(sum(map(len, rows_of_shards)), tuple(shards))


@pytest.fixture
def reader(tmp_path) -> RowReader:
    first = [[[10 + i, 1, 2, 3, 4] for i in range(3)], [[13, 1, 2]], [[14, 0, 0, 0, 9]]]
    held_out = [stored(tmp_path, first, 0), split_manifest(0), stored(tmp_path, [[[30]]], 2)]
    manifest = manifest_of([1, 1, 1], held_out)
    return RowReader(manifest, str(tmp_path), "held_out", str(tmp_path / "cache"))


def test_rows_are_read_by_name_in_the_order_asked(reader):
    ids = [RowId(0, 4), RowId(2, 0), RowId(0, 0), RowId(0, 3), RowId(0, 2), RowId(0, 0)]
    rows = reader.read(ids)
    assert rows.tokens_BT1[:, 0].tolist() == [14, 30, 10, 13, 12, 10]
    assert rows.tokens_BT1[3].tolist() == [13, 1, 2, 0, 0]
    assert rows.segments_BT1[3].tolist() == [1, 1, 1, 0, 0]
    assert rows.tokens_BT1.dtype == rows.segments_BT1.dtype == np.int32
    assert reader.read([]).tokens_BT1.shape == (0, 5)


def test_plain_order_takes_sources_in_turn(reader):
    assert reader.all_ids() == [(0, 0), (2, 0), (0, 1), (0, 2), (0, 3), (0, 4)]


@pytest.mark.parametrize("row", [RowId(0, 5), RowId(0, -1), RowId(1, 0), RowId(3, 0), RowId(-1, 0)])
def test_a_row_that_is_not_there_is_refused(reader, row):
    with pytest.raises(ValueError, match=r"is no held_out row of dataset d.*\[5, 0, 1\] rows"):
        reader.read([row])


def test_a_damaged_row_is_refused_and_no_other(reader, tmp_path):
    path = tmp_path / "datasets/d/0-0.arrayrecord"
    content = bytearray(path.read_bytes())
    place = content.index(np.array([11, 1, 2, 3, 4], "<u2").tobytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"index=1\) cannot be read .* to have the dataset packed"):
        reader.read([RowId(0, 1)])
    assert reader.read([RowId(0, 0), RowId(0, 2)]).tokens_BT1[:, 0].tolist() == [10, 12]


def test_a_shard_of_another_size_is_refused(reader, tmp_path):
    with open(tmp_path / "datasets/d/0-0.arrayrecord", "ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match=r"0-0.arrayrecord is not the file"):
        reader.read([RowId(0, 0)])
