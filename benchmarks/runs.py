"""Whole runs on this machine, for benchmarks that read what a run's record says of its steps."""

import contextlib
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from configs.load import read_source
from configs.run import RunConfig
from orchestrator.history import read_events, read_steps
from orchestrator.run_folder import RunFolder

TEACHER = "teacher"
WARM_UP_STEPS = 20
STALL_PARTS = ("data", "teacher", "wire", "decode", "checkpoint")
_STUDENT_CORE, _OTHER_CORE = 0, 1


def steady_config(
    storage: Path,
    name: str,
    steps: int,
    preset: str = "quickstart-student",
    teacher: dict[str, Any] | None = None,
    **changes: Any,
) -> RunConfig:
    """A run of the quickstart without what only happens now and then.

    Args:
        teacher: settings of the student's teacher, which is the run `TEACHER` of the storage.
        changes: settings that are replaced as a whole.
    """
    from benchmarks.bare import preset_config  # the driver of a benchmark may need no JAX

    steady: dict[str, Any] = {
        "steps": steps,
        "evaluation": {"enabled": False},
        "checkpoint": {"every_steps": 10**6, "snapshot_every_steps": None},
        "record": {"flush_s": 5.0},
    }
    if teacher is not None:
        steady["teacher"] = {**read_source(preset)["teacher"], "checkpoint": TEACHER, **teacher}
    return preset_config(preset, storage, name, **(steady | changes))


def leave_a_core() -> None:
    """Moves this process, and all that it starts from now on, off the student's core."""
    os.sched_setaffinity(0, {_OTHER_CORE})


def take_own_core() -> None:
    """Moves this process to the student's core."""
    os.sched_setaffinity(0, {_STUDENT_CORE})


def run_to_end(folder: RunFolder, address: str, own_core: bool) -> list[dict[str, Any]]:
    """The lines of a new run's steps, but for the first ones.

    Args:
        own_core: gives the student a core for itself, once `leave_a_core` was called.
    """
    from orchestrator.launch import start_controller

    start_controller(folder, address)
    if own_core:
        give_own_core(folder)
    while folder.lease() is not None:
        time.sleep(0.5)
    status = folder.status() or {}
    assert status.get("state") == "finished", status.get("reason")
    return read_steps(folder.url)[WARM_UP_STEPS:]


def give_own_core(folder: RunFolder) -> None:
    """Moves the student to its core as soon as it is there."""
    ready: list[dict[str, Any]] = []
    while not ready and folder.lease() is not None:
        time.sleep(0.5)
        ready = [event for event in read_events(folder.url) if event["event"] == "host_ready"]
    for event in ready:
        for thread in os.listdir(f"/proc/{event['pid']}/task"):
            with contextlib.suppress(ProcessLookupError):  # a thread that has just ended
                os.sched_setaffinity(int(thread), {_STUDENT_CORE})


def step_rate(lines: list[dict[str, Any]]) -> float:
    """Steps per second."""
    return len(lines) / sum(line["step_s"] for line in lines)


def stall_shares(lines: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Share of the steps' time that the student waited, by what for."""
    lines = list(lines)
    total_s = sum(line["step_s"] for line in lines)
    return {part: sum(line["stall_s"][part] for line in lines) / total_s for part in STALL_PARTS}
