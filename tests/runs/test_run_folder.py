"""A run's folder: what makes it count, its lease, and the commands it is sent."""

import contextlib
import threading
import time
from pathlib import Path

import pytest

from configs.load import ConfigError, parse_run
from configs.run import RunConfig
from orchestrator import run_folder
from orchestrator.run_folder import LEASE_EXPIRY_S, LEASE_RENEWAL_S, RunFolder, absolute, list_runs
from tests.helpers.runs import tiny_values
from workers.epochs import take_epoch
from workers.storage import join, read_json, remove_tree, write_json


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return parse_run(tiny_values(tmp_path, "run"), "test")


@pytest.fixture
def folder(tmp_path: Path, config: RunConfig) -> RunFolder:
    folder = RunFolder(str(tmp_path), "run")
    folder.create(config, {"run_id": "run-1"})
    return folder


def test_a_new_run_reads_back(folder: RunFolder, config: RunConfig):
    assert folder.exists()
    assert folder.config() == config
    assert folder.identity() == {"run_id": "run-1"}
    assert folder.snapshot() is None
    assert folder.status() is None
    assert folder.finish(1) is None
    assert folder.evaluations() == []
    assert folder.tracking() == {"step": 0, "evaluated": []}


def test_a_run_counts_only_once_all_of_it_is_there(
    tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch
):
    folder = RunFolder(str(tmp_path), "run")

    def full_disk(url: str, content: bytes) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "write_new", full_disk)
    with pytest.raises(OSError, match="No space"):
        folder.create(config, {"run_id": "run-1"})
    monkeypatch.undo()
    assert not folder.exists()
    assert list_runs(str(tmp_path)) == []
    folder.create(config, {"run_id": "run-1"})
    assert [run.name for run in list_runs(str(tmp_path))] == ["run"]


def test_of_several_that_make_a_run_at_once_one_does(tmp_path: Path, config: RunConfig):
    """And all of what it made is its own: identity and settings."""
    together, made = threading.Barrier(8), list[int]()

    def make(number: int) -> None:
        changed = config.model_copy(update={"steps": 100 + number})
        together.wait()
        with contextlib.suppress(FileExistsError):
            RunFolder(str(tmp_path), "run").create(changed, {"run_id": f"run-{number}"})
            made.append(number)

    threads = [threading.Thread(target=make, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [number] = made
    folder = RunFolder(str(tmp_path), "run")
    assert folder.identity() == {"run_id": f"run-{number}"}
    assert folder.config().steps == 100 + number


def test_a_run_made_by_one_that_was_cut_off_is_whole(folder: RunFolder, config: RunConfig):
    """Killed right after the file that makes it count."""
    Path(folder.url, "config.yaml").unlink()
    assert folder.config() == config
    folder.write_identity({"run_id": "run-1", "software": {}})
    assert folder.config() == config


def test_what_a_removal_that_was_cut_off_has_left_is_not_the_next_runs(
    tmp_path: Path, config: RunConfig
):
    left = tmp_path / "runs" / "run" / "checkpoints" / "00000002.json"
    write_json(str(left), {"step": 2})
    RunFolder(str(tmp_path), "run").create(config, {"run_id": "run-2"})
    assert not left.exists()


def test_only_a_run_of_ones_own_that_nobody_uses_is_taken_back(folder: RunFolder):
    folder.remove_unused("run-0")
    assert folder.exists(), "made by somebody else"
    take_epoch(folder.url, "run-1", "controller", "here:1")
    folder.remove_unused("run-1")
    assert folder.exists(), "a controller works on it"
    remove_tree(join(folder.url, "epochs"))
    folder.remove_unused("run-1")
    assert not folder.exists()


def test_a_configuration_of_another_version_is_refused_with_its_place(folder: RunFolder):
    url = join(folder.url, "config.yaml")
    Path(url).write_text(Path(url).read_text() + "colour: red\n")
    with pytest.raises(ConfigError, match="colour"):
        folder.config()


def test_removed_is_gone(folder: RunFolder, tmp_path: Path):
    folder.remove()
    folder.remove()
    assert not folder.exists()
    assert list(tmp_path.glob("runs/*")) == []


def test_local_paths_mean_the_same_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert absolute("./runs") == str(tmp_path / "runs")
    assert absolute("memory://runs") == "memory://runs"


# The lease.


def test_a_lease_is_held_until_it_is_released(folder: RunFolder):
    assert folder.lease() is None and folder.lease_age_s() is None
    folder.write_lease("me", "here:1")
    lease = folder.lease()
    assert lease is not None
    assert (lease["holder"], lease["address"]) == ("me", "here:1")
    folder.release_lease()
    assert folder.lease() is None and folder.lease_age_s() is None
    folder.release_lease()


@pytest.mark.parametrize(("age_s", "held"), [(0.0, True), (15.0, True), (25.0, False)])
def test_a_lease_that_nobody_renews_runs_out(folder: RunFolder, age_s: float, held: bool):
    assert 15.0 < LEASE_EXPIRY_S < 25.0
    lease = {"holder": "me", "address": "here:1", "renewed_s": time.time() - age_s}
    write_json(join(folder.url, "lease.json"), lease)
    assert (folder.lease() is not None) == held
    assert (folder.lease_age_s() or 0.0) >= age_s


def test_a_renewal_may_fail_more_than_once():
    assert 3 * LEASE_RENEWAL_S < LEASE_EXPIRY_S


# Commands.


def test_commands_come_in_the_order_they_were_sent_and_once(folder: RunFolder):
    sent = [{"kind": "scale", "teachers": number} for number in range(1, 30)]
    names = [folder.send(command) for command in sent]
    waiting = folder.commands()
    assert [command for _, command in waiting] == sent
    assert [name for name, _ in waiting] == names
    for name in names[:10]:
        folder.take(name)
    folder.take(names[0])
    assert [command for _, command in folder.commands()] == sent[10:]


def test_a_command_that_is_being_written_is_not_read_yet(folder: RunFolder):
    name = folder.send({"kind": "stop"})
    half = Path(folder.url, "commands", ".00000000000000000001-aa.json.0123abcd")
    half.write_text('{"ki')
    assert folder.commands() == [(name, {"kind": "stop"})]
    assert half.exists()


def test_evaluations_come_by_step(folder: RunFolder):
    for step in (24, 8, 100):
        folder.write_evaluation({"step": step, "bits_per_byte": 1.0})
    Path(folder.url, "evaluations", ".00000032.json.0123abcd").write_text("")
    assert [evaluation["step"] for evaluation in folder.evaluations()] == [8, 24, 100]


def test_how_an_attempt_ended(folder: RunFolder):
    write_json(join(folder.url, "attempts", "0012.json"), {"step": 4})
    assert folder.finish(12) == {"step": 4}
    assert folder.finish(1) is None


def test_wandb_has_a_local_folder_wherever_the_run_is(folder: RunFolder):
    assert folder.wandb_dir() == join(folder.url, "wandb")
    assert Path(folder.wandb_dir()).is_dir()
    elsewhere = Path(RunFolder("memory://storage", "run").wandb_dir())
    assert elsewhere.is_dir()
    elsewhere.rmdir()


def test_what_is_written_is_what_is_read(folder: RunFolder):
    folder.write_snapshot({"state": "training"})
    folder.write_status({"state": "stopping"})
    folder.write_tracking({"step": 4, "evaluated": [2]})
    folder.write_identity({"run_id": "run-2"})
    assert folder.snapshot() == {"state": "training"}
    assert folder.status() == {"state": "stopping"}
    assert folder.tracking() == {"step": 4, "evaluated": [2]}
    assert folder.identity() == {"run_id": "run-2"}
    assert read_json(join(folder.url, "run.json"))["run_id"] == "run-2"
