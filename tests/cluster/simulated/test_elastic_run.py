"""A run on two slices, of which one is lost for a while.

Costs three gangs; the same run without a loss is made in this process.
"""

import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.bare import train_here
from configs.load import parse_run
from orchestrator.history import read_events, read_steps
from orchestrator.launch import create_run, start_controller
from orchestrator.run_folder import RunFolder
from tests.chaos.world import World
from tests.helpers.distilled_runs import ENDLESS, step_of, wait_until
from tests.helpers.runs import tiny_values

MORE_STEPS = 5
# Float32 sums over another number of devices.
TOLERANCE = 1e-4


def elastic_values(storage: Path) -> dict[str, Any]:
    return tiny_values(storage, "elastic") | {
        "steps": ENDLESS,
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


def attempt_of(folder: RunFolder) -> int:
    return (folder.status() or {}).get("attempt") or 0


def goes_on_in(folder: RunFolder, attempt: int) -> None:
    wait_until(lambda: attempt_of(folder) >= attempt)
    step = step_of(folder)
    wait_until(lambda: step_of(folder) >= step + MORE_STEPS)


def in_one_process(storage: Path, steps: int) -> str:
    """The run on eight devices of this process, in a storage of its own; its folder."""
    cluster = {"cluster": {"devices_per_host": 8}, "mesh": {"data": 2, "fsdp": 2, "model": 2}}
    values = elastic_values(storage) | {"steps": steps, **cluster}
    return train_here(parse_run(values, "test")).folder.url


@pytest.mark.shows("slice-lost", "slice: lost for longer")
def test_a_run_shrinks_to_what_is_left_and_grows_back(
    shared_world: World, text_storage: Path
) -> None:
    folder = create_run(parse_run(elastic_values(shared_world.storage), "test"))
    start_controller(folder, shared_world.cluster.address)
    goes_on_in(folder, 1)
    shared_world.cluster.lose_slice(1)
    goes_on_in(folder, 2)
    shared_world.add_slice(1)
    goes_on_in(folder, 3)
    folder.send({"kind": "stop"})
    wait_until(lambda: folder.lease() is None)
    assert (folder.status() or {})["state"] == "stopped", folder.status()

    lines = read_steps(folder.url)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    expected = read_steps(in_one_process(text_storage, len(lines)))
    for line, other in zip(lines, expected, strict=True):
        assert math.isclose(line["loss"], other["loss"], rel_tol=TOLERANCE), line["step"]
    events = read_events(folder.url)
    resized = [(e["before"], e["slices"]) for e in events if e["event"] == "resized"]
    assert resized == [(2, 1), (1, 2)]
    faults = [e["kind"] for e in events if e["event"] == "attempt_failed"]
    assert len(faults) == 1, "to grow is no fault"
    # What the lost slice had, the other one had too: no step that was made is made again.
    starts = {(e["attempt"], e["start"], e["step"]) for e in events if e["event"] == "host_ready"}
    made = {n: max(line["step"] for line in lines if line["attempt"] == n) for n in (1, 2)}
    assert starts == {(1, "fresh", 0), (2, "memory", made[1]), (3, "memory", made[2])}
