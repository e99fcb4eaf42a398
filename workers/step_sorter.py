"""Sorts the rows of a request's answers, which know no steps, into steps."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import NamedTuple

import numpy as np

from workers.dataset import RowId
from workers.targets_protocol import Answer


class RowTargets(NamedTuple):
    """One row's targets as they came: wire arrays of leading axis 1, from where, and the digest."""

    arrays: dict[str, np.ndarray]
    origin: str
    digest: str


class Fetched(NamedTuple):
    """One step's rows in order; None where the row is trained on its labels alone."""

    rows: list[RowTargets | None]
    wire_s: float
    busy_s: float


class StepSorter:
    """Fulfils each step's future when its last row has come or is given up. Thread-safe.

    Args:
        rows: what was asked for, each step's rows after those of the one before.
        steps: the steps, in order, of the same number of rows each.
        futures: of the steps.
    """

    def __init__(
        self, rows: Sequence[RowId], steps: Sequence[int], futures: Sequence[Future[Fetched]]
    ):
        self._lock = threading.Lock()
        self._steps, self._futures = steps, futures
        self._rows_per_step = len(rows) // len(steps)
        self._places: dict[RowId, list[int]] = {}
        for place, row in enumerate(rows):
            self._places.setdefault(row, []).append(place)
        self._found: list[RowTargets | None] = [None] * len(rows)
        self._open = set(range(len(rows)))
        self._wire_s = [0.0] * len(steps)
        self._busy_s = [0.0] * len(steps)

    @property
    def step(self) -> int:
        """The first step that lacks rows, or the last one."""
        missing = self.missing()
        return self._steps[missing[0] // self._rows_per_step if missing else -1]

    def missing(self) -> list[int]:
        """Places of the rows that are still to come, one place of each row, in order."""
        with self._lock:
            first = (
                next((p for p in places if p in self._open), None)
                for places in self._places.values()
            )
            return sorted(place for place in first if place is not None)

    def add(self, answer: Answer) -> None:
        """Takes in a chunk; rows that have come already are passed over."""
        chunk = answer.chunk
        with self._lock:
            for index, row in enumerate(chunk.rows):
                assert row in self._places, f"{row} was not asked for"
                places = [place for place in self._places[row] if place in self._open]
                if not places:
                    continue
                first = places[0] // self._rows_per_step
                self._wire_s[first] += answer.wire_s / len(chunk.rows)
                self._busy_s[first] += chunk.busy_s / len(chunk.rows)
                arrays = {name: array[index : index + 1] for name, array in chunk.arrays.items()}
                for place in places:
                    self._close(place, RowTargets(arrays, chunk.origin, chunk.digests[index]))

    def give_up(self, row: RowId) -> None:
        """A row will not come."""
        with self._lock:
            for place in self._places[row]:
                if place in self._open:
                    self._close(place, None)

    def give_up_step(self, step: int) -> None:
        """Nothing more is waited for in a step."""
        with self._lock:
            first = self._steps.index(step) * self._rows_per_step
            for place in range(first, first + self._rows_per_step):
                if place in self._open:
                    self._close(place, None)

    def _close(self, place: int, targets: RowTargets | None) -> None:
        self._found[place] = targets
        self._open.remove(place)
        index = place // self._rows_per_step
        places = range(index * self._rows_per_step, (index + 1) * self._rows_per_step)
        if not any(place in self._open for place in places):
            rows = [self._found[place] for place in places]
            costs = self._wire_s[index], self._busy_s[index]
            self._futures[index].set_result(Fetched(rows, *costs))
