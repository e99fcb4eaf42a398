"""The thin Ray shell around the student: one process of the gang, started by Ray Train.

JAX reads its platform variables when it is imported, and Ray Train sets them and forms the gang
before it calls `train_loop`; so everything that needs JAX is imported inside.
"""

import contextlib
import dataclasses
import logging
import os
import platform
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray.exceptions import RayError

from workers.jobs import StudentJob
from workers.phases import Phases
from workers.ray_metrics import StudentMetrics
from workers.snapshot_keeper import NAMESPACE, Fetch, Keep
from workers.tally import Tally

if TYPE_CHECKING:
    from workers.targets_protocol import TargetSource

HEARTBEAT_S = 0.5

_log = logging.getLogger(__name__)


def controller_name(run_id: str) -> str:
    """Name of a run's controller actor in `NAMESPACE`."""
    return f"controller-{run_id}"


def finish_name(attempt: int) -> str:
    """File below the run's folder that tells how an attempt ended by itself."""
    return f"attempts/{attempt:04d}.json"


class Heartbeat:
    """Tells the controller of progress, and learns from its answer whether to stop.

    A controller that is away for a while costs nothing: the last answer holds until it is back.
    The newest line alone would be a sample of the steps between two beats; the tally has them all.
    """

    def __init__(self, run_id: str, attempt: int, phases: Phases):
        self._name = controller_name(run_id)
        self._attempt, self._phases = attempt, phases
        self._signal: Any = 0
        self._line: dict[str, Any] = {}
        self._tally = Tally()
        self._metrics = StudentMetrics(run_id)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="heartbeat")
        self._thread.start()

    def signal(self) -> int:
        return self._signal

    def progress(self, line: dict[str, Any]) -> None:
        if self._line:  # an attempt's first step compiles
            self._tally = self._tally.plus(line)
        self._metrics.add(line)
        self._line = line

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _beat(self) -> None:
        controller: Any = None
        while not self._closed.wait(HEARTBEAT_S):
            self._metrics.tell()
            try:
                if controller is None:
                    controller = ray.get_actor(self._name, NAMESPACE)
                said = self._line, self._tally, self._phases.doing()
                answer = controller.heartbeat.remote(self._attempt, *said)
                self._signal = ray.get(answer, timeout=10)
            except (RayError, ValueError, TimeoutError) as error:
                # It restarts by itself; the students train on meanwhile.
                controller = None
                _log.info("The controller does not answer: %s", error)


def _tell_busy(run_id: str, attempt: int) -> None:
    """A controller that is away misses it; the next time comes soon."""
    try:
        ray.get_actor(controller_name(run_id), NAMESPACE).busy.remote(attempt)
    except (RayError, ValueError) as error:
        _log.info("The controller does not answer: %s", error)


@contextlib.contextmanager
def _source(apps: list[str], job: StudentJob, host: int) -> "Iterator[TargetSource | None]":
    from workers.asking import PatientSource
    from workers.record import EventWriter
    from workers.serve_replicas import ServeReplicas

    if not job.config.distilled:
        yield None
        return
    assert job.config.teacher is not None, "checked with the configuration"
    events = EventWriter(job.run_url, f"asking-a{job.attempt:04d}-h{host:04d}")
    try:
        replicas = ServeReplicas(apps, job.config.teacher.answer_within_s)
        yield PatientSource(replicas, events.say)
    finally:
        events.close()


def _memory_tier(job: StudentJob, run_id: str, host: int) -> dict[str, Any]:
    """The hooks through which the student keeps snapshots, and finds those it starts from."""
    from jax.experimental.multihost_utils import process_allgather

    from configs.checks import layout

    hooks: dict[str, Any] = {}
    if job.start.memory is not None:
        hooks["snapshots"] = Fetch(job.start.memory)
    if job.work == "train" and job.config.checkpoint.snapshot_every_steps is not None:
        # Only a host knows its own machine. Each keeper outlives the gang on purpose.
        node = np.frombuffer(bytes.fromhex(ray.get_runtime_context().get_node_id()), np.uint8)
        nodes = [bytes(each).hex() for each in np.atleast_2d(process_allgather(node))]
        plan = layout(job.config)
        hooks["keep"] = Keep(run_id, host, nodes, plan.num_hosts // plan.num_slices)
    return hooks


def _tell_started(job: StudentJob) -> None:
    """Since when the gang has been there; what comes before is a wait for machines."""
    from workers.record import EventWriter

    events = EventWriter(job.run_url, f"start-a{job.attempt:04d}")
    where = {"machine": platform.node(), "pid": os.getpid()}
    events.say("host_started", attempt=job.attempt, process_s=_process_s(), **where)
    events.close()


def _process_s() -> float:
    """For how long this process has been there; 0 where the system has no `/proc` to tell it."""
    try:
        text = Path("/proc/self/stat").read_text()
    except FileNotFoundError:
        return 0.0
    begin_ticks = int(text.rpartition(")")[2].split()[19])  # since the machine was started
    return time.clock_gettime(time.CLOCK_BOOTTIME) - begin_ticks / os.sysconf("SC_CLK_TCK")


def train_loop(payload: dict[str, Any]) -> None:
    """What Ray Train runs on each host. `payload`: `job`, `run_id`, `apps`, `code`."""
    import jax

    from workers.cache import keep_compiled_programs
    from workers.code_identity import check_same_code
    from workers.epochs import check_epoch
    from workers.host_watch import HostWatch, stacks_url
    from workers.record import LogSegments
    from workers.storage import join, write_json
    from workers.student import Hooks, train
    from workers.target_builder import build_targets

    check_same_code(payload["code"])
    job: StudentJob = payload["job"]
    if job.epoch is not None:
        check_epoch(job.run_url, job.epoch)
    keep_compiled_programs()
    host = jax.process_index()
    handler = LogSegments(job.run_url, f"student-a{job.attempt:04d}-h{host:04d}")
    logging.getLogger().addHandler(handler)
    if host == 0:
        _tell_started(job)
    phases = Phases()
    watch = HostWatch(
        stacks_url(job.run_url, job.attempt, host),
        phases,
        job.config.watchdog,
        lambda: _tell_busy(payload["run_id"], job.attempt),
    )
    heartbeat = Heartbeat(payload["run_id"], job.attempt, phases) if host == 0 else None
    node = ray.get_runtime_context().get_node_id()
    hooks = Hooks(enter=phases.enter, node=node, **_memory_tier(job, payload["run_id"], host))
    if heartbeat is not None:
        told = {"signal": heartbeat.signal, "progress": heartbeat.progress}
        hooks = dataclasses.replace(hooks, **told)
    began = time.perf_counter()
    try:
        with _source(payload["apps"], job, host) as source:
            if job.work == "targets":
                assert source is not None, "checked with the configuration"
                finish = build_targets(job, source, hooks)
            else:
                finish = train(job, source, hooks)
    except Exception:
        _log.exception("Host %d failed", host)
        raise
    finally:
        watch.close()
        if heartbeat is not None:
            heartbeat.close()
        logging.getLogger().removeHandler(handler)
        handler.close()
    if host == 0:
        result = {**dataclasses.asdict(finish), "seconds": time.perf_counter() - began}
        write_json(join(job.run_url, finish_name(job.attempt)), result)
