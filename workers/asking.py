"""Asks a pool of replicas so that no single one of them can hold a student up.

A replica that is late is hedged: another is asked for the same rows, and whichever answers first
counts, since both say the same. One that fails is avoided for a while. A row that replicas die of
is found out by asking for it alone.
"""

import dataclasses
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

from workers.dataset import RowId
from workers.patience import DEATHS_OF_A_POISONED_ROW, Patience, PoisonedRowError, Suspects
from workers.targets_protocol import (
    Answer,
    TargetRequest,
    TargetSource,
    TeacherUnavailableError,
    check_digests,
)

# A replica that failed is asked again only after this, unless there is no other.
_AVOID_FOR_S = 30.0


class Try:
    """One request to one replica: what the asking side and the sending side tell each other."""

    def __init__(self, exclude: frozenset[str] = frozenset()):
        self.exclude = exclude
        self.replica: str | None = None
        """Which one it went to, as soon as that is known."""
        self.cancelled = False
        """Its answer is not wanted any more."""


class Replicas(Protocol):
    """A pool whose replicas can be told apart."""

    def replicas(self) -> frozenset[str]: ...

    def sameness(self) -> str: ...

    def ask(self, request: TargetRequest, attempt: Try) -> Iterator[Answer]:
        """As `TargetSource.ask`, of one replica; says in `attempt` which."""
        ...


class _Heard(NamedTuple):
    """What a try has to say: an answer, or (None) that it has ended, and with what error."""

    attempt: Try
    answer: Answer | None
    error: Exception | None = None


class PatientSource(TargetSource):
    """A pool as a `TargetSource`; lets no chunk through whose bytes are not those scored.

    Args:
        replicas: the pool.
        say: told what happens, as an event's name and details.
        patience: decides on hedges.
    """

    def __init__(
        self, replicas: Replicas, say: Callable[..., None], patience: Patience | None = None
    ):
        self._replicas, self._say = replicas, say
        self._patience = patience or Patience()
        self._suspects = Suspects()
        self._avoided: dict[str, float] = {}

    def sameness(self) -> str:
        return self._replicas.sameness()

    def num_replicas(self) -> int:
        return max(len(self._replicas.replicas()), 1)

    def ask(self, request: TargetRequest) -> Iterator[Answer]:
        """As `TargetSource.ask`.

        Raises:
            PoisonedRowError: after all other rows came.
        """
        poisoned: PoisonedRowError | None = None
        for places in self._suspects.parts(request.rows):
            part = request.only(places)
            deaths = self._suspects.deaths(part.rows[0])
            if deaths >= DEATHS_OF_A_POISONED_ROW:
                poisoned = PoisonedRowError(part.rows[0], deaths)
                continue
            alone = deaths == DEATHS_OF_A_POISONED_ROW - 1
            yield from self._ask_part(dataclasses.replace(part, alone=alone))
        if poisoned is not None:
            raise poisoned

    def _ask_part(self, request: TargetRequest) -> Iterator[Answer]:
        """Answers of one try, or of two; the error of the last one if rows are still missing."""
        heard: queue.SimpleQueue[_Heard] = queue.SimpleQueue()
        missing = dict.fromkeys(request.rows)
        tries = [self._start(request, self._avoid(), heard)]
        running, asked_at, hedged = 1, time.monotonic(), False
        try:
            while missing:
                hedge_after_s = None if hedged else self._patience.hedge_after_s()
                try:
                    attempt, answer, error = heard.get(timeout=_left_s(asked_at, hedge_after_s))
                except queue.Empty:
                    hedged = True
                    if hedge := self._hedge(request, list(missing), tries[0], heard):
                        tries.append(hedge)
                        running += 1
                    continue
                if answer is not None:
                    self._patience.came(time.monotonic() - asked_at)
                    asked_at = time.monotonic()
                    self._suspects.came(answer.chunk.rows)
                    for row in answer.chunk.rows:
                        missing.pop(row, None)
                    yield dataclasses.replace(answer, hedged=attempt is not tries[0])
                    continue
                running -= 1
                if error is not None:
                    self._failed(attempt, error, list(missing))
                if not running:
                    raise error or TeacherUnavailableError("the answer ended early")
        finally:
            for attempt in tries:
                attempt.cancelled = True

    def _start(
        self, request: TargetRequest, exclude: frozenset[str], heard: "queue.SimpleQueue[_Heard]"
    ) -> Try:
        attempt = Try(exclude)

        def run() -> None:
            answers: Any = self._replicas.ask(request, attempt)
            try:
                for answer in answers:
                    check_digests(request.spec, answer.chunk)
                    heard.put(_Heard(attempt, answer))
                    if attempt.cancelled:
                        break
                heard.put(_Heard(attempt, None))
            except Exception as error:
                heard.put(_Heard(attempt, None, error))
            finally:
                answers.close()

        threading.Thread(target=run, name="ask", daemon=True).start()
        return attempt

    def _hedge(
        self,
        request: TargetRequest,
        missing: list[RowId],
        straggler: Try,
        heard: "queue.SimpleQueue[_Heard]",
    ) -> Try | None:
        """Asks another replica for what is missing, if there is one."""
        known, late = self._replicas.replicas(), straggler.replica
        if late is None or request.alone or not known - {late} - self._avoid():
            return None
        self._patience.hedged()
        self._say("teacher_hedged", replica=late, rows=len(missing))
        wanted = set(missing)
        places = [place for place, row in enumerate(request.rows) if row in wanted]
        return self._start(request.only(places), self._avoid() | {late}, heard)

    def _failed(self, attempt: Try, error: Exception, missing: list[RowId]) -> None:
        if not isinstance(error, TeacherUnavailableError):
            return
        if attempt.replica is not None:
            self._avoided[attempt.replica] = time.monotonic() + _AVOID_FOR_S
        if error.died:
            self._suspects.died_with(missing)
        self._say(
            "teacher_failed",
            replica=attempt.replica,
            rows=len(missing),
            died=error.died,
            reason=str(error),
        )

    def _avoid(self) -> frozenset[str]:
        now = time.monotonic()
        return frozenset(name for name, until in list(self._avoided.items()) if until > now)


def _left_s(asked_at: float, wait_s: float | None) -> float | None:
    return None if wait_s is None else max(asked_at + wait_s - time.monotonic(), 0.0)
