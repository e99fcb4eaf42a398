"""What a launch settles before anything runs: names, teachers, starting points."""

import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from configs.load import parse_run
from configs.run import RunConfig
from orchestrator.catalogue import find_checkpoint
from orchestrator.launch import check_address, create_run
from orchestrator.recipe import launch_and_follow
from orchestrator.run_folder import RunFolder, list_runs
from tests.helpers.runs import VOCAB_SIZE, tiny_values
from workers.epochs import take_epoch
from workers.preparer import prepare
from workers.storage import write_json


@pytest.fixture(autouse=True)
def _leave_only_the_teacher(request: pytest.FixtureRequest, storage: Path):
    yield
    for folder in (storage / "runs").iterdir():
        if folder.name != "teacher":
            shutil.rmtree(folder)


def config(storage: Path, name: str = "run", **changes: Any) -> RunConfig:
    return parse_run(tiny_values(storage, name) | changes, "test")


def student(storage: Path, teacher: str = "teacher", **changes: Any) -> RunConfig:
    distilled: dict[str, Any] = {
        "objective": {"kind": "distill"},
        "teacher": {"checkpoint": teacher},
    }
    return config(storage, **(distilled | changes))


def step_folder(storage: Path, step: int) -> str:
    return str(storage / "runs" / "teacher" / "checkpoints" / f"{step:08d}")


# Finding checkpoints.


@pytest.mark.parametrize(("name", "step"), [("teacher", 4), ("teacher@4", 4), ("teacher@2", 2)])
def test_a_checkpoint_is_named_by_its_run_and_step(storage: Path, name: str, step: int):
    url, entry = find_checkpoint(name, str(storage))
    assert url == step_folder(storage, step)
    assert entry["step"] == step


def test_a_checkpoint_is_named_by_its_path(
    storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    _, expected = find_checkpoint("teacher@2", str(storage))
    url = step_folder(storage, 2)
    assert find_checkpoint(url, str(tmp_path)) == (url, expected)
    monkeypatch.chdir(storage / "runs")
    found, _ = find_checkpoint("teacher/checkpoints/00000002", str(tmp_path))
    assert found == url


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nobody", "nobody: there is no run 'nobody' below"),
        ("nobody@2", "nobody@2: there is no run 'nobody' below"),
        ("teacher@3", "teacher@3: no checkpoint of step 3; there are 2, 4"),
        ("teacher@last", "teacher@last: no checkpoint of step last; there are 2, 4"),
        ("./nowhere", "nowhere: there is nothing there"),
    ],
)
def test_a_checkpoint_that_is_not_there(storage: Path, name: str, words: str):
    with pytest.raises(ValueError) as caught:
        find_checkpoint(name, str(storage))
    assert words in str(caught.value)


def test_a_run_without_checkpoints_yet(storage: Path):
    create_run(config(storage, "young"))
    with pytest.raises(ValueError, match="'young' has no checkpoint yet"):
        find_checkpoint("young", str(storage))


def test_a_folder_that_is_no_checkpoint(storage: Path):
    with pytest.raises(ValueError, match="no complete checkpoint at"):
        find_checkpoint(f"{storage}/text", str(storage))


# New runs.


def test_a_new_run_is_settled(storage: Path):
    folder = create_run(config(storage))
    identity = folder.identity()
    assert folder.exists()
    assert folder.config() == config(storage)
    assert identity["run_id"].startswith("run-")
    assert identity["teacher_url"] is None
    assert identity["start_step"] == 0


def test_the_same_name_is_another_run_once_the_first_is_removed(storage: Path):
    first = create_run(config(storage))
    run_id = first.identity()["run_id"]
    first.remove()
    assert create_run(config(storage)).identity()["run_id"] != run_id


@pytest.mark.parametrize(
    ("state", "hint"), [("finished", "stillhouse report run"), ("failed", "stillhouse resume run")]
)
def test_a_taken_name_is_refused_and_the_run_left_alone(storage: Path, state: str, hint: str):
    folder = create_run(config(storage))
    folder.write_status({"state": state})
    before = folder.identity()
    with pytest.raises(ValueError) as caught:
        create_run(config(storage, steps=9))
    assert f"({state})" in str(caught.value)
    assert hint in str(caught.value)
    assert folder.identity() == before
    assert folder.config().steps == 4


def test_a_distilled_run_remembers_which_weights_it_learns_from(storage: Path):
    identity = create_run(student(storage, "teacher@2")).identity()
    _, entry = find_checkpoint("teacher@2", str(storage))
    assert identity["teacher_url"] == step_folder(storage, 2)
    assert identity["teacher_digest"] == entry["params_digest"]


def wide(storage: Path) -> RunConfig:
    values = tiny_values(storage, "run")
    values["model"] |= {"vocab_size": 384}
    values["data"]["tokenizer"] |= {"vocab_size": 384}
    values |= {"objective": {"kind": "distill"}, "teacher": {"checkpoint": "teacher"}}
    return parse_run(values, "test")


def long(storage: Path) -> RunConfig:
    values = tiny_values(storage, "run")
    values["model"] |= {"context_length": 4096}
    values["data"] |= {"row_length": 4096}
    values |= {"objective": {"kind": "distill"}, "teacher": {"checkpoint": "teacher"}}
    return parse_run(values, "test")


def no_text(storage: Path) -> RunConfig:
    values = tiny_values(storage, "run")
    values["data"]["sources"][0]["path"] = str(storage / "nothing")
    return parse_run(values, "test")


def fork(storage: Path, checkpoint: str = "teacher", state: str = "all", **changes: Any):
    return config(storage, start_from={"checkpoint": checkpoint, "state": state}, **changes)


FAULTS = {
    "missing text": (no_text, "does not exist"),
    "missing teacher": (lambda s: student(s, "nobody"), "there is no run 'nobody'"),
    "teacher's vocabulary": (wide, f"a vocabulary of {VOCAB_SIZE}, the student one of 384"),
    "teacher's context": (long, "rows have 4096 (data.row_length)"),
    "missing start": (lambda s: fork(s, "nobody"), "there is no run 'nobody'"),
    "start of other sizes": (
        lambda s: fork(s, model={"preset": "tiny", "vocab_size": VOCAB_SIZE, "num_layers": 1}),
        "a model of other sizes",
    ),
    "fork at the end": (fork, "is at step 4, and steps=4"),
    "fork of other batches": (
        lambda s: fork(s, steps=8, batch={"rows": 4}),
        "batch.rows has to stay 8",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_said_and_leaves_nothing(storage: Path, fault: str):
    make, words = FAULTS[fault]
    with pytest.raises(ValueError) as caught:
        create_run(make(storage))
    assert words in str(caught.value)
    assert [run.name for run in list_runs(str(storage))] == ["teacher"]
    assert not (storage / "runs" / "run").exists()


def test_where_a_fork_and_borrowed_weights_begin(storage: Path):
    forked = create_run(fork(storage, "teacher@2")).identity()
    assert (forked["start_url"], forked["start_step"]) == (step_folder(storage, 2), 2)
    borrowed = create_run(fork(storage, state="weights", name="other")).identity()
    assert (borrowed["start_url"], borrowed["start_step"]) == (step_folder(storage, 4), 0)


def test_a_launch_that_fails_leaves_the_run_of_another_alone(
    storage: Path, monkeypatch: pytest.MonkeyPatch
):
    """Two launches of one name at once: the run of the one that is refused is not its own."""
    first = create_run(config(storage))
    take_epoch(first.url, first.identity()["run_id"], "controller", "10.0.0.1:1")
    monkeypatch.setattr(RunFolder, "exists", lambda folder: False)  # asked a moment earlier
    with pytest.raises(ValueError, match="exists below"):
        launch_and_follow(config(storage, steps=9), None, Console())
    monkeypatch.undo()
    assert first.exists() and first.config().steps == 4


def test_a_run_that_was_half_made_by_a_crash_can_be_made_again(storage: Path):
    RunFolder(str(storage), "run").write_config(config(storage, steps=9))
    assert create_run(config(storage)).config().steps == 4


# What can be seen only once the tokenizer is there.


@pytest.mark.shows("said-in-a-sentence")
def test_a_teacher_of_another_tokenizer_is_refused(storage: Path, tmp_path: Path):
    other = tmp_path / "text"
    other.mkdir()
    for number in range(40):
        text = " ".join(f"{number * i * 7919:x}" for i in range(120))
        (other / f"{number:02d}.txt").write_text(text)
    values = tiny_values(storage, "run")
    values["data"]["sources"][0]["path"] = str(other)
    parsed = parse_run(values, "test")
    with pytest.raises(ValueError, match=r"teacher.checkpoint: .* was trained with tokenizer"):
        prepare_run(parsed, tmp_path, step_folder(storage, 4))


def test_a_teacher_of_the_same_tokenizer_is_taken(storage: Path, tmp_path: Path):
    facts = prepare_run(config(storage), storage, step_folder(storage, 4))
    _, entry = find_checkpoint("teacher", str(storage))
    assert facts.tokenizer_digest == entry["tokenizer_digest"]


def prepare_run(config: RunConfig, storage: Path, teacher_url: str):
    def ignore(what: str, done: int, total: int) -> None:
        pass

    run_url = str(storage / "runs" / "run")
    write_json(f"{run_url}/marker.json", {})
    return prepare(config.data, VOCAB_SIZE, str(storage), run_url, teacher_url, 1, ignore)


# Addresses.


@pytest.mark.parametrize("address", ["http://head:8265", "ray://head:10001", "head", "head:"])
def test_what_is_no_address_of_a_head_is_refused(address: str):
    with pytest.raises(ValueError, match="should be `auto` or HOST:PORT"):
        check_address(address)


def test_an_address_without_a_cluster_is_refused_at_once():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        check_address(f"127.0.0.1:{port}")
    with pytest.raises(ValueError, match="no Ray cluster answers there"):
        check_address(f"127.0.0.1:{port}")
