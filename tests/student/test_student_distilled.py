"""A distilled student has the same losses and end, wherever its targets come from."""

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
from orchestrator.build_targets import building_config
from orchestrator.history import read_events, read_steps
from tests.helpers.checkpoints import fresh_state, save_state
from tests.helpers.runs import VOCAB_SIZE
from tests.helpers.students import (
    NUM_STEPS,
    Beside,
    StopAfter,
    config_of,
    continued,
    job_of,
    losses,
)
from workers.checkpoint import checkpoint_url, load_params
from workers.jobs import StartPoint, TeacherJob
from workers.student import Finish, Hooks, train
from workers.tally import Tally
from workers.target_builder import build_targets
from workers.targets_protocol import CACHE, Answer, TargetRequest
from workers.teacher import Teacher, codec_of
from workers.unembedding import load_unembedding

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def teacher(text_storage: Path) -> tuple[Teacher, str]:
    config = config_of(text_storage, "teacher")
    url, meta = save_state(str(text_storage / "runs" / "teacher"), fresh_state(config, 5), config)
    settings = config_of(text_storage, "student", distilled=True).teacher
    assert settings is not None
    return Teacher(
        TeacherJob("unused", url, settings, 32, "float32"), "replica"
    ), meta.params_digest


def teacher_url(storage: Path) -> str:
    return checkpoint_url(str(storage / "runs" / "teacher"), 0)


@pytest.fixture(scope="module")
def distilled(text_storage, facts, teacher) -> tuple[RunConfig, Finish]:
    config = config_of(text_storage, "distilled", distilled=True)
    job = job_of(facts, config, teacher_digest=teacher[1])
    return config, train(job, Beside(teacher[0]))


def test_a_wait_for_a_teacher_begins_when_the_step_before_is_done(text_storage, facts, teacher):
    """Else the time that the devices still work would count as stall."""
    done = [threading.Event() for _ in range(NUM_STEPS + 1)]
    done[0].set()

    class Late(Beside):
        def ask(self, request: TargetRequest) -> Iterator[Answer]:
            assert done[next(steps)].wait(60)
            return super().ask(request)

    steps = itertools.count()
    config = config_of(text_storage, "late", distilled=True)
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


@pytest.mark.shows("stored targets: damaged")
def test_stored_targets_are_not_asked_for_again(text_storage, distilled, facts, teacher):
    """By an attempt that resumes, and by another run; and what is damaged is."""
    config = config_of(text_storage, "storing", distilled=True, cache_bytes=2**30)
    job = job_of(facts, config, teacher_digest=teacher[1])
    source = Beside(teacher[0])
    assert train(job, source) == distilled[1]
    rows = set(source.asked)
    origins = origins_of(config)
    assert origins["replica"] >= len(source.asked) == len(rows)
    assert set(origins) <= {"replica", CACHE}, "small sources give some rows a second time"

    run_url = f"{text_storage}/runs/storing"
    again = continued(config, "storing-again", 4)
    start = StartPoint("resume", checkpoint_url(run_url, 4), 4)
    job = job_of(facts, again, start, attempt=2, teacher_digest=teacher[1])
    source = Beside(teacher[0])
    assert train(job, source) == distilled[1]
    assert source.asked == []

    shards = list(Path(text_storage, "targets").glob("*/*.npz"))
    content = bytearray(shards[0].read_bytes())
    content[2000] ^= 1
    shards[0].write_bytes(content)
    mended = config_of(text_storage, "mended", distilled=True, cache_bytes=2**30)
    job = job_of(facts, mended, teacher_digest=teacher[1])
    source = Beside(teacher[0])
    assert train(job, source) == distilled[1]
    told = [
        e for e in read_events(f"{text_storage}/runs/mended") if e["event"] == "targets_damaged"
    ]
    assert [event["row"] for event in told] == [list(row) for row in source.asked]
    assert len(source.asked) == 1
    ledgers = [ledger_of(each) for each in (distilled[0], config, again, mended)]
    assert ledgers[0] == ledgers[1] == ledgers[2] == ledgers[3]
    for each in (config, again, mended):
        assert losses(each) == losses(distilled[0])


def test_targets_built_ahead_are_those_of_the_run(text_storage, distilled, facts, teacher):
    """Stopped and begun again, done, of use to the run, and refused for lack of room."""
    config = config_of(text_storage, "ahead", distilled=True, cache_bytes=2**30)
    job = dataclasses.replace(
        job_of(facts, config, teacher_digest=teacher[1]), storage_url=f"{text_storage}/ahead"
    )
    (text_storage / "ahead").mkdir()
    (text_storage / "ahead" / "datasets").symlink_to(text_storage / "datasets")
    building = dataclasses.replace(job, config=building_config(config))
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

    small = config_of(text_storage, "small", distilled=True, cache_bytes=1000)
    job = dataclasses.replace(building, config=building_config(small))
    shutil.rmtree(text_storage / "ahead" / "targets")
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


def test_hidden_states_are_read_with_the_teachers_embedding(text_storage, facts, teacher):
    """Whole distributions by either way, but for the rounding of what is sent."""
    url = teacher_url(text_storage)
    found = {}
    for kind in ("hidden", "full"):
        config = config_of(text_storage, f"by-{kind}", distilled=True, steps=2)
        assert config.teacher is not None
        told = config.teacher.model_copy(update={"codec": CodecConfig(kind=kind)})
        objective = config.objective.model_copy(update={"divergence": "reverse_kl"})
        config = config.model_copy(update={"teacher": told, "objective": objective})
        job = job_of(facts, config, teacher_digest=teacher[1], teacher_url=url)
        train(job, Beside(Teacher(TeacherJob("unused", url, told, 32, "float32"), "replica")))
        lines = read_steps(f"{text_storage}/runs/{config.name}")
        found[kind] = [line["kd_loss"] for line in lines]
    assert len(found["hidden"]) == 2 and min(found["full"]) > 0
    assert found["hidden"] == pytest.approx(found["full"], rel=2e-2)
    assert found["hidden"] != found["full"]


def test_the_embedding_is_that_of_the_checkpoint_and_of_the_same_vocabulary(text_storage, teacher):
    mesh = make_mesh({"fsdp": 2, "model": 2}, jax.devices()[:4])
    url, rows = teacher_url(text_storage), VOCAB_SIZE + 4
    found = load_unembedding(url, VOCAB_SIZE, rows, mesh)
    saved = load_params(url)[1]["embedding"].astype(jnp.bfloat16)
    by_rows = NamedSharding(mesh, PartitionSpec("model"))
    assert found.embedding_RD.sharding == by_rows
    np.testing.assert_array_equal(found.embedding_RD[:VOCAB_SIZE], saved)
    assert found.embedding_RD.shape[0] == rows and not found.embedding_RD[VOCAB_SIZE:].any()
    assert found.final_softcap == 30.0
    with pytest.raises(ValueError, match=f"vocabulary of {VOCAB_SIZE}, this run one of 300"):
        load_unembedding(url, 300, 300, mesh)


def test_a_refusing_teacher_ends_the_run_at_once(text_storage, facts, teacher):
    config = config_of(text_storage, "refused", distilled=True)
    job = job_of(facts, config, teacher_digest="0123456789abcdef")
    with pytest.raises(ValueError, match="asked for 0123456789abcdef"):
        train(job, Beside(teacher[0]))
    assert read_steps(f"{text_storage}/runs/refused") == []
