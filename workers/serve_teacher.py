"""The thin Ray Serve shell around the teacher: one replica of the pool."""

import asyncio
import logging
import os
import platform
import time
from collections.abc import AsyncIterator
from typing import Any

from ray import serve

from workers.jobs import TeacherJob
from workers.ray_metrics import TeacherMetrics
from workers.replica_loads import Route
from workers.targets_protocol import (
    TargetChunk,
    TargetRequest,
    WrongTeacherError,
)

DEPLOYMENT = "teacher"
FILL_WITHIN_S = 0.003
CANARY_EVERY_S = 60.0
MEASURE_EVERY_S = 2.0

_log = logging.getLogger(__name__)


class TeacherReplica:
    """One whole copy of the teacher, which scores the rows of all requests in full batches."""

    def __init__(self, job: TeacherJob, folder_url: str, code: str):
        from workers.batcher import Batcher
        from workers.cache import keep_compiled_programs
        from workers.canary import examine
        from workers.code_identity import check_same_code
        from workers.record import EventWriter, LogSegments

        check_same_code(code)
        keep_compiled_programs()
        self._storage_url = job.storage_url
        self._stuck_after_s = job.config.answer_within_s
        self._quarantined = False
        self._replica = serve.get_replica_context().replica_id.unique_id
        logging.getLogger().addHandler(LogSegments(folder_url, f"teacher-{self._replica}"))
        self._events = EventWriter(folder_url, f"teacher-{self._replica}")
        began = time.perf_counter()
        self._teacher = self._load(job)
        try:
            examine(self._teacher, self._replica, self._storage_url)
        except WrongTeacherError as error:
            self._tell_wrong(error)
            raise
        self._batcher = Batcher(self._teacher, self._replica, FILL_WITHIN_S)
        loop = asyncio.get_running_loop()
        self._metrics = TeacherMetrics(
            serve.get_replica_context().app_name, self._replica, job.row_length
        )
        self._tasks = [
            loop.create_task(self._examine_often()),
            loop.create_task(self._measure_often()),
        ]
        self._events.say(
            "teacher_ready",
            seconds=time.perf_counter() - began,
            machine=platform.node(),
            pid=os.getpid(),
            sameness=self._teacher.sameness,
        )

    def _load(self, job: TeacherJob) -> Any:
        from workers.teacher import Teacher

        return Teacher(job, self._replica)

    async def score(self, request: TargetRequest, route: Route) -> AsyncIterator[TargetChunk]:
        """Streams the targets of the request's rows, as they are scored.

        `route` is for `workers.teacher_router` alone.
        """
        try:
            async for chunk in self._batcher.score(request):
                yield chunk
        except WrongTeacherError as error:
            self._quarantine(error)
            raise

    async def sameness(self, route: Route) -> str:
        """The class of this copy's answers."""
        return self._teacher.sameness

    def check_health(self) -> None:
        """Asked by Serve, which replaces a replica that fails it a few times in a row."""
        if self._batcher.stuck_s > self._stuck_after_s:
            raise RuntimeError(
                f"Replica {self._replica} has had a batch on its device for "
                f"{self._batcher.stuck_s:.0f} s (teacher.answer_within_s is "
                f"{self._stuck_after_s:.0f} s)"
            )

    async def _examine_often(self) -> None:
        from workers.canary import examine

        while True:
            await asyncio.sleep(CANARY_EVERY_S)
            try:
                await asyncio.to_thread(examine, self._teacher, self._replica, self._storage_url)
            except WrongTeacherError as error:
                self._quarantine(error)
            except OSError as error:
                _log.warning("Storage does not answer, no canary this time: %s", error)

    async def _measure_often(self) -> None:
        while True:
            await asyncio.sleep(MEASURE_EVERY_S)
            done = self._batcher.counters
            self._metrics.tell(done.rows, done.batches, done.busy_s, self._batcher.num_waiting)

    def _quarantine(self, error: WrongTeacherError) -> None:
        """Serves nobody any more: ends this process, for which Serve starts another."""
        if self._quarantined:
            return
        self._quarantined = True
        self._tell_wrong(error)
        # A little later, so that who asked hears why.
        asyncio.get_running_loop().call_later(0.2, os._exit, 1)

    def _tell_wrong(self, error: WrongTeacherError) -> None:
        self._events.say("teacher_quarantined", replica=self._replica, reason=str(error))
