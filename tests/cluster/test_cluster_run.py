"""The real path on a simulated slice of two hosts, undisturbed and with processes killed."""

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

from configs.load import parse_run
from configs.run import RunConfig
from orchestrator import history
from orchestrator.cluster import SimulatedCluster, simulated_cluster
from orchestrator.launch import connect, create_run, start_controller
from orchestrator.ray_calls import answer, beside_me, start_actor
from orchestrator.run_folder import RunFolder
from orchestrator.run_state import State
from tests.helpers.distilled_runs import ENDLESS, distilled_values, step_of, wait_until
from tests.helpers.runs import tiny_values
from tests.helpers.same_run import assert_same_run

pytestmark = pytest.mark.cluster

EVERY_STEPS = 8


class Placed:
    """Tells where it is."""

    def node(self) -> str:
        return ray.get_runtime_context().get_node_id()


@pytest.fixture(scope="module")
def cluster() -> Iterator[SimulatedCluster]:
    with simulated_cluster(1, "2x2x2", "v4", dashboard=True) as running:
        connect(running.address)
        yield running


@pytest.fixture(scope="module")
def disturbed(cluster: SimulatedCluster, storage: Path) -> RunFolder:
    """A run under which a teacher and later a student host were killed, then stopped."""
    folder = launch(cluster, storage, "disturbed", ENDLESS)
    wait_until(lambda: len(history.read_steps(folder.url)) >= 3)
    kill_one(folder, "teacher_ready")
    # The dead teacher costs no attempt, and is replaced while the run goes on.
    wait_until(lambda: bool(status(folder).get("checkpoints")))
    wait_until(lambda: count(folder, "teacher_ready") == 3)
    assert status(folder)["attempt"] == 1
    kill_one(folder, "host_ready")
    wait_until(lambda: status(folder)["attempt"] == 2)
    restarted_at = step_of(folder)
    wait_until(lambda: step_of(folder) >= restarted_at + EVERY_STEPS)
    folder.send({"kind": "stop"})
    wait_for_end(folder, State.STOPPED)
    return folder


@pytest.fixture(scope="module")
def undisturbed(cluster: SimulatedCluster, storage: Path, disturbed: RunFolder) -> RunFolder:
    """The same run, as long as the disturbed one became."""
    folder = launch(cluster, storage, "undisturbed", len(history.read_steps(disturbed.url)))
    wait_for_end(folder, State.FINISHED)
    return folder


def test_what_drives_a_run_is_placed_beside_its_caller(cluster: SimulatedCluster) -> None:
    actors = [start_actor(Placed, **beside_me()) for _ in range(6)]
    try:
        places = {answer(actor.node.remote()) for actor in actors}
    finally:
        for actor in actors:
            ray.kill(actor)
    assert places == {Placed().node()}


def test_undisturbed_run_is_complete(undisturbed: RunFolder) -> None:
    steps = history.read_steps(undisturbed.url)
    num_steps = undisturbed.config().steps
    assert [line["step"] for line in steps] == list(range(1, num_steps + 1))
    assert {line["attempt"] for line in steps} == {1}
    evaluated = [evaluation["step"] for evaluation in undisturbed.evaluations()]
    assert evaluated == [*range(EVERY_STEPS, num_steps, EVERY_STEPS), num_steps]
    assert count(undisturbed, "teacher_ready") == 2
    hosts = {e["host"] for e in history.read_events(undisturbed.url) if e["event"] == "host_ready"}
    assert hosts == {0, 1}


def test_killed_teacher_and_host_change_no_bit(
    disturbed: RunFolder, undisturbed: RunFolder
) -> None:
    failed = [e for e in history.read_events(disturbed.url) if e["event"] == "attempt_failed"]
    assert [event["kind"] for event in failed] == ["host_died"]
    lines = history.read_steps(disturbed.url)
    assert {line["attempt"] for line in lines} == {1, 2}
    # No step that was made is made again: each had its snapshot, of every host.
    ready = [e for e in history.read_events(disturbed.url) if e["event"] == "host_ready"]
    last = max(line["step"] for line in lines if line["attempt"] == 1)
    restarts = {(e["start"], e["step"]) for e in ready if e["attempt"] == 2}
    assert restarts == {("memory", last)}
    assert_same_run(disturbed, undisturbed)


def test_a_run_outlives_its_job_its_terminal_and_its_controller(
    cluster: SimulatedCluster, storage: Path
) -> None:
    from ray.job_submission import JobSubmissionClient

    assert cluster.dashboard_url is not None
    values = tiny_values(storage, "job") | {
        "steps": ENDLESS,
        "checkpoint": {"every_steps": 500},
        "evaluation": {"enabled": False},
    }
    (storage / "job.yaml").write_text(yaml.safe_dump(values))
    folder = RunFolder(str(storage), "job")
    root = Path(__file__).parents[2]
    submitted = command(
        *("submit", str(storage / "job.yaml"), "--address", cluster.dashboard_url),
        *("--working-dir", str(root), "--no-wait"),
    )
    output, _ = submitted.communicate(timeout=120)
    assert submitted.returncode == 0, output

    # `ray job stop` lets the run save and stop.
    wait_until(lambda: step_of(folder) >= 10)
    client = JobSubmissionClient(cluster.dashboard_url)
    (job,) = [job for job in client.list_jobs() if job.submission_id is not None]
    assert job.submission_id is not None
    client.stop_job(job.submission_id)
    wait_until(lambda: status(folder).get("state") == State.STOPPED)
    wait_until(lambda: folder.lease() is None)
    stopped_at = history.read_steps(folder.url)[-1]["step"]
    assert status(folder)["checkpoints"][-1] == stopped_at

    # A terminal that is lost takes nothing along, nor does the controller's death.
    terminal = command("resume", "job", "--storage", str(storage), "--address", cluster.address)
    wait_until(lambda: step_of(folder) >= stopped_at + 10)
    terminal.kill()
    terminal.wait()
    kill_one(folder, "controller_started")
    wait_until(lambda: count(folder, "controller_started") == 3)
    lost_at = step_of(folder)
    wait_until(lambda: step_of(folder) >= lost_at + 10)
    folder.send({"kind": "stop"})
    wait_for_end(folder, State.STOPPED)
    lines = history.read_steps(folder.url)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert {line["attempt"] for line in lines} == {1, 2}


def command(*arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def count(folder: RunFolder, event: str) -> int:
    return sum(line["event"] == event for line in history.read_events(folder.url))


def launch(cluster: SimulatedCluster, storage: Path, name: str, steps: int) -> RunFolder:
    folder = create_run(config(storage, name, steps))
    start_controller(folder, cluster.address)
    return folder


def config(storage: Path, name: str, steps: int) -> RunConfig:
    """It keeps no targets: what its teachers were asked for once would not be asked for again."""
    values = distilled_values(storage, name, steps, replicas=2, cache_bytes=0) | {
        "evaluation": {"rows_per_batch": 4},
        "batch": {"rows": 16, "microbatches": 1},
        "mesh": {"data": 2, "fsdp": 2, "model": 2},
        "cluster": {"accelerator": "v4", "topology": "2x2x2"},
        "checkpoint": {"every_steps": EVERY_STEPS, "snapshot_every_steps": 1},
    }
    return parse_run(values, "test")


def status(folder: RunFolder) -> dict[str, Any]:
    return folder.status() or {}


def wait_for_end(folder: RunFolder, end: State) -> None:
    wait_until(lambda: status(folder).get("state") in ("finished", "failed", "stopped"))
    wait_until(lambda: folder.lease() is None)
    assert status(folder)["state"] == end, status(folder)["reason"]


def kill_one(folder: RunFolder, event: str) -> None:
    """SIGKILL to the last process that said `event`."""
    said = [line for line in history.read_events(folder.url) if line["event"] == event]
    os.kill(said[-1]["pid"], signal.SIGKILL)
