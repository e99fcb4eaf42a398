"""Targets of the coming steps: asked for ahead, in order, bounded, and asked again on failure."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from model.targets import from_wire
from workers.targets_protocol import (
    TargetChunk,
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


class _Fetched(NamedTuple):
    chunks: list[TargetChunk]
    wire_s: float


class TargetStream:
    """Keeps the targets of the next steps on their way while the student works.

    Args:
        source: the teachers.
        request_of: the request of a step; a pure function.
        steps: the steps to come, in order.
        prefetch_steps: most steps that are asked for and not yet taken.
        retry_for_s: how long a step asks again without an answer before it fails.
        on_retry: told each failure that is followed by another try.
    """

    def __init__(
        self,
        source: TargetSource,
        request_of: Callable[[int], TargetRequest],
        steps: range,
        *,
        prefetch_steps: int,
        retry_for_s: float,
        on_retry: Callable[[int, Exception], None],
    ):
        self._source = source
        self._request_of = request_of
        self._steps = steps
        self._retry_for_s = retry_for_s
        self._on_retry = on_retry
        self._closed = threading.Event()
        self._pool = ThreadPoolExecutor(prefetch_steps, thread_name_prefix="targets")
        self._pending: dict[int, Future[_Fetched]] = {}
        self._next = iter(steps)
        for _ in range(prefetch_steps):
            self._ask_ahead()

    def take(self, step: int) -> tuple[dict[str, np.ndarray], Waited]:
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
        arrays = [from_wire(chunk.arrays) for chunk in fetched.chunks]
        encoded = {name: np.concatenate([part[name] for part in arrays]) for name in arrays[0]}
        return encoded, Waited(waited_s - wire_s, wire_s, time.perf_counter() - began)

    def close(self) -> None:
        """Ends asking; what is on its way is dropped."""
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _ask_ahead(self) -> None:
        step = next(self._next, None)
        if step is not None:
            self._pending[step] = self._pool.submit(self._fetch, step)

    def _fetch(self, step: int) -> _Fetched:
        request = self._request_of(step)
        chunks: list[TargetChunk] = []
        num_rows, wire_s = 0, 0.0
        deadline = time.monotonic() + self._retry_for_s
        pause_s = FIRST_PAUSE_S
        while num_rows < len(request.rows):
            try:
                for answer in self._source.ask(request.part(num_rows)):
                    expected = request.rows[num_rows : num_rows + len(answer.chunk.rows)]
                    assert answer.chunk.rows == expected, "chunks come in the order of the rows"
                    chunks.append(answer.chunk)
                    num_rows += len(answer.chunk.rows)
                    wire_s += answer.wire_s
                    pause_s = FIRST_PAUSE_S
                    deadline = time.monotonic() + self._retry_for_s
                if num_rows < len(request.rows):
                    raise TeacherUnavailableError("the answer ended early")
            except TeacherUnavailableError as error:
                if time.monotonic() > deadline:
                    raise TeacherUnavailableError(
                        f"No teacher answered for step {step + 1} within {self._retry_for_s:.0f} s "
                        f"(teacher.retry_for_s); the last try met: {error}"
                    ) from error
                self._on_retry(step, error)
                if self._closed.wait(pause_s):
                    raise
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        return _Fetched(chunks, wire_s)
