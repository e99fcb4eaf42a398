"""The state that an attempt begins with: made, loaded from storage, or fetched from memory."""

import jax
from jax.sharding import Mesh

from workers.checkpoint import load_params, read_meta, restore_state
from workers.integrity import own_checkpoint
from workers.jobs import StudentJob
from workers.memory_tier import Snapshots
from workers.record import STEPS, write_carried
from workers.snapshots import put_back
from workers.storage import join
from workers.train_step import TrainState, make_init

_FIRST_HOST = "-h0000"


def begin(
    job: StudentJob, mesh: Mesh, snapshots: Snapshots | None
) -> tuple[TrainState, tuple[str, ...]]:
    """The state on `mesh`, and the first host's lines of the record that came with a snapshot.

    Args:
        snapshots: those that the attempt starts from, if it does.

    Raises:
        ValueError: a checkpoint that does not fit the run.
        CorruptOwnCheckpointError: the run's own checkpoint is damaged.
        CorruptCheckpointError: another one is.
        SnapshotLostError: the snapshots are gone or damaged.
    """
    if job.start.memory is not None:
        assert snapshots is not None, "an attempt that starts from memory is given it"
        return _from_memory(job, mesh, snapshots)
    if job.start.kind != "resume":
        return _from_storage(job, mesh), ()
    assert job.start.url is not None, "it is there, or in memory"
    with own_checkpoint(job.start.url):
        return _from_storage(job, mesh), ()


def _from_memory(
    job: StudentJob, mesh: Mesh, snapshots: Snapshots
) -> tuple[TrainState, tuple[str, ...]]:
    host, carried = jax.process_index(), tuple[str, ...]()
    state = put_back(job.config, mesh, snapshots.pieces(host))
    for writer, lines in snapshots.lines().items():
        if writer.endswith(_FIRST_HOST):
            carried = lines
        if host == 0:
            write_carried(join(job.run_url, STEPS), writer, job.attempt, lines)
    return state, carried


def _from_storage(job: StudentJob, mesh: Mesh) -> TrainState:
    start, config = job.start, job.config
    if start.url is not None:
        _check_same_data(job, start.url)
    if start.kind in ("resume", "fork"):
        assert start.url is not None
        return restore_state(start.url, config, mesh)
    state = make_init(config, mesh)()
    if start.kind == "weights":
        assert start.url is not None
        model, params = load_params(start.url, mesh)
        if model != config.model:
            raise ValueError(
                f"start_from.checkpoint: {start.url} holds a model of other sizes than `model:`"
            )
        state = state._replace(params=params)
    return state


def _check_same_data(job: StudentJob, url: str) -> None:
    """Token ids and data position mean the same in the checkpoint and in this run."""
    meta = read_meta(url)
    what = "resume" if job.start.kind == "resume" else "start_from.checkpoint"
    if meta.tokenizer_digest != job.tokenizer_digest:
        raise ValueError(
            f"{what}: {url} was trained with tokenizer {meta.tokenizer_digest[:12]}, this run "
            f"has {job.tokenizer_digest[:12]}; import that tokenizer (data.tokenizer)"
        )
    if job.start.kind != "weights" and meta.dataset_digest != job.dataset_digest:
        raise ValueError(
            f"{what}: {url} stands at a position of data set {meta.dataset_digest[:12]}, this "
            f"run reads {job.dataset_digest[:12]}; its text has changed: put it back, or "
            f"start a new run from the weights (start_from.state=weights)"
        )
