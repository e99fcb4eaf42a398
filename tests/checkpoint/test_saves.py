"""A student whose storage does not take its checkpoints for a while."""

import errno
import os
import pickle
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from configs.run import RunConfig
from orchestrator.catalogue import committed_steps
from orchestrator.cpu_devices import cpu_devices
from orchestrator.history import read_events
from tests.helpers.students import NUM_STEPS, config_of, job_of, losses
from workers import checkpoint_writer, saves
from workers.checkpoint import checkpoint_url, read_meta
from workers.integrity import check_files
from workers.preparer import Prepared
from workers.student import Finish, Hooks, train

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]


@pytest.fixture(scope="module")
def undisturbed(text_storage: Path, facts: Prepared) -> tuple[RunConfig, Finish]:
    config = config_of(text_storage, "undisturbed")
    return config, train(job_of(facts, config))


class Blocked:
    """A file where a run's folder should be, as a disk refuses what is written below it."""

    def __init__(self, config: RunConfig, name: str):
        self.run_url = f"{config.storage}/runs/{config.name}"
        self._path = Path(self.run_url, name)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text("in the way")

    def lift(self) -> None:
        self._path.unlink(missing_ok=True)

    def lift_after(self, step: int) -> Hooks:
        """Lifts it when the line of a step comes."""

        def progress(line: dict[str, Any]) -> None:
            if line["step"] == step:
                self.lift()

        return Hooks(progress=progress)

    def failures(self) -> list[dict[str, Any]]:
        return [e for e in read_events(self.run_url) if e["event"] == "checkpoint_failed"]


def test_training_goes_on_and_saves_when_storage_is_back(text_storage, facts, undisturbed):
    config = config_of(text_storage, "blocked")
    blocked = Blocked(config, "checkpoints")
    finish = train(job_of(facts, config), hooks=blocked.lift_after(4))
    assert finish == undisturbed[1]
    assert losses(config) == losses(undisturbed[0])
    # Tried at step 3 as well, and told once.
    assert [(event["step"], event["what"]) for event in blocked.failures()] == [(2, "folder")]
    assert committed_steps(blocked.run_url) == [4, NUM_STEPS]
    check_files(checkpoint_url(blocked.run_url, 4))


def test_a_save_that_fails_on_its_way_is_made_good(text_storage, facts, undisturbed, monkeypatch):
    """As where the disk is full: what is begun is told at the next checkpoint, or waited for."""
    config = config_of(text_storage, "on-its-way")
    write, failed = checkpoint_writer.write_file_digests, list[str]()

    def fail_twice(url: str) -> None:
        if url.endswith(("4", f"{NUM_STEPS}")) and url not in failed:
            failed.append(url)
            raise OSError(errno.ENOSPC, "No space left on device")
        write(url)

    monkeypatch.setattr(checkpoint_writer, "write_file_digests", fail_twice)
    monkeypatch.setattr("workers.saves.FIRST_PAUSE_S", 0)
    assert train(job_of(facts, config)) == undisturbed[1]
    run_url = f"{config.storage}/runs/{config.name}"
    events = [e for e in read_events(run_url) if e["event"] == "checkpoint_failed"]
    assert [(event["step"], event["what"]) for event in events] == [(4, "save")]
    assert "No space left" in events[0]["reason"]
    assert committed_steps(run_url) == [2, NUM_STEPS]


def test_no_checkpoint_counts_without_the_record_before_it(text_storage, facts, undisturbed):
    config = config_of(text_storage, "no-record")
    blocked = Blocked(config, "checkpoints")
    blocked.lift()

    def progress(line: dict[str, Any]) -> None:
        record = Path(blocked.run_url, "record")
        if line["step"] == 1:
            record.rename(record.with_name("away"))
            record.write_text("in the way")
        if line["step"] == 4:
            record.unlink()
            record.with_name("away").rename(record)

    finish = train(job_of(facts, config), hooks=Hooks(progress=progress))
    assert finish == undisturbed[1]
    assert losses(config) == losses(undisturbed[0])
    assert {event["what"] for event in blocked.failures()} == {"record"}
    assert 2 not in committed_steps(blocked.run_url)


def test_the_last_checkpoint_is_waited_for(text_storage, facts, undisturbed, monkeypatch):
    config = config_of(text_storage, "last")
    blocked = Blocked(config, "checkpoints")
    pauses_s: list[float] = []

    def sleep(seconds: float) -> None:
        pauses_s.append(seconds)
        if len(pauses_s) == 3:
            blocked.lift()

    monkeypatch.setattr("workers.saves.time.sleep", sleep)
    finish = train(job_of(facts, config))
    assert finish == undisturbed[1]
    assert pauses_s == [1.0, 2.0, 4.0]
    assert committed_steps(blocked.run_url) == [NUM_STEPS]
    assert read_meta(checkpoint_url(blocked.run_url, NUM_STEPS)).digest == finish.digest


@pytest.mark.shows("student host: its disk full")
def test_a_host_that_fails_in_a_save_keeps_no_other_waiting(text_storage, facts):
    """Alone on its full disk, it never comes to where the hosts meet in Orbax."""
    config = config_of(
        text_storage,
        "two-hosts",
        mesh={"fsdp": 2},
        cluster={"num_hosts": 2, "devices_per_host": 1},
    )
    job = job_of(facts, config)
    run_url = Path(job.run_url)
    run_url.mkdir(parents=True)
    (run_url / "job").write_bytes(pickle.dumps(job))
    # The save of step 2 has to be settled before that of step 4, and fails on host 1.
    told = _run_gang(run_url / "job", lift_at=(0, 5))
    failed = [e for e in read_events(job.run_url) if e["event"] == "checkpoint_failed"]
    assert [(e["who"], e["step"], e["what"]) for e in failed] == [
        ("student-a0001-h0001", 2, "save")
    ]
    assert "File too large" in failed[0]["reason"]
    assert len(losses(config)) == NUM_STEPS
    assert committed_steps(job.run_url)[-1] == NUM_STEPS
    assert 2 not in committed_steps(job.run_url)
    assert not list(run_url.glob("checkpoints/*tmp*")), "nothing half-made is left"
    digest = read_meta(checkpoint_url(job.run_url, NUM_STEPS)).digest
    assert told == [digest, digest]


def _run_gang(job_file: Path, lift_at: tuple[int, int]) -> list[str]:
    """What each host says in the end; see `saving_host`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    hosts = [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "tests.helpers.saving_host",
                *map(str, (job_file, port, host, lift_at[host])),
            ],
            env={**os.environ, **cpu_devices(1, num_hosts=2)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for host in range(2)
    ]
    try:
        told = [host.communicate(timeout=600)[0].splitlines() for host in hosts]
    finally:
        for host in hosts:
            host.kill()
    assert [host.returncode for host in hosts] == [0, 0]
    return [lines[-1] for lines in told]


@pytest.mark.shows("storage: does not answer a save")
def test_storage_that_does_not_answer_holds_up_no_step(
    text_storage, facts, undisturbed, monkeypatch
):
    """A disk that is still: no error comes, and no end."""
    monkeypatch.setattr("workers.saves.NUM_LOOKS", 2)
    monkeypatch.setattr("workers.saves._NUM_LATER_LOOKS", 2)
    config = config_of(text_storage, "still")
    write, answers = saves.write_atomic, threading.Event()

    def wait(url: str, content: bytes) -> None:
        assert answers.wait(100)
        write(url, content)

    def progress(line: dict[str, Any]) -> None:
        if line["step"] == NUM_STEPS:
            monkeypatch.setattr("workers.saves.NUM_LOOKS", 300)
            answers.set()

    monkeypatch.setattr("workers.saves.write_atomic", wait)
    finish = train(job_of(facts, config), hooks=Hooks(progress=progress))
    assert finish == undisturbed[1]
    assert losses(config) == losses(undisturbed[0])
    run_url = f"{config.storage}/runs/{config.name}"
    failed = [e for e in read_events(run_url) if e["event"] == "checkpoint_failed"]
    assert [(e["step"], e["what"]) for e in failed] == [(2, "folder")]
    assert "not answered" in failed[0]["reason"]
    assert committed_steps(run_url) == [NUM_STEPS]


def test_what_unfinished_saves_left_is_removed(text_storage, facts):
    config = config_of(text_storage, "leftovers")
    job = job_of(facts, config)
    folder = Path(job.run_url, "checkpoints")
    for name in ("00000090.orbax-checkpoint-tmp", "00000091", "00000092", "notes"):
        (folder / name / "params").mkdir(parents=True)
    (folder / "00000092.quarantined").write_text("{}")
    train(job)
    left = {path.name for path in folder.iterdir() if path.is_dir()}
    kept = {f"{step:08d}" for step in committed_steps(job.run_url)}
    assert left == kept | {"00000092", "notes"}


def test_a_leftover_that_stays_keeps_no_checkpoint_from_being_made(
    text_storage, facts, monkeypatch
):
    config = config_of(text_storage, "stubborn")
    job = job_of(facts, config)
    Path(job.run_url, "checkpoints", "00000090.orbax-checkpoint-tmp").mkdir(parents=True)

    def refuse(url: str) -> None:
        raise PermissionError("of another user")

    monkeypatch.setattr(checkpoint_writer, "remove_tree", refuse)
    train(job)
    assert committed_steps(job.run_url)[-1] == NUM_STEPS


def test_what_a_save_replaces_is_gone_before_the_hosts_meet_in_orbax(
    text_storage, facts, monkeypatch
):
    """As after a quarantine: a host that fails to remove it there keeps the others waiting."""
    config = config_of(text_storage, "replacing")
    job = job_of(facts, config)
    replaced = Path(checkpoint_url(job.run_url, 2))
    (replaced / "params").mkdir(parents=True)
    replaced.with_suffix(".quarantined").write_text("{}")
    save, found = checkpoint_writer.CheckpointWriter.save, list[bool]()

    def look(writer: Any, state: Any, meta: Any) -> None:
        found.append(Path(checkpoint_url(job.run_url, meta.step)).exists())
        save(writer, state, meta)

    monkeypatch.setattr(checkpoint_writer.CheckpointWriter, "save", look)
    train(job)
    assert found and not any(found)
    assert 2 in committed_steps(job.run_url)
