"""A run that loses its teacher, goes on with labels alone and comes back, against a replay of it.

The replay is another run, undisturbed and without a pool. It is told which rows had labels alone,
and has to come to the same losses and the same state. Costs one gang, two teachers one after the
other, and the replay in a process of its own.
"""

import itertools
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import ray

from configs.run import RunConfig
from orchestrator import history
from orchestrator.cpu_devices import cpu_devices
from tests.helpers.distilled_runs import ENDLESS, DistilledRun, wait_until
from tests.helpers.same_run import assert_same_steps
from workers.dataset import RowId
from workers.patience import DEATHS_OF_A_POISONED_ROW, PoisonedRowError
from workers.rows import RowReader
from workers.step_rows import StepRows
from workers.target_ledger import ledger_entry
from workers.targets_protocol import (
    LABELS,
    MIXED,
    Answer,
    TargetRequest,
    TargetSource,
    TargetSpec,
)


@pytest.fixture(scope="module")
def disturbed(storage: Path, address: str) -> DistilledRun:
    """A run whose one teacher was killed; it did not wait for the next one."""
    run = DistilledRun(storage, address, "labels", ENDLESS, labels_after_s=1.0)
    run.goes_on()
    (ready,) = run.events("teacher_ready")
    os.kill(ready["pid"], signal.SIGKILL)
    wait_until(lambda: bool(run.events("labels_alone")))
    run.goes_on()
    wait_until(lambda: len(origins(run) - {LABELS}) == 2)
    run.stop()
    return run


def origins(run: DistilledRun) -> set[str]:
    """Who gave the targets of the run's rows so far."""
    lines = history.read_steps(run.folder.url)
    return {origin for line in lines for origin in line["targets"]["from"]}


@pytest.mark.shows("only teacher: killed, labels go on alone")
def test_without_teachers_labels_take_over_and_targets_come_back(disturbed: DistilledRun) -> None:
    lines = history.read_steps(disturbed.folder.url)
    ready = [e["who"].removeprefix("teacher-") for e in disturbed.events("teacher_ready")]
    assert origins(disturbed) == {*ready, LABELS} and len(ready) == 2
    assert disturbed.events("labels_alone") and disturbed.events("targets_again")
    assert {line["attempt"] for line in lines} == {1}, "teachers that are away cost no attempt"


def test_a_run_told_which_rows_had_labels_alone_ends_the_same(
    disturbed: DistilledRun, storage: Path, address: str
) -> None:
    lines = history.read_steps(disturbed.folder.url)
    told = [line["targets"] for line in lines]
    config = disturbed.folder.config()
    assert config.teacher is not None
    # One request at a time, of one step each, so that the source knows which step is asked for.
    settings = {"prefetch_steps": 1, "steps_per_request": 1, "labels_after_s": None}
    changes = {
        "name": "replay",
        "steps": len(lines),
        "teacher": config.teacher.model_copy(update=settings),
        "checkpoint": config.checkpoint.model_copy(update={"every_steps": len(lines)}),
    }
    config = config.model_copy(update=changes)
    # A process like the run's hosts and teachers: other numbers of devices and threads round
    # differently.
    task = ray.remote(num_cpus=0, runtime_env={"env_vars": cpu_devices(1)})(replay)
    url, digest = ray.get(task.remote(config, told))
    assert_same_steps(disturbed.folder.url, url)
    assert disturbed.status()["digest"] == digest


def replay(config: RunConfig, told: list[dict[str, Any]]) -> tuple[str, str]:
    """Trains with the decisions that a ledger tells of; the run's folder, the state's digest."""
    from benchmarks.bare import make_teacher, prepare_here, student_job
    from workers.cache import cache_dir, keep_compiled_programs
    from workers.student import train

    keep_compiled_programs()
    folder, facts = prepare_here(config)
    reader = RowReader.open(folder.storage_url, facts.dataset_digest, "train", cache_dir())
    rows = StepRows(reader, config, range(config.batch.rows))
    steps = [rows.ids(index) for index in range(config.steps)]
    finish = train(student_job(config, folder, facts), Replay(make_teacher(config), steps, told))
    return folder.url, finish.digest


class Replay(TargetSource):
    """A teacher in this process that gives up the rows which had labels alone in another run.

    Args:
        steps: the rows of each step.
        told: the ledger's entry of each step of that run.
    """

    def __init__(self, teacher: Any, steps: list[tuple[RowId, ...]], told: list[dict[str, Any]]):
        self._teacher = teacher
        self._to_come = zip(steps, told, strict=True)
        self._open: set[RowId] = set()
        self._given_up: set[RowId] = set()

    def sameness(self) -> str:
        return self._teacher.sameness

    def ask(self, request: TargetRequest) -> Iterator[Answer]:
        if not self._open:
            rows, entry = next(self._to_come)
            assert set(request.rows) == set(rows)
            self._open, self._given_up = set(rows), self._without_targets(request, rows, entry)
        wanted = [at for at, row in enumerate(request.rows) if row not in self._given_up]
        if wanted:
            for chunk in self._teacher.score(request.only(wanted)):
                self._open -= set(chunk.rows)
                yield Answer(chunk, 0.0)
        if self._open:
            row = self._open.pop()
            raise PoisonedRowError(row, DEATHS_OF_A_POISONED_ROW)

    def _without_targets(
        self, request: TargetRequest, rows: Sequence[RowId], entry: dict[str, Any]
    ) -> set[RowId]:
        """The rows of a step that had labels alone."""
        if entry["from"].get(LABELS, 0) in (0, len(rows)):
            return set(rows if LABELS in entry["from"] else ())
        digests: dict[RowId, str] = {}
        for chunk in self._teacher.score(request):
            digests |= zip(chunk.rows, chunk.digests, strict=True)
        places = places_without_targets(request.spec, entry, [digests[row] for row in rows])
        return {rows[place] for place in places}


def places_without_targets(
    spec: TargetSpec, entry: dict[str, Any], digests: Sequence[str]
) -> tuple[int, ...]:
    """Which of a step's rows had labels alone: the ledger's digest fits no others.

    Args:
        entry: the step's entry in the ledger.
        digests: of the targets of each of its rows.
    """
    for places in itertools.combinations(range(len(digests)), entry["from"].get(LABELS, 0)):
        said = ["" if place in places else digest for place, digest in enumerate(digests)]
        if ledger_entry(spec, 0, said, said)["digest"] == entry["digest"]:
            return places
    raise AssertionError("the targets of that step are not those of this teacher")


def test_the_ledger_of_a_step_tells_which_of_its_rows_had_labels_alone() -> None:
    spec = TargetSpec("dataset", "teacher", "codec", 0, MIXED)
    digests = [f"{row:032x}" for row in range(8)]
    for had_targets in itertools.product((True, False), repeat=8):
        said = [digest if had else "" for digest, had in zip(digests, had_targets, strict=True)]
        origins = ["replica" if had else LABELS for had in had_targets]
        entry = ledger_entry(spec, 0, said, origins)
        alone = places_without_targets(spec, entry, digests)
        assert alone == tuple(place for place in range(8) if not had_targets[place])
