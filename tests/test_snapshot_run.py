"""A run whose student host dies again and again, and which storage has no checkpoint of."""

import os
import signal
from pathlib import Path

import pytest
import ray

from configs.load import parse_run
from orchestrator.history import read_events, read_steps
from orchestrator.launch import create_run, start_controller
from orchestrator.run_folder import RunFolder
from tests.distilled_runs import ENDLESS, embedded_ray, end_of, step_of, wait_until
from tests.runs import text_folder, tiny_values
from workers.memory_tier import newest_complete
from workers.snapshot_keeper import NAMESPACE, held_by_keepers, keepers

pytestmark = pytest.mark.cluster

NEVER = 10**6
MORE_STEPS = 5


def start(storage: Path, address: str, name: str, steps: int) -> RunFolder:
    values = tiny_values(storage, name) | {
        "steps": steps,
        "optimizer": {"final_lr_ratio": 1.0},
        "checkpoint": {"every_steps": NEVER, "snapshot_every_steps": 1},
        "evaluation": {"enabled": False},
        "record": {"flush_s": 60.0},  # the lines of the last steps are in memory alone
    }
    folder = create_run(parse_run(values, "test"))
    start_controller(folder, address)
    return folder


def goes_on(folder: RunFolder) -> None:
    step = step_of(folder)
    wait_until(lambda: step_of(folder) >= step + MORE_STEPS)


def ready(folder: RunFolder) -> list[dict]:
    return [e for e in read_events(folder.url) if e["event"] == "host_ready"]


def kill_host(folder: RunFolder) -> None:
    """Returns when the next attempt trains."""
    attempts = len(ready(folder))
    os.kill(ready(folder)[-1]["pid"], signal.SIGKILL)
    wait_until(lambda: len(ready(folder)) > attempts)
    goes_on(folder)


def test_a_run_goes_on_from_memory(tmp_path: Path):
    text_folder(tmp_path)
    with embedded_ray() as address:
        folder = start(tmp_path, address, "disturbed", ENDLESS)
        wait_until(lambda: step_of(folder) >= MORE_STEPS)
        run_id = folder.identity()["run_id"]
        kill_host(folder)
        # A keeper that dies is replaced, and the next snapshot is in the new one.
        (keeper,) = keepers(run_id)
        ray.kill(ray.get_actor(keeper, NAMESPACE))
        wait_until(lambda: newest_complete(held_by_keepers(run_id)) is not None)
        goes_on(folder)
        kill_host(folder)
        folder.send({"kind": "stop"})
        losses, digest = end_of(folder)
        assert keepers(run_id) == [], "nothing is left behind"

        starts = [(event["start"], event["step"]) for event in ready(folder)]
        assert [kind for kind, _ in starts] == ["fresh", "memory", "memory"]
        made: dict[int, int] = {}
        for line in read_steps(folder.url):
            made[line["attempt"]] = max(made.get(line["attempt"], 0), line["step"])
        # Each attempt goes on where the one before it was, and every line is there.
        assert [step for _, step in starts[1:]] == [made[1], made[2]]
        assert end_of(start(tmp_path, address, "undisturbed", len(losses))) == (losses, digest)
