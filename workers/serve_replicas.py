"""The way to ask a pool that Ray Serve keeps: one try at one replica, and which one it was.

Chunks travel by reference, from the replica's object store straight to the student's host.
"""

import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray import serve
from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from workers.asking import Try
from workers.replica_loads import Route, knowledge, knowledge_of
from workers.serve_teacher import DEPLOYMENT
from workers.targets_protocol import Answer, TargetChunk, TargetRequest, TeacherUnavailableError

# How often one who waits looks whether the answer is still wanted.
_LOOK_EVERY_S = 0.5
_INTRODUCE_EVERY_S = 5.0


class ServeReplicas:
    """Asks the replicas of a pool, one at a time.

    Args:
        apps: its Serve applications, one for each kind of replica.
        answer_within_s: how long a replica may take for the next chunk.
    """

    def __init__(self, apps: Sequence[str], answer_within_s: float):
        self._apps = dict(zip(apps, knowledge_of(apps), strict=True))
        self._loads = knowledge(apps[0]).loads
        self._answer_within_s = answer_within_s
        self._numbers = itertools.count()
        self._introduced_at: dict[str, float] = {}

    def replicas(self) -> frozenset[str]:
        """The replicas there were when this process last asked."""
        return frozenset().union(*(known.replicas for known in self._apps.values()))

    def sameness(self) -> str:
        with _failures_named(Try()):
            answer = self._ask_sameness(next(iter(self._apps)))
            return answer.result(timeout_s=self._answer_within_s)

    def _ask_sameness(self, app: str) -> Any:
        handle = serve.get_deployment_handle(DEPLOYMENT, app)
        route = Route(next(self._numbers), 0, frozenset())
        return handle.options(method_name="sameness").remote(route=route)

    def _app_for(self, num_rows: int, exclude: frozenset[str]) -> str:
        """The application that has the replica which would be done first."""
        for app, known in self._apps.items():
            if not known.replicas and len(self._apps) > 1:
                self._introduce(app)
        replicas = {name: app for app, known in self._apps.items() for name in known.replicas}
        if not replicas:
            return next(iter(self._apps))
        return replicas[self._loads.pick(replicas, num_rows, exclude)]

    def _introduce(self, app: str) -> None:
        """Has Serve find out the application's replicas, for the next time."""
        now = time.monotonic()
        if now < self._introduced_at.get(app, 0.0):
            return
        self._introduced_at[app] = now + _INTRODUCE_EVERY_S
        with contextlib.suppress(TeacherUnavailableError), _failures_named(Try()):
            self._ask_sameness(app)  # nobody waits for the answer

    def ask(self, request: TargetRequest, attempt: Try) -> Iterator[Answer]:
        """One try at one replica, which `attempt` names as soon as it is chosen.

        Raises:
            TeacherUnavailableError: it failed, or took too long.
            ValueError: the request does not fit the pool's teacher.
        """
        num_left = len(request.rows)
        route = Route(next(self._numbers), num_left, attempt.exclude)
        loads = self._loads
        booked: str | None = None
        response: Any = None
        try:
            with _failures_named(attempt):
                app = self._app_for(num_left, attempt.exclude)
                handle = serve.get_deployment_handle(DEPLOYMENT, app)
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
