"""W&B mirrors the record, and costs the run nothing, whatever it does."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from wandb.errors import CommError

from configs.load import parse_run
from configs.run import TrackingConfig
from orchestrator.launch_spec import LaunchSpec
from orchestrator.report_data import read_ledger
from orchestrator.run_folder import RunFolder
from orchestrator.tracking import _Mirror, wandb_mode
from tests.helpers.reported_runs import told_host, told_state, write_events
from tests.helpers.runs import tiny_values
from workers.record import STEPS, LogSegments, SegmentWriter
from workers.storage import join

STATUS = {"teachers": {"wanted": 2, "needed": 3, "replicas": {"RUNNING": 1, "STARTING": 1}}}
NO_TEACHERS = {"teachers": {"wanted": 0, "needed": None, "replicas": {}}}


class FakeRun:
    """Stands for a W&B run: keeps what it is told, or refuses it."""

    def __init__(self, error: Exception | None = None):
        self.error = error
        self.lines: list[dict[str, Any]] = []
        self.metrics: list[tuple[Any, ...]] = []

    def define_metric(self, name: str, **options: Any) -> None:
        self.metrics.append((name, options))

    def log(self, values: dict[str, Any], **options: Any) -> None:
        assert not options, "a step of its own would drop what comes after a rollback"
        if self.error is not None:
            raise self.error
        self.lines.append(values)

    def finish(self) -> None:
        pass

    def named(self, name: str) -> list[Any]:
        return [line[name] for line in self.lines if name in line]


@pytest.fixture(autouse=True)
def _end_log_segments() -> Iterator[None]:
    yield
    root = logging.getLogger()
    for handler in [each for each in root.handlers if isinstance(each, LogSegments)]:
        root.removeHandler(handler)
        handler.close()


@pytest.fixture
def spec(tmp_path: Path) -> LaunchSpec:
    folder = RunFolder(str(tmp_path), "run")
    return LaunchSpec(
        name="run",
        run_id="run-0123",
        storage_url=str(tmp_path),
        run_url=folder.url,
        address="here:1",
        code="c",
        replicas=2,
        teacher_url=None,
        teacher_digest=None,
        start_url=None,
        start_step=0,
    )


def mirror_of(spec: LaunchSpec) -> _Mirror:
    values = tiny_values(Path(spec.storage_url), "run") | {"tracking": {"wandb": "offline"}}
    return _Mirror(spec, parse_run(values, "test"))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeRun:
    run = FakeRun()
    monkeypatch.setattr(wandb, "init", lambda **options: run)
    return run


def write_steps(spec: LaunchSpec, attempt: int, *steps: int) -> None:
    name = f"a{attempt:04d}-h0000"
    writer = SegmentWriter(join(spec.run_url, STEPS), name, flush_s=3600)
    writer._num_segments = steps[0]  # segments of one attempt have their own numbers
    writer.append({"attempt": attempt, "start_step": steps[0] - 1})
    for step in steps:
        line = {"step": step, "loss": 8 / step, "kd_loss": None, "ce_loss": 1.0, "lr": 0.1}
        line |= {"grad_norm": 1.0, "tokens": 64, "step_s": 0.5, "attempt": attempt}
        writer.append({**line, "stall_s": {"data": 0.25}})
    writer.close()


def evaluation(step: int) -> dict[str, Any]:
    return {"step": step, "loss": 2.0, "bits_per_byte": 1.5, "kl_to_teacher": None}


def test_each_step_is_mirrored_once(spec: LaunchSpec, fake: FakeRun):
    mirror = mirror_of(spec)
    mirror.mirror(NO_TEACHERS)
    assert fake.lines == []
    write_steps(spec, 1, 1, 2)
    mirror.mirror(NO_TEACHERS)
    mirror.mirror(NO_TEACHERS)
    write_steps(spec, 1, 3)
    mirror.mirror(NO_TEACHERS)
    assert fake.named("train/step") == [1, 2, 3]
    first = fake.lines[0]
    assert first["train/loss"] == 8.0
    assert first["stall/data_s"] == 0.25
    assert first["train/tokens_per_s"] == 128
    assert "train/kd_loss" not in first
    assert ("*", {"step_metric": "train/step"}) in fake.metrics


def test_steps_made_again_after_a_fault_are_not_mirrored_again(spec: LaunchSpec, fake: FakeRun):
    mirror = mirror_of(spec)
    write_steps(spec, 1, 1, 2, 3)
    mirror.mirror(NO_TEACHERS)
    write_steps(spec, 2, 2, 3, 4)
    mirror.mirror(NO_TEACHERS)
    assert fake.named("train/step") == [1, 2, 3, 4]


def test_evaluations_come_with_their_own_step(spec: LaunchSpec, fake: FakeRun):
    folder = RunFolder(spec.storage_url, spec.name)
    mirror = mirror_of(spec)
    write_steps(spec, 1, 1, 2, 3)
    folder.write_evaluation(evaluation(2))
    mirror.mirror(NO_TEACHERS)
    mirror.mirror(NO_TEACHERS)
    told = [line for line in fake.lines if "held_out/bits_per_byte" in line]
    assert told == [{"train/step": 2, "held_out/loss": 2.0, "held_out/bits_per_byte": 1.5}]


def test_teachers_are_gauged_by_state(spec: LaunchSpec, fake: FakeRun):
    mirror = mirror_of(spec)
    write_steps(spec, 1, 1)
    mirror.mirror(STATUS)
    gauges = {"teachers/running": 1, "teachers/starting": 1}
    gauges |= {"teachers/wanted": 2, "teachers/needed": 3}
    assert fake.lines[-1] == {"train/step": 1, **gauges}


def test_goodput_is_gauged_as_the_record_grows(spec: LaunchSpec, fake: FakeRun):
    mirror = mirror_of(spec)
    write_events(
        RunFolder(spec.storage_url, spec.name),
        (0, "controller_started", {"state": "preparing", "away_s": None}),
        told_state(3, "starting", 1),
        *told_host(4, 1, 0),
        told_state(12, "finished", 1),
    )
    write_steps(spec, 1, 1, 2)
    mirror.mirror(NO_TEACHERS)
    (line,) = [line for line in fake.lines if "goodput/share" in line]
    ledger = read_ledger(RunFolder(spec.storage_url, spec.name))
    assert ledger is not None
    assert line["train/step"] == 2 and line["goodput/share"] == ledger.goodput
    assert ledger.goodput == pytest.approx(0.5 / 12)
    assert line["goodput/step_s"] == line["goodput/stall_data_s"] == pytest.approx(0.5)
    lines = len(fake.lines)
    mirror.mirror(NO_TEACHERS)
    mirror.finish()
    assert len(fake.lines) == lines, "nothing new has been heard"


def test_the_last_goodput_is_gauged_whenever_the_one_before_was(spec: LaunchSpec, fake: FakeRun):
    mirror = mirror_of(spec)
    folder = RunFolder(spec.storage_url, spec.name)
    write_events(folder, (0, "controller_started", {"state": "preparing", "away_s": None}))
    mirror.mirror(NO_TEACHERS)
    write_events(folder, told_state(7, "failed", 0), writer="controller-2")
    mirror.mirror(NO_TEACHERS)
    assert len(fake.named("goodput/share")) == 1
    mirror.finish()
    assert fake.named("goodput/preparing_s")[-1] == 7


def test_a_new_mirror_goes_on_where_the_last_one_was(spec: LaunchSpec, fake: FakeRun):
    folder = RunFolder(spec.storage_url, spec.name)
    write_steps(spec, 1, 1, 2)
    folder.write_evaluation(evaluation(2))
    mirror_of(spec).mirror(NO_TEACHERS)
    fake.lines.clear()
    write_steps(spec, 1, 3)
    folder.write_evaluation(evaluation(3))
    mirror_of(spec).mirror(NO_TEACHERS)
    assert fake.named("train/step") == [3, 3]


def test_what_keeps_it_from_starting_stops_nothing_and_is_tried_again(
    spec: LaunchSpec,
    fake: FakeRun,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    now_s = [1000.0]
    errors: list[Exception | None] = [
        OSError("the storage is away"),
        CommError("the server is down"),
    ]
    clock = SimpleNamespace(monotonic=lambda: now_s[0], time=time.time)
    monkeypatch.setattr("orchestrator.tracking.time", clock)

    def read() -> dict[str, Any]:
        if isinstance(errors[0], OSError):
            raise errors[0]
        return {"step": 1, "evaluated": []}

    def init(**options: Any) -> FakeRun:
        if errors[0] is not None:
            raise errors[0]
        return fake

    monkeypatch.setattr(wandb, "init", init)
    mirror = mirror_of(spec)
    monkeypatch.setattr(mirror._folder, "tracking", read)
    write_steps(spec, 1, 1, 2, 3)
    mirror.mirror(STATUS)
    assert "the storage is away" in caplog.text
    errors[:] = errors[1:]
    mirror.mirror(STATUS)
    assert "the server is down" not in caplog.text, "it has just been tried"
    now_s[0] += 61
    mirror.mirror(STATUS)
    assert "the server is down" in caplog.text
    mirror.finish()
    errors[:] = [None]
    now_s[0] += 61
    mirror.mirror(NO_TEACHERS)
    assert fake.named("train/step") == [2, 3], "from where the last mirror was"


def test_a_wandb_that_takes_nothing_for_a_while_stops_nothing(
    spec: LaunchSpec, fake: FakeRun, caplog: pytest.LogCaptureFixture
):
    mirror = mirror_of(spec)
    fake.error = RuntimeError("the server is down")
    write_steps(spec, 1, 1, 2)
    mirror.mirror(STATUS)
    assert "W&B did not take the newest lines" in caplog.text
    fake.error = None
    mirror.mirror(NO_TEACHERS)
    # They were in the record all the time.
    assert fake.named("train/step") == [1, 2]
    assert RunFolder(spec.storage_url, spec.name).tracking()["step"] == 2


def test_a_wandb_that_cannot_finish_stops_nothing(
    spec: LaunchSpec, fake: FakeRun, monkeypatch: pytest.MonkeyPatch
):
    mirror = mirror_of(spec)
    mirror.mirror(NO_TEACHERS)

    def refuse() -> None:
        raise RuntimeError("the server is down")

    monkeypatch.setattr(fake, "finish", refuse)
    mirror.finish()


def test_wandb_itself_takes_the_run_offline(spec: LaunchSpec, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    write_steps(spec, 1, 1, 2)
    RunFolder(spec.storage_url, spec.name).write_evaluation(evaluation(2))
    mirror = mirror_of(spec)
    mirror.mirror(STATUS)
    assert mirror._run is not None
    assert mirror._run.id == "run-0123"
    summary = dict(mirror._run.summary)
    mirror.finish()
    assert summary["train/loss"] == 4.0
    assert summary["held_out/bits_per_byte"] == 1.5
    files = list(Path(spec.run_url, "wandb").rglob("run-run-0123.wandb"))
    assert len(files) == 1
    assert files[0].stat().st_size > 0
    position = RunFolder(spec.storage_url, spec.name).tracking()
    assert position == {"step": 2, "evaluated": [2]}


def test_wandb_itself_can_be_tried_again(
    spec: LaunchSpec, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody is there
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    wandb.teardown()  # it reads the environment once
    monkeypatch.setattr("orchestrator.tracking._TRY_AGAIN_AFTER_S", 0.0)
    modes = iter(["online", "offline"])
    monkeypatch.setattr("orchestrator.tracking.wandb_mode", lambda tracking, has_key: next(modes))
    write_steps(spec, 1, 1, 2)
    mirror = mirror_of(spec)
    mirror.mirror(NO_TEACHERS)
    assert "W&B could not be started" in caplog.text
    mirror.mirror(NO_TEACHERS)
    mirror.finish()
    assert RunFolder(spec.storage_url, spec.name).tracking()["step"] == 2


@pytest.mark.parametrize(
    ("setting", "has_key", "mode"),
    [
        ("auto", True, "online"),
        ("auto", False, "offline"),
        ("offline", True, "offline"),
        ("online", False, "online"),
    ],
)
def test_mode(setting: Any, has_key: bool, mode: str):
    assert wandb_mode(TrackingConfig(wandb=setting), has_key) == mode
