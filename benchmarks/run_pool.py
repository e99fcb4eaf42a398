"""The pool of a run, with replicas that a benchmark chooses."""

import time
from pathlib import Path
from typing import Any

from benchmarks.bare import preset_config, train_here
from benchmarks.runs import TEACHER, steady_config
from benchmarks.scripted_teacher import ScriptedJob, ScriptedReplica
from orchestrator.run_folder import RunFolder
from orchestrator.run_pool import app_name
from orchestrator.teacher_pool import TeacherPool
from workers.code_identity import code_digest
from workers.jobs import TeacherJob
from workers.serve_teacher import TeacherReplica


def scale_to(pool: TeacherPool, replicas: int) -> None:
    """Returns when so many serve."""
    pool.scale(replicas)
    while pool.status() != {"RUNNING": replicas}:
        assert pool.failure() is None, pool.failure()
        time.sleep(0.2)


def bring_up(folder: RunFolder, **scripted: Any) -> None:
    """Starts a new run's pool; its controller takes it as its own.

    Args:
        scripted: what scripted teachers do, as fields of a `ScriptedJob`; none: real teachers.
    """
    config, identity = folder.config(), folder.identity()
    assert config.teacher is not None, "a distilled run has a teacher"
    job = TeacherJob(
        storage_url=folder.storage_url,
        checkpoint_url=identity["teacher_url"],
        config=config.teacher,
        row_length=config.data.row_length,
        compute_dtype=config.compute_dtype,
    )
    replica = TeacherReplica
    if scripted:
        job, replica = ScriptedJob(**vars(job), **scripted), ScriptedReplica
    pool = TeacherPool(app_name(identity["run_id"]), job, folder.url, code_digest(), replica)
    scale_to(pool, config.teacher.replicas)


def tiny_teacher(storage: Path) -> None:
    """Trains the run `TEACHER`: a small model with the quickstart's vocabulary, in a few steps."""
    vocab_size = preset_config("quickstart-teacher", storage, TEACHER).model.vocab_size
    model = {"preset": "tiny", "vocab_size": vocab_size}
    train_here(steady_config(storage, TEACHER, 40, "quickstart-teacher", model=model))
