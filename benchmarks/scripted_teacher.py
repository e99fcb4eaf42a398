"""A teacher for measuring the pool: takes a fixed time for a batch and answers real byte counts."""

import dataclasses
import functools
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from configs.run import TeacherConfig
from workers.dataset import RowId
from workers.jobs import TeacherJob
from workers.serve_teacher import TeacherReplica
from workers.targets_protocol import MIXED, Row, Scored, TargetRequest, TargetSpec, row_digest

SPEC = TargetSpec("benchmark", "scripted", "bytes", 0, MIXED)


@dataclasses.dataclass(frozen=True)
class ScriptedJob(TeacherJob):
    """What the replicas of a scripted pool do."""

    batch_s: float = 0.0
    batch_s_path: str | None = None
    """A file to read it from at each batch, so that it can be changed meanwhile."""
    row_bytes: int | None = None
    """None: each row gets targets of the job's codec and length, which a student can learn from."""


def scripted_job(storage_url: str, rows_per_batch: int, batch_s: float, row_bytes: int):
    """A pool that takes `batch_s` for `rows_per_batch` rows and answers `row_bytes` for each."""
    values = {"checkpoint": "none", "rows_per_batch": rows_per_batch, "cpus_per_replica": 0}
    config = TeacherConfig.model_validate(values)
    job = TeacherJob(storage_url, "none", config, 1, "float32")
    return ScriptedJob(**vars(job), batch_s=batch_s, row_bytes=row_bytes)


def request_of(rows: Sequence[int]) -> TargetRequest:
    """A request for the rows of these numbers, of one token each."""
    tokens = np.array(rows, np.int32).reshape(-1, 1)
    return TargetRequest(SPEC, tuple(RowId(0, row) for row in rows), tokens, tokens, tokens)


class ScriptedTeacher:
    """Takes the place of a `Teacher`."""

    sameness = "scripted"

    def __init__(self, job: ScriptedJob):
        self._job = job
        self.num_rows = job.config.rows_per_batch
        self._device = threading.Lock()  # one batch at a time, as on a real one
        if job.row_bytes is None:
            self._row = _random_targets(job)
        else:
            self._row = {"x": np.arange(job.row_bytes, dtype=np.uint8)}
        self._batch = {name: np.stack([row] * self.num_rows) for name, row in self._row.items()}
        # As precomputed as the targets are, for rows that are asked for again and again.
        self._digest = functools.lru_cache(1024)(self._digest_of)
        forms = [f"{name}{list(row.shape)}" for name, row in self._row.items()]
        self.serves = f"scripted {' '.join(forms)}"

    def check(self, request: TargetRequest) -> None:
        assert request.spec.sameness in (MIXED, self.sameness)

    def score_rows(self, rows: Sequence[Row]) -> Scored:
        with self._device:
            time.sleep(self._batch_s())
        digests = [self._digest(request.spec, request.rows[at]) for request, at in rows]
        return Scored({name: array[: len(rows)] for name, array in self._batch.items()}, digests)

    def canary(self) -> str:
        return "canary"

    def _digest_of(self, spec: TargetSpec, row: RowId) -> str:
        return row_digest(spec, row, self._row)

    def _batch_s(self) -> float:
        path = self._job.batch_s_path
        return self._job.batch_s if path is None else float(Path(path).read_text())


def _random_targets(job: TeacherJob) -> dict[str, np.ndarray]:
    """The wire arrays of one row, as the job's codec makes them of random logits."""
    import jax
    import jax.numpy as jnp

    from model.targets import ScoredPiece, row_key, wire_view
    from workers.checkpoint import read_meta
    from workers.teacher import codec_of

    model = read_meta(job.checkpoint_url).model
    rng = np.random.default_rng(0)
    logits_TV = rng.normal(0, 3, (job.row_length, model.vocab_size))
    x_TD = jnp.zeros((job.row_length, model.width))
    row = ScoredPiece(jnp.asarray(logits_TV, jnp.float32), row_key(0, 0, 0), x_TD)
    return wire_view(jax.jit(codec_of(job.config).encode)(row))


class ScriptedReplica(TeacherReplica):
    """A real replica with a scripted teacher."""

    def _load(self, job: Any) -> ScriptedTeacher:
        return ScriptedTeacher(job)
