"""What a stream does about a source that fails: ask again, give up, or say so at once."""

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.target_streams import (
    LONG_S,
    NUM_ROWS,
    NUM_STEPS,
    Source,
    digest_of,
    eventually,
    expected_targets,
    open_stream,
    request_of,
)
from workers import target_stream
from workers.target_stream import Provenance, TargetStream
from workers.targets_protocol import Answer, TargetRequest, TeacherUnavailableError

pytestmark = pytest.mark.usefixtures("without_pauses")


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


def provenances(stream: TargetStream) -> list[Provenance]:
    taken = [stream.take(step) for step in range(NUM_STEPS)]
    stream.close()
    return [step.provenance for step in taken]


def test_the_same_bytes_are_told_whatever_happened_on_the_way():
    quiet = provenances(open_stream(Source()))
    assert provenances(open_stream(Source([0, 1, 2, 1, 0, 1]), prefetch_steps=1)) == quiet
    assert len({step.digests for step in quiet}) == NUM_STEPS


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
    failures = [0] * 8 + [1] + [0] * 8 + [1] + [0] * 8 + [1] + [0] * 8
    stream = open_stream(Source(failures, chunk_rows=1), prefetch_steps=1, retry_for_s=10.0)
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
