"""However often a run stops and goes on, its losses and its end are those of one run."""

import dataclasses
import itertools
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs.distillation import CodecConfig
from configs.run import RunConfig
from model.sharding import make_mesh
from orchestrator.history import read_events, read_steps
from orchestrator.targets import _building_config
from tests.checkpoints import fresh_state, save_state, tiny_config
from tests.runs import VOCAB_SIZE, text_folder
from workers import checkpoint
from workers.checkpoint import checkpoint_url, load_params, read_entry, read_meta
from workers.jobs import StartPoint, StudentJob, TeacherJob
from workers.preparer import Prepared, prepare
from workers.rows import RowId
from workers.student import STOP_SIGNAL, Finish, Hooks, train
from workers.tally import Tally
from workers.target_builder import build_targets
from workers.targets_protocol import (
    CACHE,
    Answer,
    TargetRequest,
    TargetSource,
    TeacherUnavailableError,
)
from workers.teacher import Teacher, codec_of
from workers.unembedding import load_unembedding

NUM_STEPS = 6
MESH = {"fsdp": 2, "model": 2}


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Each attempt compiles its step; as in a run, later ones find it compiled."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], str(tmp_path_factory.mktemp("jax")))
    jax.config.update(names[1], 0.5)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("storage")
    text_folder(path)
    return path


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


@pytest.fixture(scope="module")
def facts(storage: Path) -> Prepared:
    data, run = config_of(storage, "teacher").data, str(storage / "runs" / "teacher")
    return prepare(data, VOCAB_SIZE, str(storage), run, None, 1, lambda what, done, total: None)


@pytest.fixture(scope="module")
def teacher(storage: Path) -> tuple[Teacher, str]:
    config = config_of(storage, "teacher")
    url, meta = save_state(str(storage / "runs" / "teacher"), fresh_state(config, 5), config)
    settings = config_of(storage, "student", distilled=True).teacher
    assert settings is not None
    return Teacher(
        TeacherJob("unused", url, settings, 32, "float32"), "replica"
    ), meta.params_digest


def teacher_url(storage: Path) -> str:
    return checkpoint_url(str(storage / "runs" / "teacher"), 0)


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


@pytest.fixture(scope="module")
def undisturbed(storage: Path, facts: Prepared) -> tuple[RunConfig, Finish]:
    config = config_of(storage, "undisturbed")
    return config, train(job_of(facts, config))


@pytest.fixture(scope="module")
def distilled(storage, facts, teacher) -> tuple[RunConfig, Finish]:
    config = config_of(storage, "distilled", distilled=True)
    job = job_of(facts, config, teacher_digest=teacher[1])
    return config, train(job, Beside(teacher[0]))


def test_a_run_leaves_a_complete_record_and_its_checkpoints(undisturbed, facts):
    config, finish = undisturbed
    run = Path(config.storage, "runs", config.name)
    assert finish.step == NUM_STEPS and not finish.stopped
    lines = read_steps(str(run))
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for line in lines:
        assert line["loss"] == line["ce_loss"] and line["kd_loss"] is None
        assert line["tokens"] > 0 and line["step_s"] > 0 and line["attempt"] == 1
        assert all(seconds >= 0 for seconds in line["stall_s"].values())
    assert lines[-1]["loss"] < lines[0]["loss"]
    for step in (2, 4, 6):
        meta = read_entry(str(run), step)
        assert meta == read_meta(checkpoint_url(str(run), step))
        assert (meta.step, meta.data_position) == (step, 8 * step)
        assert meta.dataset_digest == facts.dataset_digest
        assert meta.tokenizer_digest == facts.tokenizer_digest
    assert finish.digest == read_entry(str(run), 6).digest
    events = [event for event in read_events(str(run)) if event["event"] == "checkpoint"]
    assert [(event["step"], event["digest"]) for event in events] == [
        (step, read_entry(str(run), step).digest) for step in (2, 4, 6)
    ]


def continued(config: RunConfig, name: str, step: int) -> RunConfig:
    """A copy of a run as it was when it died some steps after its checkpoint of `step`."""
    runs = Path(config.storage, "runs")
    shutil.copytree(runs / config.name, runs / name)
    for later in range(step + 1, NUM_STEPS + 1):
        path = Path(checkpoint_url(str(runs / name), later))
        shutil.rmtree(path, ignore_errors=True)
        path.with_suffix(".json").unlink(missing_ok=True)
    return config.model_copy(update={"name": name})


def test_resuming_gives_the_bits_of_a_run_that_never_died(undisturbed, facts):
    config, finish = undisturbed
    again = continued(config, "resumed", 2)
    url = checkpoint_url(f"{again.storage}/runs/{again.name}", 2)
    # An older attempt was being saved when it died: a folder, and no entry.
    cut_off = Path(checkpoint_url(f"{again.storage}/runs/{again.name}", 4))
    shutil.copytree(url, cut_off)
    (cut_off / "commit_success.txt").unlink()
    found = train(job_of(facts, again, StartPoint("resume", url, 2), attempt=2))
    assert found == finish
    assert losses(again) == losses(config)
    lines = read_steps(f"{again.storage}/runs/{again.name}")
    assert [line["attempt"] for line in lines] == [1, 1, 2, 2, 2, 2]
    for step in (4, 6):
        entries = [read_entry(f"{c.storage}/runs/{c.name}", step) for c in (again, config)]
        assert entries[0].digest == entries[1].digest


def test_a_wait_for_a_teacher_begins_when_the_step_before_is_done(storage, facts, teacher):
    """Else the time that the devices still work would count as stall."""
    done = [threading.Event() for _ in range(NUM_STEPS + 1)]
    done[0].set()

    class Late(Beside):
        def ask(self, request: TargetRequest) -> Iterator[Answer]:
            assert done[next(steps)].wait(60)
            return super().ask(request)

    steps = itertools.count()
    config = config_of(storage, "late", distilled=True)
    assert config.teacher is not None
    # One request at a time, so that they are asked in order.
    changed = config.teacher.model_copy(update={"prefetch_steps": 1})
    config = config.model_copy(update={"teacher": changed})
    job = job_of(facts, config, teacher_digest=teacher[1])
    tally = Tally()

    def progress(line: dict[str, Any]) -> None:
        nonlocal tally
        tally = tally.plus(line)
        done[line["step"]].set()

    train(job, Late(teacher[0]), Hooks(progress=progress))
    assert tally.steps == NUM_STEPS
    assert 0 < tally.teacher_stall_s <= tally.step_s
    assert tally.teacher_busy_s > 0
    assert tally.since(tally) == Tally()


def test_distilling_resumes_to_the_same_bits_beside_a_teacher_that_dies(distilled, facts, teacher):
    config, finish = distilled
    assert all(float.fromhex(line[2]) > 0 for line in losses(config).values()), "kd_loss"
    again = continued(config, "distilled-again", 4)
    run = f"{again.storage}/runs/{again.name}"
    source = Beside(teacher[0], fails_every=2)
    start = StartPoint("resume", checkpoint_url(run, 4), 4)
    job = job_of(facts, again, start, attempt=2, teacher_digest=teacher[1])
    assert train(job, source) == finish
    assert losses(again) == losses(config)
    retries = [event for event in read_events(run) if event["event"] == "teacher_retry"]
    assert retries and {event["step"] for event in retries} <= {5, 6}
    assert {event["reason"] for event in retries} == {"the replica died"}


def test_stored_targets_are_not_asked_for_again(storage, distilled, facts, teacher):
    """By an attempt that resumes, and by another run; and what is damaged is."""
    config = config_of(storage, "storing", distilled=True, cache_bytes=2**30)
    job = job_of(facts, config, teacher_digest=teacher[1])
    source = Beside(teacher[0])
    assert train(job, source) == distilled[1]
    rows = set(source.asked)
    origins = origins_of(config)
    assert origins["replica"] >= len(source.asked) == len(rows)
    assert set(origins) <= {"replica", CACHE}, "small sources give some rows a second time"

    run_url = f"{storage}/runs/storing"
    again = continued(config, "storing-again", 4)
    start = StartPoint("resume", checkpoint_url(run_url, 4), 4)
    job = job_of(facts, again, start, attempt=2, teacher_digest=teacher[1])
    source = Beside(teacher[0])
    assert train(job, source) == distilled[1]
    assert source.asked == []

    shards = list(Path(storage, "targets").glob("*/*.npz"))
    content = bytearray(shards[0].read_bytes())
    content[2000] ^= 1
    shards[0].write_bytes(content)
    mended = config_of(storage, "mended", distilled=True, cache_bytes=2**30)
    job = job_of(facts, mended, teacher_digest=teacher[1])
    source = Beside(teacher[0])
    assert train(job, source) == distilled[1]
    told = [e for e in read_events(f"{storage}/runs/mended") if e["event"] == "targets_damaged"]
    assert [event["row"] for event in told] == [list(row) for row in source.asked]
    assert len(source.asked) == 1
    ledgers = [ledger_of(each) for each in (distilled[0], config, again, mended)]
    assert ledgers[0] == ledgers[1] == ledgers[2] == ledgers[3]
    for each in (config, again, mended):
        assert losses(each) == losses(distilled[0])


def test_targets_built_ahead_are_those_of_the_run(storage, distilled, facts, teacher):
    """Stopped and begun again, done, of use to the run, and refused for lack of room."""
    config = config_of(storage, "ahead", distilled=True, cache_bytes=2**30)
    job = dataclasses.replace(
        job_of(facts, config, teacher_digest=teacher[1]), storage_url=f"{storage}/ahead"
    )
    (storage / "ahead").mkdir()
    (storage / "ahead" / "datasets").symlink_to(storage / "datasets")
    building = dataclasses.replace(job, config=_building_config(config, None, None))
    stopped = build_targets(building, Beside(teacher[0]), StopAfter(2).hooks())
    assert stopped.stopped and stopped.step == 2
    lines: list[dict[str, Any]] = []
    finish = build_targets(building, Beside(teacher[0]), Hooks(progress=lines.append))
    assert not finish.stopped and finish.step == NUM_STEPS
    assert [line["targets"]["from"] for line in lines[:2]] == [{CACHE: 8}] * 2
    idle = Beside(teacher[0])
    assert build_targets(building, idle, Hooks()) == finish
    assert train(job, idle) == distilled[1]
    assert idle.asked == []
    assert origins_of(config) == {CACHE: 8 * NUM_STEPS}
    assert losses(config) == losses(distilled[0])
    assert [line["targets"]["digest"] for line in lines] == ledger_of(distilled[0])

    small = config_of(storage, "small", distilled=True, cache_bytes=1000)
    job = dataclasses.replace(building, config=_building_config(small, None, None))
    shutil.rmtree(storage / "ahead" / "targets")
    with pytest.raises(ValueError, match=r"Not all targets .* \(teacher.cache_bytes\); make room"):
        build_targets(job, idle, Hooks())


def origins_of(config: RunConfig) -> Counter[str]:
    lines = read_steps(f"{config.storage}/runs/{config.name}")
    return sum((Counter(line["targets"]["from"]) for line in lines), Counter())


def ledger_of(config: RunConfig) -> list[str]:
    """The digests of the targets of each step, wherever they came from."""
    lines = read_steps(f"{config.storage}/runs/{config.name}")
    assert all(sum(line["targets"]["from"].values()) == 8 for line in lines)
    assert config.teacher is not None
    assert {line["targets"]["codec"] for line in lines} == {codec_of(config.teacher).name}
    return [line["targets"]["digest"] for line in lines]


@pytest.mark.parametrize("every_steps", [1, 100])
def test_a_stop_saves_at_once_and_can_be_resumed(storage, undisturbed, facts, every_steps):
    config = config_of(storage, f"stopped-{every_steps}", checkpoint={"every_steps": every_steps})
    finish = train(job_of(facts, config), hooks=StopAfter(2).hooks())
    assert finish.stopped and 2 < finish.step <= 5, "some steps are already on their way"
    run = f"{storage}/runs/{config.name}"
    assert read_entry(run, finish.step).digest == finish.digest
    assert max(losses(config)) == finish.step
    if every_steps == 1:
        return
    start = StartPoint("resume", checkpoint_url(run, finish.step), finish.step)
    assert train(job_of(facts, config, start, attempt=2)) == undisturbed[1]
    assert losses(config) == losses(undisturbed[0])


def test_lines_are_durable_before_their_checkpoint_counts(storage, facts, monkeypatch):
    """No entry may be seen before the lines of its steps are on storage."""
    config = config_of(storage, "durable", record={"flush_s": 3600.0})
    run = f"{storage}/runs/durable"
    seen: dict[int, list[int]] = {}
    write = checkpoint.write_json

    def look_and_write(url: str, value: dict) -> None:
        seen[value["step"]] = [line["step"] for line in read_steps(run)]
        write(url, value)

    monkeypatch.setattr(checkpoint, "write_json", look_and_write)
    train(job_of(facts, config))
    assert seen[2][:2] == [1, 2] and seen[6] == [1, 2, 3, 4, 5, 6]


def test_starting_from_weights_takes_the_parameters_alone(storage, facts, undisturbed):
    source = checkpoint_url(f"{storage}/runs/undisturbed", 4)
    config = config_of(storage, "from-weights", steps=1)
    # At its last step already: nothing is trained, so the digest is that of the start.
    at_end = StartPoint("weights", source, 1)
    params, optimizer = train(job_of(facts, config, at_end)).digest.split("-")
    assert params == read_meta(source).params_digest
    unstarted = config_of(storage, "unstarted", steps=1)
    fresh = train(job_of(facts, unstarted, StartPoint("fresh", step=1)))
    assert [params == part for part in fresh.digest.split("-")] == [False, False]
    assert optimizer == fresh.digest.split("-")[1]

    larger = config_of(storage, "larger", steps=1)
    model = larger.model.model_copy(update={"feed_forward": 128})
    larger = larger.model_copy(update={"model": model})
    with pytest.raises(ValueError, match=r"start_from.checkpoint: .* a model of other sizes"):
        train(job_of(facts, larger, at_end))


def test_a_fork_goes_on_in_a_run_of_its_own(storage, facts, undisturbed):
    source = checkpoint_url(f"{storage}/runs/undisturbed", 4)
    config = config_of(storage, "fork")
    finish = train(job_of(facts, config, StartPoint("fork", source, 4)))
    assert finish == undisturbed[1]
    run = f"{storage}/runs/fork"
    assert [line["step"] for line in read_steps(run)] == [5, 6]
    assert not Path(checkpoint_url(run, 4)).exists()
    assert Path(source).exists()


def test_hidden_states_are_read_with_the_teachers_embedding(storage, facts, teacher):
    """Whole distributions by either way, but for the rounding of what is sent."""
    url = teacher_url(storage)
    found = {}
    for kind in ("hidden", "full"):
        config = config_of(storage, f"by-{kind}", distilled=True, steps=2)
        assert config.teacher is not None
        told = config.teacher.model_copy(update={"codec": CodecConfig(kind=kind)})
        objective = config.objective.model_copy(update={"divergence": "reverse_kl"})
        config = config.model_copy(update={"teacher": told, "objective": objective})
        job = job_of(facts, config, teacher_digest=teacher[1], teacher_url=url)
        train(job, Beside(Teacher(TeacherJob("unused", url, told, 32, "float32"), "replica")))
        lines = read_steps(f"{storage}/runs/{config.name}")
        found[kind] = [line["kd_loss"] for line in lines]
    assert len(found["hidden"]) == 2 and min(found["full"]) > 0
    assert found["hidden"] == pytest.approx(found["full"], rel=2e-2)
    assert found["hidden"] != found["full"]


def test_the_embedding_is_that_of_the_checkpoint_and_of_the_same_vocabulary(storage, teacher):
    mesh = make_mesh({"fsdp": 2, "model": 2}, jax.devices()[:4])
    url, rows = teacher_url(storage), VOCAB_SIZE + 4
    found = load_unembedding(url, VOCAB_SIZE, rows, mesh)
    saved = load_params(url)[1]["embedding"].astype(jnp.bfloat16)
    by_rows = NamedSharding(mesh, PartitionSpec("model"))
    assert found.embedding_RD.sharding == by_rows
    np.testing.assert_array_equal(found.embedding_RD[:VOCAB_SIZE], saved)
    assert found.embedding_RD.shape[0] == rows and not found.embedding_RD[VOCAB_SIZE:].any()
    assert found.final_softcap == 30.0
    with pytest.raises(ValueError, match=f"vocabulary of {VOCAB_SIZE}, this run one of 300"):
        load_unembedding(url, 300, 300, mesh)


def test_a_refusing_teacher_ends_the_run_at_once(storage, facts, teacher):
    config = config_of(storage, "refused", distilled=True)
    job = job_of(facts, config, teacher_digest="0123456789abcdef")
    with pytest.raises(ValueError, match="asked for 0123456789abcdef"):
        train(job, Beside(teacher[0]))
    assert read_steps(f"{storage}/runs/refused") == []
