"""No single replica holds a student up, and a row that kills replicas is found out."""

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from workers.asking import PatientSource, Try
from workers.dataset import RowId
from workers.patience import DEATHS_OF_A_POISONED_ROW, Patience, PoisonedRowError, Suspects
from workers.targets_protocol import (
    MIXED,
    Answer,
    TargetChunk,
    TargetRequest,
    TargetSpec,
    TeacherUnavailableError,
    row_digest,
)

SPEC = TargetSpec("dataset", "teacher", "codec", 0, MIXED)
LONG_S = 30.0


def request_of(*indices: int) -> TargetRequest:
    tokens = np.array(indices, np.int32).reshape(-1, 1)
    return TargetRequest(SPEC, tuple(RowId(0, i) for i in indices), tokens, tokens, tokens)


def answer_of(request: TargetRequest, place: int, replica: str) -> Answer:
    row = request.rows[place]
    arrays = {"index": np.array([[row.index]], np.uint32)}
    digest = row_digest(SPEC, row, {"index": arrays["index"][0]})
    return Answer(TargetChunk((row,), arrays, (digest,), replica), 0.0)


class Pool:
    """Replicas that do as they are told, one row a chunk; the first that is allowed is asked.

    Args:
        does: by replica, what it does before it answers a row.
    """

    def __init__(self, **does: Callable[[TargetRequest, int, Try], None]):
        self.does = does
        self.tries: list[tuple[str, TargetRequest, Try]] = []

    def replicas(self) -> frozenset[str]:
        return frozenset(self.does)

    def sameness(self) -> str:
        return "class"

    def ask(self, request: TargetRequest, attempt: Try) -> Iterator[Answer]:
        allowed = [name for name in self.does if name not in attempt.exclude]
        attempt.replica = replica = (allowed or list(self.does))[0]
        self.tries.append((replica, request, attempt))
        for place in range(len(request.rows)):
            self.does[replica](request, place, attempt)
            yield answer_of(request, place, replica)


def works(request: TargetRequest, place: int, attempt: Try) -> None:
    pass


def dies_at(*indices: int) -> Callable[[TargetRequest, int, Try], None]:
    def act(request: TargetRequest, place: int, attempt: Try) -> None:
        if request.rows[place].index in indices:
            raise TeacherUnavailableError("it died", attempt.replica, died=True)

    return act


def patient(pool: Pool, patience: Patience | None = None) -> tuple[PatientSource, list]:
    events: list = []
    source = PatientSource(pool, lambda name, **details: events.append((name, details)), patience)
    return source, events


def rows_of(answers) -> list[int]:
    return [row.index for answer in answers for row in answer.chunk.rows]


def ready_to_hedge() -> Patience:
    patience = Patience(hedge_after_at_least_s=0.0)
    for _ in range(20):
        patience.came(0.0)
    return patience


def test_rows_of_a_straggler_are_asked_of_another_and_the_first_answer_counts():
    woken = threading.Event()
    hung_for: list[Try] = []

    def hangs_at_the_third(request: TargetRequest, place: int, attempt: Try) -> None:
        if place == 2:
            hung_for.append(attempt)
            assert woken.wait(LONG_S)

    pool = Pool(slow=hangs_at_the_third, fast=works)
    source, events = patient(pool, ready_to_hedge())
    answers = list(source.ask(request_of(0, 1, 2, 3)))
    assert sorted(set(rows_of(answers))) == [0, 1, 2, 3]
    assert [answer.chunk.origin for answer in answers][-1] == "fast"
    assert {name for name, _ in events} == {"teacher_hedged"}
    assert events[0][1]["replica"] == "slow"
    assert all(attempt.cancelled for attempt in hung_for), "it need not go on"
    woken.set()


def test_without_another_replica_nobody_is_hedged():
    hangs, woken = threading.Event(), threading.Event()

    def slow(request: TargetRequest, place: int, attempt: Try) -> None:
        hangs.set()
        assert woken.wait(LONG_S)

    pool = Pool(only=slow)
    source, events = patient(pool, ready_to_hedge())
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.extend(rows_of(source.ask(request_of(0)))))
    thread.start()
    assert hangs.wait(LONG_S)
    woken.set()
    thread.join(LONG_S)
    assert found == [0] and events == [] and len(pool.tries) == 1


def test_one_that_failed_is_avoided_while_there_are_others():
    pool = Pool(bad=dies_at(1), good=works)
    source, events = patient(pool)
    answers = source.ask(request_of(0, 1, 2))
    assert next(answers).chunk.rows == (RowId(0, 0),)
    with pytest.raises(TeacherUnavailableError, match="it died"):
        next(answers)
    ((name, details),) = events
    assert (name, details["replica"], details["rows"], details["died"]) == (
        "teacher_failed",
        "bad",
        2,
        True,
    )
    assert rows_of(source.ask(request_of(1, 2))) == [1, 2]
    assert [replica for replica, _, _ in pool.tries] == ["bad", "good"]


def test_a_refusal_is_passed_on_as_it_is():
    def refuses(request: TargetRequest, place: int, attempt: Try) -> None:
        raise ValueError("another teacher")

    source, events = patient(Pool(a=refuses))
    with pytest.raises(ValueError, match="another teacher"):
        list(source.ask(request_of(0)))
    assert events == []


def test_a_row_that_kills_replicas_is_asked_alone_and_then_named():
    pool = Pool(**{f"replica-{n}": dies_at(5) for n in range(9)})
    source, _ = patient(pool)
    missing, num_failures = [3, 4, 5, 6], 0
    while True:
        try:
            for answer in source.ask(request_of(*missing)):
                missing.remove(answer.chunk.rows[0].index)
        except TeacherUnavailableError:
            num_failures += 1
            continue
        except PoisonedRowError as error:
            poisoned = error
            break
    assert poisoned.row == RowId(0, 5) and "Row 5 of data source 0" in str(poisoned)
    assert missing == [5] and num_failures == DEATHS_OF_A_POISONED_ROW
    alone = [request for _, request, _ in pool.tries if request.alone]
    assert all(len(request.rows) == 1 for request in alone)
    assert [request.rows[0].index for request in alone] == [5, 6], "6 was only behind it"
    num_tries = len(pool.tries)
    with pytest.raises(PoisonedRowError):
        list(source.ask(request_of(5)))
    assert len(pool.tries) == num_tries, "nobody is asked for it any more"


def test_rows_that_only_were_near_are_cleared():
    suspects = Suspects()
    near, other = RowId(0, 1), RowId(0, 2)
    for _ in range(DEATHS_OF_A_POISONED_ROW - 1):
        suspects.died_with([near, other])
    assert suspects.parts([near, other, RowId(0, 3)]) == [[2], [0], [1]]
    suspects.came([near])
    assert suspects.parts([near, other, RowId(0, 3)]) == [[0, 2], [1]]


def test_a_pool_that_is_slow_as_a_whole_is_not_given_more_to_do():
    patience = Patience(hedge_after_at_least_s=0.0)
    assert patience.hedge_after_s() is None, "nothing is known yet"
    for _ in range(20):
        patience.came(1.0)
    assert patience.hedge_after_s() == pytest.approx(4.0)
    num_hedges = 0
    for _ in range(200):
        if patience.hedge_after_s() is not None:
            patience.hedged()
            num_hedges += 1
        patience.came(1.0)
    assert 0 < num_hedges <= 200 * 0.1 + 3


def test_wrong_bytes_are_not_let_through_and_their_replica_is_avoided():
    class Spoils(Pool):
        def ask(self, request: TargetRequest, attempt: Try) -> Iterator[Answer]:
            for answer in super().ask(request, attempt):
                if attempt.replica == "bad":
                    answer.chunk.arrays["index"][0] ^= 4
                yield answer

    pool = Spoils(bad=works, good=works)
    source, events = patient(pool)
    with pytest.raises(TeacherUnavailableError, match=r"^bad sent targets of RowId.*index=7"):
        list(source.ask(request_of(7, 8)))
    assert rows_of(source.ask(request_of(7, 8))) == [7, 8]
    assert [replica for replica, _, _ in pool.tries] == ["bad", "good"]
    assert [name for name, _ in events] == ["teacher_failed"]
