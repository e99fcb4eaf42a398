"""Targets built ahead of a run on an embedded Ray: its teachers are then asked for nothing."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from orchestrator.history import read_events, read_steps
from orchestrator.run_folder import RunFolder
from tests.runs import make_teacher, text_folder
from tests.test_embedded import finished, values
from workers.target_store import find_damage, stored_keys
from workers.targets_protocol import CACHE

NUM_STEPS = 6


@pytest.fixture
def temp_dir() -> Iterator[Path]:
    """A folder for Ray's sockets, whose paths have to be short."""
    with tempfile.TemporaryDirectory(prefix="sh-") as path:
        yield Path(path)


def test_a_run_finds_what_was_built_ahead_of_it(tmp_path: Path, temp_dir: Path) -> None:
    make_teacher(tmp_path, text_folder(tmp_path))
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values(tmp_path, "student", NUM_STEPS)))

    built = finished(["targets", "build", str(file), "--steps", "4"], temp_dir)
    assert built.returncode == 0, built.stdout + built.stderr
    building = RunFolder(str(tmp_path), "student-targets")
    assert read_steps(building.url) == []
    assert {event["event"] for event in read_events(building.url)} >= {"prepared", "host_ready"}
    assert not (tmp_path / "runs" / "student-targets" / "checkpoints").exists()
    (key,) = stored_keys(str(tmp_path))
    assert list(find_damage(str(tmp_path), key)) == []

    again = finished(["targets", "build", str(file), "--teachers", "2"], temp_dir)
    assert again.returncode == 0, again.stdout + again.stderr
    status = building.status() or {}
    assert (status["state"], status["step"]) == ("finished", NUM_STEPS)
    before = sorted((tmp_path / "targets" / key).iterdir())

    run = finished(["run", str(file)], temp_dir)
    assert run.returncode == 0, run.stdout + run.stderr
    lines = read_steps(RunFolder(str(tmp_path), "student").url)
    assert [line["targets"]["from"] for line in lines] == [{CACHE: 8}] * NUM_STEPS
    assert all(line["kd_loss"] > 0 for line in lines)
    assert sorted((tmp_path / "targets" / key).iterdir()) == before

    shown = finished(["targets", "list", "--storage", str(tmp_path)], temp_dir)
    assert key in shown.stdout
