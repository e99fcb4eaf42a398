"""A controller without a cluster, for tests: events go in, actions come out."""

import json
from pathlib import Path
from typing import Any

from configs.load import parse_run
from configs.run import RunConfig
from orchestrator.controller import Controller
from orchestrator.fault_policy import DRIVER_DIED, Failure
from orchestrator.run_state import (
    AttemptFailed,
    AttemptFinished,
    Committed,
    Event,
    Prepared,
    Say,
    Snapshot,
    State,
    Stepped,
    StopAsked,
)
from tests.helpers.runs import tiny_values

FACTS = {"dataset_digest": "d", "tokenizer_digest": "t"}
HOST_DIED = Failure(1, ("ActorDiedError",), "ActorDiedError: it died")
USER_ERROR = Failure(0, ("ValueError",), "ValueError: wrong")
LOST_DRIVER = Failure(None, (DRIVER_DIED,), "gone")


def make_config(**changes: Any) -> RunConfig:
    return parse_run(tiny_values(Path("/nowhere"), "run") | changes, "test")


CONFIG = make_config(checkpoint={"every_steps": 1, "keep_latest": 2, "keep_best": 1})


class Bench:
    """A controller, and every action it has asked for."""

    def __init__(self, config: RunConfig = CONFIG, snapshot: Snapshot | None = None):
        self.controller = Controller(config, snapshot or Snapshot(teachers=2))
        self.actions: list[Any] = []

    def feed(self, *events: Event, at_s: float = 1000.0) -> list[Any]:
        """Takes in `events`; what they made it do."""
        done = [action for event in events for action in self.controller.on(event, at_s)]
        self.actions += done
        return done

    @property
    def state(self) -> State:
        return self.controller.snapshot.state

    @property
    def snapshot(self) -> Snapshot:
        return self.controller.snapshot


def of(kind: type, actions: list[Any]) -> list[Any]:
    return [action for action in actions if isinstance(action, kind)]


def said(event: str, actions: list[Any]) -> list[dict[str, Any]]:
    return [action.details for action in of(Say, actions) if action.event == event]


def failed(attempt: int, failure: Failure = HOST_DIED) -> AttemptFailed:
    return AttemptFailed(attempt, (failure,))


def finished(attempt: int, stopped: bool = False) -> AttemptFinished:
    return AttemptFinished(attempt, step=4, digest="p-o", stopped=stopped)


# Events that lead to each state that is not an end. The second fault is the one with a pause.
TO: dict[State, list[Event]] = {
    State.PREPARING: [],
    State.STARTING: [Prepared(FACTS)],
    State.TRAINING: [Prepared(FACTS), Stepped(1)],
    State.RECOVERING: [Prepared(FACTS), failed(1), failed(2)],
    State.STOPPING: [Prepared(FACTS), Stepped(1), StopAsked()],
    State.EVALUATING: [Prepared(FACTS), Stepped(1), Committed((4,)), finished(1)],
}


def round_trip(snapshot: Snapshot) -> Snapshot:
    return Snapshot.from_json(json.loads(json.dumps(snapshot.to_json())))
