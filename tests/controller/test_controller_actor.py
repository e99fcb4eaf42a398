"""The controller's actor as a plain object: what it does in which order, and its next life."""

import logging
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from configs.load import parse_run
from orchestrator import controller_actor, lives
from orchestrator.controller_actor import ControllerActor
from orchestrator.history import read_events
from orchestrator.launch_spec import LaunchSpec
from orchestrator.run_folder import RunFolder
from orchestrator.run_state import AttemptFinished, Prepared, Snapshot, StartAttempt, State
from tests.helpers.broken_storage import break_storage, mend_storage
from tests.helpers.runs import tiny_values
from workers.epochs import take_epoch
from workers.host_watch import stacks_url
from workers.phases import Doing, Phase
from workers.record import EventWriter
from workers.storage import join, write_atomic, write_json
from workers.tally import Tally

STEP = Doing(Phase.STEP, 0.1, 0.1)
FACTS = {"dataset_digest": "d", "tokenizer_digest": "t"}


class Part:
    """Stands for what the controller drives: keeps what it is asked for."""

    def __init__(self, name: str, calls: list[tuple[Any, ...]]):
        self._name, self._calls = name, calls
        self.events: list[Any] = []
        self.replicas: dict[str, int] = {}

    def poll(self, *args: Any) -> list[Any]:
        events, self.events = self.events, []
        return events

    def progress(self) -> None:
        return None

    failure = progress

    def serving(self) -> int:
        return self.replicas.get("RUNNING", 0)

    def status(self) -> dict[str, int]:
        return self.replicas

    def gauge(self, status: dict[str, Any]) -> None:
        pass

    def __getattr__(self, method: str) -> Any:
        return lambda *args: self._calls.append((self._name, method, *args))


class World:
    """One run's storage, and the lives of its controller on it."""

    def __init__(self, storage: Path, monkeypatch: pytest.MonkeyPatch):
        self.calls: list[tuple[Any, ...]] = []
        self.parts: dict[str, Part] = {}
        names = {
            "PreparationPart": "preparation",
            "AttemptPart": "attempt",
            "EvaluationPart": "evaluation",
            "make_pool": "pool",
            "TrackingPart": "tracking",
        }
        for cls, name in names.items():
            monkeypatch.setattr(controller_actor, cls, lambda *args, name=name: self._part(name))
        # Its turns are taken by hand.
        thread = lambda **options: Part("thread", [])  # noqa: E731
        monkeypatch.setattr(controller_actor.threading, "Thread", thread)
        self.draining: set[str] = set()
        monkeypatch.setattr(controller_actor, "draining_nodes", lambda within_s: self.draining)
        monkeypatch.setattr(controller_actor, "LogSegments", lambda *args: logging.NullHandler())
        values = tiny_values(storage, "run") | {"objective": {"kind": "distill"}}
        values["teacher"] = {
            "checkpoint": "elder",
            "replicas": 2,
            "max_replicas": 6,
            "prefetch_steps": 8,
        }
        self.folder = RunFolder(str(storage), "run")
        self.folder.create(parse_run(values, "test"), {"run_id": "run-1"})
        self.spec = LaunchSpec(
            name="run",
            run_id="run-1",
            storage_url=str(storage),
            run_url=self.folder.url,
            address="here:1",
            code="c",
            replicas=2,
            teacher_url="elder",
            teacher_digest="e",
            start_url=None,
            start_step=0,
        )

    def _part(self, name: str) -> Part:
        self.parts[name] = Part(name, self.calls)
        return self.parts[name]

    def life(self, **snapshot: Any) -> ControllerActor:
        """A new life of the controller, on what storage remembers (or on `snapshot`)."""
        if snapshot:
            self.folder.write_snapshot(Snapshot(**snapshot).to_json())
        self.calls.clear()
        return ControllerActor(self.spec)

    def turn(self, actor: ControllerActor) -> list[tuple[Any, ...]]:
        """One turn that looks at storage; what was asked for in it."""
        self.calls.clear()
        actor._looked_at_s = 0.0
        actor._turn()
        return list(self.calls)

    def commit(self, step: int) -> None:
        write_json(join(self.folder.url, "checkpoints", f"{step:08d}.json"), {"step": step})

    def remembered(self) -> Snapshot:
        values = self.folder.snapshot()
        assert values is not None
        return Snapshot.from_json(values)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


UNDER_WAY = [State.STARTING, State.TRAINING, State.RECOVERING, State.STOPPING, State.EVALUATING]
ENDS = [State.FINISHED, State.STOPPED, State.FAILED]


def test_a_first_life_prepares_and_holds_the_lease(world: World):
    actor = world.life()
    assert actor.state() == "preparing"
    assert world.calls == [("preparation", "start")]
    lease = world.folder.lease()
    assert lease is not None
    assert lease["address"] == "here:1"


def test_a_life_that_starts_over_prepares_again(world: World):
    world.life(state=State.PREPARING, teachers=2)
    assert world.calls == [("preparation", "start")]


@pytest.mark.parametrize("state", UNDER_WAY)
def test_the_next_life_goes_on_where_the_last_one_was(world: World, state: State):
    actor = world.life(state=state, attempt=3, teachers=5, facts=FACTS, evaluating=2, steps=(2,))
    assert actor.state() == state.value
    # A scaling that was lost with the last life is made good; nothing is started twice.
    assert world.calls == [("pool", "scale", 5)]
    world.commit(2)
    assert ("evaluation", "start", 2, FACTS) in world.turn(actor)
    started = [e for e in read_events(world.folder.url) if e["event"] == "controller_started"]
    assert started[-1]["state"] == state.value
    assert started[-1]["away_s"] is None


def test_a_life_tells_how_long_nobody_had_been_there(world: World):
    lease = {"holder": "last", "address": "here:1", "renewed_s": time.time() - 1000}
    write_json(join(world.folder.url, "lease.json"), lease)
    world.life(state=State.RECOVERING, attempt=3, teachers=2, facts=FACTS)
    (started,) = [e for e in read_events(world.folder.url) if e["event"] == "controller_started"]
    assert 1000 <= started["away_s"] < 2000
    lease_now = world.folder.lease()
    assert lease_now is not None and lease_now["holder"] != "last"


@pytest.mark.parametrize("state", ENDS)
def test_a_life_after_the_end_gives_everything_back(world: World, state: State):
    world.life(state=state, attempt=3, teachers=2, facts=FACTS)
    assert ("attempt", "kill", 3) in world.calls
    assert ("pool", "remove") in world.calls


def test_what_is_decided_is_remembered_before_it_is_done(world: World):
    actor = world.life()
    world.parts["preparation"].events = [Prepared(FACTS)]

    def start(action: StartAttempt, *told: Any) -> None:
        assert world.remembered().state is State.STARTING
        assert world.remembered().attempt == action.attempt
        raise ConnectionError("dies here")

    world.parts["attempt"].start = start  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ConnectionError):
        world.turn(actor)


def test_a_command_is_taken_only_once_it_is_remembered(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    actor = world.life(state=State.TRAINING, attempt=1, teachers=2, facts=FACTS)
    world.folder.send({"kind": "stop"})

    def fail(values: dict[str, Any]) -> None:
        raise OSError("dies here")

    monkeypatch.setattr(actor._folder, "write_snapshot", fail)
    with pytest.raises(OSError, match="dies here"):
        world.turn(actor)
    assert len(world.folder.commands()) == 1
    next_life = world.life()
    world.turn(next_life)
    assert world.remembered().state is State.STOPPING
    assert world.folder.commands() == []
    assert next_life.heartbeat(1, {}, Tally(), STEP) == 1


def test_commands_are_carried_out_in_order(world: World):
    actor = world.life(state=State.TRAINING, attempt=1, teachers=2, facts=FACTS)
    for number in (3, 4, 1):
        world.folder.send({"kind": "scale", "teachers": number})
    calls = world.turn(actor)
    assert [call for call in calls if call[0] == "pool"] == [
        ("pool", "scale", number) for number in (3, 4, 1)
    ]
    assert world.turn(actor) == []


def test_the_last_checkpoint_is_known_before_the_end_is_taken_in(world: World):
    actor = world.life(state=State.TRAINING, attempt=1, teachers=2, facts=FACTS)
    world.turn(actor)
    world.commit(4)
    world.parts["attempt"].events = [AttemptFinished(1, 4, "p-o", stopped=False)]
    actor._turn()  # not due to look at storage
    assert actor.state() == "evaluating"
    assert world.remembered().steps == (4,)


def test_a_heartbeat_makes_it_train_and_shows_its_line(world: World):
    actor = world.life(state=State.STARTING, attempt=2, teachers=2, facts=FACTS)
    actor.heartbeat(1, {"step": 7}, Tally(), STEP)  # a student of the attempt before
    world.turn(actor)
    assert actor.state() == "starting"
    assert actor.heartbeat(2, {"step": 9}, Tally(), STEP) == 0
    world.turn(actor)
    assert actor.state() == "training"
    status = world.folder.status()
    assert status is not None
    assert status["step"] == 9


def test_heartbeats_of_a_student_that_waits_scale_the_pool(world: World):
    actor = world.life(state=State.TRAINING, attempt=2, teachers=2, facts=FACTS)
    world.parts["pool"].replicas = {"RUNNING": 2}

    def beat(steps: int) -> list[tuple[Any, ...]]:
        """So many steps of 1 s, half of it a wait for two teachers that never rest."""
        tally = Tally(steps, 1.0 * steps, 0.5 * steps, 2.0 * steps)
        actor.heartbeat(2, {"step": steps}, tally, STEP)
        return [call for call in world.turn(actor) if call[0] == "pool"]

    # The first tally is where this life begins to look; then a window of steps at a time.
    assert [beat(steps) for steps in (40, 41, 46, 48, 52)] == [[]] * 5
    assert beat(58) == [("pool", "scale", 5)]
    status = world.folder.status()
    assert status is not None
    assert status["teachers"] == {
        "wanted": 5,
        "needed": 5,
        "pool": None,
        "replicas": {"RUNNING": 2},
    }


def test_an_attempt_that_hangs_is_ended_with_a_word_on_its_hosts(world: World):
    actor = world.life(state=State.TRAINING, attempt=2, teachers=2, facts=FACTS)
    write_atomic(stacks_url(world.folder.url, 2, 0), b"File student.py")
    hangs = Doing(Phase.STEP, 131.0, 0.1)
    actor.heartbeat(2, {"step": 7}, Tally(), hangs)
    actor.busy(2)  # one host has its reasons
    world.turn(actor)
    actor._watch._not_busy_s = 60.0  # and has been silent since
    done = world.turn(actor)
    assert ("attempt", "kill", 2) in done and actor.state() in ("recovering", "starting")
    failed = [e for e in read_events(world.folder.url) if e["event"] == "attempt_failed"]
    assert [event["kind"] for event in failed] == ["host_hung"]
    assert "phase `step` for 131 s, where 120 s are allowed" in failed[0]["message"]
    assert failed[0]["message"].endswith("in stacks/ are those of hosts [0]")


def test_a_gang_is_told_to_leave_only_if_it_is_on_a_machine_that_goes(world: World):
    actor = world.life(state=State.TRAINING, attempt=2, teachers=2, facts=FACTS)
    for attempt, node in [(1, "old"), (2, "a"), (2, "b")]:
        events = EventWriter(world.folder.url, f"student-a{attempt:04d}-h{node}")
        events.say("host_ready", attempt=attempt, node=node)
        events.close()
    world.draining = {"old", "elsewhere"}
    world.turn(actor)
    assert actor.heartbeat(2, {"step": 7}, Tally(), STEP) == 0
    world.draining = {"b", "elsewhere"}
    world.turn(actor)
    assert actor.heartbeat(2, {"step": 7}, Tally(), STEP) == 1
    told = [e for e in read_events(world.folder.url) if e["event"] == "preemption_noticed"]
    assert [event["machines"] for event in told] == [["b"]]
    world.parts["attempt"].events = [AttemptFinished(2, 8, "d", stopped=True)]
    world.turn(actor)
    assert world.remembered().used == {"preempted": 1}
    assert actor.heartbeat(3, {}, Tally(), STEP) == 0


def test_the_pool_is_scaled_by_hand_and_then_by_need(world: World):
    actor = world.life(state=State.TRAINING, attempt=2, teachers=2, facts=FACTS)
    world.folder.send({"kind": "scale", "teachers": 9})
    world.turn(actor)
    assert world.remembered().scaling.by_hand
    world.folder.send({"kind": "scale", "teachers": "auto"})
    assert ("pool", "scale", 6) in world.turn(actor)
    assert not world.remembered().scaling.by_hand


def test_a_controller_that_another_cluster_has_superseded_writes_nothing(world: World):
    actor = world.life(state=State.RECOVERING, facts=FACTS, attempt=1, relaunch_at_s=0.0)
    take_epoch(world.folder.url, "run-1", "another", "there:1")
    world.folder.write_lease("another", "there:1")
    remembered, held = world.remembered(), world.folder.lease()
    ended: list[bool] = []
    actor._end_actor = lambda: ended.append(True)
    actor._run()
    assert ended and ("attempt", "kill", 1) in world.calls
    assert not [call for call in world.calls if call[:2] == ("attempt", "start")]
    assert world.remembered() == remembered and world.folder.lease() == held


def test_a_controller_whose_run_was_removed_ends_what_it_drives(world: World):
    actor = world.life(state=State.STARTING, attempt=1, teachers=2, facts=FACTS)
    world.folder.remove()
    actor._renewed_at_s = 0.0
    ended: list[bool] = []
    actor._end_actor = lambda: ended.append(True)
    actor._run()
    assert ended and ("attempt", "kill", 1) in world.calls
    assert world.folder.lease() is None and world.folder.status() is None


def test_a_controller_whose_storage_shows_nothing_writes_nothing_and_waits(world: World):
    """As where a mount is missing for a moment; then all is as it was."""
    actor = world.life(state=State.STARTING, attempt=1, teachers=2, facts=FACTS)
    folder = Path(world.folder.url)
    aside = folder.rename(folder.with_name("aside"))
    actor._renewed_at_s = actor._looked_at_s = 0.0
    actor._turn_patiently()
    assert world.folder.lease() is None and world.folder.status() is None
    assert actor.state() == State.STARTING
    shutil.rmtree(folder, ignore_errors=True)  # the record's writers wait for nothing
    aside.rename(folder)
    assert not [call for call in world.turn(actor) if call[1] in ("kill", "start", "remove")]
    assert actor.state() == State.STARTING


def test_a_life_that_ray_started_waits_for_storage(world: World, monkeypatch: pytest.MonkeyPatch):
    """An actor that fails as it is made is dead for good, and with it the run."""
    world.life(state=State.TRAINING, attempt=1)
    folder, pauses_s = Path(world.folder.url), list[float]()

    def sleep(seconds: float) -> None:
        pauses_s.append(seconds)
        if len(pauses_s) == 2:
            mend_storage(folder)

    monkeypatch.setattr(lives.time, "sleep", sleep)
    break_storage(folder)
    with pytest.raises(NotADirectoryError):  # at a launch, whoever launches hears of it
        world.life()
    monkeypatch.setattr(lives, "is_restarted", lambda: True)
    actor = world.life()
    assert len(pauses_s) == 2
    assert actor._machine.snapshot.state is State.TRAINING
