"""A cache of targets for tests: rows to put into it, what it gives back, and what it tells."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from workers import storage
from workers.dataset import RowId
from workers.target_cache import TargetCache, targets_folder
from workers.targets_protocol import MIXED, TargetChunk, TargetSpec, row_digest

SPEC = TargetSpec("dataset", "teacher", "hybrid(k=3,draws=0)", 0, MIXED)
LENGTH = 6
PLENTY = 2**40
ROWS = [RowId(0, 3), RowId(1, 12), RowId(1, 2)]


def targets_of(row: RowId) -> dict[str, np.ndarray]:
    """One row's wire arrays: odd sizes, an empty one, and each row's own numbers."""
    rng = np.random.default_rng((row.source, row.index))
    return {
        "head_ids": rng.integers(0, 2**16, (LENGTH, 3), np.uint16),
        "head_probs:float32": rng.random((LENGTH, 3), np.float32).view(np.uint32),
        "draw_ids": np.zeros((LENGTH, 0), np.uint16),
        "odd": rng.integers(0, 256, (LENGTH, 1), np.uint8),
    }


def chunk_of(rows: Sequence[RowId]) -> TargetChunk:
    parts = [targets_of(row) for row in rows]
    arrays = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    digests = tuple(row_digest(SPEC, *pair) for pair in zip(rows, parts, strict=True))
    return TargetChunk(tuple(rows), arrays, digests, "replica")


class Told:
    """What a cache has told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, event: str, **details: Any) -> None:
        self.events.append((event, details))

    @property
    def names(self) -> list[str]:
        return [event for event, _ in self.events]

    @property
    def num_dropped(self) -> int:
        return sum(details["rows"] for name, details in self.events if name == "targets_dropped")


def open_cache(root: str, told: Told | None = None, max_bytes: int = PLENTY) -> TargetCache:
    return TargetCache(root, SPEC, max_bytes, told or Told())


def store(root: str, rows: Sequence[RowId] = ROWS) -> None:
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


def open_and_get(root: str) -> dict[RowId, Any]:
    cache = open_cache(root)
    found = cache.get(ROWS)
    cache.close()
    return found


def shards(root: str) -> list[str]:
    folder = targets_folder(root, SPEC.key)
    names = [name for name in storage.list_names(folder) if name.endswith(".npz")]
    return [storage.join(folder, name) for name in names]


def rewrite(url: str, content: bytes) -> None:
    storage.remove_tree(url)
    storage.write_atomic(url, content)
