"""Where the controller's parts have an attempt begin."""

from pathlib import Path
from typing import Any

import pytest

from configs.load import parse_run
from orchestrator import run_parts
from orchestrator.launch_spec import LaunchSpec
from orchestrator.run_parts import AttemptPart
from tests.helpers.runs import tiny_values
from workers.checkpoint import checkpoint_url
from workers.jobs import StartPoint
from workers.memory_tier import Source


def part(storage: Path, monkeypatch: pytest.MonkeyPatch, source: Source | None, **start: Any):
    values = tiny_values(storage, "run")
    if start:
        values["start_from"] = start
    spec = LaunchSpec(
        name="run",
        run_id="run-1",
        storage_url=str(storage),
        run_url=str(storage / "runs/run"),
        address="here:1",
        code="c",
        replicas=0,
        teacher_url=None,
        teacher_digest=None,
        start_url="other" if start else None,
        start_step=30 if start else 0,
    )
    monkeypatch.setattr(run_parts, "held_by_keepers", lambda run_id: {})
    monkeypatch.setattr(run_parts, "newest_complete", lambda held: source)
    return AttemptPart(spec, parse_run(values, "test"))


def test_what_is_in_memory_is_used_if_it_is_newer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = Source(1, 70, {}, {})
    attempt = part(tmp_path, monkeypatch, source)
    # A rollback goes to storage, which has less.
    assert attempt._start_point((40, 60)) == StartPoint("resume", None, 70, source, 60)
    assert attempt._start_point(()) == StartPoint("resume", None, 70, source, 0)
    url = checkpoint_url(str(tmp_path / "runs/run"), 80)
    assert attempt._start_point((60, 80)) == StartPoint("resume", url, 80)


def test_a_fork_begins_with_a_step_of_the_other_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fork = {"checkpoint": "other@30", "state": "all"}
    attempt = part(tmp_path, monkeypatch, None, **fork)
    assert attempt._start_point(()) == StartPoint("fork", "other", 30)
    source = Source(1, 33, {}, {})
    attempt = part(tmp_path, monkeypatch, source, **fork)
    assert attempt._start_point(()) == StartPoint("resume", None, 33, source, 30)
