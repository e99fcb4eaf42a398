"""A student that is killed in its second save, in a process of its own."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from typing import Any

from workers import checkpoint_writer
from workers.checkpoint_writer import CheckpointWriter
from workers.jobs import StudentJob
from workers.saves import Saves
from workers.student import train

# What a save calls, in this order; the kill comes before it.
PHASES: dict[str, tuple[Any, str]] = {
    "the record is written": (Saves, "_start"),
    "the folder is tried": (Saves, "_make_room"),
    "the arrays are copied": (CheckpointWriter, "save"),
    "the arrays are written": (CheckpointWriter, "_commit"),
    "the files are digested": (checkpoint_writer, "write_file_digests"),
    "the entry is written": (checkpoint_writer, "write_json"),
    "the commit is told": (Saves, "_committed"),
}


def killed_in_a_save(job: StudentJob, phase: str) -> int:
    """Trains until the kill comes; how the process ended."""
    # Each process finds all that it needs imported.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload([__name__])
    student = processes.Process(target=_train, args=(job, phase))
    student.start()
    student.join()
    assert student.exitcode is not None
    return student.exitcode


def _train(job: StudentJob, phase: str) -> None:
    owner, name = PHASES[phase]
    setattr(owner, name, _killed_before(getattr(owner, name), call=2))
    train(job)


def _killed_before(work: Callable[..., Any], call: int) -> Callable[..., Any]:
    calls = 0

    def count(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return work(*args, **options)

    return count
