"""What a killed student host costs, by part: with snapshots in memory, and from storage alone.

    python -m benchmarks.recovery [--kills N] [--preset NAME]

Two runs in turn, which differ in nothing else, and whose only host is killed again and again. The
parts are those of the run's own account of its time (docs/running.md, “Goodput”): `lost` is work
that is made again, `compile` what it takes where every program is in the cache.
"""

import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click

from benchmarks.figures import Figure, show, tell
from benchmarks.runs import WARM_UP_STEPS, steady_config
from orchestrator.history import read_events
from orchestrator.launch import connect, create_run, start_controller
from orchestrator.ledger import Category
from orchestrator.report_data import read_ledger
from orchestrator.run_folder import RunFolder

PARTS = (
    Category.LOST,
    Category.DETECT,
    Category.PAUSE,
    Category.CAPACITY,
    Category.START,
    Category.COMPILE,
)
_ENDLESS = 10**6
_WITHIN_S = 300.0


@click.command()
@click.option("--kills", default=3, show_default=True, help="Of each arm.")
@click.option("--preset", default="quickstart-control", show_default=True)
@click.option("--storage-every", default=100, show_default=True, help="Steps between checkpoints.")
def main(kills: int, preset: str, storage_every: int) -> None:
    arms = {"memory": 1, "storage": None}
    found: dict[str, list[dict[Category, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        address = connect(None)
        for name, snapshot_every in arms.items():
            saving = {"every_steps": storage_every, "snapshot_every_steps": snapshot_every}
            config = steady_config(
                Path(scratch),
                name,
                _ENDLESS,
                preset,
                checkpoint=saving,
                record={"flush_s": 0.2},
                faults={"host_died": kills},
            )
            folder = create_run(config)
            start_controller(folder, address)
            # The same for both arms.
            disturb(folder, kills, storage_every, random.Random(0))
            found[name] = recoveries(folder)
    columns = ["goes on from", *(f"{part.value} s" for part in PARTS), "all s"]
    rows = [
        [name, *(each[part] for part in PARTS), sum(each.values())]
        for name, each_kill in found.items()
        for each in each_kill
    ]
    show("A killed host, by part", columns, rows)
    whole = {name: statistics.median(sum(e.values()) for e in each) for name, each in found.items()}
    lost = {name: statistics.median(e[Category.LOST] for e in each) for name, each in found.items()}
    tell(
        {
            "recovery_memory_over_storage": Figure(whole["memory"] / whole["storage"], "1"),
            "lost_share_memory": Figure(lost["memory"] / whole["memory"], "1"),
            "lost_share_storage": Figure(lost["storage"] / whole["storage"], "1"),
        }
    )


def disturb(folder: RunFolder, kills: int, every: int, chance: random.Random) -> None:
    """Kills the run's host `kills` times, each time somewhere between two checkpoints."""
    for _ in range(kills):
        go_on(folder, WARM_UP_STEPS + chance.randrange(every))
        hosts = host_pids(folder)
        os.kill(hosts[-1], signal.SIGKILL)
        wait_until(lambda known=hosts: host_pids(folder) != known)
    go_on(folder, WARM_UP_STEPS)
    folder.send({"kind": "stop"})
    wait_until(lambda: folder.lease() is None)


def recoveries(folder: RunFolder) -> list[dict[Category, float]]:
    """Seconds of each part, for each attempt that failed."""
    ledger = read_ledger(folder)
    assert ledger is not None
    found: list[dict[Category, float]] = []
    lost_s, under_way = 0.0, False
    for category, begin_s, end_s in ledger.timeline():
        if category is Category.DETECT:
            found.append(dict.fromkeys(PARTS, 0.0) | {Category.LOST: lost_s})
            lost_s, under_way = 0.0, True
        if category is Category.LOST:
            lost_s += end_s - begin_s
        elif category is Category.STEP:
            under_way = False
        elif under_way and category in PARTS:
            found[-1][category] += end_s - begin_s
    return found


def go_on(folder: RunFolder, num_steps: int) -> None:
    """Waits for so many more steps."""
    until = step_of(folder) + num_steps
    wait_until(lambda: step_of(folder) >= until)


def step_of(folder: RunFolder) -> int:
    return (folder.status() or {}).get("step") or 0


def host_pids(folder: RunFolder) -> list[int]:
    """The student host of each attempt that was ready."""
    return [e["pid"] for e in read_events(folder.url) if e["event"] == "host_ready"]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _WITHIN_S
    while not condition():
        assert time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.2)


if __name__ == "__main__":
    main()
