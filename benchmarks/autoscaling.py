"""A run whose teacher becomes slower, and whose pool has to follow."""

import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from benchmarks.figures import Figure, show, tell
from benchmarks.run_pool import bring_up, tiny_teacher
from benchmarks.runs import WARM_UP_STEPS, give_own_core, leave_a_core, steady_config
from orchestrator.history import Line, read_events, read_steps
from orchestrator.launch import connect, create_run, start_controller
from orchestrator.run_folder import RunFolder
from orchestrator.teacher_scaling import TARGET_UTILISATION

ENDLESS = 10**6  # steps: the run goes on until it is told to stop
ROWS_PER_BATCH = 8
# Of one replica, at the student's pace. When slow, two would be too few by more than the noise.
LOAD, SLOWER = 0.55, 4
CALM_S = 25.0


@click.command()
def autoscaling() -> None:
    """A teacher of which one replica suffices becomes four times slower, and fast again."""
    leave_a_core()  # the student's own pace, which the load follows from, should not change
    with tempfile.TemporaryDirectory() as scratch:
        storage = Path(scratch)
        tiny_teacher(storage)
        address = connect(None)
        teacher = {
            "rows_per_batch": ROWS_PER_BATCH,
            "cpus_per_replica": 0,
            "max_replicas": 6,
            "cache_bytes": 0,
            # As many requests at once as replicas, or some of them would have nothing to do.
            "prefetch_steps": 16,
            "steps_per_request": 2,
        }
        folder = create_run(steady_config(storage, "autoscaling", ENDLESS, teacher=teacher))
        pace = storage / "batch_s"
        _set(pace, 0.001)
        bring_up(folder, batch_s_path=str(pace))
        start_controller(folder, address)
        give_own_core(folder)
        _follow(folder, pace)


def _follow(folder: RunFolder, pace: Path) -> None:
    rows_per_s = _student_pace(folder)
    began_s = time.time()
    fast_s = LOAD * ROWS_PER_BATCH / rows_per_s
    _set(pace, fast_s)
    _pass(folder, CALM_S)
    assert not _events(folder, began_s), "one replica suffices so far"
    slow_at_s = time.time()
    _set(pace, SLOWER * fast_s)
    grown = _settled(folder, slow_at_s)
    fast_at_s = time.time()
    _set(pace, fast_s)
    shrunk = _settled(folder, fast_at_s)
    folder.send({"kind": "stop"})
    while folder.lease() is not None:
        time.sleep(0.5)
    _tell(slow_at_s, fast_at_s, grown, shrunk)


def _student_pace(folder: RunFolder) -> float:
    """Rows per second of a student that does not wait."""
    lines: list[Line] = []
    while len(lines) < 100:
        _pass(folder, 2.0)
        lines = read_steps(folder.url)[WARM_UP_STEPS:]
    return folder.config().batch.rows * len(lines) / sum(line["step_s"] for line in lines)


def _settled(folder: RunFolder, since_s: float) -> list[Line]:
    """What was done to the pool since then, once its effect is told and a while was calm."""
    events: list[Line] = []
    while (
        not events
        or events[-1]["event"] != "scaling_effect"
        or (time.time() - events[-1]["time_s"] < CALM_S)
    ):
        _pass(folder, 0.5)
        events = _events(folder, since_s)
    return events


def _events(folder: RunFolder, since_s: float) -> list[Line]:
    kinds = ("scaled", "scaling_effect")
    events = read_events(folder.url)
    return [e for e in events if e["event"] in kinds and e["time_s"] >= since_s]


def _pass(folder: RunFolder, seconds: float) -> None:
    time.sleep(seconds)
    assert folder.lease() is not None, (folder.status() or {}).get("reason")


def _set(pace: Path, batch_s: float) -> None:
    """At once, for whoever reads it."""
    new = pace.with_suffix(".new")
    new.write_text(f"{batch_s}")
    os.replace(new, pace)


def _tell(slow_at_s: float, fast_at_s: float, grown: list[Line], shrunk: list[Line]) -> None:
    kinds = ("event", "teachers", "stall_share_before", "stall_share", "utilisation", "reason")
    table: list[list[Any]] = [
        [f"{event['time_s'] - slow_at_s:.0f} s", *(event.get(kind, "") for kind in kinds)]
        for event in [*grown, *shrunk]
    ]
    columns = ["since slow", "event", "teachers", "stall before", "stall", "utilisation", "reason"]
    show(f"Slower at 0 s, fast again at {fast_at_s - slow_at_s:.0f} s", columns, table)
    before, after = grown[0]["stall_share"], grown[-1]["stall_share"]
    tell(
        {
            "replicas_when_slow": Figure(grown[-1]["teachers"], "1", _right(SLOWER * LOAD)),
            "first_growth_after_s": Figure(grown[0]["time_s"] - slow_at_s, "s"),
            "last_effect_after_s": Figure(grown[-1]["time_s"] - slow_at_s, "s"),
            "stall_before_scaling": Figure(before, "share of step time"),
            "stall_after_scaling": Figure(after, "share of step time", "<= 0.02"),
            "replicas_when_fast_again": Figure(shrunk[-1]["teachers"], "1", _right(LOAD)),
            "shrunk_after_s": Figure(shrunk[-2]["time_s"] - fast_at_s, "s"),
        }
    )


def _right(load: float) -> str:
    """How many replicas a load keeps as busy as they should be."""
    return str(math.ceil(load / TARGET_UTILISATION))
