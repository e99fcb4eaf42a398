"""Targets arrive bounded, in order, and whole, however the source fails."""

import dataclasses
import threading
import time
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.targets import wire_view
from workers import target_stream
from workers.patience import PoisonedRowError
from workers.rows import RowId
from workers.target_stream import Provenance, TargetStream
from workers.targets_protocol import (
    LABELS,
    MIXED,
    Answer,
    TargetChunk,
    TargetRequest,
    TargetSource,
    TargetSpec,
    TeacherUnavailableError,
)

SPEC = TargetSpec("dataset", "teacher", "codec", 0, MIXED)
NUM_ROWS, CHUNK_ROWS, NUM_STEPS = 5, 2, 6
LONG_S = 30.0


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_stream, "FIRST_PAUSE_S", 0)


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

    def __init__(self, failures: Sequence[int | None] = ()):
        self.failures = failures
        self.asked: list[tuple[RowId, ...]] = []
        self._lock = threading.Lock()

    def sameness(self) -> str:
        return "class"

    def ask(self, request: TargetRequest) -> Iterator[Answer]:
        with self._lock:
            number = len(self.asked)
            self.asked.append(request.rows)
        failure = self.failures[number] if number < len(self.failures) else None
        for count, start in enumerate(range(0, len(request.rows), CHUNK_ROWS)):
            if count == failure:
                raise TeacherUnavailableError("the replica died")
            part = slice(start, start + CHUNK_ROWS)
            arrays = wire_view({"half": (request.inputs[part] * 0.5).astype(np.float32)})
            rows = request.rows[part]
            yield Answer(TargetChunk(rows, arrays, tuple(map(digest_of, rows)), "replica"), 0.0)
        if failure is not None and failure >= 0:
            raise TeacherUnavailableError("the replica died at the end")


def open_stream(source, **changes) -> TargetStream:
    events = changes.pop("events", [])
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
        range(NUM_STEPS),
        say=lambda event, **details: events.append((event, details)),
        **settings,
    )


@settings(deadline=None, max_examples=100)
@given(
    failures=st.lists(st.none() | st.integers(0, 4), max_size=25),
    prefetch_steps=st.integers(1, 8),
    data=st.data(),
)
def test_a_source_that_dies_in_any_way_gives_the_same_bytes(failures, prefetch_steps, data):
    stream = open_stream(
        Source(failures),
        prefetch_steps=prefetch_steps,
        steps_per_request=data.draw(st.integers(1, prefetch_steps)),
    )
    for step in range(NUM_STEPS):
        encoded, has_targets, cost, provenance = stream.take(step)
        assert provenance.digests == tuple(map(digest_of, request_of(step).rows))
        assert provenance.origins == ("replica",) * NUM_ROWS
        assert encoded.keys() == {"half"} and encoded["half"].dtype == np.float32
        np.testing.assert_array_equal(encoded["half"], expected_targets(step))
        assert min(cost) >= 0 and has_targets.all()
    stream.close()


def test_each_step_costs_its_share_of_the_chunks():
    class Busy(Source):
        def ask(self, request: TargetRequest) -> Iterator[Answer]:
            for answer in [*super().ask(request)] * 2:  # what comes twice counts once
                rows = answer.chunk.rows
                chunk = dataclasses.replace(answer.chunk, busy_s=3.0 * len(rows))
                yield Answer(chunk, 1e-9 * len(rows))

    stream = open_stream(Busy(), prefetch_steps=4, steps_per_request=4)
    for step in range(4):
        cost = stream.take(step).cost
        assert cost.busy_s == pytest.approx(3.0 * len(request_of(step).rows))
        assert cost.wire_s <= 1e-9 * len(request_of(step).rows) * 1.01
    stream.close()


def test_a_retry_asks_only_for_the_rows_that_have_not_come():
    events: list = []
    source = Source([1, 0, None])
    stream = open_stream(source, prefetch_steps=1, events=events)
    stream.take(0)
    stream.close()
    rows = request_of(0).rows
    assert source.asked[:3] == [rows, rows[2:], rows[2:]]
    assert events == [("teacher_retry", {"step": 1, "reason": "the replica died"})] * 2


def test_an_answer_that_ends_early_is_asked_again():
    class EndsEarly(Source):
        def ask(self, request: TargetRequest) -> Iterator[Answer]:
            yield next(super().ask(request))

    events: list = []
    source = EndsEarly()
    stream = open_stream(source, prefetch_steps=1, events=events)
    encoded = stream.take(0).encoded
    stream.close()
    np.testing.assert_array_equal(encoded["half"], expected_targets(0))
    assert [len(rows) for rows in source.asked[:3]] == [5, 3, 1]
    assert len(events) >= 2


class Held(Source):
    """Answers only as far as it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.let = threading.Semaphore(0)
        self.num_answered = 0

    def ask(self, request: TargetRequest) -> Iterator[Answer]:
        answers = list(super().ask(request))
        assert self.let.acquire(timeout=LONG_S)
        yield from answers
        with self._lock:
            self.num_answered += 1


def eventually(happened) -> bool:
    deadline = time.monotonic() + LONG_S
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.002)
    return happened()


def test_no_more_steps_are_asked_for_than_allowed():
    source = Held()
    stream = open_stream(source, prefetch_steps=3)
    assert eventually(lambda: len(source.asked) == 3)
    source.let.release(NUM_STEPS)
    for step in range(NUM_STEPS):
        allowed = min(step + 3, NUM_STEPS)
        assert eventually(lambda n=allowed: source.num_answered == n)
        assert len(source.asked) == allowed, "none beyond, however fast the answers are"
        stream.take(step)
    assert {rows[0].index // NUM_ROWS for rows in source.asked} == set(range(NUM_STEPS))
    stream.close()


def test_steps_are_taken_in_order_whichever_answer_comes_first():
    late, arrived = threading.Event(), threading.Event()

    class FirstIsLate(Source):
        def ask(self, request: TargetRequest) -> Iterator[Answer]:
            if request.rows[0].index == 0:
                assert late.wait(LONG_S)
            yield from super().ask(request)
            if request.rows[0].index:
                arrived.set()

    stream = open_stream(FirstIsLate())
    assert arrived.wait(LONG_S)
    late.set()
    for step in range(NUM_STEPS):
        np.testing.assert_array_equal(stream.take(step).encoded["half"], expected_targets(step))
    stream.close()


def test_one_request_asks_for_several_steps_as_soon_as_there_is_room_for_them():
    source = Held()
    stream = open_stream(source, prefetch_steps=4, steps_per_request=2)
    source.let.release(NUM_STEPS)
    for step, num_requests in enumerate([2, 2, 3, 3, 3, 3]):
        assert eventually(lambda n=num_requests: source.num_answered == n)
        assert len(source.asked) == num_requests
        np.testing.assert_array_equal(stream.take(step).encoded["half"], expected_targets(step))
    stream.close()
    for rows in source.asked:
        first = rows[0].index // NUM_ROWS
        assert rows == request_of(first).rows + request_of(first + 1).rows


def test_a_step_is_there_before_the_rest_of_its_request():
    let = threading.Event()

    class Pauses(Source):
        def ask(self, request: TargetRequest) -> Iterator[Answer]:
            for number, answer in enumerate(super().ask(request)):
                assert number < 3 or let.wait(LONG_S)
                yield answer

    stream = open_stream(Pauses(), prefetch_steps=2, steps_per_request=2)
    np.testing.assert_array_equal(stream.take(0).encoded["half"], expected_targets(0))
    let.set()
    np.testing.assert_array_equal(stream.take(1).encoded["half"], expected_targets(1))
    stream.close()


def test_a_failure_names_the_step_it_holds_up_and_fails_those_behind_it():
    events: list = []
    source = Source([3, 0, None])
    stream = open_stream(source, prefetch_steps=3, steps_per_request=3, events=events)
    for step in range(3):
        np.testing.assert_array_equal(stream.take(step).encoded["half"], expected_targets(step))
    stream.close()
    assert [details["step"] for _, details in events] == [2, 2]
    assert [len(rows) for rows in source.asked[:3]] == [15, 9, 9]

    class Refuses(Source):
        def ask(self, request: TargetRequest) -> Iterator[Answer]:
            yield from list(super().ask(request))[:3]
            raise ValueError("another teacher")

    stream = open_stream(Refuses(), prefetch_steps=3, steps_per_request=3)
    np.testing.assert_array_equal(stream.take(0).encoded["half"], expected_targets(0))
    for step in (1, 2):
        with pytest.raises(ValueError, match="another teacher"):
            stream.take(step)
    stream.close()


class Clock:
    """Each look at the clock is a second later."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        self.now_s += 1.0
        return self.now_s


def use_clock(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    fake = SimpleNamespace(monotonic=clock.monotonic, perf_counter=time.perf_counter)
    monkeypatch.setattr(target_stream, "time", fake)


def test_it_gives_up_when_no_teacher_answered_for_long_enough(monkeypatch):
    use_clock(monkeypatch, Clock())
    events: list = []
    source = Source([0] * 100)
    stream = open_stream(source, prefetch_steps=1, retry_for_s=10.0, events=events)
    with pytest.raises(TeacherUnavailableError) as raised:
        stream.take(0)
    stream.close()
    assert str(raised.value) == (
        "No teacher answered for step 1 within 10 s (teacher.retry_for_s); "
        "the last try met: the replica died"
    )
    assert len(source.asked) == 11
    assert len(events) == 10, "the last failure is not followed by a try"


def test_a_teacher_that_answers_in_between_is_waited_for(monkeypatch):
    use_clock(monkeypatch, Clock())
    monkeypatch.setattr(f"{__name__}.CHUNK_ROWS", 1)
    failures = [0] * 8 + [1] + [0] * 8 + [1] + [0] * 8 + [1] + [0] * 8
    stream = open_stream(Source(failures), prefetch_steps=1, retry_for_s=10.0)
    np.testing.assert_array_equal(stream.take(0).encoded["half"], expected_targets(0))
    stream.close()


def test_a_refused_request_is_not_repeated():
    class Refuses(Source):
        def ask(self, request: TargetRequest) -> Iterator[Answer]:
            with self._lock:
                self.asked.append(request.rows)
            raise ValueError("another teacher")
            yield

    source, events = Refuses(), []
    stream = open_stream(source, prefetch_steps=1, events=events)
    with pytest.raises(ValueError, match="another teacher"):
        stream.take(0)
    stream.close()
    assert len(source.asked) == 1 and events == []


def test_a_chunk_of_other_rows_is_an_error():
    class Confused(Source):
        def ask(self, request: TargetRequest) -> Iterator[Answer]:
            return super().ask(request_of(request.rows[0].index // NUM_ROWS + 1))

    stream = open_stream(Confused(), prefetch_steps=1)
    with pytest.raises(AssertionError, match="was not asked for"):
        stream.take(0)
    stream.close()


def test_closing_ends_a_stream_that_fails_on(monkeypatch):
    monkeypatch.setattr(target_stream, "FIRST_PAUSE_S", LONG_S)

    def threads() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name.startswith("targets")}

    before, events = threads(), []
    stream = open_stream(Source([0] * 100), events=events)
    assert eventually(lambda: len(events) == 2)
    stream.close()
    assert eventually(lambda: threads() <= before)
    assert len(events) == 2


def provenances(stream: TargetStream) -> list[Provenance]:
    taken = [stream.take(step) for step in range(NUM_STEPS)]
    stream.close()
    return [step.provenance for step in taken]


def test_the_same_bytes_are_told_whatever_happened_on_the_way():
    quiet = provenances(open_stream(Source()))
    assert provenances(open_stream(Source([0, 1, 2, 1, 0, 1]), prefetch_steps=1)) == quiet
    assert len({step.digests for step in quiet}) == NUM_STEPS


def test_a_row_that_comes_twice_in_a_request_is_asked_for_once():
    def same(step: int) -> TargetRequest:
        return request_of(0)

    stream = TargetStream(
        source := Source(),
        same,
        range(2),
        rows_per_step=NUM_ROWS,
        prefetch_steps=2,
        steps_per_request=lambda: 2,
        retry_for_s=LONG_S,
        labels_after_s=None,
        blank={},
        say=lambda event, **details: None,
    )
    for step in range(2):
        np.testing.assert_array_equal(stream.take(step).encoded["half"], expected_targets(0))
    stream.close()
    assert source.asked == [request_of(0).rows]


class Away(Source):
    """No teacher is left for a while."""

    def __init__(self) -> None:
        super().__init__()
        self.back = threading.Event()

    def ask(self, request: TargetRequest) -> Iterator[Answer]:
        if request.rows[0].index >= NUM_ROWS and not self.back.is_set():
            raise TeacherUnavailableError("there is none")
        yield from super().ask(request)


def test_without_a_teacher_steps_go_on_with_labels_and_with_targets_when_it_is_back():
    events: list = []
    source = Away()
    stream = open_stream(source, labels_after_s=0.0, events=events)
    assert eventually(lambda: len(source.asked) == 1)
    taken = [stream.take(step) for step in range(4)]
    for step in taken[1:]:
        assert not step.has_targets.any() and step.provenance.origins == (LABELS,) * NUM_ROWS
        np.testing.assert_array_equal(step.encoded["half"], np.zeros((NUM_ROWS, 2)))
    names = [name for name, _ in events if name != "teacher_retry"]
    assert names == ["labels_alone"], "told once"
    source.back.set()
    assert eventually(lambda: ("targets_again", {}) in events)
    stream.close()


def test_rows_that_came_are_used_although_the_rest_is_given_up(monkeypatch):
    class HalfAway(Source):
        def ask(self, request: TargetRequest) -> Iterator[Answer]:
            if request.rows[0] == request_of(0).rows[0]:
                yield next(super().ask(request))
                came.set()
            raise TeacherUnavailableError("the last one is gone")

    came = threading.Event()
    stream = open_stream(HalfAway(), prefetch_steps=1, labels_after_s=0.05)
    assert came.wait(LONG_S)
    step = stream.take(0)
    stream.close()
    assert step.has_targets.tolist() == [True, True, False, False, False]
    np.testing.assert_array_equal(step.encoded["half"][:2], expected_targets(0)[:2])
    assert step.provenance.origins == ("replica",) * 2 + (LABELS,) * 3


def test_a_poisoned_row_is_named_and_trained_on_its_label():
    poisoned = request_of(1).rows[3]

    class Dies(Source):
        def ask(self, request: TargetRequest) -> Iterator[Answer]:
            harmless = [place for place, row in enumerate(request.rows) if row != poisoned]
            yield from super().ask(request.only(harmless))
            if len(harmless) < len(request.rows):
                raise PoisonedRowError(poisoned, 3)

    events: list = []
    stream = open_stream(Dies(), events=events)
    taken = [stream.take(step) for step in range(NUM_STEPS)]
    stream.close()
    for number, step in enumerate(taken):
        expected = [number != 1 or place != 3 for place in range(NUM_ROWS)]
        assert step.has_targets.tolist() == expected
    ((name, details),) = events
    assert name == "row_poisoned"
    assert (details["source"], details["index"]) == poisoned
