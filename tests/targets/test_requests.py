"""A pool that grows has more to do, up to as many requests as steps are asked for ahead."""

import math
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.distillation import TeacherConfig
from configs.requests import steps_together
from model.targets import wire_view
from orchestrator.run_state import Observed, SetTeachers, Snapshot, State
from orchestrator.teacher_scaling import UP_WINDOWS, Bounds, Scaling, bounds_of
from tests.helpers.controller_bench import TO, Bench, make_config, of
from workers.asking import PatientSource, Try
from workers.dataset import RowId
from workers.patience import Patience
from workers.replica_loads import ReplicaLoads
from workers.tally import Tally
from workers.target_stream import TargetStream
from workers.targets_protocol import (
    MIXED,
    Answer,
    TargetChunk,
    TargetRequest,
    TargetSpec,
    row_digest,
)

SPEC = TargetSpec("dataset", "teacher", "codec", 0, MIXED)
NUM_ROWS, PREFETCH, NUM_STEPS = 4, 8, 40
LONG_S = 30.0


def teacher(steps_per_request: int, rows_per_batch: int) -> TeacherConfig:
    return TeacherConfig(
        checkpoint="teacher",
        prefetch_steps=PREFETCH,
        steps_per_request=steps_per_request,
        rows_per_batch=rows_per_batch,
    )


def test_few_replicas_get_large_requests_and_many_small_ones():
    config = teacher(steps_per_request=4, rows_per_batch=4)
    sizes = [
        steps_together(config, rows_per_step=4, prefetch_steps=8, num_hosts=1, replicas=n)
        for n in range(12)
    ]
    assert sizes == [4, 4, 4, 2, 2, 1, 1, 1, 1, 1, 1, 1]


@given(
    most=st.integers(1, 20),
    rows_per_batch=st.integers(1, 64),
    rows_per_step=st.integers(1, 64),
    prefetch_steps=st.integers(1, 20),
    num_hosts=st.integers(1, 8),
    replicas=st.integers(0, 64),
)
def test_requests_reach_all_replicas_unless_they_would_be_too_small(
    most, rows_per_batch, rows_per_step, prefetch_steps, num_hosts, replicas
):
    config = teacher(steps_per_request=most, rows_per_batch=rows_per_batch)
    steps = steps_together(
        config,
        rows_per_step=rows_per_step,
        prefetch_steps=prefetch_steps,
        num_hosts=num_hosts,
        replicas=replicas,
    )
    assert 1 <= steps <= min(most, prefetch_steps)
    num_requests = num_hosts * (prefetch_steps // steps)
    smallest = (steps - 1) * rows_per_step < rows_per_batch
    assert num_requests >= replicas or smallest
    fewest = math.ceil(rows_per_batch / rows_per_step)
    assert steps >= min(fewest, most, prefetch_steps), "a replica's batch is filled"


class Pool:
    """Replicas that answer as far as they are let, chosen as those of a real pool are."""

    def __init__(self, num_replicas: int):
        self.names = [f"replica-{number}" for number in range(num_replicas)]
        self._loads = ReplicaLoads()
        self._changed = threading.Condition()
        self._held = dict.fromkeys(self.names, 0)
        self._num_let = 0

    def replicas(self) -> frozenset[str]:
        return frozenset(self.names)

    def sameness(self) -> str:
        return "class"

    def ask(self, request: TargetRequest, attempt: Try) -> Iterator[Answer]:
        num_rows = len(request.rows)
        with self._changed:
            name = self._loads.pick(self.names, num_rows, attempt.exclude)
            attempt.replica = name
            self._loads.asked(name, num_rows)
            self._held[name] += 1
            self._changed.notify_all()
            last = request.rows[-1].index
            assert self._changed.wait_for(lambda: last < self._num_let * NUM_ROWS, LONG_S)
            self._held[name] -= 1
        self._loads.answered(name, num_rows, busy_s=num_rows)
        yield Answer(chunk_of(request, name), 0.0)

    def all_busy(self) -> bool:
        """Whether each replica has a request, sooner or later."""
        with self._changed:
            return self._changed.wait_for(lambda: all(self._held.values()), LONG_S)

    def let(self, num_steps: int) -> None:
        """From now on, answers what belongs to the first steps."""
        with self._changed:
            self._num_let = num_steps
            self._changed.notify_all()


def targets_of(row: RowId) -> dict[str, np.ndarray]:
    return wire_view({"half": np.full((2,), row.index / 2, np.float32)})


def chunk_of(request: TargetRequest, replica: str) -> TargetChunk:
    parts = [targets_of(row) for row in request.rows]
    digests = tuple(row_digest(SPEC, *pair) for pair in zip(request.rows, parts, strict=True))
    arrays = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    return TargetChunk(request.rows, arrays, digests, replica)


def request_of(step: int) -> TargetRequest:
    rows = tuple(RowId(0, step * NUM_ROWS + row) for row in range(NUM_ROWS))
    tokens = np.array([[row.index] for row in rows], np.int32)
    return TargetRequest(SPEC, rows, tokens, tokens, tokens)


@pytest.mark.parametrize("num_replicas", range(1, PREFETCH + 1))
def test_every_replica_is_kept_busy_up_to_the_steps_that_are_asked_for_ahead(num_replicas):
    config = teacher(steps_per_request=4, rows_per_batch=NUM_ROWS)
    pool = Pool(num_replicas)
    patience = Patience(hedge_after_at_least_s=2 * LONG_S)
    source = PatientSource(pool, lambda event, **details: None, patience)
    stream = TargetStream(
        source,
        request_of,
        range(NUM_STEPS),
        rows_per_step=NUM_ROWS,
        prefetch_steps=PREFETCH,
        steps_per_request=lambda: steps_together(
            config,
            rows_per_step=NUM_ROWS,
            prefetch_steps=PREFETCH,
            num_hosts=1,
            replicas=source.num_replicas(),
        ),
        retry_for_s=LONG_S,
        labels_after_s=None,
        blank={},
        say=lambda event, **details: None,
    )
    digests: list[str] = []
    for begin in range(0, NUM_STEPS, PREFETCH):
        assert pool.all_busy()
        pool.let(begin + PREFETCH)
        for step in range(begin, begin + PREFETCH):
            taken = stream.take(step)
            digests += taken.provenance.digests
            halves = [row.index / 2 for row in request_of(step).rows]
            np.testing.assert_array_equal(taken.encoded["half"][:, 0], halves)
    stream.close()
    rows = [row for step in range(NUM_STEPS) for row in request_of(step).rows]
    assert digests == [row_digest(SPEC, row, targets_of(row)) for row in rows], "in their order"


def test_a_pool_does_not_grow_beyond_what_is_asked_for_ahead():
    config = make_config(
        objective={"kind": "distill"},
        teacher={"checkpoint": "elder", "replicas": 2, "max_replicas": 20, "prefetch_steps": 3},
    )
    bench = Bench(config, Snapshot(teachers=2))
    bench.feed(*TO[State.TRAINING])
    waits = Observed(1, Tally(10, 10.0, 7.5, teacher_busy_s=10.0), 2)
    assert of(SetTeachers, bench.feed(*[waits] * UP_WINDOWS)) == [SetTeachers(3)]
    assert bench.snapshot.scaling.needed == 5


def test_the_fewest_teachers_are_those_of_the_configuration():
    config = make_config(
        objective={"kind": "distill"},
        teacher={
            "checkpoint": "elder",
            "replicas": 5,
            "min_replicas": 5,
            "max_replicas": 9,
            "prefetch_steps": 2,
        },
        cluster={"num_hosts": 2},
    )
    assert bounds_of(config, Scaling()) == Bounds(5, 5)
