"""A run's side of a pool of teachers that it shares with others."""

import logging
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from orchestrator.pool_keeper import View, keeper_name, pool_url, start_keeper
from orchestrator.ray_calls import answer, is_ready
from workers.jobs import TeacherJob
from workers.student_host import NAMESPACE

LOOK_EVERY_S = 1.0
LEAVE_WITHIN_S = 5.0

_NOTHING = View(failure=None, members=0, wanted=0, replicas={}, serving=0)
_log = logging.getLogger(__name__)


class SharedPool:
    """Keeps a run a member of its pool, as it is asked about it; only `remove` waits.

    The keeper may be away, on its way out, or not there yet: whoever looks next starts it again.

    Args:
        pool: the pool's name.
        run: the member's name.
        needs: what replicas have to be for this run (`pool_members.needs_of`).
        keeper_args: what a new keeper is told, besides the pool's name.
        say: records an event of the run; takes its name and details.
        clock: seconds.
    """

    def __init__(
        self,
        pool: str,
        run: str,
        job: TeacherJob,
        app: str,
        needs: dict[str, Any],
        code: str,
        say: Callable[..., None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._pool, self._run, self._needs = pool, run, needs
        self._keeper_args = (app, job, needs, code)
        self._url = pool_url(job.storage_url, pool)
        self._say, self._clock = say, clock
        self._replicas: int | None = None
        self._keeper: Any = None
        self._asked: Any = None
        self._look_at_s = clock()
        self._view = _NOTHING
        self._failure: str | None = None

    def scale(self, replicas: int) -> None:
        """Asks for so many replicas among those of the others; the first time, joins."""
        self._replicas = replicas
        self._look_at_s = self._clock()
        self._look()

    def failure(self) -> str | None:
        """Why the pool cannot serve this run at all, as far as it is known."""
        self._look()
        return self._failure

    def status(self) -> dict[str, int]:
        """The whole pool's replicas by state."""
        self._look()
        return self._view["replicas"]

    def serving(self) -> int:
        """This run's share of the replicas that serve."""
        return self._view["serving"]

    def remove(self) -> None:
        """Leaves the pool, which goes when nobody has used it for a while."""
        self._replicas, self._view = None, _NOTHING
        try:
            keeper = ray.get_actor(keeper_name(self._pool), NAMESPACE)
            answer(keeper.leave.remote(self._run), timeout_s=LEAVE_WITHIN_S)
        except ValueError:
            pass  # there is no keeper
        except RayError as error:
            _log.warning("The pool %s drops this run only later: %s", self._pool, error)

    def _look(self) -> None:
        """Takes in what the keeper has answered, and asks again when it is time."""
        if self._replicas is None:
            return
        try:
            if self._asked is not None and is_ready(self._asked):
                asked, self._asked = self._asked, None
                self._take_in(answer(asked))
            if self._asked is None and self._clock() >= self._look_at_s:
                self._look_at_s = self._clock() + LOOK_EVERY_S
                if self._keeper is None:
                    self._keeper = start_keeper(self._pool, *self._keeper_args)
                self._asked = self._keeper.look.remote(self._run, self._needs, self._replicas)
        except RayTaskError as error:
            self._failure = f"The pool {self._pool!r} does not know what to say: {error.cause}"
        except RayError as error:
            self._keeper = None
            _log.warning("The keeper of the pool %s is away: %s", self._pool, error)

    def _take_in(self, view: View | None) -> None:
        if view is None:
            self._keeper = None
            return
        before, self._view = self._view, view
        self._failure = view["failure"]
        if self._failure is not None:
            return
        told = {"pool": self._pool, "replicas": view["wanted"], "members": view["members"]}
        if not before["members"]:
            self._say("pool_joined", **told, asks_for=self._replicas, folder=self._url)
        elif (before["wanted"], before["members"]) != (view["wanted"], view["members"]):
            self._say("pool_changed", **told, before=before["wanted"])
