"""When a straggler's rows are asked for elsewhere, and which rows bring replicas down. Pure."""

import statistics
import threading
from collections import Counter, deque
from collections.abc import Iterable, Sequence

from workers.dataset import RowId

# A replica is a straggler when it takes this many times as long as is usual for a chunk.
_HEDGE_FACTOR = 4.0
_HEDGE_AFTER_AT_LEAST_S = 0.5
_REMEMBERED_CHUNKS = 64
_CHUNKS_BEFORE_HEDGES = 8
# Hedges are a few in a hundred at most: a pool that is slow as a whole must not get more work.
_HEDGES_PER_CHUNK = 0.1
_SAVED_HEDGES = 3.0
# A row is asked for alone after one death less than these, and given up after these.
DEATHS_OF_A_POISONED_ROW = 3


class Patience:
    """What the answers so far say about how long to wait for the next. Thread-safe."""

    def __init__(self, hedge_after_at_least_s: float = _HEDGE_AFTER_AT_LEAST_S):
        self._at_least_s = hedge_after_at_least_s
        self._lock = threading.Lock()
        self._waits_s: deque[float] = deque(maxlen=_REMEMBERED_CHUNKS)
        self._saved = _SAVED_HEDGES

    def came(self, waited_s: float) -> None:
        """A chunk came after so long."""
        with self._lock:
            self._waits_s.append(waited_s)
            self._saved = min(self._saved + _HEDGES_PER_CHUNK, _SAVED_HEDGES)

    def hedge_after_s(self) -> float | None:
        """How long to wait for a chunk before another replica is asked too; None: not at all."""
        with self._lock:
            if len(self._waits_s) < _CHUNKS_BEFORE_HEDGES or self._saved < 1:
                return None
            usual_s = statistics.quantiles(self._waits_s, n=10)[-1]
            return max(_HEDGE_FACTOR * usual_s, self._at_least_s)

    def hedged(self) -> None:
        """Another replica was asked too."""
        with self._lock:
            self._saved -= 1


class PoisonedRowError(RuntimeError):
    """A row that brings down each replica that touches it."""

    def __init__(self, row: RowId, num_deaths: int):
        super().__init__(
            f"Row {row.index} of data source {row.source} brought down {num_deaths} teacher "
            f"replicas, the last one when it was scored alone"
        )
        self.row, self.num_deaths = row, num_deaths


class Suspects:
    """The rows that replicas were working on when they died. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._deaths: Counter[RowId] = Counter()

    def died_with(self, rows: Iterable[RowId]) -> None:
        """A replica died, and these rows were still to be answered."""
        with self._lock:
            self._deaths.update(set(rows))

    def came(self, rows: Iterable[RowId]) -> None:
        """These were answered: they are harmless."""
        with self._lock:
            for row in rows:
                self._deaths.pop(row, None)

    def deaths(self, row: RowId) -> int:
        with self._lock:
            return self._deaths[row]

    def parts(self, rows: Sequence[RowId]) -> list[list[int]]:
        """Places of `rows` in the order they are to be asked: together, then suspects alone."""
        alone = DEATHS_OF_A_POISONED_ROW - 1
        together = [place for place, row in enumerate(rows) if self.deaths(row) < alone]
        suspects = [[place] for place, row in enumerate(rows) if self.deaths(row) >= alone]
        return [part for part in [together, *suspects] if part]
