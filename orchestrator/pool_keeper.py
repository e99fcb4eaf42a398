"""The actor that keeps a pool of teachers for all the runs that share it by name."""

import logging
import os
import threading
import time
import uuid
from typing import Any, TypedDict

import ray

from orchestrator.pool_members import Members
from orchestrator.ray_calls import beside_me, start_actor
from orchestrator.teacher_groups import GroupedPool
from orchestrator.teacher_pool import num_serving
from workers.jobs import TeacherJob
from workers.record import EventWriter, LogSegments
from workers.storage import join
from workers.student_host import NAMESPACE

TURN_S = 0.5

_log = logging.getLogger(__name__)


class View(TypedDict):
    """What a run is told of a pool; a plain dict, since it may run other sources."""

    failure: str | None
    """Why the run cannot be served at all."""
    members: int
    wanted: int
    """Replicas that the members ask for together."""
    replicas: dict[str, int]
    """By state."""
    serving: int
    """The run's own share of the replicas that serve."""


class PoolKeeper:
    """One pool's keeper: detached, restarted by Ray, and gone when nobody has used it for a while.

    It keeps nothing that it would miss: members show themselves every second, and the application
    goes on without it.

    Args:
        pool: the pool's name.
        app: the Serve application.
        job: what the replicas are.
        needs: the same in the words of `pool_members.needs_of`.
        code: digest of the sources that the replicas have to run.
    """

    def __init__(self, pool: str, app: str, job: TeacherJob, needs: dict[str, Any], code: str):
        self._name = keeper_name(pool)
        url = pool_url(job.storage_url, pool)
        writer = f"keeper-{uuid.uuid4().hex[:8]}"
        logging.getLogger().addHandler(LogSegments(url, writer))
        self._events = EventWriter(url, writer)
        self._pool = GroupedPool(app, job, url, code)
        self._states = self._pool.status()
        # One thread looks after the pool, others answer the runs.
        self._lock = threading.Lock()
        now_s = time.monotonic()
        self._members = Members(pool, needs, now_s, taken_up=bool(self._states))
        self._scaled_to: int | None = None
        self._closing = False
        self._events.say("keeper_started", pid=os.getpid(), replicas=self._states, serves=needs)
        threading.Thread(target=self._run, name="keeper", daemon=True).start()

    def look(self, run: str, needs: dict[str, Any], replicas: int) -> View | None:
        """A run shows itself, what it needs and how many replicas it asks for.

        None: the pool is being removed, or not known well enough to say; ask again.
        """
        with self._lock:
            now_s = time.monotonic()
            if self._closing:
                return None
            if refusal := self._members.refusal(needs):
                if self._members:
                    return self._view(0, refusal)
                # What nobody uses gives way at once.
                self._closing = not self._members.is_gathering(now_s)
                return None
            if self._members.see(run, replicas, now_s):
                self._events.say("pool_member", run=run, replicas=replicas)
            return self._view(replicas, self._pool.failure())

    def leave(self, run: str) -> None:
        """A run has ended."""
        with self._lock:
            if self._members.leave(run, time.monotonic()):
                self._events.say("pool_left", run=run)

    def _view(self, replicas: int, failure: str | None) -> View:
        wanted = self._members.replicas
        return View(
            failure=failure,
            members=len(self._members),
            wanted=wanted,
            replicas=self._states,
            serving=num_serving(self._states) * replicas // max(wanted, 1),
        )

    def _run(self) -> None:
        try:
            while not self._turn():
                time.sleep(TURN_S)
            self._pool.remove()
        except Exception:
            _log.exception("The keeper met an error of its own and starts over")
            logging.shutdown()
            os._exit(1)
        self._events.say("pool_removed")
        logging.shutdown()
        ray.kill(ray.get_actor(self._name, NAMESPACE), no_restart=True)

    def _turn(self) -> bool:
        """Looks after members and replicas; whether that was the last time."""
        states = self._pool.status()
        with self._lock:
            now_s = time.monotonic()
            self._states = states
            for run in self._members.drop_unseen(now_s):
                self._events.say("pool_member_lost", run=run)
            if not self._members:
                failed = self._pool.failure() is not None
                self._closing |= failed or self._members.is_over(now_s)
                return self._closing
            wanted = self._members.replicas
            # Replicas of members that have yet to be seen are not to be restarted.
            if wanted != self._scaled_to and not self._members.is_gathering(now_s):
                self._pool.scale(wanted)
                self._events.say("pool_scaled", replicas=wanted, members=len(self._members))
                self._scaled_to = wanted
            return False


def pool_url(storage_url: str, pool: str) -> str:
    """The folder of a shared pool: what its keeper and its replicas write."""
    return join(storage_url, "pools", pool)


def keeper_name(pool: str) -> str:
    """Name of a shared pool's keeper in the project's namespace."""
    return f"pool-{pool}"


def start_keeper(pool: str, *args: Any) -> Any:
    """A handle to the keeper of a pool, which is started where there is none."""
    return start_actor(
        PoolKeeper,
        *(pool, *args),
        **beside_me(),
        max_restarts=-1,
        name=keeper_name(pool),
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
    )
