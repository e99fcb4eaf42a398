"""A run that meets a bad step ends as one that was told beforehand to leave it out."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.run import RunConfig
from orchestrator import run_state
from orchestrator.attempt import failures_of
from orchestrator.history import read_events, read_steps
from orchestrator.run_state import AttemptFailed, StartAttempt
from tests.helpers.checkpoints import fresh_state, save_state
from tests.helpers.controller_bench import FACTS, Bench, of, round_trip
from tests.helpers.students import NUM_STEPS, Beside, config_of, continued, job_of, losses
from workers.anomalies import AnomalyError, RollbackError
from workers.checkpoint import checkpoint_url, read_entry
from workers.jobs import StartPoint, StudentJob, TeacherJob
from workers.preparer import Prepared
from workers.student import Finish, train
from workers.targets_protocol import Answer, TargetRequest
from workers.teacher import Teacher

pytestmark = pytest.mark.slow

BAD_STEP = 4
_NAN = 0x7FC0  # of a bfloat16


class Poisoned(Beside):
    """A teacher whose probabilities for some steps are no numbers.

    Args:
        first_step: the step that is asked for first.
    """

    def __init__(self, teacher: Teacher, *bad_steps: int, first_step: int = 1):
        super().__init__(teacher)
        self._bad_steps = bad_steps
        self._steps = itertools.count(first_step)

    def ask(self, request: TargetRequest) -> Iterator[Answer]:
        step = next(self._steps)
        for answer in super().ask(request):
            arrays = dict(answer.chunk.arrays)
            if step in self._bad_steps:
                name = next(name for name in arrays if name.startswith("probs"))
                arrays[name] = np.full_like(arrays[name], _NAN)
            yield Answer(dataclasses.replace(answer.chunk, arrays=arrays), answer.wire_s)


@pytest.fixture(scope="module")
def teacher(text_storage: Path) -> Teacher:
    config = config_of(text_storage, "teacher")
    url, _ = save_state(str(text_storage / "runs" / "teacher"), fresh_state(config, 5), config)
    settings = config_of(text_storage, "student", distilled=True).teacher
    assert settings is not None
    return Teacher(TeacherJob("unused", url, settings, 32, "float32"), "replica")


def distilled_config(storage: Path, name: str, **anomalies: Any) -> RunConfig:
    """A run that asks its teacher for one step after the other."""
    config = config_of(storage, name, distilled=True, anomalies=anomalies)
    assert config.teacher is not None
    one = config.teacher.model_copy(update={"prefetch_steps": 1})
    return config.model_copy(update={"teacher": one})


def job_to(facts: Prepared, config: RunConfig, *args: Any, **changes: Any) -> StudentJob:
    teacher_digest = read_entry(f"{config.storage}/runs/teacher", 0).params_digest
    return job_of(facts, config, *args, teacher_digest=teacher_digest, **changes)


def lines_of(config: RunConfig) -> dict[int, dict[str, Any]]:
    return {line["step"]: line for line in read_steps(f"{config.storage}/runs/{config.name}")}


def without(step: int, config: RunConfig) -> dict[int, list[str]]:
    """The losses of all other steps."""
    return {each: values for each, values in losses(config).items() if each != step}


@pytest.mark.shows("not-finite")
def test_a_step_that_is_not_finite_is_skipped_as_if_one_had_known(text_storage, facts, teacher):
    config = distilled_config(text_storage, "skipping", on_nan="skip")
    finish = train(job_to(facts, config), Poisoned(teacher, BAD_STEP))
    told = distilled_config(text_storage, "skipping-told")
    knowing = train(job_to(facts, told, skip_steps=(BAD_STEP,)), Poisoned(teacher))
    assert finish == knowing and finish.step == NUM_STEPS
    assert without(BAD_STEP, config) == without(BAD_STEP, told)
    ignorant = distilled_config(text_storage, "skipping-nothing", on_nan="skip")
    assert train(job_to(facts, ignorant), Poisoned(teacher)) != finish

    found, expected = lines_of(config), lines_of(told)
    assert [line["skipped"] for line in found.values()] == [None, None, None, "nan", None, None]
    assert expected[BAD_STEP]["skipped"] == "rollback"
    assert math.isnan(found[BAD_STEP]["loss"]) and math.isfinite(expected[BAD_STEP]["loss"])
    # Nothing was learnt at the step, and the schedule goes on nevertheless.
    assert found[BAD_STEP]["lr"] == expected[BAD_STEP]["lr"] == lines_of(ignorant)[BAD_STEP]["lr"]
    events = read_events(f"{text_storage}/runs/skipping")
    [event] = [event for event in events if event["event"] == "step_skipped"]
    assert (event["step"], event["reason"], event["limit"]) == (BAD_STEP, "nan", None)


def test_a_run_that_goes_back_ends_as_if_it_had_known(text_storage, facts, teacher):
    """From the student's error to the next attempt's job, as the controller has it."""
    config = distilled_config(text_storage, "rolling-back", on_nan="rollback")
    with pytest.raises(RollbackError, match="Step 4, rows 24 to 31 of the stream") as caught:
        train(job_to(facts, config), Poisoned(teacher, BAD_STEP))
    assert max(losses(config)) == BAD_STEP, "the step is in the record"

    bench = Bench(config)
    bench.feed(run_state.Prepared(FACTS))
    actions = bench.feed(AttemptFailed(1, failures_of(caught.value)))
    assert of(StartAttempt, actions) == [StartAttempt(2)]
    assert bench.snapshot.used == {"anomaly": 1}
    left_out = round_trip(bench.snapshot).skip_steps
    assert left_out == (3, 4)

    start = StartPoint("resume", checkpoint_url(f"{text_storage}/runs/rolling-back", 2), 2)
    job = job_to(facts, config, start, attempt=2, skip_steps=left_out)
    finish = train(job, Poisoned(teacher, BAD_STEP, first_step=3))
    told = distilled_config(text_storage, "rolling-back-told")
    assert finish == train(job_to(facts, told, skip_steps=(3, 4)), Poisoned(teacher))
    assert without(BAD_STEP, config) == without(BAD_STEP, told)
    skipped = {step: line["skipped"] for step, line in lines_of(config).items()}
    assert skipped == {1: None, 2: None, 3: "rollback", 4: "rollback", 5: None, 6: None}


def test_a_run_that_was_stopped_goes_on_with_another_policy(text_storage, facts, teacher):
    config = distilled_config(text_storage, "stopping", on_nan="stop")
    with pytest.raises(AnomalyError, match=r"resume stopping --set anomalies.on_nan=skip"):
        train(job_to(facts, config), Poisoned(teacher, BAD_STEP))
    told = continued(config, "stopping-told", 2)
    start = StartPoint("resume", checkpoint_url(f"{text_storage}/runs/stopping", 2), 2)
    changed = distilled_config(text_storage, "stopping", on_nan="skip")
    finish = train(
        job_to(facts, changed, start, attempt=2), Poisoned(teacher, BAD_STEP, first_step=3)
    )
    # From the same checkpoint: steps with and without a guard may round differently.
    start = StartPoint("resume", checkpoint_url(f"{text_storage}/runs/stopping-told", 2), 2)
    job = job_to(facts, told, start, attempt=2, skip_steps=(BAD_STEP,))
    assert finish == train(job, Poisoned(teacher))
    assert without(BAD_STEP, changed) == without(BAD_STEP, told)


def test_a_teacher_that_stays_bad_ends_the_run(text_storage, facts, teacher):
    config = distilled_config(text_storage, "hopeless", on_nan="skip", max_skips=2)
    with pytest.raises(AnomalyError, match=r"Step 5, .* 3 of the last 5 steps had to be skipped"):
        train(job_to(facts, config), Poisoned(teacher, 3, 4, 5, 6))


@pytest.fixture(scope="module")
def spiky(text_storage: Path, facts: Prepared) -> tuple[RunConfig, Finish]:
    """Ordinary losses with a limit so low that some of them are spikes."""
    values = {"on_spike": "skip", "spike_deviations": 0.5, "window_steps": 3, "max_skips": 3}
    changes = {"steps": 12, "anomalies": values, "optimizer": {"peak_lr": 3e-4}}
    config = config_of(text_storage, "spiky", **changes)
    return config, train(job_of(facts, config))


@pytest.mark.parametrize("resumed_at", [6, 8, 10])
def test_a_resumed_run_finds_the_same_spikes(spiky, facts, resumed_at):
    whole, finish = spiky
    again = continued(whole, f"spiky-{resumed_at}", resumed_at)
    url = checkpoint_url(f"{again.storage}/runs/{again.name}", resumed_at)
    assert train(job_of(facts, again, StartPoint("resume", url, resumed_at), attempt=2)) == finish
    assert losses(again) == losses(whole)
    found, expected = (
        {step: line["skipped"] for step, line in lines_of(config).items()}
        for config in (again, whole)
    )
    assert found == expected
    spikes = {step for step, skipped in expected.items() if skipped == "spike"}
    assert min(spikes) <= 8 and max(spikes) > 10, "before and after"
