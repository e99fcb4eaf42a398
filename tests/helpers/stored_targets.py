"""Targets on storage for tests, with numbers that mean nothing."""

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

from workers.dataset import RowId
from workers.target_cache import TargetCache
from workers.targets_protocol import TargetChunk, TargetSpec, row_digest


def told(event: str, **details: object) -> NoReturn:
    pytest.fail(f"{event}: {details}")


def store(storage: Path, spec: TargetSpec, rows: Sequence[RowId]) -> None:
    """Puts rows of a key on storage, as one shard."""
    ids = np.arange(len(rows) * 40, dtype=np.uint16).reshape(len(rows), 40)
    digests = tuple(
        row_digest(spec, row, {"ids": each}) for row, each in zip(rows, ids, strict=True)
    )
    cache = TargetCache(str(storage), spec, 2**40, told)
    cache.put(TargetChunk(tuple(rows), {"ids": ids}, digests, "replica"))
    cache.close()
