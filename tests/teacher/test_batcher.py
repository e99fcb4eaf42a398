"""Requests that share a device: whole answers, full batches, one failing alone."""

import asyncio
import threading
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers import batcher
from workers.batcher import Batcher
from workers.dataset import RowId
from workers.targets_protocol import MIXED, Row, Scored, TargetChunk, TargetRequest, TargetSpec

SPEC = TargetSpec("dataset", "teacher", "codec", 0, MIXED)
LONG_S = 30.0


def request_of(indices: Sequence[int], student: str = "a", alone: bool = False) -> TargetRequest:
    tokens = np.array(indices, np.int32).reshape(-1, 1)
    rows = tuple(RowId(0, index) for index in indices)
    return TargetRequest(SPEC, rows, tokens, tokens, tokens, student, alone)


class Scorer:
    """Answers each row with its own index; a row in `bad` fails its batch."""

    num_rows = 4

    def __init__(self, bad: frozenset[int] = frozenset()):
        self.bad = bad
        self.batches: list[list[int]] = []
        self.may_go = threading.Event()
        self.may_go.set()

    def check(self, request: TargetRequest) -> None:
        if request.spec != SPEC:
            raise ValueError("another teacher")

    def score_rows(self, rows: Sequence[Row]) -> Scored:
        self.may_go.wait(LONG_S)
        indices = [row.request.rows[row.place].index for row in rows]
        self.batches.append(indices)
        if self.bad & set(indices):
            raise RuntimeError(f"cannot score {indices}")
        return Scored({"index": np.array(indices, np.uint32)}, [str(i) for i in indices])


async def answer(pool: Batcher, request: TargetRequest) -> list[TargetChunk]:
    return [chunk async for chunk in pool.score(request)]


def found(chunks: list[TargetChunk]) -> list[int]:
    for chunk in chunks:
        assert [row.index for row in chunk.rows] == chunk.arrays["index"].tolist()
        assert [int(digest) for digest in chunk.digests] == chunk.arrays["index"].tolist()
    return sorted(row.index for chunk in chunks for row in chunk.rows)


@settings(deadline=None, max_examples=60)
@given(
    requests=st.lists(
        st.tuples(
            st.lists(st.integers(0, 99), min_size=1, max_size=9),
            st.sampled_from("ab"),
            st.booleans(),
        ),
        min_size=1,
        max_size=5,
    )
)
def test_every_request_gets_each_of_its_rows(requests):
    async def run():
        scorer = Scorer()
        pool = Batcher(scorer, "replica", fill_within_s=0.0)
        asked = [request_of(*request) for request in requests]
        answers = await asyncio.gather(*(answer(pool, request) for request in asked))
        for (indices, _, _), chunks in zip(requests, answers, strict=True):
            assert found(chunks) == sorted(indices)
        num_rows = sum(len(indices) for indices, _, _ in requests)
        assert pool.counters.rows == num_rows and pool.num_waiting == 0
        assert pool.counters.batches == len(scorer.batches)
        assert all(len(batch) <= scorer.num_rows for batch in scorer.batches)

    asyncio.run(run())


def test_small_requests_that_come_together_fill_one_batch():
    async def run():
        scorer = Scorer()
        pool = Batcher(scorer, "replica", fill_within_s=LONG_S)
        await asyncio.gather(*(answer(pool, request_of([index])) for index in range(8)))
        assert sorted(map(sorted, scorer.batches)) == [[0, 1, 2, 3], [4, 5, 6, 7]]

    asyncio.run(run())


def test_a_batch_that_fails_fails_those_it_served_and_no_others():
    async def run():
        scorer = Scorer(bad=frozenset({2}))
        pool = Batcher(scorer, "replica", fill_within_s=0.0)
        bad, good = await asyncio.gather(
            answer(pool, request_of([0, 1, 2, 3])),
            answer(pool, request_of([4, 5, 6, 7])),
            return_exceptions=True,
        )
        assert isinstance(bad, RuntimeError) and "cannot score [0, 1, 2, 3]" in str(bad)
        assert not isinstance(good, BaseException) and found(good) == [4, 5, 6, 7]
        with pytest.raises(ValueError, match="another teacher"):
            other = TargetSpec("dataset", "other", "codec", 0, MIXED)
            tokens = np.zeros((1, 1), np.int32)
            await answer(pool, TargetRequest(other, (RowId(0, 0),), tokens, tokens, tokens))

    asyncio.run(run())


def test_rows_of_one_who_has_gone_are_not_scored():
    async def run():
        scorer = Scorer()
        scorer.may_go.clear()
        pool = Batcher(scorer, "replica", fill_within_s=0.0)
        gone = asyncio.create_task(answer(pool, request_of(range(100))))
        assert pool.stuck_s == 0
        while pool.num_waiting in (0, 100):
            await asyncio.sleep(0)
        while not (stuck_s := pool.stuck_s):
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert pool.stuck_s > stuck_s, "a batch that does not end is seen to grow old"
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        assert pool.num_waiting == 0
        scorer.may_go.set()
        assert found(await answer(pool, request_of([7]))) == [7]
        assert sum(map(len, scorer.batches)) < 20
        async with asyncio.timeout(LONG_S):
            while pool.stuck_s:
                await asyncio.sleep(0)

    asyncio.run(run())


def test_a_student_with_a_backlog_does_not_hold_up_another():
    async def run():
        scorer = Scorer()
        scorer.may_go.clear()
        pool = Batcher(scorer, "replica", fill_within_s=0.0)
        greedy = asyncio.create_task(answer(pool, request_of(range(1000, 1400), "greedy")))
        while pool.num_waiting in (0, 400):
            await asyncio.sleep(0)
        # What is with the device already is all that comes before the first of the modest one.
        ahead = 400 - pool.num_waiting
        modest = asyncio.create_task(answer(pool, request_of(range(40), "modest")))
        while pool.num_waiting < 440 - ahead:
            await asyncio.sleep(0)
        scorer.may_go.set()
        assert found(await modest) == list(range(40))
        scored = [index for batch in scorer.batches for index in batch]
        last = max(place for place, index in enumerate(scored) if index < 1000)
        assert last + 1 <= ahead + 2 * 40 + scorer.num_rows
        assert found(await greedy) == list(range(1000, 1400))

    asyncio.run(run())


def test_a_chunk_holds_what_is_ready_up_to_its_size(monkeypatch):
    async def run(chunk_bytes: int) -> list[int]:
        monkeypatch.setattr(batcher, "_CHUNK_WITHIN_S", LONG_S)
        monkeypatch.setattr(batcher, "_CHUNK_BYTES", chunk_bytes)
        pool = Batcher(Scorer(), "replica", fill_within_s=0.0)
        return [len(chunk.rows) for chunk in await answer(pool, request_of(range(20)))]

    assert asyncio.run(run(1 << 20)) == [20]
    assert asyncio.run(run(1)) == [4] * 5
