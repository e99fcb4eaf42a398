"""Rows that wait for a teacher's device: in fair shares, in the order they came. No clock."""

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple


class Waiting(NamedTuple):
    """One row of one request."""

    request: int
    place: int


class FairQueue:
    """Gives each student that has rows waiting an equal share of the rows that are scored.

    Start-time fair queueing: each student's clock advances by the rows it is given, the student
    whose clock is furthest behind goes first, and one that comes (back) starts no further behind
    than the others are. Within a student, rows go in the order they came.
    """

    def __init__(self) -> None:
        self._rows: dict[str, deque[Waiting]] = {}
        self._served: dict[str, int] = {}
        self._floor = 0
        self._alone: set[int] = set()

    def __len__(self) -> int:
        return sum(len(rows) for rows in self._rows.values())

    def put(self, student: str, request: int, places: Iterable[int], alone: bool = False) -> None:
        """Rows of a request; `alone`: each is to be scored without neighbours."""
        rows = self._rows.setdefault(student, deque())
        if not rows:
            self._served[student] = max(self._served.get(student, 0), self._floor)
        rows.extend(Waiting(request, place) for place in places)
        if alone:
            self._alone.add(request)

    def take(self, num_rows: int) -> list[Waiting]:
        """The next batch, at most `num_rows`; empty when nothing waits."""
        batch: list[Waiting] = []
        while len(batch) < num_rows and (student := self._next()) is not None:
            rows = self._rows[student]
            alone = rows[0].request in self._alone
            if alone and batch:
                break
            batch.append(rows.popleft())
            self._floor = self._served[student]
            self._served[student] += 1
            if alone:
                break
        return batch

    def drop(self, request: int) -> None:
        """Forgets what still waits of a request."""
        for student, rows in self._rows.items():
            self._rows[student] = deque(row for row in rows if row.request != request)
        self._alone.discard(request)

    def _next(self) -> str | None:
        waiting = [student for student, rows in self._rows.items() if rows]
        return min(waiting, key=lambda student: self._served[student], default=None)
