"""One host's targets of a run: from storage, else from the teachers; asked for ahead, in order."""

from collections.abc import Callable
from typing import Any

import numpy as np

from workers.jobs import StudentJob
from workers.step_rows import StepRows
from workers.target_cache import TargetCache
from workers.target_ledger import ledger_entry
from workers.target_sources import CachedSource, VerifiedSource
from workers.target_stream import TargetStream, Waited
from workers.targets_protocol import MIXED, TargetSource, TargetSpec
from workers.teacher import codec_of


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
        assert config is not None and job.teacher_digest is not None
        self._rows = rows
        codec = codec_of(config).name
        self._spec = spec = TargetSpec(
            job.dataset_digest, job.teacher_digest, codec, job.config.seed, MIXED
        )
        source = VerifiedSource(source)
        self._cache = None
        if config.cache_bytes:
            self._cache = TargetCache(job.storage_url, spec, config.cache_bytes, say, keep_all)
            source = CachedSource(self._cache, source)
        self._stream = TargetStream(
            source,
            lambda index: rows.request(index, spec),
            steps,
            prefetch_steps=config.prefetch_steps,
            steps_per_request=config.steps_per_request,
            retry_for_s=config.retry_for_s,
            on_retry=lambda index, error: say("teacher_retry", step=index + 1, reason=str(error)),
        )

    def take(self, index: int) -> tuple[dict[str, np.ndarray], Waited, dict[str, Any]]:
        """As `TargetStream.take`, with the step's entry in the ledger."""
        encoded, waited, provenance = self._stream.take(index)
        entry = ledger_entry(self._spec, self._rows.first_row, *provenance)
        return encoded, waited, entry

    def close(self) -> None:
        """Ends asking, and returns when what has come is on storage."""
        self._stream.close()
        if self._cache is not None:
            self._cache.close()
