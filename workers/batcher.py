"""Feeds a teacher's device: rows of all requests in batches of its one shape. No Ray."""

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from workers.fair_queue import FairQueue
from workers.targets_protocol import Row, Scored, TargetChunk, TargetRequest

# While one batch is on the device, the next is already queued there.
_BATCHES_AT_ONCE = 2
# A chunk this large travels at full speed; a smaller one goes out rather than hold a row back.
_CHUNK_BYTES = 4 << 20
_CHUNK_WITHIN_S = 0.05


class Scorer(Protocol):
    """What scores batches: a `Teacher`."""

    num_rows: int

    def check(self, request: TargetRequest) -> None: ...
    def score_rows(self, rows: Sequence[Row]) -> Scored: ...


class _Part(NamedTuple):
    """What one batch holds of a request."""

    places: list[int]
    arrays: dict[str, np.ndarray]
    digests: list[str]
    busy_s: float
    fill: float


class Counters(NamedTuple):
    """What a batcher has done so far."""

    rows: int = 0
    batches: int = 0
    busy_s: float = 0.0


class _Asked(NamedTuple):
    """A request, and what it has been answered so far."""

    request: TargetRequest
    parts: "asyncio.Queue[_Part | Exception]"


class Batcher:
    """Shares a device among requests.

    Args:
        scorer: scores at most `num_rows` rows at once.
        replica: the name that goes with the answers.
        fill_within_s: how long a batch that is not full waits for rows of other requests.
    """

    def __init__(self, scorer: Scorer, replica: str, fill_within_s: float):
        self._scorer, self._replica = scorer, replica
        self._fill_within_s = fill_within_s
        self._queue = FairQueue()
        self._asked: dict[int, _Asked] = {}
        self._numbers = itertools.count()
        self._arrived = asyncio.Event()
        self._full = asyncio.Event()
        self._free = asyncio.Semaphore(_BATCHES_AT_ONCE)
        self._tasks: set[asyncio.Task[None]] = set()
        self._busy_until = 0.0
        self._running_since: dict[int, float] = {}
        self.counters = Counters()
        self._keep(self._run())

    @property
    def num_waiting(self) -> int:
        """Rows that wait for the device."""
        return len(self._queue)

    @property
    def stuck_s(self) -> float:
        """How long the oldest batch has been on the device."""
        started = list(self._running_since.values())
        return time.perf_counter() - min(started) if started else 0.0

    async def score(self, request: TargetRequest) -> AsyncIterator[TargetChunk]:
        """The targets of the request's rows, as they are scored.

        Raises:
            ValueError: the request does not fit this teacher.
        """
        self._scorer.check(request)
        number = next(self._numbers)
        asked = self._asked[number] = _Asked(request, asyncio.Queue())
        try:
            self._queue.put(request.student, number, range(len(request.rows)), request.alone)
            self._arrived.set()
            if len(self._queue) >= self._scorer.num_rows:
                self._full.set()
            num_missing = len(request.rows)
            while num_missing:
                parts = await _gather(asked.parts, num_missing)
                num_missing -= sum(len(part.places) for part in parts)
                yield self._chunk(request, parts)
        finally:
            del self._asked[number]
            self._queue.drop(number)

    def _chunk(self, request: TargetRequest, parts: list[_Part]) -> TargetChunk:
        return TargetChunk(
            tuple(request.rows[place] for part in parts for place in part.places),
            {
                name: np.concatenate([part.arrays[name] for part in parts])
                for name in parts[0].arrays
            }
            if len(parts) > 1
            else parts[0].arrays,
            tuple(digest for part in parts for digest in part.digests),
            self._replica,
            sum(part.busy_s for part in parts),
            len(self._queue),
            sum(part.fill for part in parts) / len(parts),
        )

    async def _run(self) -> None:
        while True:
            await self._arrived.wait()
            await self._free.acquire()
            if len(self._queue) < self._scorer.num_rows:
                self._full.clear()
                await _either(self._full.wait(), self._fill_within_s)
            batch = self._queue.take(self._scorer.num_rows)
            if not len(self._queue):
                self._arrived.clear()
            if batch:
                self._keep(self._score([(self._asked[row.request], row.place) for row in batch]))
            else:
                self._free.release()

    async def _score(self, batch: "list[tuple[_Asked, int]]") -> None:
        rows = [Row(asked.request, place) for asked, place in batch]
        began = self._running_since[id(batch)] = time.perf_counter()
        try:
            # In a thread, so that health checks are answered while the device works.
            scored = await asyncio.to_thread(self._scorer.score_rows, rows)
        except Exception as error:
            for asked, _ in batch:
                asked.parts.put_nowait(error)
            return
        finally:
            del self._running_since[id(batch)]
            self._free.release()
        now = time.perf_counter()
        busy_s = now - max(began, self._busy_until)
        self._busy_until = now
        done = self.counters
        self.counters = Counters(done.rows + len(rows), done.batches + 1, done.busy_s + busy_s)
        indices: dict[int, list[int]] = {}
        for index, (asked, _) in enumerate(batch):
            indices.setdefault(id(asked), []).append(index)
        for chosen in indices.values():
            asked = batch[chosen[0]][0]
            fill = len(batch) / self._scorer.num_rows
            asked.parts.put_nowait(_part(scored, batch, chosen, busy_s / len(batch), fill))

    def _keep(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _part(
    scored: Scored,
    batch: "list[tuple[_Asked, int]]",
    chosen: list[int],
    row_s: float,
    fill: float,
) -> _Part:
    whole = len(chosen) == len(batch)
    arrays = scored.arrays
    return _Part(
        [batch[index][1] for index in chosen],
        arrays if whole else {name: array[chosen] for name, array in arrays.items()},
        [scored.digests[index] for index in chosen],
        row_s * len(chosen),
        fill,
    )


async def _gather(parts: "asyncio.Queue[_Part | Exception]", num_missing: int) -> list[_Part]:
    """What makes the next chunk: all that comes in a short while, up to a chunk's size."""
    gathered: list[_Part] = []
    num_bytes, deadline = 0, None
    while num_missing and num_bytes < _CHUNK_BYTES:
        left_s = None if deadline is None else deadline - time.monotonic()
        try:
            part = parts.get_nowait() if not parts.empty() else await _within(parts.get(), left_s)
        except TimeoutError:
            break
        if isinstance(part, Exception):
            raise part
        gathered.append(part)
        num_missing -= len(part.places)
        num_bytes += sum(array.nbytes for array in part.arrays.values())
        deadline = deadline or time.monotonic() + _CHUNK_WITHIN_S
    return gathered


async def _within(work: Any, seconds: float | None) -> Any:
    return await asyncio.wait_for(work, None if seconds is None else max(seconds, 0))


async def _either(work: Any, seconds: float) -> None:
    """Waits for `work`, but not longer than `seconds`."""
    try:
        await _within(work, seconds)
    except TimeoutError:
        return
