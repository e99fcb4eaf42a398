"""Watches a run from its folder: shows progress, passes on Ctrl-C, tells the end."""

import contextlib
import signal
import time
from collections.abc import Iterator
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column

from orchestrator.history import Tail
from orchestrator.liveness import LOOK_EVERY_S, under_way
from orchestrator.run_folder import LEASE_EXPIRY_S, RunFolder
from orchestrator.run_state import State
from workers.record import EVENTS

EXIT_STOPPED = 130

_SHOWN_EVENTS = {
    "attempt_failed": "attempt {attempt} failed ({kind}): {message}",
    "teacher_retry": "step {step}: asked for targets again ({reason})",
    "preemption_noticed": "attempt {attempt} saves and leaves: its machines are taken away",
    "evaluated": "step {step}: {bits_per_byte:.4f} bits per byte on held-out text",
    "evaluation_failed": "step {step}: not evaluated: {message}",
    "scaled": "teachers: {before} → {teachers} ({reason})",
    "pool_joined": "shares the pool {pool}: {replicas} teachers for {members} runs",
    "pool_changed": "pool {pool}: {before} → {replicas} teachers for {members} runs",
    "scaling_effect": "with {teachers} teachers the student waits {stall_share:.0%} of its time, "
    "before {stall_share_before:.0%}",
    "class_chosen": "targets are those of teachers of the class {sameness}: {reason}",
    "targets_damaged": "stored targets are damaged and asked for again: {shard}: {reason}",
    "targets_cache_full": "further targets are not stored: {reason}",
    "targets_cache_unwritable": "targets wait to be stored in {folder}: {reason}",
    "targets_dropped": "targets of {rows} rows are not stored: {reason}",
    "targets_cache_unreadable": "stored targets cannot be read from {folder}: {reason}",
    "teacher_hedged": "replica {replica} is late: {rows} rows were asked of another one too",
    "teacher_failed": "replica {replica} failed with {rows} rows to go ({reason})",
    "teacher_quarantined": "replica {replica} is not used any more: {reason}",
    "row_poisoned": "{reason}; it is trained on its labels alone",
    "labels_alone": "step {step}: no teacher for {after_s} s, going on with labels alone",
    "targets_again": "teachers answer again",
}


def is_under_way(folder: RunFolder, console: Console) -> bool:
    """Whether a controller works on the run, for certain; says so where that takes a while."""

    def told() -> None:
        console.print(f"Waiting to see that nobody works on {folder.name}", highlight=False)

    return under_way(folder, told)


class LostRunError(click.ClickException):
    """Nobody works on the run any more, though it has not ended."""

    exit_code = 2


def follow(folder: RunFolder, console: Console) -> int:
    """Shows a run until it ends; the exit code tells how.

    The first Ctrl-C (or SIGTERM) asks the run to stop and save; the second leaves at once.

    Raises:
        LostRunError: the run's controller has been away for too long.
    """
    with _asking_to_stop(folder, console), _progress(console) as bar:
        task = bar.add_task(folder.name, total=None, doing="waiting")
        events = Tail(folder.url, EVENTS)
        events.new()  # told before
        lease, seen_s = folder.last_lease(), time.monotonic()
        while True:
            status = folder.status()
            before, lease = lease, folder.last_lease()
            if lease is not None and lease != before:
                seen_s = time.monotonic()
            left = lease is None or time.monotonic() - seen_s > LEASE_EXPIRY_S
            if status is not None:
                _update(bar, task, status)
                _tell_events(events.new(), console)
                if State(status["state"]).is_terminal and left:
                    break
            if time.monotonic() - seen_s > 2 * LEASE_EXPIRY_S:
                folder.check_writable()
                raise LostRunError(
                    f"Nothing works on {folder.name} any more; its cluster may be gone. "
                    f"`stillhouse resume {folder.name}` continues from the last checkpoint"
                )
            time.sleep(LOOK_EVERY_S)
    return _tell_end(folder, status, console)


def describe_status(status: dict[str, Any]) -> str:
    """One line: where a run stands."""
    line = status["line"]
    if status["state"] == "preparing":
        made = status["preparing"] or {}
        return f"preparing {made.get('what', '')}".rstrip()
    if not line:
        return status["state"]
    rate = line["tokens"] / line["step_s"]
    wait = sum(line["stall_s"].values()) / line["step_s"]
    state = "" if status["state"] == "training" else f"{status['state']} · "
    loss = f"loss {line['loss']:.3f} · " if "loss" in line else ""
    return f"{state}{loss}{rate:,.0f} tok/s · wait {wait:.0%}"


def _tell_events(events: list[dict[str, Any]], console: Console) -> None:
    for event in events:
        if event["event"] in _SHOWN_EVENTS:
            text = _SHOWN_EVENTS[event["event"]].format(**event)
            console.print(f"  {text}", highlight=False, markup=False)


def _update(bar: Progress, task: Any, status: dict[str, Any]) -> None:
    if status["state"] == "preparing" and status["preparing"]:
        made = status["preparing"]
        bar.update(task, completed=made["done"], total=made["total"] or None)
    else:
        bar.update(task, completed=status["step"] or 0, total=status["num_steps"])
    bar.update(task, doing=describe_status(status))


def _tell_end(folder: RunFolder, status: dict[str, Any], console: Console) -> int:
    name, state = folder.name, State(status["state"])
    if state is State.FINISHED:
        console.print(f"{name} finished at step {status['num_steps']}", highlight=False)
        return 0
    if state is State.STOPPED:
        console.print(f"{name} stopped; `stillhouse resume {name}` continues it", highlight=False)
        return EXIT_STOPPED
    console.print(f"{name} failed: {status['reason']}", highlight=False, markup=False)
    console.print(
        f"`stillhouse logs {name}` has the details; `stillhouse resume {name}` tries again once "
        f"the cause is mended",
        highlight=False,
    )
    return 1


@contextlib.contextmanager
def _asking_to_stop(folder: RunFolder, console: Console) -> Iterator[None]:
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        folder.send({"kind": "stop"})
        console.print("Stopping after a checkpoint; once more leaves at once", highlight=False)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", table_column=Column(no_wrap=True, min_width=18)),
        MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=7)),
        BarColumn(bar_width=8),
        TimeElapsedColumn(table_column=Column(no_wrap=True, min_width=7)),
        TextColumn("{task.fields[doing]}", table_column=Column(no_wrap=True)),
        console=console,
        refresh_per_second=4,
    )
