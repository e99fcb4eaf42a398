"""Targets of the coming steps: asked for ahead, in order, bounded, and asked again on failure."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from model.targets import from_wire
from workers.patience import PoisonedRowError
from workers.step_sorter import Fetched, StepSorter
from workers.targets_protocol import LABELS, TargetRequest, TargetSource, TeacherUnavailableError

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0


class Cost(NamedTuple):
    """What one step's targets cost: the student's wait, by cause, and the teachers' time."""

    teacher_s: float
    wire_s: float
    decode_s: float
    busy_s: float


class Provenance(NamedTuple):
    """Of each row of one step: the digest of its targets, and who gave them."""

    digests: tuple[str, ...]
    origins: tuple[str, ...]


class StepTargets(NamedTuple):
    """What the teacher says about one step's rows, in the request's order."""

    encoded: dict[str, np.ndarray]
    has_targets: Bool[np.ndarray, " B"]
    """False where a row is to be trained on its labels alone; `encoded` holds zeros there."""
    cost: Cost
    provenance: Provenance


class _Pending(NamedTuple):
    """A step that was asked for, and who sorts its rows, as soon as the request is made."""

    targets: Future[Fetched]
    sorter: Future[StepSorter]


class TargetStream:
    """Keeps the targets of the next steps on their way while the student works.

    Args:
        source: the teachers.
        request_of: the request of a step, for `rows_per_step` rows; a pure function.
        steps: the steps to come, in order.
        prefetch_steps: most steps that are asked for and not yet taken.
        steps_per_request: steps that the next request asks for, at most `prefetch_steps`.
        retry_for_s: how long a request is repeated without an answer before it fails.
        labels_after_s: how long after the last answer a step that waits goes on with its labels
            in place of the rows that have not come; None: never.
        blank: zeros in the form of one row's wire arrays, [1, ...] each.
        say: told what happens, as an event's name and details.
    """

    def __init__(
        self,
        source: TargetSource,
        request_of: Callable[[int], TargetRequest],
        steps: range,
        *,
        rows_per_step: int,
        prefetch_steps: int,
        steps_per_request: Callable[[], int],
        retry_for_s: float,
        labels_after_s: float | None,
        blank: dict[str, np.ndarray],
        say: Callable[..., None],
    ):
        self._source = source
        self._request_of = request_of
        self._rows_per_step = rows_per_step
        self._prefetch_steps, self._steps_per_request = prefetch_steps, steps_per_request
        self._retry_for_s, self._labels_after_s = retry_for_s, labels_after_s
        self._blank = blank
        self._say = say
        self._answered_at = time.monotonic()
        self._away = False
        self._taken = steps.start - 1
        self._closed = threading.Event()
        self._pool = ThreadPoolExecutor(prefetch_steps, thread_name_prefix="targets")
        self._pending: dict[int, _Pending] = {}
        self._next = iter(steps)
        self._ask_ahead()

    def is_here(self, step: int) -> bool:
        """Whether `take` would return at once."""
        return self._pending[step].targets.done()

    def take(self, step: int) -> StepTargets:
        """The targets of `step`; steps come in order.

        Raises:
            TeacherUnavailableError: no teacher answered within `retry_for_s`.
            ValueError: the pool refuses the request.
        """
        began = time.perf_counter()
        fetched = self._wait_for(step)
        self._taken = step
        waited_s = time.perf_counter() - began
        self._ask_ahead()
        wire_s = min(waited_s, fetched.wire_s)
        began = time.perf_counter()
        parts = [from_wire(row.arrays if row else self._blank) for row in fetched.rows]
        encoded = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        has_targets = np.array([row is not None for row in fetched.rows])
        decode_s = time.perf_counter() - began
        cost = Cost(waited_s - wire_s, wire_s, decode_s, fetched.busy_s)
        provenance = Provenance(
            tuple(row.digest if row else "" for row in fetched.rows),
            tuple(row.origin if row else LABELS for row in fetched.rows),
        )
        return StepTargets(encoded, has_targets, cost, provenance)

    def close(self) -> None:
        """Ends asking; what is on its way is dropped."""
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _wait_for(self, step: int) -> Fetched:
        future, sorter = self._pending.pop(step)
        if self._labels_after_s is None:
            return future.result()
        while True:
            left_s = self._answered_at + self._labels_after_s - time.monotonic()
            try:
                return future.result(timeout=max(left_s, 0))
            except TimeoutError:
                if time.monotonic() < self._answered_at + self._labels_after_s:
                    continue  # an answer came meanwhile, if not to this step
                if not self._away:
                    self._away = True
                    self._say("labels_alone", step=step + 1, after_s=self._labels_after_s)
                if not sorter.done():  # all threads still wait for answers to earlier steps
                    return Fetched([None] * self._rows_per_step, 0.0, 0.0)
                sorter.result().give_up_step(step)

    def _ask_ahead(self) -> None:
        """Asks for the next steps as long as there is room for a whole request."""
        while (together := self._steps_per_request()) + len(self._pending) <= self._prefetch_steps:
            steps = list(islice(self._next, together))
            if not steps:
                return
            sorter: Future[StepSorter] = Future()
            futures = [Future[Fetched]() for _ in steps]
            pending = (_Pending(future, sorter) for future in futures)
            self._pending |= zip(steps, pending, strict=True)
            self._pool.submit(self._fetch, steps, futures, sorter)

    def _fetch(
        self, steps: list[int], futures: list[Future[Fetched]], made: Future[StepSorter]
    ) -> None:
        if steps[-1] <= self._taken:
            return
        try:
            request = TargetRequest.joined([self._request_of(step) for step in steps])
            sorter = StepSorter(request.rows, steps, futures)
            made.set_result(sorter)
            self._ask(request, sorter)
        except BaseException as error:
            for future in [made, *futures]:
                if not future.done():
                    future.set_exception(error)

    def _ask(self, request: TargetRequest, sorter: StepSorter) -> None:
        """Asks until every row has come or is given up; only for the rows that have not."""
        deadline = time.monotonic() + self._retry_for_s
        pause_s = FIRST_PAUSE_S
        while missing := sorter.missing():
            try:
                for answer in self._source.ask(request.only(missing)):
                    self._answered()
                    sorter.add(answer)
                    pause_s = FIRST_PAUSE_S
                    deadline = time.monotonic() + self._retry_for_s
                if sorter.missing():
                    raise TeacherUnavailableError("the answer ended early")
            except PoisonedRowError as error:
                self._say("row_poisoned", **error.row._asdict(), reason=str(error))
                sorter.give_up(error.row)
            except TeacherUnavailableError as error:
                step = sorter.step
                if self._labels_after_s is None and time.monotonic() > deadline:
                    raise TeacherUnavailableError(
                        f"No teacher answered for step {step + 1} within {self._retry_for_s:.0f} s "
                        f"(teacher.retry_for_s); the last try met: {error}"
                    ) from error
                self._say("teacher_retry", step=step + 1, reason=str(error))
                if self._closed.wait(pause_s):
                    raise
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def _answered(self) -> None:
        self._answered_at = time.monotonic()
        if self._away:
            self._away = False
            self._say("targets_again")
