"""The thin Ray Serve shells around the teacher: a replica, and the way to ask the pool.

Chunks travel by reference, from the replica's object store straight to the student's host.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import platform
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import ray
from ray import serve
from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from workers.asking import Try
from workers.jobs import TeacherJob
from workers.replica_loads import Route, knowledge
from workers.targets_protocol import (
    Answer,
    TargetChunk,
    TargetRequest,
    TeacherUnavailableError,
    WrongTeacherError,
)

DEPLOYMENT = "teacher"
FILL_WITHIN_S = 0.003
CANARY_EVERY_S = 60.0
# How often one who waits looks whether the answer is still wanted.
_LOOK_EVERY_S = 0.5

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
        self._canaries = asyncio.get_running_loop().create_task(self._examine_often())
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


class ServeReplicas:
    """Asks the replicas of one Serve application, one at a time.

    Args:
        app: the application.
        answer_within_s: how long a replica may take for the next chunk.
    """

    def __init__(self, app: str, answer_within_s: float):
        self._app = app
        self._answer_within_s = answer_within_s
        self._numbers = itertools.count()
        self._known = knowledge(app)

    def replicas(self) -> frozenset[str]:
        """The replicas there were when this process last asked."""
        return self._known.replicas

    def sameness(self) -> str:
        route, attempt = Route(next(self._numbers), 0, frozenset()), Try()
        with _failures_named(attempt):
            handle = serve.get_deployment_handle(DEPLOYMENT, self._app)
            answer: Any = handle.options(method_name="sameness").remote(route=route)
            return answer.result(timeout_s=self._answer_within_s)

    def ask(self, request: TargetRequest, attempt: Try) -> Iterator[Answer]:
        """One try at one replica, which `attempt` names as soon as it is chosen.

        Raises:
            TeacherUnavailableError: it failed, or took too long.
            ValueError: the request does not fit the pool's teacher.
        """
        num_left = len(request.rows)
        route = Route(next(self._numbers), num_left, attempt.exclude)
        loads = self._known.loads
        booked: str | None = None
        response: Any = None
        try:
            with _failures_named(attempt):
                handle = serve.get_deployment_handle(DEPLOYMENT, self._app)
                method = handle.options(method_name="score", stream=True)
                response = method.remote(request, route=route)
                refs = self._accepted(response, route, attempt)
                booked = attempt.replica
                if booked is not None:
                    loads.asked(booked, num_left)
                while (ref := self._next(refs, attempt)) is not None:
                    began = time.perf_counter()
                    chunk: TargetChunk = ray.get(ref, timeout=self._answer_within_s)
                    num_left -= len(chunk.rows)
                    if booked is not None:
                        loads.answered(booked, len(chunk.rows), chunk.busy_s)
                    yield Answer(chunk, time.perf_counter() - began)
        finally:
            if booked is not None:
                loads.given_up(booked, num_left)
            if num_left and response is not None:
                response.cancel()

    def _accepted(self, response: Any, route: Route, attempt: Try) -> Any:
        """The stream of answers, once a replica was found."""
        deadline = time.monotonic() + self._answer_within_s
        while True:
            try:
                return response._to_object_ref_gen_sync(_LOOK_EVERY_S)
            except TimeoutError:
                self._look(attempt, deadline)
            finally:
                attempt.replica = route.tried[-1] if route.tried else None

    def _next(self, refs: Any, attempt: Try) -> Any:
        """The reference of the next chunk; None after the last."""
        deadline = time.monotonic() + self._answer_within_s
        while True:
            try:
                ref = refs._next_sync(_LOOK_EVERY_S)
            except StopIteration:
                return None
            if not ref.is_nil():
                return ref
            self._look(attempt, deadline)

    def _look(self, attempt: Try, deadline: float) -> None:
        if attempt.cancelled:
            raise TeacherUnavailableError("another replica was faster", attempt.replica)
        if time.monotonic() > deadline:
            raise TeacherUnavailableError(
                f"no answer within {self._answer_within_s:.0f} s", attempt.replica
            )


@contextlib.contextmanager
def _failures_named(attempt: Try) -> Iterator[None]:
    """Turns Ray's errors into those of a `TargetSource`, with the replica that was asked."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise ValueError(str(error.cause)) from error
        reason = f"the replica failed: {error.cause!r}"
        raise TeacherUnavailableError(reason, attempt.replica) from error
    except RayActorError as error:
        reason, died = f"the replica died: {_first_line(error)}", isinstance(error, ActorDiedError)
        raise TeacherUnavailableError(reason, attempt.replica, died) from error
    except (RayError, RayServeException, TimeoutError, KeyError) as error:
        # KeyError: Serve does not know the application (yet).
        raise TeacherUnavailableError(_first_line(error), attempt.replica) from error


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
