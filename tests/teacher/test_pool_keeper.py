"""A shared pool's keeper and its members' side, as plain objects: no Ray, no Serve."""

import logging
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from orchestrator import pool_keeper, shared_pool
from orchestrator.pool_keeper import PoolKeeper
from orchestrator.pool_members import MEMBER_EXPIRY_S, STAY_S
from orchestrator.shared_pool import LOOK_EVERY_S, SharedPool
from workers.jobs import TeacherJob


class FakeTeacherPool:
    """Has the replicas it was last asked for."""

    def __init__(self, *args: Any):
        self.asked: list[int] = []
        self.states: dict[str, int] = {}
        self.reason: str | None = None

    def scale(self, replicas: int) -> None:
        self.asked.append(replicas)
        self.states = {"RUNNING": replicas}

    def status(self) -> dict[str, int]:
        return self.states

    def failure(self) -> str | None:
        return self.reason


class Method:
    """A method of an actor: `remote` answers at once, unless the actor is dead."""

    def __init__(self, world: "World", name: str):
        self._world, self._name = world, name

    def remote(self, *args: Any) -> Any:
        if self._world.is_away:
            return ActorDiedError()
        return getattr(self._world.keeper, self._name)(*args)


class World:
    """One keeper whose turns are taken by hand, on a clock that the test moves."""

    def __init__(self, storage: Path, monkeypatch: pytest.MonkeyPatch):
        self.now_s = 0.0
        self.is_away = False
        self.num_started = 0
        self.said: list[tuple[str, dict[str, Any]]] = []
        self.pool = FakeTeacherPool()
        monkeypatch.setattr(pool_keeper, "GroupedPool", lambda *args: self.pool)
        monkeypatch.setattr(pool_keeper, "LogSegments", lambda *args: logging.NullHandler())
        monkeypatch.setattr(pool_keeper.time, "monotonic", lambda: self.now_s)
        monkeypatch.setattr(PoolKeeper, "_run", lambda self: None)
        monkeypatch.setattr(shared_pool, "start_keeper", self._start)
        monkeypatch.setattr(shared_pool.ray, "get_actor", lambda *args: self._handle())
        monkeypatch.setattr(shared_pool, "is_ready", lambda reference: True)
        monkeypatch.setattr(shared_pool, "answer", self._answer)
        self._storage = storage
        self.keeper = self.new_keeper()

    def new_keeper(self) -> PoolKeeper:
        job: Any = TeacherJob(str(self._storage), "", None, 8, "float32")  # pyright: ignore
        return PoolKeeper("elders", "app", job, {"teacher.codec.k": 8}, "c")

    def member(self, run: str, k: int = 8) -> SharedPool:
        job: Any = TeacherJob(str(self._storage), "", None, 8, "float32")  # pyright: ignore
        say = lambda event, **details: self.said.append((event, details))  # noqa: E731
        needs = {"teacher.codec.k": k}
        return SharedPool("elders", run, job, "app", needs, "c", say, lambda: self.now_s)

    def look(self, *members: SharedPool) -> None:
        """All look and the keeper takes its turns, until everybody has heard of everything."""
        for _ in range(3):
            self.now_s += LOOK_EVERY_S
            for member in members:
                member.failure()  # asks
                member.failure()  # takes in the answer
            self.keeper._turn()

    def _start(self, *args: Any) -> Any:
        self.num_started += 1
        return self._handle()

    def _handle(self) -> Any:
        class Handle:
            look, leave = Method(self, "look"), Method(self, "leave")

        return Handle

    def _answer(self, reference: Any, timeout_s: float | None = None) -> Any:
        if isinstance(reference, Exception):
            raise reference
        return reference


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


def test_members_share_what_runs_and_hear_of_each_other(world: World):
    a, b = world.member("a"), world.member("b")
    a.scale(1)
    world.look(a, b)
    assert world.pool.asked == [1], "one that asks for no teachers yet is no member"
    b.scale(3)
    world.look(a, b)
    assert world.pool.asked == [1, 4]
    assert (a.serving(), b.serving()) == (1, 3)
    assert a.status() == b.status() == {"RUNNING": 4}
    world.pool.states = {"RUNNING": 2, "STARTING": 2}
    world.look(a, b)
    assert (a.serving(), b.serving()) == (0, 1), "not all that they are to have"
    b.remove()
    world.look(a, b)
    assert world.pool.asked == [1, 4, 1]
    told = [(name, d["replicas"], d["members"]) for name, d in world.said]
    assert told == [
        ("pool_joined", 1, 1),
        ("pool_changed", 4, 2),
        ("pool_joined", 4, 2),
        ("pool_changed", 1, 1),
    ]
    assert b.status() == {} and b.serving() == 0


def test_one_that_does_not_fit_is_refused_and_others_go_on(world: World):
    a, other = world.member("a"), world.member("b", k=4)
    a.scale(1)
    other.scale(5)
    world.look(a, other)
    reason = other.failure()
    assert reason is not None and "serves runs with teacher.codec.k 8" in reason
    assert a.failure() is None
    assert world.pool.asked == [1]


def test_an_unused_pool_gives_way_to_one_of_another_kind(world: World):
    a, other = world.member("a"), world.member("b", k=4)
    a.scale(1)
    world.look(a)
    a.remove()
    other.scale(1)
    world.look(other)
    assert world.keeper._turn(), "it leaves"
    assert other.failure() is None
    assert world.num_started >= 2, "and is asked for anew"


def test_a_keeper_leaves_when_nobody_is_left(world: World):
    a = world.member("a")
    a.scale(1)
    world.look(a)
    assert not world.keeper._turn()
    world.now_s += MEMBER_EXPIRY_S
    assert not world.keeper._turn(), "the unseen member is dropped"
    world.now_s += STAY_S
    assert world.keeper._turn()
    assert world.keeper.look("a", {"teacher.codec.k": 8}, 1) is None


def test_a_keeper_that_takes_over_leaves_the_replicas_until_it_knows_all_members(world: World):
    a, b = world.member("a"), world.member("b")
    a.scale(1)
    b.scale(2)
    world.look(a, b)
    world.is_away = True
    world.look(a, b)
    assert a.failure() is None, "what serves goes on serving"
    assert a.serving() == 1
    world.is_away, world.keeper = False, world.new_keeper()
    world.look(a)
    assert world.pool.asked == [3]
    world.look(a, b)
    world.now_s += MEMBER_EXPIRY_S
    world.look(a, b)
    assert world.pool.asked == [3, 3], "as many as there were"


def test_a_pool_that_cannot_be_served_fails_its_members_and_goes(world: World):
    a = world.member("a")
    a.scale(1)
    world.look(a)
    world.pool.reason = "The teachers cannot be served: no such checkpoint"
    world.look(a)
    assert a.failure() == world.pool.reason
    a.remove()
    assert world.keeper._turn()
