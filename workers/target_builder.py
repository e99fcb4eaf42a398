"""A host that has a run's targets put on storage and trains nothing. Knows nothing of Ray."""

import os
import platform
import time
from typing import Any

import xxhash

from workers.cache import cache_dir
from workers.host_targets import HostTargets
from workers.jobs import StudentJob
from workers.phases import Phase
from workers.record import EventWriter
from workers.rows import RowReader
from workers.step_rows import StepRows
from workers.student import Finish, Hooks
from workers.targets_protocol import TargetSource

_OBSTACLES = ("targets_cache_full", "targets_dropped")


def build_targets(job: StudentJob, source: TargetSource, hooks: Hooks) -> Finish:
    """Takes the targets of all rows of all steps, as a student would, until it is asked to stop.

    What is stored already is read, and with that verified; the rest is asked for and stored. The
    result's digest is over the targets of all steps.

    Raises:
        TeacherUnavailableError: no teacher answered in time.
        ValueError: not all targets can be stored.
    """
    config = job.config
    obstacles: list[str] = []
    events = EventWriter(job.run_url, f"builder-a{job.attempt:04d}")

    def say(event: str, **details: Any) -> None:
        events.say(event, **details)
        if event in _OBSTACLES:
            obstacles.append(details["reason"])

    reader = RowReader.open(job.storage_url, job.dataset_digest, "train", cache_dir())
    rows = StepRows(reader, config, range(config.batch.rows))
    targets = HostTargets(job, source, rows, range(config.steps), say, keep_all=True)
    place = {"machine": platform.node(), "node": hooks.node, "pid": os.getpid()}
    say("host_ready", attempt=job.attempt, **place)
    hooks.enter(Phase.TARGETS)
    step, digest = 0, xxhash.xxh3_128()
    try:
        while step < config.steps and not hooks.signal():
            line = _take(targets, rows, step)
            digest.update(line["targets"]["digest"].encode())
            step += 1
            hooks.progress({**line, "step": step, "attempt": job.attempt})
            _check(obstacles)
    finally:
        rows.close()
        targets.close()
        events.close()
    _check(obstacles)
    return Finish(step, digest.hexdigest(), stopped=step < config.steps)


def _take(targets: HostTargets, rows: StepRows, index: int) -> dict[str, Any]:
    """Takes a step's targets; its line for whoever watches."""
    began = time.perf_counter()
    tokens = int(rows.batch(index).mask.sum())
    data_s = time.perf_counter() - began
    step = targets.take(index)
    teacher_s, wire_s, decode_s, busy_s = step.cost
    return {
        "tokens": tokens,
        "step_s": time.perf_counter() - began,
        "stall_s": {"data": data_s, "teacher": teacher_s, "wire": wire_s, "decode": decode_s},
        "teacher_busy_s": busy_s,
        "targets": step.ledger,
    }


def _check(obstacles: list[str]) -> None:
    if obstacles:
        raise ValueError(
            f"Not all targets can be stored: {obstacles[0]}; make room, or raise "
            "teacher.cache_bytes, and start the same again: what is stored stays"
        )
