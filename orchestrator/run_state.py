"""What a run can be in, what can happen to it, and what can be done about it: plain data.

`TRANSITIONS` is the state machine; `orchestrator.controller` decides along it.
"""

import dataclasses
import enum
from typing import Any

from orchestrator.fault_policy import Failure
from orchestrator.teacher_scaling import Scaling
from workers.tally import Tally


class State(enum.StrEnum):
    """Where a run stands."""

    PREPARING = "preparing"
    STARTING = "starting"
    TRAINING = "training"
    RECOVERING = "recovering"
    STOPPING = "stopping"
    EVALUATING = "evaluating"
    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"

    @property
    def is_terminal(self) -> bool:
        return not TRANSITIONS[self]


TRANSITIONS: dict[State, frozenset[State]] = {
    State.PREPARING: frozenset({State.STARTING, State.STOPPED, State.FAILED}),
    State.STARTING: frozenset(
        {State.TRAINING, State.RECOVERING, State.STOPPING, State.EVALUATING, State.FAILED}
    ),
    State.TRAINING: frozenset({State.RECOVERING, State.STOPPING, State.EVALUATING, State.FAILED}),
    State.RECOVERING: frozenset({State.STARTING, State.STOPPED, State.FAILED}),
    State.STOPPING: frozenset({State.STOPPED, State.EVALUATING}),
    # Back to training where the last checkpoint proves to be damaged.
    State.EVALUATING: frozenset({State.FINISHED, State.STOPPED, State.RECOVERING}),
    State.FINISHED: frozenset(),
    State.STOPPED: frozenset(),
    State.FAILED: frozenset(),
}


# What can happen.
@dataclasses.dataclass(frozen=True)
class Prepared:
    """Tokenizer and rows are there."""

    facts: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Broken:
    """Something without which the run cannot go on, and which no second try mends."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Stepped:
    """The students report that they train."""

    attempt: int


@dataclasses.dataclass(frozen=True)
class AttemptFinished:
    """The gang came to its end by itself."""

    attempt: int
    step: int
    digest: str
    stopped: bool


@dataclasses.dataclass(frozen=True)
class AttemptFailed:
    """The gang is gone."""

    attempt: int
    failures: tuple[Failure, ...]


@dataclasses.dataclass(frozen=True)
class Hung:
    """The gang is there, but makes no progress."""

    attempt: int
    reason: str


@dataclasses.dataclass(frozen=True)
class Noticed:
    """Machines of the gang are to be taken away soon."""

    attempt: int
    machines: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Committed:
    """The complete checkpoints on storage."""

    steps: tuple[int, ...]
    pinned: tuple[int, ...] = ()
    """Those that a user wants kept."""


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """A checkpoint has been judged."""

    step: int
    bits_per_byte: float


@dataclasses.dataclass(frozen=True)
class EvaluationFailed:
    """The evaluator died (`retry`) or refused the checkpoint, perhaps since it is damaged."""

    step: int
    message: str
    retry: bool
    corrupt: bool = False


@dataclasses.dataclass(frozen=True)
class StopAsked:
    """A user wants the run to stop."""


@dataclasses.dataclass(frozen=True)
class ScaleAsked:
    """A user wants another number of teachers; None: as many as are needed, from now on."""

    teachers: int | None


@dataclasses.dataclass(frozen=True)
class Observed:
    """Steps that the first host has made, and how many teachers serve."""

    attempt: int
    steps: Tally
    serving: int


@dataclasses.dataclass(frozen=True)
class SlicesFree:
    """Whole slices of the run's shape that nobody uses now."""

    num: int


@dataclasses.dataclass(frozen=True)
class Ticked:
    """Time has passed."""


Event = (
    Prepared
    | Broken
    | Stepped
    | AttemptFinished
    | AttemptFailed
    | Hung
    | Noticed
    | Committed
    | Evaluated
    | EvaluationFailed
    | StopAsked
    | ScaleAsked
    | Observed
    | SlicesFree
    | Ticked
)


# What is to be done.
@dataclasses.dataclass(frozen=True)
class StartAttempt:
    attempt: int
    num_slices: int = 1


@dataclasses.dataclass(frozen=True)
class KillAttempt:
    attempt: int


@dataclasses.dataclass(frozen=True)
class SetTeachers:
    replicas: int


@dataclasses.dataclass(frozen=True)
class Evaluate:
    step: int


@dataclasses.dataclass(frozen=True)
class Delete:
    step: int


@dataclasses.dataclass(frozen=True)
class Quarantine:
    """Nobody is to use this checkpoint any more."""

    step: int
    reason: str


@dataclasses.dataclass(frozen=True)
class DropSnapshots:
    """What is in memory outside the gang is not to be used any more."""


@dataclasses.dataclass(frozen=True)
class Release:
    """Everything the run still holds on the cluster is to go."""


@dataclasses.dataclass(frozen=True)
class Say:
    """An event for the record."""

    event: str
    details: dict[str, Any] = dataclasses.field(default_factory=dict)


Action = (
    StartAttempt
    | KillAttempt
    | SetTeachers
    | Evaluate
    | Delete
    | Quarantine
    | DropSnapshots
    | Release
    | Say
)


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """All that the controller remembers; it survives the controller on storage."""

    state: State = State.PREPARING
    attempt: int = 0
    teachers: int = 0
    scaling: Scaling = dataclasses.field(default_factory=Scaling)
    facts: dict[str, Any] | None = None
    stop_asked: bool = False
    used: dict[str, int] = dataclasses.field(default_factory=dict)
    """Faults so far, by kind."""
    recent: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    """When those happened that still count towards their budgets."""
    relaunch_at_s: float = 0.0
    num_slices: int = 1
    """Of the newest attempt."""
    slices_free: int | None = None
    more_since_s: float | None = None
    """Since when there are more slices than the newest attempt has."""
    kill_at_s: float = 0.0
    leaving: bool = False
    """Whether the newest attempt is to save and give up its machines, which are taken away."""
    skip_steps: tuple[int, ...] = ()
    """Steps that rollbacks leave out."""
    reason: str | None = None
    digest: str | None = None
    step: int | None = None
    """Where the newest attempt that ended by itself came to."""
    steps: tuple[int, ...] = ()
    pinned: tuple[int, ...] = ()
    resumed_from: int | None = None
    """The checkpoint of this run that the newest attempt started from."""
    evaluating: int | None = None
    evaluated: dict[int, float | None] = dataclasses.field(default_factory=dict)
    """Bits per byte by step; None where the checkpoint could not be judged."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Snapshot":
        evaluated = {int(step): value for step, value in values["evaluated"].items()}
        steps, pinned = tuple(values["steps"]), tuple(values.get("pinned", ()))
        state = State(values["state"])
        scaling = Scaling(**values.get("scaling", {}))
        read = {
            "state": state,
            "steps": steps,
            "pinned": pinned,
            "recent": {kind: tuple(at) for kind, at in values.get("recent", {}).items()},
            "skip_steps": tuple(values.get("skip_steps", ())),
            "evaluated": evaluated,
            "scaling": scaling,
        }
        return cls(**{**values, **read})
