"""Targets built ahead of a run on an embedded Ray: its teachers are then asked for nothing.

Costs two gangs, one of which trains nothing, and two teachers.
"""

from pathlib import Path

import yaml
from click.testing import CliRunner
from rich.console import Console

from orchestrator.cli import main
from orchestrator.history import read_events, read_steps
from orchestrator.run_folder import RunFolder
from orchestrator.targets import targets_list
from tests.helpers.distilled_runs import distilled_values
from workers.target_store import find_damage, stored_keys
from workers.targets_protocol import CACHE

NUM_STEPS = 6


def test_a_run_finds_what_was_built_ahead_of_it(storage: Path, address: str) -> None:
    file = storage / "ahead.yaml"
    file.write_text(yaml.safe_dump(distilled_values(storage, "ahead", NUM_STEPS)))

    def call(*command: str) -> None:
        """A command on the run's file, which has to succeed."""
        done = CliRunner().invoke(main, [*command, str(file), "--address", address])
        assert done.exit_code == 0, done.output

    call("targets", "build", "--teachers", "2")
    building = RunFolder(str(storage), "ahead-targets")
    status = building.status() or {}
    assert (status["state"], status["step"]) == ("finished", NUM_STEPS)
    assert read_steps(building.url) == []
    assert {event["event"] for event in read_events(building.url)} >= {"prepared", "host_ready"}
    assert not (storage / "runs" / "ahead-targets" / "checkpoints").exists()
    (key,) = stored_keys(str(storage))
    assert list(find_damage(str(storage), key)) == []
    before = sorted((storage / "targets" / key).iterdir())

    call("run")
    lines = read_steps(RunFolder(str(storage), "ahead").url)
    assert [line["targets"]["from"] for line in lines] == [{CACHE: 8}] * NUM_STEPS
    assert all(line["kd_loss"] > 0 for line in lines)
    assert sorted((storage / "targets" / key).iterdir()) == before

    console = Console(width=200)
    with console.capture() as shown:
        console.print(targets_list(str(storage)))
    assert key in shown.get()
