"""A run whose targets are stored needs no teacher to begin, and never mixes two classes."""

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from model.targets import wire_view
from tests.helpers.checkpoints import tiny_config
from workers import step_rows, stored_classes
from workers.dataset import RowId
from workers.host_targets import HostTargets
from workers.jobs import StartPoint, StudentJob
from workers.sameness import agree, agreed_sameness
from workers.step_rows import StepRows
from workers.stored_classes import Choice, StoredClasses, choose_class, find_classes
from workers.target_cache import TargetCache, targets_folder
from workers.targets_protocol import (
    CACHE,
    MIXED,
    Answer,
    TargetChunk,
    TargetRequest,
    TargetSource,
    TargetSpec,
    TeacherUnavailableError,
    row_digest,
)
from workers.teacher import codec_of

NUM_STEPS, NUM_ROWS = 3, 4
SPEC = TargetSpec("dataset", "teacher", "codec", 0, "one")
RUN_ROWS = [RowId(0, index) for index in range(NUM_STEPS * NUM_ROWS)]


def told(event: str, **details: object) -> None:
    pytest.fail(f"{event}: {details}")


def targets_of(spec: TargetSpec, row: RowId) -> dict[str, np.ndarray]:
    """One row's wire arrays, which tell of the class that made them."""
    return wire_view({"half": np.full((2,), row.index + len(spec.sameness) / 16, np.float32)})


def chunk_of(spec: TargetSpec, rows: Sequence[RowId], origin: str = "replica") -> TargetChunk:
    parts = [targets_of(spec, row) for row in rows]
    arrays = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    digests = tuple(row_digest(spec, *pair) for pair in zip(rows, parts, strict=True))
    return TargetChunk(tuple(rows), arrays, digests, origin)


def store(storage: Path, spec: TargetSpec, rows: Sequence[RowId]) -> None:
    cache = TargetCache(str(storage), spec, 2**40, told)
    cache.put(chunk_of(spec, rows))
    cache.close()


# Which class it is.

WHOLE, HALF, LITTLE = set(RUN_ROWS), set(RUN_ROWS[::2]), {*RUN_ROWS[:3], RowId(7, 7), RowId(7, 8)}
ALL_STORED, ANSWERS = "All targets of the run are stored", "A teacher of that class answers"


class Pool:
    """Answers with its class, after some failures."""

    def __init__(self, live: str | None, failures: int = 0):
        self.live, self.failures, self.asked = live, failures, 0

    def __call__(self) -> str:
        self.asked += 1
        if self.live is None or self.asked <= self.failures:
            raise TeacherUnavailableError("there is none")
        return self.live


def choose(stored: dict[str, set[RowId]], pool: Pool, retry_for_s: float = 30.0) -> Choice:
    # Every row twice, as in a second epoch.
    rows = StoredClasses(lambda: iter(RUN_ROWS * 2), stored)
    return choose_class(rows, pool, retry_for_s, threading.Event())


@pytest.mark.parametrize(
    ("stored", "live", "chosen", "asked"),
    [
        ({"one": WHOLE}, "other", Choice("one", ALL_STORED), 0),
        ({"one": WHOLE, "other": HALF}, "other", Choice("other", ANSWERS), 1),
        ({"one": WHOLE, "other": HALF}, "third", Choice("one", ALL_STORED), 1),
        ({"one": WHOLE, "other": HALF}, None, Choice("one", ALL_STORED), 1),
        ({"one": HALF, "other": LITTLE}, "third", Choice("third", ANSWERS), 1),
        ({"one": HALF}, "other", Choice("other", ANSWERS), 1),
        ({}, "other", Choice("other", ANSWERS), 1),
    ],
)
def test_the_pools_class_is_preferred_but_where_another_needs_no_pool(stored, live, chosen, asked):
    pool = Pool(live)
    assert choose(stored, pool) == chosen
    assert pool.asked == asked


def test_a_pool_that_is_late_is_waited_for(monkeypatch):
    """Else a run would take a class whose missing rows nobody can answer."""
    monkeypatch.setattr(stored_classes, "_ASK_AGAIN_AFTER_S", 0)
    pool = Pool("other", failures=1)
    assert choose({"one": HALF}, pool) == Choice("other", ANSWERS)
    assert pool.asked == 2


def test_without_any_pool_the_class_with_most_rows_of_the_run_is_taken():
    sameness, reason = choose({"a": LITTLE, "b": HALF, "c": {RUN_ROWS[0]}}, Pool(None), 0.0)
    assert sameness == "b"
    assert reason == (
        "No teacher answered within 0 s (teacher.retry_for_s), and 6 rows of the run are stored"
    )
    with pytest.raises(TeacherUnavailableError, match=r"retry_for_s.*last try met: there is none"):
        choose({}, Pool(None), 0.0)


def test_only_targets_of_the_same_data_teacher_codec_and_seed_count(tmp_path):
    one, other = SPEC, dataclasses.replace(SPEC, sameness="other")
    store(tmp_path, one, RUN_ROWS[:2])
    store(tmp_path, other, RUN_ROWS[1:4])
    for change in (
        {"dataset_digest": "x"},
        {"teacher_digest": "x"},
        {"codec": "x"},
        {"seed": 1},
        {"sameness": MIXED},
    ):
        store(tmp_path, dataclasses.replace(SPEC, **change), RUN_ROWS)
    damaged = dataclasses.replace(SPEC, sameness="damaged")
    store(tmp_path, damaged, RUN_ROWS)
    Path(targets_folder(str(tmp_path), damaged.key), "spec.json").write_text("{")
    found = find_classes(str(tmp_path), dataclasses.replace(SPEC, sameness=""))
    assert {name: index.rows() for name, index in found.items()} == {
        "one": RUN_ROWS[:2],
        "other": RUN_ROWS[1:4],
    }
    assert find_classes(str(tmp_path / "new"), SPEC) == {}


def test_the_first_proposal_is_agreed_on(tmp_path):
    assert agreed_sameness(str(tmp_path)) is None
    assert agree(str(tmp_path), "one") and not agree(str(tmp_path), "other")
    assert agreed_sameness(str(tmp_path)) == "one"


def test_the_rows_of_all_hosts_are_those_of_each(tmp_path, monkeypatch):
    monkeypatch.setattr(step_rows, "row_at", lambda manifest, weights, seed, at: RowId(seed, at))
    config = tiny_config(tmp_path, seed=3)
    num_rows = config.batch.rows
    parts = (range(num_rows // 2), range(num_rows // 2, num_rows))
    reader: Any = SimpleNamespace(manifest=None)
    hosts = [StepRows(reader, config, part) for part in parts]
    for step in range(3):
        everywhere = hosts[0].ids_everywhere(step)
        assert everywhere == hosts[0].ids(step) + hosts[1].ids(step)
        assert len(set(everywhere)) == num_rows
    for host in hosts:
        host.close()


# What a run makes of it.


class NumberedRows(StepRows):
    """Steps of rows that are merely counted; this host has the second half of each."""

    def __init__(self) -> None:
        self.num_rows = self.first_row = NUM_ROWS // 2

    def ids(self, index: int) -> tuple[RowId, ...]:
        return self.ids_everywhere(index)[NUM_ROWS // 2 :]

    def ids_everywhere(self, index: int) -> tuple[RowId, ...]:
        return tuple(RUN_ROWS[index * NUM_ROWS :][:NUM_ROWS])

    def request(self, index: int, spec: TargetSpec) -> TargetRequest:
        tokens = np.array([list(row) for row in self.ids(index)], np.int32)
        return TargetRequest(spec, self.ids(index), tokens, tokens, tokens)


class Teachers(TargetSource):
    """Teachers of one class, who refuse to speak for another."""

    def __init__(self, sameness: str | None):
        self._sameness = sameness
        self.asked: list[RowId] = []

    def sameness(self) -> str:
        if self._sameness is None:
            raise TeacherUnavailableError("there is none")
        return self._sameness

    def ask(self, request: TargetRequest) -> Iterator[Answer]:
        self.asked += request.rows
        if self._sameness != request.spec.sameness:
            raise TeacherUnavailableError(f"{self._sameness!r} is not {request.spec.sameness!r}")
        yield Answer(chunk_of(request.spec, request.rows), 0.0)


class Run:
    """One host's targets of a new run."""

    def __init__(self, storage: Path, teachers: Teachers, **teacher: Any):
        values = {"checkpoint": "teacher", "retry_for_s": 1e-9, "prefetch_steps": 1} | teacher
        config = tiny_config(
            storage, steps=NUM_STEPS, objective={"kind": "distill"}, teacher=values
        )
        assert config.teacher is not None
        codec = codec_of(config.teacher).name
        self.spec = TargetSpec("dataset", "teacher", codec, config.seed, "one")
        self.url, self.events = str(storage / "runs" / "run"), []
        job = StudentJob(
            config=config,
            storage_url=str(storage),
            run_url=self.url,
            attempt=1,
            start=StartPoint("fresh"),
            dataset_digest="dataset",
            tokenizer_digest="tokenizer",
            teacher_digest="teacher",
        )
        self._job, self._teachers = job, teachers

    def origins(self) -> list[dict[str, int]]:
        """Takes all steps; where the rows of each were from."""
        targets = HostTargets(
            self._job,
            self._teachers,
            NumberedRows(),
            range(NUM_STEPS),
            lambda event, **details: self.events.append((event, details)),
        )
        try:
            return [targets.take(step).ledger["from"] for step in range(NUM_STEPS)]
        finally:
            targets.close()


def test_a_run_with_all_targets_stored_asks_no_teacher_for_anything(tmp_path):
    run = Run(tmp_path, teachers := Teachers(None))
    store(tmp_path, run.spec, RUN_ROWS)
    assert run.origins() == [{CACHE: NUM_ROWS // 2}] * NUM_STEPS
    assert teachers.asked == []
    chosen = {"sameness": "one", "reason": ALL_STORED, "stored": ["one"]}
    assert run.events == [("class_chosen", chosen)]
    assert agreed_sameness(run.url) == "one"
    assert run.origins() == [{CACHE: NUM_ROWS // 2}] * NUM_STEPS
    assert len(run.events) == 1, "a later attempt has nothing to choose"


def test_a_row_that_other_hosts_lack_makes_the_store_incomplete(tmp_path):
    run = Run(tmp_path, Teachers("other"))
    store(tmp_path, run.spec, RUN_ROWS[1:])
    assert run.origins() == [{"replica": NUM_ROWS // 2}] * NUM_STEPS
    assert agreed_sameness(run.url) == "other"


def test_a_run_that_keeps_nothing_does_not_go_by_what_is_stored(tmp_path):
    run = Run(tmp_path, Teachers("other"), cache_bytes=0)
    store(tmp_path, run.spec, RUN_ROWS)
    assert run.origins() == [{"replica": NUM_ROWS // 2}] * NUM_STEPS
    assert run.events == []


def test_teachers_of_another_class_do_not_fill_a_hole_in_what_was_stored(tmp_path):
    run = Run(tmp_path, teachers := Teachers("other"))
    hole = RUN_ROWS[-1]
    store(tmp_path, run.spec, [row for row in RUN_ROWS if row != hole])
    store(tmp_path, run.spec, [hole])
    (shard,) = find_hole(tmp_path, run.spec, hole)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(TeacherUnavailableError, match=r"for step 3 .* 'other' is not 'one'"):
        run.origins()
    assert set(teachers.asked) == {hole}
    assert [name for name, _ in run.events][:2] == ["class_chosen", "targets_damaged"]
    again = Run(tmp_path, Teachers("one"))
    assert again.origins()[-1] == {CACHE: NUM_ROWS // 2 - 1, "replica": 1}


def find_hole(storage: Path, spec: TargetSpec, row: RowId) -> list[Path]:
    index = find_classes(str(storage), spec)[spec.sameness]
    folder = Path(targets_folder(str(storage), spec.key))
    return [folder / place.shard for place in index.places(row)]
