"""What it costs a student that its targets are made while it trains."""

import statistics
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import click

from benchmarks.figures import Figure, show, tell
from benchmarks.run_pool import bring_up, tiny_teacher
from benchmarks.runs import (
    STALL_PARTS,
    leave_a_core,
    run_to_end,
    stall_shares,
    steady_config,
    step_rate,
)
from orchestrator.launch import connect, create_run
from workers.targets_protocol import CACHE

# What each kind of teacher does; the real one is a model of the size `tiny`.
TEACHERS: dict[str, dict[str, Any]] = {"scripted": {"batch_s": 0.2}, "real": {}}
ROWS_PER_BATCH, STEPS_PER_REQUEST = 24, 6
# Two layers more than the quickstart, whose student takes more than 0.6 of what the real teacher
# can do on one core.
STUDENT = {"preset": "student-small", "num_layers": 4}


class Round(NamedTuple):
    """The lines of the same steps with live teachers and with their stored targets."""

    live: list[dict[str, Any]]
    cached: list[dict[str, Any]]

    @property
    def ratio(self) -> float:
        return step_rate(self.live) / step_rate(self.cached)

    @property
    def load(self) -> float:
        """Busy seconds of the teachers per second."""
        busy_s = sum(line["teacher_busy_s"] for line in self.live)
        return busy_s / sum(line["step_s"] for line in self.live)


@click.command()
@click.option("--rounds", default=3, show_default=True, help="Turns of each arm.")
@click.option("--steps", default=120, show_default=True, help="Steps of a turn.")
def live(rounds: int, steps: int) -> None:
    """A student's step rate with live teachers over that with the same targets stored.

    The student has core 0 for itself, everything else has core 1, and the pool is up in both
    arms. The live arm asks it for every row and stores what comes; the other finds all of it.
    """
    leave_a_core()
    done: dict[str, list[Round]] = {kind: [] for kind in TEACHERS}
    with tempfile.TemporaryDirectory() as scratch:
        storage = Path(scratch)
        tiny_teacher(storage)
        address = connect(None)
        for number in range(rounds):
            for kind in TEACHERS:
                done[kind].append(_round(storage, kind, number, steps, address))
                each = done[kind][-1]
                print(f"{kind} {number}: {each.ratio:.3f} at load {each.load:.2f}", flush=True)
    _tell(done)


def _round(storage: Path, kind: str, number: int, steps: int, address: str) -> Round:
    arms = []
    for arm in ("live", "cached"):
        teacher = {
            "rows_per_batch": ROWS_PER_BATCH,
            "steps_per_request": STEPS_PER_REQUEST,
            "prefetch_steps": 2 * STEPS_PER_REQUEST,
            "cpus_per_replica": 0,
        }
        name = f"{kind}-{arm}-{number}"
        # By its seed, what another kind or an earlier round stored is of no use to this one.
        seed = len(TEACHERS) * number + list(TEACHERS).index(kind)
        config = steady_config(storage, name, steps, teacher=teacher, model=STUDENT, seed=seed)
        folder = create_run(config)
        bring_up(folder, **TEACHERS[kind])
        lines = run_to_end(folder, address, own_core=True)
        cached = {CACHE in line["targets"]["from"] for line in lines}
        mixed = any(len(line["targets"]["from"]) > 1 for line in lines)
        assert cached == {arm == "cached"} and not mixed, "an arm has the other's targets"
        arms.append(lines)
    return Round(*arms)


def _tell(done: dict[str, list[Round]]) -> None:
    table = [
        [kind, number, step_rate(each.live), step_rate(each.cached), each.ratio, each.load]
        for kind, rounds in done.items()
        for number, each in enumerate(rounds)
    ]
    columns = ["teacher", "round", "live steps/s", "cached steps/s", "ratio", "teachers' load"]
    show("Steps per second", columns, table)
    waits = []
    for kind, rounds in done.items():
        for arm in Round._fields:
            lines = [line for each in rounds for line in getattr(each, arm)]
            waits.append([f"{kind}, {arm}", *stall_shares(lines).values()])
    show("Share of the steps' time that the student waits", ["arm", *STALL_PARTS], waits)
    ratios = {
        kind: statistics.median(each.ratio for each in rounds) for kind, rounds in done.items()
    }
    figures = {f"live_over_cached_{kind}": Figure(ratio, "1") for kind, ratio in ratios.items()}
    figures["live_over_cached"] = Figure(min(ratios.values()), "1", ">= 0.95")
    for kind, rounds in done.items():
        load = statistics.median(each.load for each in rounds)
        figures[f"teacher_load_{kind}"] = Figure(load, "busy s/s", "<= 0.6")
    tell(figures)
