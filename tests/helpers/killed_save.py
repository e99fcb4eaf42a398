"""A student that is killed in its second save: `python -m tests.helpers.killed_save JOB PHASE`."""

import os
import pickle
import signal
import sys
from collections.abc import Callable
from pathlib import Path
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


def killed_before(work: Callable[..., Any], call: int) -> Callable[..., Any]:
    calls = 0

    def count(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return work(*args, **options)

    return count


def main(job_file: str, phase: str) -> None:
    job: StudentJob = pickle.loads(Path(job_file).read_bytes())
    owner, name = PHASES[phase]
    setattr(owner, name, killed_before(getattr(owner, name), call=2))
    train(job)


if __name__ == "__main__":
    main(*sys.argv[1:])
