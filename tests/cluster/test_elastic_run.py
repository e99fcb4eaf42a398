"""A run on two slices, of which one is lost for a while."""

import math
from pathlib import Path

import pytest

from configs.load import parse_run
from orchestrator.cluster import simulated_cluster
from orchestrator.history import read_events, read_steps
from orchestrator.launch import connect, create_run, start_controller
from orchestrator.run_folder import RunFolder
from tests.helpers.distilled_runs import ENDLESS, step_of, wait_until
from tests.helpers.runs import text_folder, tiny_values

pytestmark = pytest.mark.cluster

MORE_STEPS = 5
# Float32 sums over another number of devices.
TOLERANCE = 1e-4


def start(storage: Path, address: str, name: str, steps: int) -> RunFolder:
    values = tiny_values(storage, name) | {
        "steps": steps,
        "optimizer": {"final_lr_ratio": 1.0},
        "mesh": {"fsdp": 2, "model": 2},
        "cluster": {
            "accelerator": "v4",
            "topology": "2x2x1",
            "num_slices": 2,
            "min_slices": 1,
            "resize_after_s": 2.0,
        },
        "checkpoint": {"every_steps": 10**6, "snapshot_every_steps": 1},
        "evaluation": {"enabled": False},
    }
    folder = create_run(parse_run(values, "test"))
    start_controller(folder, address)
    return folder


def attempt_of(folder: RunFolder) -> int:
    return (folder.status() or {}).get("attempt") or 0


def goes_on_in(folder: RunFolder, attempt: int) -> None:
    wait_until(lambda: attempt_of(folder) >= attempt)
    step = step_of(folder)
    wait_until(lambda: step_of(folder) >= step + MORE_STEPS)


def test_a_run_shrinks_to_what_is_left_and_grows_back(tmp_path: Path):
    text_folder(tmp_path)
    with simulated_cluster(2, "2x2x1", "v4") as cluster:
        connect(cluster.address)
        folder = start(tmp_path, cluster.address, "elastic", ENDLESS)
        goes_on_in(folder, 1)
        cluster.lose_slice(1)
        goes_on_in(folder, 2)
        cluster.add_slice(2)
        goes_on_in(folder, 3)
        folder.send({"kind": "stop"})
        wait_until(lambda: folder.lease() is None)
        assert (folder.status() or {})["state"] == "stopped", folder.status()
        lines = read_steps(folder.url)
        undisturbed = start(tmp_path, cluster.address, "undisturbed", len(lines))
        wait_until(lambda: undisturbed.lease() is None)

    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    for line, expected in zip(lines, read_steps(undisturbed.url), strict=True):
        assert math.isclose(line["loss"], expected["loss"], rel_tol=TOLERANCE), line["step"]
    events = read_events(folder.url)
    resized = [(e["before"], e["slices"]) for e in events if e["event"] == "resized"]
    assert resized == [(2, 1), (1, 2)]
    faults = [e["kind"] for e in events if e["event"] == "attempt_failed"]
    assert len(faults) == 1, "to grow is no fault"
    # What the lost slice had, the other one had too: no step that was made is made again.
    starts = {(e["attempt"], e["start"], e["step"]) for e in events if e["event"] == "host_ready"}
    made = {n: max(line["step"] for line in lines if line["attempt"] == n) for n in (1, 2)}
    assert starts == {(1, "fresh", 0), (2, "memory", made[1]), (3, "memory", made[2])}
