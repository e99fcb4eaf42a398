"""However often a run stops and goes on, its losses and its end are those of one run."""

import shutil
from pathlib import Path

import pytest

from configs.run import RunConfig
from orchestrator.history import read_events, read_steps
from tests.helpers.students import NUM_STEPS, StopAfter, config_of, continued, job_of, losses
from workers import checkpoint_writer
from workers.checkpoint import checkpoint_url, read_entry, read_meta
from workers.jobs import StartPoint
from workers.preparer import Prepared
from workers.student import Finish, train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed(text_storage: Path, facts: Prepared) -> tuple[RunConfig, Finish]:
    config = config_of(text_storage, "undisturbed")
    return config, train(job_of(facts, config))


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
    assert [line["step"] for line in lines if "compile_s" in line] == [1]
    assert 0 < lines[0]["compile_s"] < lines[0]["step_s"]
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


@pytest.mark.parametrize("every_steps", [1, 100])
def test_a_stop_saves_at_once_and_can_be_resumed(text_storage, undisturbed, facts, every_steps):
    config = config_of(
        text_storage, f"stopped-{every_steps}", checkpoint={"every_steps": every_steps}
    )
    finish = train(job_of(facts, config), hooks=StopAfter(2).hooks())
    assert finish.stopped and 2 < finish.step <= 5, "some steps are already on their way"
    run = f"{text_storage}/runs/{config.name}"
    assert read_entry(run, finish.step).digest == finish.digest
    assert max(losses(config)) == finish.step
    if every_steps == 1:
        return
    start = StartPoint("resume", checkpoint_url(run, finish.step), finish.step)
    assert train(job_of(facts, config, start, attempt=2)) == undisturbed[1]
    assert losses(config) == losses(undisturbed[0])


def test_lines_are_durable_before_their_checkpoint_counts(text_storage, facts, monkeypatch):
    """No entry may be seen before the lines of its steps are on storage."""
    config = config_of(text_storage, "durable", record={"flush_s": 3600.0})
    run = f"{text_storage}/runs/durable"
    seen: dict[int, list[int]] = {}
    write = checkpoint_writer.write_json

    def look_and_write(url: str, value: dict) -> None:
        seen[value["step"]] = [line["step"] for line in read_steps(run)]
        write(url, value)

    monkeypatch.setattr(checkpoint_writer, "write_json", look_and_write)
    train(job_of(facts, config))
    assert seen[2][:2] == [1, 2] and seen[6] == [1, 2, 3, 4, 5, 6]


def test_starting_from_weights_takes_the_parameters_alone(text_storage, facts, undisturbed):
    source = checkpoint_url(f"{text_storage}/runs/undisturbed", 4)
    config = config_of(text_storage, "from-weights", steps=1)
    # At its last step already: nothing is trained, so the digest is that of the start.
    at_end = StartPoint("weights", source, 1)
    params, optimizer = train(job_of(facts, config, at_end)).digest.split("-")
    assert params == read_meta(source).params_digest
    unstarted = config_of(text_storage, "unstarted", steps=1)
    fresh = train(job_of(facts, unstarted, StartPoint("fresh", step=1)))
    assert [params == part for part in fresh.digest.split("-")] == [False, False]
    assert optimizer == fresh.digest.split("-")[1]

    larger = config_of(text_storage, "larger", steps=1)
    model = larger.model.model_copy(update={"feed_forward": 128})
    larger = larger.model_copy(update={"model": model})
    with pytest.raises(ValueError, match=r"start_from.checkpoint: .* a model of other sizes"):
        train(job_of(facts, larger, at_end))


def test_a_fork_goes_on_in_a_run_of_its_own(text_storage, facts, undisturbed):
    source = checkpoint_url(f"{text_storage}/runs/undisturbed", 4)
    config = config_of(text_storage, "fork")
    finish = train(job_of(facts, config, StartPoint("fork", source, 4)))
    assert finish == undisturbed[1]
    run = f"{text_storage}/runs/fork"
    assert [line["step"] for line in read_steps(run)] == [5, 6]
    assert not Path(checkpoint_url(run, 4)).exists()
    assert Path(source).exists()
