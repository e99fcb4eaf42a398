"""Streams of targets for tests, and the sources that they ask."""

import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np

from model.targets import wire_view
from workers.dataset import RowId
from workers.target_stream import TargetStream
from workers.targets_protocol import (
    MIXED,
    Answer,
    TargetChunk,
    TargetRequest,
    TargetSource,
    TargetSpec,
    TeacherUnavailableError,
)

SPEC = TargetSpec("dataset", "teacher", "codec", 0, MIXED)
NUM_ROWS, NUM_STEPS = 5, 6
LONG_S = 30.0


def request_of(step: int) -> TargetRequest:
    rows = tuple(RowId(0, step * NUM_ROWS + row) for row in range(NUM_ROWS))
    tokens = np.array([[row.index, step] for row in rows], np.int32)
    return TargetRequest(SPEC, rows, tokens, tokens + 1, tokens + 2)


def digest_of(row: RowId) -> str:
    return f"{row.index:032x}"


def expected_targets(step: int) -> np.ndarray:
    return request_of(step).inputs * 0.5


class Source(TargetSource):
    """Answers in chunks; ask number n fails as `failures[n]` says, later ones do not.

    A failure is the number of chunks that come before it.
    """

    def __init__(self, failures: Sequence[int | None] = (), chunk_rows: int = 2):
        self.failures = failures
        self.chunk_rows = chunk_rows
        self.asked: list[tuple[RowId, ...]] = []
        self._lock = threading.Lock()

    def sameness(self) -> str:
        return "class"

    def ask(self, request: TargetRequest) -> Iterator[Answer]:
        with self._lock:
            number = len(self.asked)
            self.asked.append(request.rows)
        failure = self.failures[number] if number < len(self.failures) else None
        for count, start in enumerate(range(0, len(request.rows), self.chunk_rows)):
            if count == failure:
                raise TeacherUnavailableError("the replica died")
            part = slice(start, start + self.chunk_rows)
            arrays = wire_view({"half": (request.inputs[part] * 0.5).astype(np.float32)})
            rows = request.rows[part]
            yield Answer(TargetChunk(rows, arrays, tuple(map(digest_of, rows)), "replica"), 0.0)
        if failure is not None and failure >= 0:
            raise TeacherUnavailableError("the replica died at the end")


def open_stream(
    source, *, request_of=request_of, steps=range(NUM_STEPS), events=None, **changes
) -> TargetStream:
    told = [] if events is None else events
    settings = {
        "rows_per_step": NUM_ROWS,
        "prefetch_steps": 2,
        "steps_per_request": 1,
        "retry_for_s": LONG_S,
        "labels_after_s": None,
        "blank": wire_view({"half": np.zeros((1, 2), np.float32)}),
    } | changes
    together = settings["steps_per_request"]
    settings["steps_per_request"] = together if callable(together) else lambda: together
    return TargetStream(
        source,
        request_of,
        steps,
        say=lambda event, **details: told.append((event, details)),
        **settings,
    )


def eventually(happened) -> bool:
    deadline = time.monotonic() + LONG_S
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.002)
    return happened()
