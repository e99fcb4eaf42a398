"""A run whose newest checkpoint is damaged while it is away: it goes on from the one before."""

import os
import signal
from pathlib import Path

import pytest

from configs.load import parse_run
from orchestrator import catalogue
from orchestrator.history import read_events
from orchestrator.launch import create_run, start_controller
from orchestrator.run_folder import RunFolder
from tests.damaged_files import flip_bit, newest_params
from tests.distilled_runs import embedded_ray, end_of, wait_until
from tests.runs import text_folder, tiny_values

pytestmark = pytest.mark.cluster

STEPS = 300


def start(storage: Path, address: str, name: str) -> RunFolder:
    values = tiny_values(storage, name) | {
        "steps": STEPS,
        "checkpoint": {"every_steps": 20, "keep_latest": 3, "snapshot_every_steps": None},
        "evaluation": {"enabled": False},
    }
    folder = create_run(parse_run(values, "test"))
    start_controller(folder, address)
    return folder


def test_a_damaged_checkpoint_costs_no_more_than_the_steps_since_the_one_before(tmp_path: Path):
    text_folder(tmp_path)
    with embedded_ray() as address:
        folder = start(tmp_path, address, "damaged")
        wait_until(lambda: len(catalogue.committed_steps(folder.url)) >= 2)
        ready = next(e for e in read_events(folder.url) if e["event"] == "host_ready")
        os.kill(ready["pid"], signal.SIGSTOP)  # so that no newer checkpoint comes between
        damaged = catalogue.committed_steps(folder.url)[-1]
        flip_bit(newest_params(folder.url))
        os.kill(ready["pid"], signal.SIGKILL)
        result = end_of(folder)
        assert len(result[0]) == STEPS and (folder.status() or {})["state"] == "finished"
        assert result == end_of(start(tmp_path, address, "undisturbed"))

    events = read_events(folder.url)
    put_away = [e for e in events if e["event"] == "checkpoint_quarantined"]
    assert [event["step"] for event in put_away] == [damaged]
    assert "has changed" in put_away[0]["reason"]
    kinds = [e["kind"] for e in events if e["event"] == "attempt_failed"]
    assert kinds == ["host_died", "corrupt_checkpoint"]
    starts = [e["step"] for e in events if e["event"] == "host_ready"]
    assert starts == [0, put_away[0]["newest"]]
