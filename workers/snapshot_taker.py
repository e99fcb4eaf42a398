"""Takes a host's snapshots while it trains, and hands them over in the background."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import jax

from workers.jobs import StudentJob
from workers.memory_tier import HostSnapshot, Piece, SnapshotLostError
from workers.record import EventWriter, SegmentWriter
from workers.snapshots import groups_of, take_pieces
from workers.train_step import TrainState

Keep = Callable[[HostSnapshot], None]


class SnapshotTaker:
    """One snapshot at a time is on its way; the next waits for it, so that none is far behind.

    Args:
        writer: this host's name in the record.
        keep: takes a snapshot over; None where nobody does.
    """

    def __init__(
        self,
        job: StudentJob,
        writer: str,
        record: SegmentWriter,
        events: EventWriter,
        keep: Keep | None,
    ):
        self._job, self._writer, self._record, self._events = job, writer, record, events
        self._keep = keep
        self._groups: tuple[int, ...] = ()
        self._pool = ThreadPoolExecutor(1, "snapshot")
        self._pending: Future[None] | None = None

    def due(self, step: int) -> bool:
        """Whether a snapshot of the state after `step` is to be taken."""
        every = self._job.config.checkpoint.snapshot_every_steps
        return self._keep is not None and every is not None and step % every == 0

    def take(self, state: TrainState) -> None:
        """Returns when the state is copied off the devices, and the snapshot before is kept."""
        assert self._keep is not None, "asked after `due`"
        self.wait()
        self._groups = self._groups or groups_of(state)
        taken, step, lines = take_pieces(state), int(state.step), self._record.pending()
        job, groups, keep = self._job, self._groups, self._keep

        def hand_over() -> None:
            pieces = tuple(Piece.of(*each) for each in taken)
            host = jax.process_index()
            keep(HostSnapshot(step, job.attempt, host, groups, self._writer, lines, pieces))

        self._pending = self._pool.submit(hand_over)

    def wait(self) -> None:
        """Returns when the last snapshot is kept; one that could not be is told as an event."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.result()
        except SnapshotLostError as error:
            self._events.say("snapshot_failed", host=jax.process_index(), reason=str(error))

    def close(self) -> None:
        self.wait()
        self._pool.shutdown()
