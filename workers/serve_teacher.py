"""The thin Ray Serve shells around the teacher: a replica, and the way to ask the pool.

Chunks travel by reference, from the replica's object store straight to the student's host.
"""

import asyncio
import logging
import os
import platform
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from workers.jobs import TeacherJob
from workers.targets_protocol import Answer, TargetChunk, TargetRequest, TeacherUnavailableError

DEPLOYMENT = "teacher"


class TeacherReplica:
    """One whole copy of the teacher; scores one request after the other."""

    def __init__(self, job: TeacherJob, run_url: str, code: str):
        from workers.cache import keep_compiled_programs
        from workers.code_identity import check_same_code
        from workers.record import EventWriter, LogSegments
        from workers.teacher import Teacher

        check_same_code(code)
        keep_compiled_programs()
        replica = serve.get_replica_context().replica_id.unique_id
        logging.getLogger().addHandler(LogSegments(run_url, f"teacher-{replica}"))
        began = time.perf_counter()
        self._teacher = Teacher(job, replica)
        self._device = asyncio.Lock()
        EventWriter(run_url, f"teacher-{replica}").say(
            "teacher_ready",
            seconds=time.perf_counter() - began,
            machine=platform.node(),
            pid=os.getpid(),
        )

    async def score(self, request: TargetRequest) -> AsyncIterator[TargetChunk]:
        """Streams the targets of the request's rows, in order."""
        chunks = self._teacher.score(request)
        async with self._device:
            # In a thread, so that health checks are answered while the device works.
            while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
                yield chunk


class ServeSource:
    """A `TargetSource`: asks the pool of one Serve application."""

    def __init__(self, app: str, answer_within_s: float):
        self._app = app
        self._answer_within_s = answer_within_s

    def ask(
        self, request: TargetRequest, exclude: frozenset[str] = frozenset()
    ) -> Iterator[Answer]:
        try:
            handle = serve.get_deployment_handle(DEPLOYMENT, self._app)
            response: Any = handle.options(method_name="score", stream=True).remote(request)
            refs = response._to_object_ref_gen_sync(self._answer_within_s)
            while True:
                ref = refs._next_sync(self._answer_within_s)
                if ref.is_nil():
                    response.cancel()
                    raise TeacherUnavailableError(f"no answer within {self._answer_within_s:.0f} s")
                began = time.perf_counter()
                chunk: TargetChunk = ray.get(ref, timeout=self._answer_within_s)
                yield Answer(chunk, time.perf_counter() - began)
        except StopIteration:
            return
        except RayTaskError as error:
            if isinstance(error.cause, ValueError):
                raise ValueError(str(error.cause)) from error
            raise TeacherUnavailableError(f"the replica failed: {error.cause!r}") from error
        except RayActorError as error:
            raise TeacherUnavailableError(f"the replica died: {_first_line(error)}") from error
        except (RayError, RayServeException, TimeoutError) as error:
            raise TeacherUnavailableError(_first_line(error)) from error


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
