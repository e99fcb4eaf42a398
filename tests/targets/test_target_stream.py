"""Targets arrive bounded, in order, and whole."""

import dataclasses
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from tests.helpers.target_streams import (
    LONG_S,
    NUM_ROWS,
    NUM_STEPS,
    Source,
    eventually,
    expected_targets,
    open_stream,
    request_of,
)
from workers.targets_protocol import Answer, TargetRequest


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


def test_a_row_that_comes_twice_in_a_request_is_asked_for_once():
    def same(step: int) -> TargetRequest:
        return request_of(0)

    source = Source()
    stream = open_stream(source, request_of=same, steps=range(2), steps_per_request=2)
    for step in range(2):
        np.testing.assert_array_equal(stream.take(step).encoded["half"], expected_targets(0))
    stream.close()
    assert source.asked == [request_of(0).rows]
