"""A teacher for measuring the pool: takes a fixed time for a batch and answers real byte counts."""

import dataclasses
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from configs.run import TeacherConfig
from workers.jobs import TeacherJob
from workers.rows import RowId
from workers.serve_teacher import TeacherReplica
from workers.targets_protocol import MIXED, Row, Scored, TargetRequest, TargetSpec, row_digest

SPEC = TargetSpec("benchmark", "scripted", "bytes", 0, MIXED)


@dataclasses.dataclass(frozen=True)
class ScriptedJob(TeacherJob):
    """What the replicas of a scripted pool do."""

    batch_s: float = 0.0
    row_bytes: int = 0


def scripted_job(storage_url: str, rows_per_batch: int, batch_s: float, row_bytes: int):
    """A pool that takes `batch_s` for `rows_per_batch` rows and answers `row_bytes` for each."""
    values = {"checkpoint": "none", "rows_per_batch": rows_per_batch, "cpus_per_replica": 0}
    config = TeacherConfig.model_validate(values)
    return ScriptedJob(storage_url, "none", config, 1, "float32", 1, batch_s, row_bytes)


def request_of(rows: Sequence[int]) -> TargetRequest:
    """A request for the rows of these numbers, of one token each."""
    tokens = np.array(rows, np.int32).reshape(-1, 1)
    return TargetRequest(SPEC, tuple(RowId(0, row) for row in rows), tokens, tokens, tokens)


class ScriptedTeacher:
    """Takes the place of a `Teacher`."""

    def __init__(self, job: ScriptedJob):
        self.num_rows = job.config.rows_per_batch
        self.sameness, self.serves = "scripted", f"scripted {job.row_bytes}"
        self._batch_s = job.batch_s
        self._device = threading.Lock()  # one batch at a time, as on a real one
        self._row = np.arange(job.row_bytes, dtype=np.uint8)
        self._batch = np.tile(self._row, (self.num_rows, 1))

    def check(self, request: TargetRequest) -> None:
        assert request.spec == SPEC

    def score_rows(self, rows: Sequence[Row]) -> Scored:
        with self._device:
            time.sleep(self._batch_s)
        digests = [row_digest(SPEC, request.rows[at], {"x": self._row}) for request, at in rows]
        return Scored({"x": self._batch[: len(rows)]}, digests)

    def canary(self) -> str:
        return "canary"


class ScriptedReplica(TeacherReplica):
    """A real replica with a scripted teacher."""

    def _load(self, job: Any) -> ScriptedTeacher:
        return ScriptedTeacher(job)
