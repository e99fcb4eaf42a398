"""What a host's traffic with the pool amounts to, step by step."""

import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

from workers.targets_protocol import Answer, TargetRequest, TargetSource


class PoolMeter:
    """Adds up what came from the pool. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_bytes = self._num_hedged = self._num_retries = 0
        self._rows: Counter[str] = Counter()
        self._waiting: dict[str, int] = {}
        self._fill = 0.0

    def came(self, answer: Answer) -> None:
        chunk = answer.chunk
        with self._lock:
            num_rows = len(chunk.rows)
            self._num_bytes += sum(array.nbytes for array in chunk.arrays.values())
            self._num_hedged += num_rows * answer.hedged
            self._rows[chunk.origin] += num_rows
            self._waiting[chunk.origin] = chunk.num_waiting
            self._fill += chunk.batch_fill * num_rows

    def retried(self) -> None:
        with self._lock:
            self._num_retries += 1

    def take(self) -> dict[str, Any]:
        """What came since it was last asked, for the record.

        `rows` by replica, `waiting` rows there by replica, `fill` of their batches (0 to 1),
        `bytes`, `retries`, and `hedged` rows, which a second replica was first to answer.
        """
        with self._lock:
            num_rows = self._rows.total()
            told = {
                "rows": dict(self._rows),
                "waiting": dict(self._waiting),
                "fill": self._fill / num_rows if num_rows else None,
                "bytes": self._num_bytes,
                "retries": self._num_retries,
                "hedged": self._num_hedged,
            }
            self._num_bytes = self._num_hedged = self._num_retries = 0
            self._fill = 0.0
            self._rows.clear()
            self._waiting.clear()
        return told


class MeteredSource(TargetSource):
    """A source whose answers are added up."""

    def __init__(self, source: TargetSource, meter: PoolMeter):
        self._source, self._meter = source, meter

    def sameness(self) -> str:
        return self._source.sameness()

    def num_replicas(self) -> int:
        return self._source.num_replicas()

    def ask(self, request: TargetRequest) -> Iterator[Answer]:
        for answer in self._source.ask(request):
            self._meter.came(answer)
            yield answer
