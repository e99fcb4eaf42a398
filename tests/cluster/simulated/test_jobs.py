"""Runs that are submitted as jobs, on a slice of two hosts: what they outlive.

Costs a slice that joins, two gangs of two hosts, and the processes of a job.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from click.testing import CliRunner

from orchestrator import history
from orchestrator.cli import main
from orchestrator.ray_calls import answer, beside_me, start_actor
from orchestrator.run_folder import RunFolder
from orchestrator.run_state import State
from tests.chaos.world import World
from tests.helpers.distilled_runs import ENDLESS, step_of, wait_until
from tests.helpers.runs import tiny_values

TOPOLOGY, INDEX = "2x2x2", 7
NUM_STEPS = 10


class Placed:
    """Tells where it is."""

    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()


@pytest.fixture
def slice_of_two_hosts(shared_world: World) -> Iterator[None]:
    shared_world.cluster.add_slice(INDEX, TOPOLOGY)
    yield
    shared_world.cluster.lose_slice(INDEX)


def test_what_drives_a_run_is_placed_beside_its_caller(shared_world: World) -> None:
    actors = [start_actor(Placed, **beside_me()) for _ in range(4)]
    try:
        places = {answer(actor.node.remote()) for actor in actors}
    finally:
        for actor in actors:
            ray.kill(actor)
    assert places == {Placed().node()}


@pytest.mark.shows(
    "ray-job-stop", "ray-job-delete", "stop-command", "terminal: killed", "controller: killed"
)
def test_a_run_outlives_its_job_its_terminal_and_its_controller(
    shared_world: World, slice_of_two_hosts: None
) -> None:
    from ray.job_submission import JobSubmissionClient

    storage, dashboard = shared_world.storage, shared_world.cluster.dashboard_url
    assert dashboard is not None
    values = tiny_values(storage, "job") | {
        "steps": ENDLESS,
        "mesh": {"data": 2, "fsdp": 2, "model": 2},
        "cluster": {"accelerator": "v4", "topology": TOPOLOGY},
        "checkpoint": {"every_steps": 500},
        "evaluation": {"enabled": False},
    }
    (storage / "job.yaml").write_text(yaml.safe_dump(values))
    folder = RunFolder(str(storage), "job")
    root = Path(__file__).parents[3]
    submitted = command(
        *("submit", str(storage / "job.yaml"), "--address", dashboard),
        *("--working-dir", str(root), "--no-wait"),
    )
    output, _ = submitted.communicate(timeout=600)
    assert submitted.returncode == 0, output

    # `ray job stop` lets the run save and stop.
    wait_until(lambda: step_of(folder) >= NUM_STEPS)
    client = JobSubmissionClient(dashboard)
    (job,) = [job.submission_id for job in client.list_jobs() if job.submission_id is not None]
    client.stop_job(job)
    wait_until(lambda: status(folder).get("state") == State.STOPPED)
    wait_until(lambda: folder.lease() is None)
    stopped_at = history.read_steps(folder.url)[-1]["step"]
    assert status(folder)["checkpoints"][-1] == stopped_at

    # A terminal that is lost takes nothing along, nor do the controller's death and the job's end.
    where = ("--storage", str(storage))
    terminal = command("resume", "job", *where, "--address", shared_world.cluster.address)
    wait_until(lambda: step_of(folder) >= stopped_at + NUM_STEPS)
    terminal.kill()
    terminal.wait()
    kill_one(folder, "controller_started")
    client.delete_job(job)
    wait_until(lambda: count(folder, "controller_started") == 3)
    lost_at = step_of(folder)
    wait_until(lambda: step_of(folder) >= lost_at + NUM_STEPS)
    assert CliRunner().invoke(main, ["stop", "job", "--no-wait", *where]).exit_code == 0
    wait_until(lambda: status(folder).get("state") == State.STOPPED)
    wait_until(lambda: folder.lease() is None)
    lines = history.read_steps(folder.url)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert {line["attempt"] for line in lines} == {1, 2}
    ready = [e for e in history.read_events(folder.url) if e["event"] == "host_ready"]
    assert {(event["attempt"], event["host"]) for event in ready} == {
        (1, 0),
        (1, 1),
        (2, 0),
        (2, 1),
    }


def command(*arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def count(folder: RunFolder, event: str) -> int:
    return sum(line["event"] == event for line in history.read_events(folder.url))


def status(folder: RunFolder) -> dict[str, Any]:
    return folder.status() or {}


def kill_one(folder: RunFolder, event: str) -> None:
    """SIGKILL to the last process that said `event`."""
    said = [line for line in history.read_events(folder.url) if line["event"] == event]
    os.kill(said[-1]["pid"], signal.SIGKILL)
