"""A run of two hosts, killed and stopped, which storage has no checkpoint of.

Costs four gangs of two hosts.
"""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import ray

from configs.load import parse_run
from orchestrator.history import read_events, read_steps
from orchestrator.launch import create_run, start_controller
from orchestrator.run_folder import RunFolder
from tests.helpers.distilled_runs import (
    ENDLESS,
    MORE_STEPS,
    end_of,
    step_of,
    wait_until,
)
from tests.helpers.runs import tiny_values
from workers.host_watch import hosts_with_stacks, stacks_url
from workers.memory_tier import newest_complete
from workers.snapshot_keeper import NAMESPACE, held_by_keepers, keepers

pytestmark = pytest.mark.night("test_a_killed_host_costs_at_most_one_step")

NEVER = 10**6
SNAPSHOT_EVERY_STEPS = 1


def start(storage: Path, address: str, name: str, steps: int) -> RunFolder:
    values = tiny_values(storage, name) | {
        "steps": steps,
        "optimizer": {"final_lr_ratio": 1.0},
        "cluster": {"num_hosts": 2, "devices_per_host": 2},
        "checkpoint": {"every_steps": NEVER, "snapshot_every_steps": SNAPSHOT_EVERY_STEPS},
        "evaluation": {"enabled": False},
        "record": {"flush_s": 60.0},  # the lines of the last steps are in memory alone
        "watchdog": {"step_at_least_s": 5.0, "step_times": 2.0},
    }
    folder = create_run(parse_run(values, "test"))
    start_controller(folder, address)
    return folder


def events(folder: RunFolder, name: str) -> list[dict[str, Any]]:
    return [event for event in read_events(folder.url) if event["event"] == name]


def goes_on(folder: RunFolder) -> None:
    step = step_of(folder)
    wait_until(lambda: step_of(folder) >= step + MORE_STEPS)


def end_host(folder: RunFolder, with_signal: signal.Signals) -> tuple[int, int]:
    """Returns when the next attempt trains: the process, and the step that it had made."""
    ready = events(folder, "host_ready")
    pid = next(event["pid"] for event in reversed(ready) if event["host"] == 1)
    step = step_of(folder)
    os.kill(pid, with_signal)
    wait_until(lambda: len(events(folder, "host_ready")) == len(ready) + 2)
    goes_on(folder)
    return pid, step


def test_a_run_goes_on_from_memory(storage: Path, address: str):
    folder = start(storage, address, "snapshots", ENDLESS)
    wait_until(lambda: step_of(folder) >= MORE_STEPS)
    run_id = folder.identity()["run_id"]
    _, killed_at = end_host(folder, signal.SIGKILL)
    # A keeper that dies is replaced, and the next snapshot is in the new one.
    (keeper,) = keepers(run_id)
    ray.kill(ray.get_actor(keeper, NAMESPACE))
    wait_until(lambda: newest_complete(held_by_keepers(run_id)) is not None)
    goes_on(folder)
    stopped, stopped_at = end_host(folder, signal.SIGSTOP)
    folder.send({"kind": "stop"})
    losses, digest = end_of(folder)
    assert keepers(run_id) == [], "nothing is left behind"
    assert not Path(f"/proc/{stopped}").exists()

    starts = {(e["attempt"], e["start"], e["step"]) for e in events(folder, "host_ready")}
    made: dict[int, int] = {}
    for line in read_steps(folder.url):
        made[line["attempt"]] = max(made.get(line["attempt"], 0), line["step"])
    # Each attempt resumes at the last step of the one before, and no line is missing.
    assert starts == {(1, "fresh", 0), (2, "memory", made[1]), (3, "memory", made[2])}
    assert made[1] >= killed_at - SNAPSHOT_EVERY_STEPS
    assert made[2] >= stopped_at - SNAPSHOT_EVERY_STEPS

    died, hung = events(folder, "attempt_failed")
    assert (died["kind"], hung["kind"]) == ("host_died", "host_hung")
    # The host that waited says where; the one that was stopped could not.
    assert "those of hosts [0], and none of hosts [1]" in hung["message"]
    assert hosts_with_stacks(folder.url, 2) == [0]
    assert "in _settle" in Path(stacks_url(folder.url, 2, 0)).read_text()

    assert end_of(start(storage, address, "snapshots-undisturbed", len(losses))) == (losses, digest)
