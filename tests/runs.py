"""Small runs for tests: text, settings, and a teacher, without a cluster."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.load import parse_run
from configs.run import RunConfig
from orchestrator.launch import create_run, find_checkpoint
from orchestrator.run_folder import RunFolder
from workers.jobs import StartPoint, StudentJob, TeacherJob
from workers.preparer import prepare
from workers.student import train
from workers.targets_protocol import Answer, TargetRequest
from workers.teacher import Teacher

VOCAB_SIZE = 320


def text_folder(path: Path) -> Path:
    """Forty small files of made-up prose; always the same."""
    folder = path / "text"
    folder.mkdir(exist_ok=True)
    words = [
        "the",
        "still",
        "house",
        "keeps",
        "its",
        "fire",
        "low",
        "and",
        "the",
        "copper",
        "warm",
        "until",
        "the",
        "morning",
        "run",
    ]
    for number in range(40):
        chosen = [words[(number * 7 + i * i) % len(words)] for i in range(120)]
        (folder / f"{number:02d}.txt").write_text(" ".join(chosen) + ".\n")
    return folder


def tiny_values(storage: Path, name: str) -> dict[str, Any]:
    """A next-token run of seconds on `text_folder`; change what a test is about."""
    return {
        "name": name,
        "storage": str(storage),
        "steps": 4,
        "model": {"preset": "tiny", "vocab_size": VOCAB_SIZE},
        "data": {
            "sources": [{"name": "prose", "path": str(storage / "text")}],
            "tokenizer": {"kind": "train", "vocab_size": VOCAB_SIZE},
            "row_length": 32,
            "held_out_fraction": 0.2,
            "held_out_rows": 8,
        },
        "batch": {"rows": 8},
        "checkpoint": {"every_steps": 2},
        "evaluation": {"rows_per_batch": 4},
        "tracking": {"wandb": "off"},
        "record": {"flush_s": 0.2},
    }


def make_teacher(storage: Path, text: Path, name: str = "teacher") -> str:
    """A run `name` with a checkpoint, trained for a few steps in this process; its state digest."""
    assert text.parent == storage
    config = parse_run(tiny_values(storage, name) | {"cluster": {"devices_per_host": 8}}, "test")
    return train(first_job(config, create_run(config))).digest


def first_job(config: RunConfig, folder: RunFolder) -> StudentJob:
    """The first attempt of a run, with its tokenizer and rows made."""
    identity = folder.identity()
    facts = prepare(
        config.data,
        config.model.vocab_size,
        folder.storage_url,
        folder.url,
        identity["teacher_url"],
        1,
        lambda what, done, total: None,
    )
    return StudentJob(
        config=config,
        storage_url=folder.storage_url,
        run_url=folder.url,
        attempt=1,
        start=StartPoint("fresh"),
        dataset_digest=facts.dataset_digest,
        tokenizer_digest=facts.tokenizer_digest,
        teacher_digest=identity["teacher_digest"],
    )


class InProcessSource:
    """Asks the teacher of a distilled run, in this process."""

    def __init__(self, config: RunConfig):
        assert config.teacher is not None
        url, _ = find_checkpoint(config.teacher.checkpoint, config.storage)
        job = TeacherJob(url, config.teacher, config.data.row_length, config.compute_dtype)
        self._teacher = Teacher(job, "in-process")

    def ask(self, request: TargetRequest) -> Iterator[Answer]:
        for chunk in self._teacher.score(request):
            yield Answer(chunk, 0.0)
