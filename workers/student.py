"""The student's training loop on one host of the gang. Knows nothing of Ray."""

import dataclasses
import os
import platform
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from configs.checks import layout
from model.sharding import MESH_AXES, batch_sharding, make_mesh
from model.targets import HiddenCodec, Unembedding
from workers.anomalies import Anomalies, Anomaly, needs_guard
from workers.beginning import begin
from workers.cache import cache_dir
from workers.host_targets import HostTargets
from workers.jobs import StudentJob
from workers.memory_tier import Snapshots
from workers.phases import Phase
from workers.recent_steps import settled_before
from workers.record import STEPS, EventWriter, SegmentWriter
from workers.rows import RowReader
from workers.saves import Saves
from workers.snapshot_taker import Keep, SnapshotTaker
from workers.step_rows import StepRows
from workers.storage import join
from workers.targets_protocol import TargetSource
from workers.teacher import codec_of
from workers.train_step import (
    HAS_TARGETS,
    Batch,
    StepMetrics,
    make_train_step,
    signal_sharding,
)
from workers.unembedding import load_unembedding

STOP_SIGNAL = 1


@dataclasses.dataclass(frozen=True)
class Finish:
    """How an attempt ended by itself."""

    step: int
    digest: str
    stopped: bool


@dataclasses.dataclass(frozen=True)
class Hooks:
    """The loop's ties to the world: they return at once where nothing else is said."""

    signal: Callable[[], int] = lambda: 0
    progress: Callable[[dict[str, Any]], None] = lambda line: None
    enter: Callable[[Phase], None] = lambda phase: None
    node: str | None = None
    """What the scheduler calls this machine."""
    keep: Keep | None = None
    """Takes snapshots over; may take its time."""
    snapshots: Snapshots | None = None
    """Those that the attempt starts from, if it does."""


class _Dispatched(NamedTuple):
    """A step that is on the devices, and what its line in the record will need."""

    step: int
    metrics: StepMetrics
    stall_s: dict[str, float]
    teacher_busy_s: float
    targets: dict[str, Any] | None
    pool: dict[str, Any] | None


class Student:
    """One host's share of an attempt."""

    def __init__(self, job: StudentJob, source: TargetSource | None, hooks: Hooks):
        config = job.config
        self._job, self._hooks = job, hooks
        self._mesh = make_mesh(dict(zip(MESH_AXES, layout(config).mesh_shape, strict=True)))
        host = jax.process_index()
        writer = f"a{job.attempt:04d}-h{host:04d}"
        self._events = EventWriter(job.run_url, f"student-{writer}")
        self._record = SegmentWriter(join(job.run_url, STEPS), writer, config.record.flush_s)
        self._saves = Saves(job, self._mesh, self._record, self._events, hooks.enter)
        self._taker = SnapshotTaker(job, writer, self._record, self._events, hooks.keep)
        reader = RowReader.open(job.storage_url, job.dataset_digest, "train", cache_dir())
        self._rows = StepRows(reader, config, _local_rows(self._mesh, config.batch.rows))
        self._state, carried = begin(job, self._mesh, hooks.snapshots)
        before = settled_before(job, carried)
        saved = job.start.step if job.start.saved_step is None else job.start.saved_step
        self._anomalies = Anomalies(config, before, job.skip_steps, saved)
        self._codec = None
        self._targets = None
        self._unembedding: tuple[Unembedding, ...] = ()
        if config.distilled:
            assert config.teacher is not None and source is not None
            self._codec = codec_of(config.teacher)
            if isinstance(self._codec, HiddenCodec):
                self._unembedding = (self._load_unembedding(),)
            steps = range(job.start.step, config.steps)
            self._targets = HostTargets(job, source, self._rows, steps, self._events.say)
        self._guarded = needs_guard(config.anomalies, job.skip_steps)
        self._step_fn = make_train_step(config, self._codec, self._mesh, self._guarded)
        self._checkpoint_stall_s = self._compile_s = 0.0
        self._has_settled = False
        if host == 0:
            self._record.append({"attempt": job.attempt, "start_step": job.start.step})
            self._record.flush()
        # The steps follow one another from here on: the event tells when that was.
        self._settled_at = time.perf_counter()
        self._events.say(
            "host_ready",
            attempt=job.attempt,
            host=host,
            step=job.start.step,
            start="memory" if job.start.memory is not None else job.start.kind,
            machine=platform.node(),
            node=hooks.node,
            pid=os.getpid(),
        )

    def run(self) -> Finish:
        """Trains to the last step, or until a host is asked to stop.

        Raises:
            AnomalyError, RollbackError: a step that the state could not take in, by policy.
            TeacherUnavailableError: no teacher answered in time.
        """
        steps = range(self._job.start.step, self._job.config.steps)
        before: _Dispatched | None = None
        stopped = False
        try:
            for index in steps:
                self._enter_step()
                if before is not None and not self._targets_here(index):
                    # The wait to come is of idle devices, so that all of it counts as stall.
                    stopped, before = self._settle(before), None
                dispatched = self._dispatch(index)
                if before is not None:
                    stopped = self._settle(before)
                before = dispatched
                save = stopped or self._saves.due(dispatched.step)
                if save or self._taker.due(dispatched.step):
                    stopped |= self._settle(dispatched)
                    before = None
                    self._save(save or stopped)
                if stopped:
                    break
            meta = self._saves.finish(self._state)
        finally:
            self._rows.close()
            if self._targets is not None:
                self._targets.close()
            self._taker.close()
            self._saves.close()
            self._record.close()
            self._events.close()
        return Finish(meta.step, meta.digest, stopped and meta.step < self._job.config.steps)

    def _enter_step(self) -> None:
        # The first step has been made when all hosts have compiled it.
        self._hooks.enter(Phase.STEP if self._has_settled else Phase.COMPILE)

    def _targets_here(self, index: int) -> bool:
        return self._targets is None or self._targets.is_here(index)

    def _dispatch(self, index: int) -> _Dispatched:
        """Gathers the inputs of a step and puts it on the devices."""
        began = time.perf_counter()
        batch = Batch(*(self._global(array) for array in self._rows.batch(index)))
        data_s = time.perf_counter() - began
        encoded: dict[str, Any] = {}
        teacher_s = wire_s = decode_s = busy_s = 0.0
        ledger = pool = None
        if self._targets is not None:
            self._hooks.enter(Phase.TARGETS)
            arrays, has_targets, cost, ledger, pool = self._targets.take(index)
            self._enter_step()
            teacher_s, wire_s, decode_s, busy_s = cost
            began = time.perf_counter()
            arrays[HAS_TARGETS] = has_targets
            encoded = {name: self._global(array) for name, array in arrays.items()}
            decode_s += time.perf_counter() - began
        signals = np.full(jax.local_device_count(), self._hooks.signal(), np.int32)
        signals = jax.make_array_from_process_local_data(signal_sharding(self._mesh), signals)
        limit = [np.float32(self._anomalies.limit(index + 1))] if self._guarded else []
        began = time.perf_counter()
        self._state, metrics = self._step_fn(
            self._state, batch, encoded, signals, *limit, *self._unembedding
        )
        if index == self._job.start.step:  # later ones are put on the devices and nothing more
            self._compile_s = time.perf_counter() - began
        stall_s = {
            "data": data_s,
            "teacher": teacher_s,
            "wire": wire_s,
            "decode": decode_s,
            "checkpoint": self._checkpoint_stall_s,
        }
        self._checkpoint_stall_s = 0.0
        return _Dispatched(index + 1, metrics, stall_s, busy_s, ledger, pool)

    def _settle(self, step: _Dispatched) -> bool:
        """Waits for a step's metrics and records them; true when some host asks to stop."""
        # So that no more steps than the snapshots' interval are ever at stake.
        began = time.perf_counter()
        self._taker.wait()
        self._checkpoint_stall_s += time.perf_counter() - began
        metrics = StepMetrics(*(value.item() for value in jax.device_get(step.metrics)))
        now = time.perf_counter()
        anomaly = self._anomalies.settle(step.step, float(metrics.loss), float(metrics.grad_norm))
        line: dict[str, Any] = {"step": step.step, "stall_s": step.stall_s}
        if step.targets is not None:
            line |= {"targets": step.targets, "pool": step.pool}
        if jax.process_index() == 0:
            line |= {
                "loss": metrics.loss,
                "kd_loss": metrics.kd_loss if self._codec is not None else None,
                "ce_loss": metrics.ce_loss,
                "lr": metrics.lr,
                "grad_norm": metrics.grad_norm,
                "tokens": metrics.tokens,
                "skipped": anomaly and anomaly.reason,
                "step_s": now - self._settled_at,
                "teacher_busy_s": step.teacher_busy_s,
                "attempt": self._job.attempt,
            }
            if not self._has_settled:
                line["compile_s"] = self._compile_s
            self._hooks.progress(line)
        self._record.append(line)
        self._settled_at, self._has_settled = now, True
        if anomaly is not None:
            self._meet(anomaly)
        return bool(metrics.signal)

    def _meet(self, anomaly: Anomaly) -> None:
        if jax.process_index() == 0:
            self._events.say("step_skipped", **anomaly._asdict())
        if (error := self._anomalies.error(anomaly)) is not None:
            self._saves.wait()  # so that the newest checkpoint is the same wherever this happens
            raise error

    def _save(self, on_storage: bool) -> None:
        """Saves the state in memory, if that is due, and on storage, if asked to."""
        began = time.perf_counter()
        if self._taker.due(int(self._state.step)):
            self._taker.take(self._state)
        if on_storage:
            self._saves.save(self._state)
        self._checkpoint_stall_s += time.perf_counter() - began

    def _load_unembedding(self) -> Unembedding:
        assert self._job.teacher_url is not None
        model = self._job.config.model
        return load_unembedding(
            self._job.teacher_url, model.vocab_size, model.embedding_rows, self._mesh
        )

    def _global(self, local: np.ndarray) -> jax.Array:
        """This host's rows as its part of the global batch."""
        shape = (self._job.config.batch.rows, *local.shape[1:])
        return jax.make_array_from_process_local_data(batch_sharding(self._mesh), local, shape)


def train(
    job: StudentJob, source: TargetSource | None = None, hooks: Hooks | None = None
) -> Finish:
    """Runs this host's share of an attempt to its end. `jax.distributed` is already up."""
    return Student(job, source, hooks or Hooks()).run()


def _local_rows(mesh: jax.sharding.Mesh, num_rows: int) -> range:
    """The rows of the global batch whose shards lie on this host."""
    slices = batch_sharding(mesh).addressable_devices_indices_map((num_rows,)).values()
    bounds = [part[0].indices(num_rows)[:2] for part in slices if part is not None]
    first, last = min(low for low, _ in bounds), max(high for _, high in bounds)
    covered = {row for low, high in bounds for row in range(low, high)}
    assert covered == set(range(first, last)), "a host's rows are contiguous"
    return range(first, last)
