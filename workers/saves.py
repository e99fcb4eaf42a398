"""When a student's state is saved, and what happens while storage does not take it."""

import enum
import logging
import time
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor

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
# For so many looks of so long the training is held up by storage that does not answer, the first
# time and later ones.
_LOOK_S, NUM_LOOKS, _NUM_LATER_LOOKS = 0.1, 300, 20
# A checkpoint that cannot be saved is tried again after this part of the usual interval.
_SOONER = 10
_TRIAL_BYTES = 1 << 20

_log = logging.getLogger(__name__)


class Outcome(enum.IntEnum):
    """What became of something that all hosts do; that of the gang is the largest of its hosts."""

    DONE = 0
    UNDER_WAY = 1
    FAILED = 2


class Saves:
    """The checkpoints of an attempt; all processes of the gang call it alike.

    Storage that is full, away or does not answer does not stop the training: what cannot be saved
    is told as an event and tried again. The last checkpoint of an attempt is waited for.

    Hosts go by what all of them have met, and look again and again instead of waiting each for
    itself: where storage fails one of them, Orbax lets the others wait for minutes.
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
        self._saved_step = job.start.step if job.start.memory is None else None
        self._told: set[str] = set()
        self._begun = self._late = False
        # One, so that what is tried again follows what has not come back.
        self._worker = ThreadPoolExecutor(1, "saves")

    def due(self, step: int) -> bool:
        """Whether the state after `step` is to be saved."""
        config = self._job.config
        regular = step % config.checkpoint.every_steps == 0 or step == config.steps
        return regular or step == self._retry_at

    def save(self, state: TrainState) -> None:
        """Starts a checkpoint; returns when the arrays are copied off the devices."""
        self._enter(Phase.CHECKPOINT)
        step = int(state.step)
        self._retry_at = None
        if self._settle() is Outcome.UNDER_WAY or not self._start(state, step):
            sooner = max(self._job.config.checkpoint.every_steps // _SOONER, 1)
            self._retry_at = step + sooner

    def finish(self, state: TrainState) -> CheckpointMeta:
        """Returns when `state`, with which an attempt ends, is saved, however long it takes."""
        self._enter(Phase.CHECKPOINT)
        step, pause_s = int(state.step), FIRST_PAUSE_S
        while (outcome := self._settle()) is Outcome.UNDER_WAY or self._saved_step != step:
            if outcome is Outcome.UNDER_WAY:
                continue
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            self._start(state, step)
        return self._describe(state)

    def wait(self) -> None:
        """Returns when no save is under way."""
        self._enter(Phase.CHECKPOINT)
        while self._settle() is Outcome.UNDER_WAY:
            pass

    def close(self) -> None:
        self._worker.shutdown()

    def _settle(self) -> Outcome:
        """What became of the save before."""
        if not self._begun:
            return Outcome.DONE
        outcome = self._agree("save", self._started_step, self._writer.pending)
        if outcome is not Outcome.UNDER_WAY:
            self._leave()
        if outcome is Outcome.DONE:
            self._saved_step = self._started_step
        return outcome

    def _leave(self) -> None:
        self._begun = False
        self._writer.leave()

    def _start(self, state: TrainState, step: int) -> bool:
        # What has not come back is before it in the queue, on each host.
        if self._late and self._all_manage("storage", step, lambda: None):
            self._late = False
        again = step == self._started_step
        if again and not self._all_manage("save", step, self._writer.wait_for_left):
            return False
        # The record up to this step becomes durable first, so that no resume finds a gap.
        if not self._all_manage("record", step, self._record.flush):
            return False
        # Orbax leaves threads behind that wait for minutes where it cannot make a folder.
        if not self._all_manage("folder", step, lambda: self._make_room(step)):
            return False
        self._started_step = step
        meta = self._describe(state)
        begun = Future[None]()
        try:  # not on another thread: Orbax has the hosts meet in it
            self._writer.save(state, meta)
            begun.set_result(None)
        except OSError as error:
            begun.set_exception(error)
        self._begun = self._agree("save", step, begun) is Outcome.DONE
        if not self._begun:
            self._leave()
        return self._begun

    def _make_room(self, step: int) -> None:
        if jax.process_index() == 0:
            self._writer.remove_unfinished()
            # Orbax would do it where the hosts meet, and they would wait for one that fails in it.
            self._writer.remove_existing(step)
            # On a full disk an empty file still finds a place.
            write_atomic(join(self._job.run_url, FOLDER, ".writable"), bytes(_TRIAL_BYTES))

    def _all_manage(self, what: str, step: int, work: Callable[[], None]) -> bool:
        """Does what needs storage; whether all hosts have."""
        return self._agree(what, step, self._worker.submit(work)) is Outcome.DONE

    def _agree(self, what: str, step: int | None, pending: "Future[None]") -> Outcome:
        """What came of `pending`, in the end or after some time, on the host where it is worst."""
        for _ in range(_NUM_LATER_LOOKS if self._late else NUM_LOOKS):
            outcome = self._worst(self._look(what, step, pending))
            if outcome is not Outcome.UNDER_WAY:
                return outcome
        if not self._late and not pending.done():
            self._tell(what, step, f"storage has not answered for {_LOOK_S * NUM_LOOKS:.0f} s")
        self._late = True
        return Outcome.UNDER_WAY

    def _look(self, what: str, step: int | None, pending: "Future[None]") -> Outcome:
        if not futures.wait([pending], _LOOK_S).done:
            return Outcome.UNDER_WAY
        try:
            pending.result()
        except OSError as error:
            self._tell(what, step, str(error))
            return Outcome.FAILED
        return Outcome.DONE

    def _tell(self, what: str, step: int | None, reason: str) -> None:
        if what not in self._told:  # once for as long as it lasts
            self._told.add(what)
            _log.warning("Storage does not take the %s of step %s: %s", what, step, reason)
            told = {"step": step, "what": what, "reason": reason}
            self._worker.submit(self._events.say, "checkpoint_failed", **told)

    def _worst(self, here: Outcome) -> Outcome:
        if jax.process_count() == 1:
            return here
        signals = np.full(jax.local_device_count(), here, np.int32)
        signals = jax.make_array_from_process_local_data(self._sharding, signals)
        return Outcome(int(self._largest(signals)))

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
