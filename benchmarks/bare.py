"""Runs without Ray: the same student, teacher and evaluator, in this process."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from configs.load import parse_run, read_source
from configs.run import RunConfig
from orchestrator.catalogue import find_checkpoint
from orchestrator.launch import create_run
from orchestrator.run_folder import RunFolder
from workers.evaluator import Evaluation, Evaluator
from workers.jobs import EvaluationJob, StartPoint, StudentJob, TeacherJob
from workers.preparer import Prepared, prepare
from workers.student import Finish, train
from workers.targets_protocol import Answer, TargetRequest, TargetSource
from workers.teacher import Teacher


def preset_config(preset: str, storage: Path, name: str, **changes: Any) -> RunConfig:
    """A preset under another name and storage, some of its settings replaced as a whole."""
    values = read_source(preset) | {"name": name, "storage": str(storage)}
    return parse_run(values | {"tracking": {"wandb": "off"}} | changes, name)


def prepare_here(config: RunConfig) -> tuple[RunFolder, Prepared]:
    """A new run's folder, with its tokenizer and rows made."""
    folder = create_run(config)
    teacher_url = folder.identity()["teacher_url"]
    facts = prepare(
        config.data,
        config.model.vocab_size,
        folder.storage_url,
        folder.url,
        teacher_url,
        2,
        lambda what, done, total: None,
    )
    return folder, facts


def student_job(config: RunConfig, folder: RunFolder, facts: Prepared) -> StudentJob:
    """The first attempt, as a controller would launch it."""
    return StudentJob(
        config=config,
        storage_url=folder.storage_url,
        run_url=folder.url,
        attempt=1,
        start=StartPoint("fresh"),
        dataset_digest=facts.dataset_digest,
        tokenizer_digest=facts.tokenizer_digest,
        teacher_digest=folder.identity()["teacher_digest"],
    )


def make_teacher(config: RunConfig) -> Teacher:
    """The teacher that a distilled run names, in this process."""
    assert config.teacher is not None, "a distilled run has a teacher"
    url, _ = find_checkpoint(config.teacher.checkpoint, config.storage)
    job = TeacherJob("unused", url, config.teacher, config.data.row_length, config.compute_dtype)
    return Teacher(job, "in-process")


class InProcessSource(TargetSource):
    """Asks a teacher in this process."""

    def __init__(self, teacher: Teacher):
        self._teacher = teacher

    def sameness(self) -> str:
        return self._teacher.sameness

    def ask(self, request: TargetRequest) -> Iterator[Answer]:
        for chunk in self._teacher.score(request):
            yield Answer(chunk, 0.0)


class Trained(NamedTuple):
    """A run that was trained here; `train_s` leaves out the making of rows and teacher."""

    folder: RunFolder
    facts: Prepared
    finish: Finish
    train_s: float


def train_here(config: RunConfig) -> Trained:
    """Trains a run to its end."""
    folder, facts = prepare_here(config)
    source = InProcessSource(make_teacher(config)) if config.distilled else None
    began = time.perf_counter()
    finish = train(student_job(config, folder, facts), source)
    return Trained(folder, facts, finish, time.perf_counter() - began)


def evaluate_here(run: Trained) -> Evaluation:
    """Judges a run's last checkpoint on its held-out rows."""
    folder = run.folder
    config = folder.config()
    job = EvaluationJob(
        storage_url=folder.storage_url,
        dataset_digest=run.facts.dataset_digest,
        tokenizer_url=f"{folder.url}/tokenizer.model",
        max_rows=config.data.held_out_rows,
        rows_per_batch=config.evaluation.rows_per_batch,
        compute_dtype=config.compute_dtype,
        teacher_url=folder.identity()["teacher_url"],
    )
    url, _ = find_checkpoint(folder.name, folder.storage_url)
    return Evaluator(job).evaluate(url)
