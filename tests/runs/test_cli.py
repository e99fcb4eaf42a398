"""The command line on runs made by hand: what it says, its exit codes, and no traceback."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from fsspec.implementations.local import LocalFileSystem

from configs.load import parse_run
from orchestrator.cli import main
from orchestrator.run_folder import RunFolder
from tests.helpers.leases import renewed_lease
from tests.helpers.runs import text_folder, tiny_values
from workers.record import LOGS, STEPS, EventWriter, SegmentWriter
from workers.storage import join

STATUS = {
    "name": "run",
    "run_id": "run-1",
    "state": "training",
    "reason": None,
    "attempt": 1,
    "step": 2,
    "num_steps": 4,
    "line": {},
    "preparing": None,
    "teachers": {"wanted": 0, "replicas": {}},
    "checkpoints": [2],
    "bits_per_byte": {"2": 1.5},
    "faults": {},
    "digest": None,
    "time_s": 0.0,
}


@pytest.fixture(autouse=True)
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands look: a folder with some text, and no run yet."""
    monkeypatch.setenv("STILLHOUSE_STORAGE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    text_folder(tmp_path)
    return tmp_path


def call(*args: str, answer: str | None = None) -> Result:
    """What a user sees; only ends that are meant for users may end a command."""
    result = CliRunner().invoke(main, list(args), input=answer)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def refused(*args: str) -> str:
    """The one message of a command that refuses to work."""
    result = call(*args)
    assert result.exit_code == 2, result.output
    assert result.stdout == "", "what is read by programs holds no errors"
    assert "Traceback" not in result.stderr
    return result.stderr


def make_run(storage: Path, name: str = "run", alive: bool = False, **changes: Any) -> RunFolder:
    folder = RunFolder(str(storage), name)
    folder.create(parse_run(tiny_values(storage, name) | changes, "test"), {"run_id": f"{name}-1"})
    if alive:
        folder.write_lease("someone", "here:1")
    return folder


def write_file(storage: Path, **changes: Any) -> str:
    path = storage / "my-run.yaml"
    path.write_text(yaml.safe_dump(tiny_values(storage, "my-run") | changes))
    return str(path)


# Configurations.


def test_an_unknown_preset_names_the_known_ones():
    said = refused("run", "nonsense")
    assert "no such preset" in said
    assert "quickstart" in said
    assert "did you mean `quickstart`" in refused("run", "quikstart")


def test_a_missing_file_is_named():
    assert "elsewhere/run.yaml" in refused("run", "elsewhere/run.yaml")


@pytest.mark.shows("said-in-a-sentence")
def test_all_faults_are_told_at_once_by_their_paths(storage: Path):
    source = write_file(storage, steps=-1, batch={"rows": 0})
    said = refused("run", source, "--set", "seed=many")
    for path in ("steps", "batch.rows", "seed"):
        assert f"  {path}: " in said


def test_check_shows_the_run_and_starts_nothing(storage: Path):
    source = write_file(storage)
    result = call("run", source, "--check", "--set", "steps=7")
    assert result.exit_code == 0, result.output
    assert "steps: 7" in result.stdout
    assert "7 steps × 256" in result.stdout  # 8 rows × 32 tokens
    assert not (storage / "runs").exists()


def test_check_finds_missing_text(storage: Path):
    result = call("run", write_file(storage), "--check", "--set", "data.sources.0.path=nowhere")
    assert result.exit_code == 2
    assert "data.sources.0" in result.stderr
    assert not (storage / "runs").exists()


def test_a_run_of_missing_text_leaves_nothing(storage: Path):
    assert "does not exist" in refused(
        "run", write_file(storage), "--set", "data.sources.0.path=nowhere"
    )
    assert not (storage / "runs").exists()


@pytest.mark.shows("run-after-end")
def test_a_taken_name_is_refused(storage: Path):
    make_run(storage, "my-run").write_status({**STATUS, "state": "stopped"})
    said = refused("run", write_file(storage))
    assert "'my-run' exists" in said
    assert "stillhouse resume my-run" in said


# Runs.

NEED_A_RUN = [
    ("status",),
    ("log",),
    ("events",),
    ("logs",),
    ("report",),
    ("stop",),
    ("scale", "--teachers", "2"),
    ("rm", "--yes"),
    ("resume",),
]


@pytest.mark.parametrize("command", NEED_A_RUN, ids=lambda command: command[0])
def test_an_unknown_run_names_the_known_ones(storage: Path, command: tuple[str, ...]):
    assert "(runs: none)" in refused(*command, "other")
    make_run(storage, "first")
    make_run(storage, "second")
    said = refused(*command, "other")
    assert "There is no run 'other'" in said
    assert "(runs: first, second)" in said


def test_evaluating_an_unknown_checkpoint():
    assert "there is no run 'other'" in refused("evaluate", "other@4")


def test_status_as_a_table_and_as_json(storage: Path):
    folder = make_run(storage)
    assert "created" in call("status", "run").stdout
    folder.write_status(STATUS)
    folder.write_lease("someone", "here:1")
    shown = call("status", "run").stdout
    assert "training" in shown
    assert "2 of 4" in shown
    assert json.loads(call("status", "run", "--json").stdout) == {
        **STATUS,
        "alive": True,
        "goodput": None,
    }
    folder.release_lease()
    assert json.loads(call("status", "run", "--json").stdout)["alive"] is False


def test_the_record_comes_out_as_json_lines(storage: Path):
    folder = make_run(storage)
    for command in ("log", "events", "logs"):
        assert call(command, "run").stdout == ""
    writer = SegmentWriter(join(folder.url, STEPS), "a0001-h0000", flush_s=3600)
    writer.append({"attempt": 1, "start_step": 0})
    for step in (1, 2):
        writer.append({"attempt": 1, "step": step, "loss": 2.0, "stall_s": {"data": 0.0}})
    writer.close()
    events = EventWriter(folder.url, "controller-1")
    events.say("state", state="training")
    events.close()
    lines = [json.loads(line) for line in call("log", "run").stdout.splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    (event,) = [json.loads(line) for line in call("events", "run").stdout.splitlines()]
    assert (event["event"], event["who"]) == ("state", "controller-1")


def test_logs_keep_their_brackets(storage: Path):
    folder = make_run(storage)
    writer = SegmentWriter(join(folder.url, LOGS), "student", flush_s=3600)
    line = {"time_s": 0.0, "who": "student", "level": "INFO", "message": "[red]shape [8, 32]"}
    writer.append(line)
    writer.close()
    assert call("logs", "run").stdout.endswith("student INFO [red]shape [8, 32]\n")


def test_list_shows_every_run(storage: Path):
    make_run(storage, "first").write_status({**STATUS, "name": "first", "state": "finished"})
    make_run(storage, "second")
    shown = call("list").stdout
    assert "first" in shown
    assert "finished" in shown
    assert "second" in shown
    assert "created" in shown


def test_stopping_a_run_that_is_not_under_way(storage: Path):
    folder = make_run(storage)
    assert "not under way (it is created)" in refused("stop", "run")
    folder.write_status({**STATUS, "state": "finished"})
    assert "not under way (it is finished)" in refused("stop", "run")
    assert folder.commands() == []


def test_stopping_leaves_a_command(storage: Path):
    folder = make_run(storage, alive=True)
    assert call("stop", "run", "--no-wait").exit_code == 0
    assert [command for _, command in folder.commands()] == [{"kind": "stop"}]


def test_scaling_leaves_a_command(storage: Path):
    distilled: dict[str, Any] = {
        "objective": {"kind": "distill"},
        "teacher": {"checkpoint": "elder"},
    }
    folder = make_run(storage, alive=True, **distilled)
    result = call("scale", "run", "--teachers", "3")
    assert result.exit_code == 0
    assert "3 teachers" in result.stdout
    assert [c for _, c in folder.commands()] == [{"kind": "scale", "teachers": 3}]
    for wrong in ("0", "many"):
        assert call("scale", "run", "--teachers", wrong).exit_code == 2
    assert "has no teacher.max_replicas" in refused("scale", "run", "--teachers", "auto")
    assert len(folder.commands()) == 1


def test_scaling_by_need_is_asked_for(storage: Path):
    distilled: dict[str, Any] = {
        "objective": {"kind": "distill"},
        "teacher": {"checkpoint": "elder", "max_replicas": 4},
    }
    folder = make_run(storage, alive=True, **distilled)
    result = call("scale", "run", "--teachers", "auto")
    assert result.exit_code == 0
    assert "as many teachers as it needs" in result.stdout
    assert [c for _, c in folder.commands()] == [{"kind": "scale", "teachers": "auto"}]


def test_a_run_without_teachers_cannot_be_scaled(storage: Path):
    folder = make_run(storage, alive=True)
    assert "it has no teachers" in refused("scale", "run", "--teachers", "3")
    assert folder.commands() == []


def test_removing_asks_first(storage: Path):
    folder = make_run(storage)
    result = call("rm", "run", answer="n\n")
    assert result.exit_code == 1
    assert folder.url in result.output
    assert folder.exists()
    assert call("rm", "run", answer="y\n").exit_code == 0
    assert not folder.exists()
    assert (storage / "text").exists()
    make_run(storage)
    assert call("rm", "run", "--yes").exit_code == 0
    assert not folder.exists()


def test_a_run_under_way_is_not_removed(storage: Path):
    """Also where the clocks of user and controller are apart."""
    folder = make_run(storage)
    with renewed_lease(folder, clock_behind_s=21.0):
        assert "stillhouse stop run" in refused("rm", "run", "--yes")
        assert call("stop", "run", "--no-wait").exit_code == 0
        assert json.loads(call("status", "run", "--json").stdout)["alive"]
    assert folder.exists()


def test_resuming_with_a_setting_that_is_fixed_for_life(storage: Path):
    make_run(storage)
    assert "batch.rows" in refused("resume", "run", "--set", "batch.rows=4")


def test_a_damaged_run_is_told_by_its_file(storage: Path):
    folder = make_run(storage)
    Path(folder.url, "status.json").write_text("{")
    said = refused("status", "run")
    assert "status.json is not JSON" in said


def test_a_cluster_that_is_not_there_leaves_no_run(storage: Path, monkeypatch: pytest.MonkeyPatch):
    import ray

    def nobody(**options: Any) -> None:
        raise ConnectionError("nobody answers at ray://10.0.0.1:6379\nmore of it")

    monkeypatch.setattr(ray, "init", nobody)
    said = refused("run", write_file(storage), "--address", "10.0.0.1:6379")
    assert "no Ray cluster answers there (nobody answers at ray://10.0.0.1:6379)" in said
    assert not (storage / "runs" / "my-run").exists()


def test_storage_that_fails_is_not_taken_for_one_without_the_run(
    storage: Path, monkeypatch: pytest.MonkeyPatch
):
    """A `run` of a name that is there would make it anew, and remove it when that fails."""
    folder = make_run(storage, "my-run")
    info = LocalFileSystem.info

    def failing(fs: LocalFileSystem, path: str, **options: Any) -> Any:
        if str(path).endswith("run.json"):
            raise OSError(errno.EIO, "Input/output error")
        return info(fs, path, **options)

    monkeypatch.setattr(LocalFileSystem, "info", failing)
    said = refused("run", write_file(storage, steps=9))
    assert "Input/output error" in said and "run.json" in said
    monkeypatch.undo()
    assert folder.config().steps == 4


def test_storage_that_needs_a_package_says_which():
    said = refused("status", "run", "--storage", "gs://bucket/runs")
    assert "gcsfs" in said


def test_a_job_is_refused_where_its_run_would_be_thrown_away():
    address = ("--address", "http://127.0.0.1:1")
    assert "storage: './stillhouse-runs' would lie in the job's copy" in refused(
        "submit", "simulated", *address
    )
    said = refused("submit", "simulated", *address, "--runtime-env-json", "{pip")
    assert "--runtime-env-json: is no JSON" in said


def test_help_names_every_command():
    shown = call("--help").stdout
    commands = ("run", "resume", "stop", "scale", "status", "log", "events", "logs", "evaluate")
    more = ("generate", "import", "export", "report", "list", "rm", "simulate", "submit")
    for command in (*commands, *more):
        assert f"  {command} " in shown
