"""The real path on a simulated slice of two hosts, undisturbed and with processes killed.

Costs a cluster of its own, three gangs of two hosts and five teachers.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.load import parse_run
from configs.run import RunConfig
from orchestrator import history
from orchestrator.cluster import SimulatedCluster, simulated_cluster
from orchestrator.launch import connect, create_run, start_controller
from orchestrator.run_folder import RunFolder
from orchestrator.run_state import State
from tests.helpers.distilled_runs import ENDLESS, distilled_values, step_of, wait_until
from tests.helpers.same_run import assert_same_run

pytestmark = pytest.mark.night("test_a_disturbed_run_equals_an_undisturbed_one")

EVERY_STEPS = 8


@pytest.fixture(scope="module")
def cluster() -> Iterator[SimulatedCluster]:
    with simulated_cluster(1, "2x2x2", "v4") as running:
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
