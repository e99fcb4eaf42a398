"""One host's targets of a run: from storage, else from the teachers; asked for ahead, in order."""

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from configs.requests import steps_together
from model.targets import HiddenCodec, encoded_shapes, wire_view
from workers.checkpoint import read_meta
from workers.dataset import RowId
from workers.jobs import StudentJob
from workers.pool_meter import MeteredSource, PoolMeter
from workers.sameness import agree, agreed_sameness
from workers.step_rows import StepRows
from workers.storage import join, write_json
from workers.stored_classes import StoredClasses, choose_class, find_classes
from workers.target_cache import TargetCache
from workers.target_index import ShardIndex
from workers.target_ledger import ledger_entry
from workers.target_sources import CachedSource
from workers.target_stream import Cost, TargetStream
from workers.targets_protocol import (
    MIXED,
    TargetRequest,
    TargetSource,
    TargetSpec,
)
from workers.teacher import codec_of


class HostStep(NamedTuple):
    """A step's targets as the student needs them, and what the record says of them.

    `pool` is what came from there since the step before, for whichever step.
    """

    encoded: dict[str, np.ndarray]
    has_targets: Bool[np.ndarray, " B"]
    cost: Cost
    ledger: dict[str, Any]
    pool: dict[str, Any]


class HostTargets:
    """What a host's steps need of the teacher.

    Args:
        rows: the host's rows of every step.
        steps: the steps to come, in order.
        say: records an event; takes its name and details.
        keep_all: rather waits for the storage than not to store a row.
    """

    def __init__(
        self,
        job: StudentJob,
        source: TargetSource,
        rows: StepRows,
        steps: range,
        say: Callable[..., None],
        *,
        keep_all: bool = False,
    ):
        config = job.config.teacher
        assert config is not None
        self._job, self._config, self._rows, self._say = job, config, rows, say
        self._source, self._keep_all = source, keep_all
        self._codec = codec_of(config)
        self._meter = PoolMeter()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._spec: TargetSpec | None = None
        self._cache: TargetCache | None = None
        blank = self._blank_row()
        bytes_per_row = sum(array.nbytes for array in blank.values())
        # At least one step, however large.
        room = max(config.prefetch_bytes // (rows.num_rows * bytes_per_row), 1)
        self._prefetch_steps = min(config.prefetch_steps, room)
        self._stream = TargetStream(
            CachedSource(lambda: self._cache, MeteredSource(source, self._meter)),
            self._request,
            steps,
            rows_per_step=rows.num_rows,
            prefetch_steps=self._prefetch_steps,
            steps_per_request=self._steps_per_request,
            retry_for_s=config.retry_for_s,
            labels_after_s=None if keep_all else config.labels_after_s,
            blank=blank,
            say=self._note,
        )

    def is_here(self, index: int) -> bool:
        """Whether `take` would return at once."""
        return self._stream.is_here(index)

    def take(self, index: int) -> HostStep:
        """As `TargetStream.take`, with the step's entry in the ledger."""
        step = self._stream.take(index)
        spec = self._spec or self._spec_of("")
        entry = ledger_entry(spec, self._rows.first_row, *step.provenance)
        return HostStep(step.encoded, step.has_targets, step.cost, entry, self._meter.take())

    def close(self) -> None:
        """Ends asking, and returns when what has come is on storage."""
        self._closed.set()
        self._stream.close()
        if self._cache is not None:
            self._cache.close()

    def _note(self, event: str, **details: Any) -> None:
        if event == "teacher_retry":
            self._meter.retried()
        self._say(event, **details)

    def _steps_per_request(self) -> int:
        return steps_together(
            self._config,
            rows_per_step=self._rows.num_rows,
            prefetch_steps=self._prefetch_steps,
            num_hosts=max(self._job.config.batch.rows // self._rows.num_rows, 1),
            replicas=self._source.num_replicas(),
        )

    def _request(self, index: int) -> TargetRequest:
        request = self._rows.request(index, self._agreed_spec())
        return dataclasses.replace(request, student=self._job.run_url)

    def _agreed_spec(self) -> TargetSpec:
        """What is asked for; waits for a teacher while the run has none to agree with."""
        with self._lock:
            if self._spec is None:
                self._spec = self._spec_of(self._sameness())
                if self._config.cache_bytes:
                    self._cache = self._open_cache(self._spec)
            return self._spec

    def _open_cache(self, spec: TargetSpec) -> TargetCache:
        if self._rows.first_row == 0:  # the first host speaks for the run
            use = {"key": spec.key, "used_s": time.time()}
            write_json(join(self._job.run_url, "targets.json"), use)
        num_bytes = self._config.cache_bytes
        return TargetCache(self._job.storage_url, spec, num_bytes, self._say, self._keep_all)

    def _sameness(self) -> str:
        if self._config.sameness == MIXED:
            return MIXED
        while (agreed := agreed_sameness(self._job.run_url)) is None:
            stored = StoredClasses(self._all_rows, self._stored_rows())
            choice = choose_class(
                stored, self._source.sameness, self._config.retry_for_s, self._closed
            )
            if agree(self._job.run_url, choice.sameness) and stored.names:
                self._say("class_chosen", **choice._asdict(), stored=stored.names)
        return agreed

    def _stored_rows(self) -> dict[str, ShardIndex]:
        if not self._config.cache_bytes:
            return {}
        return find_classes(self._job.storage_url, self._spec_of(""))

    def _all_rows(self) -> Iterator[RowId]:
        for index in range(self._job.start.step, self._job.config.steps):
            yield from self._rows.ids_everywhere(index)

    def _spec_of(self, sameness: str) -> TargetSpec:
        job = self._job
        assert job.teacher_digest is not None
        return TargetSpec(
            job.dataset_digest, job.teacher_digest, self._codec.name, job.config.seed, sameness
        )

    def _blank_row(self) -> dict[str, np.ndarray]:
        """Zeros in the form of one row's targets."""
        job = self._job
        width = None
        if isinstance(self._codec, HiddenCodec):
            assert job.teacher_url is not None
            width = read_meta(job.teacher_url).model.width
        shapes = encoded_shapes(self._codec, job.config.model.vocab_size, width)
        length = job.config.data.row_length
        return wire_view(
            {name: np.zeros((1, length, *s.shape[1:]), s.dtype) for name, s in shapes.items()}
        )
