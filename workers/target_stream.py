"""Targets of the coming steps: asked for ahead, in order, bounded, and asked again on failure."""

import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np

from model.targets import from_wire
from workers.rows import RowId
from workers.targets_protocol import (
    Answer,
    TargetRequest,
    TargetSource,
    TeacherUnavailableError,
)

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0


class Waited(NamedTuple):
    """The student's wait for one step's targets, by cause."""

    teacher_s: float
    wire_s: float
    decode_s: float


class Provenance(NamedTuple):
    """Of each row of one step: the digest of its targets, and who gave them."""

    digests: tuple[str, ...]
    origins: tuple[str, ...]


class _Row(NamedTuple):
    """One row's targets, as they came over the wire."""

    arrays: dict[str, np.ndarray]
    digest: str
    origin: str


class _Fetched(NamedTuple):
    """One step's targets, row by row."""

    rows: list[_Row]
    wire_s: float


class TargetStream:
    """Keeps the targets of the next steps on their way while the student works.

    Args:
        source: the teachers.
        request_of: the request of a step, of the same number of rows for each; a pure function.
        steps: the steps to come, in order.
        prefetch_steps: most steps that are asked for and not yet taken.
        steps_per_request: steps that one request asks for, at most `prefetch_steps`.
        retry_for_s: how long a request is repeated without an answer before it fails.
        on_retry: told each failure that is followed by another try, and the step it held up.
    """

    def __init__(
        self,
        source: TargetSource,
        request_of: Callable[[int], TargetRequest],
        steps: range,
        *,
        prefetch_steps: int,
        steps_per_request: int,
        retry_for_s: float,
        on_retry: Callable[[int, Exception], None],
    ):
        self._source = source
        self._request_of = request_of
        self._prefetch_steps, self._steps_per_request = prefetch_steps, steps_per_request
        self._retry_for_s = retry_for_s
        self._on_retry = on_retry
        self._closed = threading.Event()
        num_requests = math.ceil(prefetch_steps / steps_per_request)
        self._pool = ThreadPoolExecutor(num_requests, thread_name_prefix="targets")
        self._pending: dict[int, Future[_Fetched]] = {}
        self._next = iter(steps)
        for _ in range(num_requests):
            self._ask_ahead()

    def take(self, step: int) -> tuple[dict[str, np.ndarray], Waited, Provenance]:
        """The encoded targets of `step`, rows in the request's order; steps come in order.

        Raises:
            TeacherUnavailableError: no teacher answered within `retry_for_s`.
            ValueError: the pool refuses the request.
        """
        began = time.perf_counter()
        fetched = self._pending.pop(step).result()
        waited_s = time.perf_counter() - began
        self._ask_ahead()
        wire_s = min(waited_s, fetched.wire_s)
        began = time.perf_counter()
        parts = [from_wire(row.arrays) for row in fetched.rows]
        encoded = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        waited = Waited(waited_s - wire_s, wire_s, time.perf_counter() - began)
        _, digests, origins = zip(*fetched.rows, strict=True)
        return encoded, waited, Provenance(digests, origins)

    def close(self) -> None:
        """Ends asking; what is on its way is dropped."""
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _ask_ahead(self) -> None:
        """Asks for the next steps as soon as there is room for a whole request."""
        if len(self._pending) + self._steps_per_request > self._prefetch_steps:
            return
        if steps := list(islice(self._next, self._steps_per_request)):
            futures = [Future[_Fetched]() for _ in steps]
            self._pending |= zip(steps, futures, strict=True)
            self._pool.submit(self._fetch, steps, futures)

    def _fetch(self, steps: list[int], futures: list[Future[_Fetched]]) -> None:
        try:
            requests = [self._request_of(step) for step in steps]
            request = TargetRequest.joined(requests)
            self._ask(request, _Sorter(request.rows, steps, futures))
        except BaseException as error:
            for future in futures:
                if not future.done():
                    future.set_exception(error)

    def _ask(self, request: TargetRequest, sorter: "_Sorter") -> None:
        """Asks until every row has come; only for the rows that have not."""
        deadline = time.monotonic() + self._retry_for_s
        pause_s = FIRST_PAUSE_S
        while missing := sorter.missing():
            try:
                for answer in self._source.ask(request.only(missing)):
                    sorter.add(answer)
                    pause_s = FIRST_PAUSE_S
                    deadline = time.monotonic() + self._retry_for_s
                if sorter.missing():
                    raise TeacherUnavailableError("the answer ended early")
            except TeacherUnavailableError as error:
                step = sorter.step
                if time.monotonic() > deadline:
                    raise TeacherUnavailableError(
                        f"No teacher answered for step {step + 1} within {self._retry_for_s:.0f} s "
                        f"(teacher.retry_for_s); the last try met: {error}"
                    ) from error
                self._on_retry(step, error)
                if self._closed.wait(pause_s):
                    raise
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


class _Sorter:
    """Gives each step its rows out of the chunks, which know no steps.

    Args:
        rows: what was asked for, each step's rows after those of the one before.
        steps: the steps, in order, of the same number of rows each.
        futures: of the steps; each is fulfilled when its last row has come.
    """

    def __init__(
        self,
        rows: Sequence[RowId],
        steps: Sequence[int],
        futures: Sequence[Future[_Fetched]],
    ):
        self._steps, self._futures = steps, futures
        self._rows_per_step = len(rows) // len(steps)
        self._places: dict[RowId, list[int]] = {}
        for place, row in enumerate(rows):
            self._places.setdefault(row, []).append(place)
        self._rows: list[_Row | None] = [None] * len(rows)
        self._wire_s = [0.0] * len(steps)

    @property
    def step(self) -> int:
        """The first step that lacks rows, or the last one."""
        missing = self.missing()
        return self._steps[missing[0] // self._rows_per_step if missing else -1]

    def missing(self) -> list[int]:
        """Places of the rows that have not come, each row's first place only."""
        return [places[0] for places in self._places.values() if self._rows[places[0]] is None]

    def add(self, answer: Answer) -> None:
        """Takes in a chunk; rows that have come already are passed over."""
        chunk = answer.chunk
        for index, (row, digest) in enumerate(zip(chunk.rows, chunk.digests, strict=True)):
            assert row in self._places, f"{row} was not asked for"
            arrays = {name: array[index : index + 1] for name, array in chunk.arrays.items()}
            for place in self._places[row]:
                if self._rows[place] is None:
                    self._rows[place] = _Row(arrays, digest, chunk.origin)
                    self._wire_s[place // self._rows_per_step] += answer.wire_s
                    self._finish(place // self._rows_per_step)

    def _finish(self, index: int) -> None:
        begin = index * self._rows_per_step
        rows = [row for row in self._rows[begin : begin + self._rows_per_step] if row]
        if len(rows) == self._rows_per_step:
            self._futures[index].set_result(_Fetched(rows, self._wire_s[index]))
