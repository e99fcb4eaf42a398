"""What each kind of worker is told when it starts: plain data, free of JAX and Ray."""

import dataclasses
from typing import Literal

from configs.run import RunConfig, TeacherConfig
from workers.epochs import Epoch
from workers.memory_tier import Source


@dataclasses.dataclass(frozen=True)
class StartPoint:
    """Where an attempt's state comes from."""

    kind: Literal["fresh", "resume", "weights", "fork"]
    url: str | None = None
    step: int = 0
    memory: Source | None = None
    """Snapshots to resume from, instead of a checkpoint."""
    saved_step: int | None = None
    """The newest step on storage, to which a rollback goes, where that is not `step`."""


Work = Literal["train", "targets"]
"""What a run's hosts do: train a student, or only have its targets put on storage."""


@dataclasses.dataclass(frozen=True)
class StudentJob:
    """An attempt; the same on every host."""

    config: RunConfig
    storage_url: str
    run_url: str
    attempt: int
    start: StartPoint
    dataset_digest: str
    tokenizer_digest: str
    teacher_digest: str | None
    teacher_url: str | None = None
    """Where hidden states find their embedding; other targets need no teacher here."""
    work: Work = "train"
    epoch: Epoch | None = None
    """That of the controller, outside of which nothing of this attempt counts; None without one."""
    skip_steps: tuple[int, ...] = ()
    """Steps that the state is not to take in."""


@dataclasses.dataclass(frozen=True)
class TeacherJob:
    """A replica of the teacher."""

    storage_url: str
    checkpoint_url: str
    config: TeacherConfig
    row_length: int
    compute_dtype: str
    num_devices: int = 1
    """Devices of its host over which a copy is sharded."""
    not_on: str | None = None
    """Ray's name of the TPU slices (`v4-16`) that are the students'."""


@dataclasses.dataclass(frozen=True)
class EvaluationJob:
    """What checkpoints are judged on."""

    storage_url: str
    dataset_digest: str
    tokenizer_url: str
    max_rows: int
    rows_per_batch: int
    compute_dtype: str
    teacher_url: str | None
    window: int | None = None
    """Of the judged model's local layers, if it is not to be the trained one."""
