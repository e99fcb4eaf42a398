"""Which row comes when, and its arrays.

The order of training rows is a pure function of (weights, seed, position in the stream), so
nothing about it needs saving but the step, and any division of a batch between hosts reads the
same stream. Position = step * rows per batch + row within the batch.
"""

import hashlib
import itertools
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import gcd, lcm
from typing import NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from grain.experimental import index_shuffle
from jaxtyping import Bool, Int32

from workers import storage
from workers.dataset import (
    DatasetManifest,
    RowId,
    Split,
    dataset_folder,
    decode_row,
    load_manifest,
)

_MAX_CYCLE = 10_000
_SHUFFLE_ROUNDS = 4
_SMALL_SOURCE = 4096
_MAX_OPEN_SHARDS = 128


def row_at(
    manifest: DatasetManifest, weights: Sequence[float], seed: int, global_index: int
) -> RowId:
    """The training row at a position of the endless stream.

    Sources take turns in a fixed cycle, in proportion to `weights` (one per source of the
    manifest). Each visits its rows in a shuffled order, another one in each of its epochs.

    Raises:
        ValueError: the number of weights is not that of the sources.
    """
    if len(weights) != len(manifest.sources):
        raise ValueError(
            f"{len(weights)} weights for a dataset of {len(manifest.sources)} sources; "
            "give one weight per source, in the manifest's order"
        )
    cycle = _cycle(tuple(weights))
    turn, place = divmod(global_index, len(cycle.source))
    source = cycle.source[place]
    visit = turn * cycle.visits[source] + cycle.visit[place]
    num_rows = manifest.sources[source].train.num_rows
    epoch, index = divmod(visit, num_rows)
    epoch_seed = _epoch_seed(seed, source, epoch)
    return RowId(source, _shuffled(index, num_rows, epoch_seed))


def _shuffled(index: int, num_rows: int, seed: int) -> int:
    if num_rows < _SMALL_SOURCE:
        return _small_order(num_rows, seed)[index]
    return index_shuffle(index, max_index=num_rows - 1, seed=seed, rounds=_SHUFFLE_ROUNDS)


@lru_cache(maxsize=64)
def _small_order(num_rows: int, seed: int) -> list[int]:
    # index_shuffle walks a domain of 2**16 until it falls among the rows: with a few rows that
    # takes milliseconds. Here it deals out sort keys of a domain that it never leaves.
    def key(index: int) -> int:
        return index_shuffle(index, max_index=2**32 - 1, seed=seed, rounds=_SHUFFLE_ROUNDS)

    return sorted(range(num_rows), key=key)


@lru_cache(maxsize=1024)
def _epoch_seed(seed: int, source: int, epoch: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{source}/{epoch}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")


class _Cycle(NamedTuple):
    source: list[int]  # of each place in the cycle
    visit: list[int]  # how often that source came before, in this cycle
    visits: list[int]  # of each source in a whole cycle


@lru_cache(maxsize=64)
def _cycle(weights: tuple[float, ...]) -> _Cycle:
    visits = _visits(weights)
    # The k-th of n visits belongs at (k + 1/2) / n of the cycle: each source spread evenly.
    places = sorted(
        (Fraction(2 * k + 1, 2 * n), source, k) for source, n in enumerate(visits) for k in range(n)
    )
    return _Cycle([source for _, source, _ in places], [k for _, _, k in places], visits)


def _visits(weights: Sequence[float]) -> list[int]:
    """Visits per cycle in proportion to the weights: exact if a short cycle can be, else within
    one in `_MAX_CYCLE`, and never 0."""
    exact = [Fraction(str(weight)) for weight in weights]
    scale = lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * scale) for weight in exact]
    visits = [n // gcd(*whole) for n in whole]
    if sum(visits) <= _MAX_CYCLE:
        return visits
    total = sum(exact)
    return [max(1, round(weight / total * _MAX_CYCLE)) for weight in exact]


@dataclass(frozen=True)
class Rows:
    """Rows as they are stored: T + 1 tokens, and the segment of each (0 is padding)."""

    tokens_BT1: Int32[np.ndarray, "B T1"]
    segments_BT1: Int32[np.ndarray, "B T1"]


class BatchArrays(NamedTuple):
    """What a model reads and is asked for; the mask is true where the label counts."""

    inputs: Int32[np.ndarray, "B T"]
    labels: Int32[np.ndarray, "B T"]
    positions: Int32[np.ndarray, "B T"]
    segments: Int32[np.ndarray, "B T"]
    mask: Bool[np.ndarray, "B T"]


def batch_arrays(rows: Rows) -> BatchArrays:
    """Inputs and next-token labels of rows.

    Positions start at 0 in each segment. A label counts when it lies in the segment of its
    input, so no document is asked to foretell the next one.
    """
    tokens, segments = rows.tokens_BT1, rows.segments_BT1
    segments_BT = segments[:, :-1]
    columns = np.arange(segments_BT.shape[1], dtype=np.int32)
    starts = np.diff(segments_BT, axis=1, prepend=-1) != 0
    first = np.maximum.accumulate(np.where(starts, columns, 0), axis=1)
    return BatchArrays(
        inputs=tokens[:, :-1],
        labels=tokens[:, 1:],
        positions=(columns - first).astype(np.int32),
        segments=segments_BT,
        mask=(segments_BT == segments[:, 1:]) & (segments_BT > 0),
    )


class RowReader:
    """Reads rows of one split by name. Shards on an object store are first copied, each once,
    into `cache_dir`."""

    def __init__(self, manifest: DatasetManifest, root_url: str, split: Split, cache_dir: str):
        self.manifest = manifest
        self._split: Split = split
        self._folder = dataset_folder(root_url, manifest.digest)
        self._cache_dir = cache_dir
        splits = [source.split(split) for source in manifest.sources]
        self._stops = [
            list(itertools.accumulate(shard.num_rows for shard in split.shards)) for split in splits
        ]
        self._open = lru_cache(maxsize=_MAX_OPEN_SHARDS)(self._open_shard)

    @classmethod
    def open(cls, root_url: str, digest: str, split: Split, cache_dir: str) -> "RowReader":
        """Reader of a dataset that is known by its digest.

        Raises:
            FileNotFoundError: there is no such dataset.
            ValueError: it is damaged.
        """
        return cls(load_manifest(root_url, digest), root_url, split, cache_dir)

    def all_ids(self) -> list[RowId]:
        """Every row in plain order: the first one of each source, the second one of each, ...

        So the start of the list holds as many rows of each source, as far as it has them.
        """
        num_rows = [stops[-1] if stops else 0 for stops in self._stops]
        return [
            RowId(source, index)
            for index in range(max(num_rows))
            for source, of_source in enumerate(num_rows)
            if index < of_source
        ]

    def read(self, ids: Sequence[RowId]) -> Rows:
        """The rows named `ids`, in that order.

        Raises:
            ValueError: there is no such row, or its shard is damaged.
        """
        num_slots, token_type = self.manifest.row_length + 1, self.manifest.token_type
        rows = [decode_row(self._record(row), num_slots, token_type) for row in ids]
        tokens = np.array([tokens for tokens, _ in rows], np.int32).reshape(-1, num_slots)
        segments = np.array([segments for _, segments in rows], np.int32).reshape(-1, num_slots)
        return Rows(tokens, segments)

    def _record(self, row: RowId) -> bytes:
        known = 0 <= row.source < len(self._stops)
        stops = self._stops[row.source] if known else [0]
        if not 0 <= row.index < (stops[-1] if stops else 0):
            raise ValueError(
                f"{row} is no {self._split} row of dataset {self.manifest.digest}; its sources "
                f"have {[of_source[-1] if of_source else 0 for of_source in self._stops]} rows"
            )
        shard = bisect_right(stops, row.index)
        before = stops[shard - 1] if shard else 0
        try:
            return self._open(row.source, shard).read([row.index - before])[0]
        except RuntimeError as error:  # ArrayRecord's word for a wrong checksum
            url = self._shard_url(row.source, shard)
            raise ValueError(
                f"{row} cannot be read from {url} ({error}); remove {self._folder} to have the "
                "dataset packed again"
            ) from error

    def _shard_url(self, source: int, shard: int) -> str:
        entry = self.manifest.sources[source].split(self._split).shards[shard]
        return storage.join(self._folder, entry.name)

    def _open_shard(self, source: int, shard: int) -> ArrayRecordReader:
        entry = self.manifest.sources[source].split(self._split).shards[shard]
        url = self._shard_url(source, shard)
        path = storage.local_copy(url, self._cache_dir)
        whole = os.path.getsize(path) == entry.num_bytes
        if whole and not storage.is_local(url):
            whole = storage.file_sha256(path) == entry.sha256
        if not whole:
            raise ValueError(
                f"{path} is not the file of {entry.num_bytes} bytes that the manifest of its "
                "dataset tells of; remove it"
            )
        return ArrayRecordReader(
            path,
            # For random access: no reading ahead.
            options="readahead_buffer_size:0,max_parallelism:0",
            file_reader_buffer_size=2**15,
        )
