"""When a student's state is saved, and what happens while storage does not take it."""

import logging
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from workers.checkpoint import FOLDER, CheckpointMeta, describe
from workers.checkpoint_writer import CheckpointWriter
from workers.jobs import StudentJob
from workers.phases import Phase
from workers.record import EventWriter, SegmentWriter
from workers.storage import join, write_atomic
from workers.train_step import TrainState, signal_sharding

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0
# A checkpoint that cannot be saved is tried again after this part of the usual interval.
_SOONER = 10
_TRIAL_BYTES = 1 << 20

_log = logging.getLogger(__name__)


class Saves:
    """The checkpoints of an attempt; all processes of the gang call it alike.

    Storage that is full or away does not stop the training: what cannot be saved is told as an
    event and tried again. The last checkpoint of an attempt is waited for.
    """

    def __init__(
        self,
        job: StudentJob,
        mesh: Mesh,
        record: SegmentWriter,
        events: EventWriter,
        enter: Callable[[Phase], None],
    ):
        self._job, self._record, self._events, self._enter = job, record, events, enter
        self._writer = CheckpointWriter(job.run_url, self._committed, job.epoch)
        self._sharding = signal_sharding(mesh)
        self._largest = jax.jit(
            lambda signals: signals.max(), out_shardings=NamedSharding(mesh, PartitionSpec())
        )
        self._retry_at: int | None = None
        self._started_step: int | None = None
        self._told: set[str] = set()

    def due(self, step: int) -> bool:
        """Whether the state after `step` is to be saved."""
        config = self._job.config
        regular = step % config.checkpoint.every_steps == 0 or step == config.steps
        return regular or step == self._retry_at

    def save(self, state: TrainState) -> None:
        """Starts a checkpoint; returns when the arrays are copied off the devices."""
        self._enter(Phase.CHECKPOINT)
        step = int(state.step)
        self._settle()
        self._retry_at = None
        # The record up to this step becomes durable first, so that no resume finds a gap.
        if not self._start(state, step):
            sooner = max(self._job.config.checkpoint.every_steps // _SOONER, 1)
            self._retry_at = step + sooner

    def finish(self, state: TrainState) -> CheckpointMeta:
        """Returns when `state`, with which an attempt ends, is saved, however long it takes."""
        self._enter(Phase.CHECKPOINT)
        step, pause_s = int(state.step), FIRST_PAUSE_S
        start = self._job.start
        on_storage = start.memory is None and step == start.step
        started = on_storage or self._started_step == step
        while not (self._settle() and started):
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            started = self._start(state, step)
        return self._describe(state)

    def wait(self) -> None:
        """Returns when no save is under way."""
        self._enter(Phase.CHECKPOINT)
        self._settle()

    def _settle(self) -> bool:
        """Waits for the save under way; whether it came to its end on all hosts."""
        return self._all_manage("save", self._started_step, self._writer.wait)

    def _start(self, state: TrainState, step: int) -> bool:
        if not self._all_manage("record", step, self._record.flush):
            return False
        # Orbax leaves threads behind that wait for minutes where it cannot make a folder.
        if not self._all_manage("folder", step, self._try_to_write):
            return False
        self._started_step = step
        meta = self._describe(state)
        return self._all_manage("save", step, lambda: self._writer.save(state, meta))

    def _try_to_write(self) -> None:
        if jax.process_index() == 0:
            # On a full disk an empty file still finds a place.
            write_atomic(join(self._job.run_url, FOLDER, ".writable"), bytes(_TRIAL_BYTES))

    def _all_manage(self, what: str, step: int | None, work: Callable[[], None]) -> bool:
        """Does what needs storage; whether no host failed."""
        failed = False
        try:
            work()
        except OSError as error:
            failed = True
            if what not in self._told:  # once for as long as it lasts
                self._told.add(what)
                _log.warning("Storage does not take the %s of step %s: %s", what, step, error)
                self._events.say("checkpoint_failed", step=step, what=what, reason=str(error))
        return not self._on_any_host(failed)

    def _on_any_host(self, here: bool) -> bool:
        if jax.process_count() == 1:
            return here
        signals = np.full(jax.local_device_count(), here, np.int32)
        signals = jax.make_array_from_process_local_data(self._sharding, signals)
        return bool(self._largest(signals))

    def _describe(self, state: TrainState) -> CheckpointMeta:
        job = self._job
        return describe(
            state,
            job.config,
            tokenizer_digest=job.tokenizer_digest,
            dataset_digest=job.dataset_digest,
            teacher_digest=job.teacher_digest,
            attempt=job.attempt,
        )

    def _committed(self, meta: CheckpointMeta) -> None:
        self._told.clear()
        self._events.say("checkpoint", step=meta.step, digest=meta.digest)
