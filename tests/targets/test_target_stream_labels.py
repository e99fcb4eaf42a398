"""A step without its targets goes on with labels: no teacher is left, or a row kills teachers."""

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
from workers.patience import PoisonedRowError
from workers.targets_protocol import LABELS, Answer, TargetRequest, TeacherUnavailableError

pytestmark = pytest.mark.usefixtures("without_pauses")


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
