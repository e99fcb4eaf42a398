"""Students on one host, without Ray: their jobs, a teacher beside them, and what they leave."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from configs.run import RunConfig
from model.targets import Codec
from orchestrator.history import read_steps
from tests.helpers.checkpoints import tiny_config
from workers.checkpoint import checkpoint_url
from workers.dataset import RowId
from workers.jobs import StartPoint, StudentJob
from workers.preparer import Prepared
from workers.student import STOP_SIGNAL, Hooks
from workers.targets_protocol import Answer, TargetRequest, TargetSource, TeacherUnavailableError
from workers.teacher import Teacher
from workers.train_step import TrainStep

NUM_STEPS = 6
MESH = {"fsdp": 2, "model": 2}


def config_of(
    storage: Path, name: str, distilled: bool = False, cache_bytes: int = 0, **changes: Any
) -> RunConfig:
    values = {"steps": NUM_STEPS, "mesh": MESH} | changes
    if distilled:
        values["objective"] = {"kind": "distill", "label_weight": 0.25}
        values["teacher"] = {
            "checkpoint": "teacher",
            "codec": {"k": 4, "draws": 5},
            "rows_per_batch": 3,
            "prefetch_steps": 2,
            "retry_for_s": 60,
            "cache_bytes": cache_bytes,
        }
    return tiny_config(storage, name, **values)


def job_of(
    facts: Prepared, config: RunConfig, start: StartPoint | None = None, **changes: Any
) -> StudentJob:
    values: dict[str, Any] = {"attempt": 1, "teacher_digest": None} | changes
    return StudentJob(
        config=config,
        storage_url=config.storage,
        run_url=f"{config.storage}/runs/{config.name}",
        start=start or StartPoint("fresh"),
        dataset_digest=facts.dataset_digest,
        tokenizer_digest=facts.tokenizer_digest,
        **values,
    )


# Settings that no step depends on.
_BESIDE_THE_STEP = {"name", "storage", "data", "cluster", "checkpoint", "evaluation", "tracking"}
_BESIDE_THE_STEP |= {"record", "watchdog", "faults", "anomalies", "start_from"}


def memoised(make: Callable[..., TrainStep]) -> Callable[..., TrainStep]:
    """`make_train_step` that gives runs of equal steps one program, instead of one each."""
    made: dict[Any, TrainStep] = {}

    def make_once(
        config: RunConfig, codec: Codec | None, mesh: Mesh, guarded: bool = False
    ) -> TrainStep:
        key = config.model_dump_json(exclude=_BESIDE_THE_STEP), codec, mesh, guarded
        if key not in made:
            made[key] = make(config, codec, mesh, guarded)
        return made[key]

    return make_once


class Beside(TargetSource):
    """A teacher in this process; every `fails_every`-th chunk is followed by a failure."""

    def __init__(self, teacher: Teacher, fails_every: int = 0):
        self._teacher = teacher
        self._fails_every = fails_every
        self.num_chunks = 0
        self.asked: list[RowId] = []

    def sameness(self) -> str:
        return self._teacher.sameness

    def ask(self, request: TargetRequest) -> Iterator[Answer]:
        self.asked += request.rows
        for chunk in self._teacher.score(request):
            yield Answer(chunk, 0.0)
            self.num_chunks += 1
            if self._fails_every and self.num_chunks % self._fails_every == 0:
                raise TeacherUnavailableError("the replica died")


class StopAfter:
    """Asks to stop once the line of a step has come, as the controller's answer would."""

    def __init__(self, step: int):
        self._step = step
        self._asked = False

    def hooks(self) -> Hooks:
        return Hooks(lambda: STOP_SIGNAL if self._asked else 0, self._progress)

    def _progress(self, line: dict[str, Any]) -> None:
        self._asked = self._asked or line["step"] >= self._step


def losses(config: RunConfig) -> dict[int, list[str]]:
    """Of each step, in hexadecimal; each step is in the record once."""
    lines = read_steps(f"{config.storage}/runs/{config.name}")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    names = ("loss", "ce_loss", "kd_loss", "grad_norm", "lr")
    return {
        line["step"]: [float(line[name]).hex() for name in names if line[name] is not None]
        for line in lines
    }


def continued(config: RunConfig, name: str, step: int) -> RunConfig:
    """A copy of a run as it was when it died some steps after its checkpoint of `step`."""
    runs = Path(config.storage, "runs")
    shutil.copytree(runs / config.name, runs / name)
    for later in range(step + 1, NUM_STEPS + 1):
        path = Path(checkpoint_url(str(runs / name), later))
        shutil.rmtree(path, ignore_errors=True)
        path.with_suffix(".json").unlink(missing_ok=True)
    return config.model_copy(update={"name": name})
