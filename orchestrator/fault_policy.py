"""What to do after a fault: a pure decision from its kind and what the run has outlived so far."""

import dataclasses
import enum
from collections.abc import Mapping, Sequence

from configs.run import FaultConfig

_FIRST_PAUSE_S = 1.0
# By then all machines of a slice that goes are known to go.
_AFTER_NOTICE_S = 5.0
LONGEST_PAUSE_S = 60.0


class FaultKind(enum.StrEnum):
    """Kinds of fault, each with a budget of its own."""

    HOST_DIED = "host_died"
    HOST_HUNG = "host_hung"
    PREEMPTED = "preempted"
    DRIVER_DIED = "driver_died"
    EVALUATOR_DIED = "evaluator_died"
    CORRUPT_CHECKPOINT = "corrupt_checkpoint"
    SNAPSHOT_LOST = "snapshot_lost"
    NO_CAPACITY = "no_capacity"
    STORAGE = "storage"
    ANOMALY = "anomaly"
    USER_ERROR = "user_error"
    UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True)
class Failure:
    """How one host, or the attempt as a whole (`host` None), came to its end."""

    host: int | None
    error_types: tuple[str, ...]
    """Class names of the error and of what caused it, outermost first."""
    message: str
    skip_steps: tuple[int, ...] = ()
    """Steps that the next attempt is to leave out."""


@dataclasses.dataclass(frozen=True)
class Relaunch:
    """Try again after a pause."""

    after_s: float


@dataclasses.dataclass(frozen=True)
class GiveUp:
    """Stop the run; `reason` is for the user."""

    reason: str


UNBOUNDED = {FaultKind.CORRUPT_CHECKPOINT, FaultKind.SNAPSHOT_LOST}
"""There is less to start from each time, or the next time, so that they come to an end."""

MACHINE_FAULTS = {
    FaultKind.HOST_DIED,
    FaultKind.HOST_HUNG,
    FaultKind.DRIVER_DIED,
    FaultKind.UNKNOWN,
}
"""What the loss of a machine may look like."""

# What a host reports when it is another host that died: never the cause itself.
_ECHOES = {"JaxRuntimeError", "XlaRuntimeError"}
_DEATHS = {
    "WorkerHealthCheckFailedError",
    "WorkerHealthCheckTimeoutError",
    "ActorDiedError",
    "RayActorError",
    "NodeDiedError",
    "WorkerCrashedError",
    "OwnerDiedError",
    "ActorUnavailableError",
}
DRIVER_DIED = "AttemptDriverDied"
"""Error type of an attempt whose own actor is gone."""
HUNG = "AttemptHung"
"""Error type of an attempt that the watchdog has ended."""

PREEMPTED = "PreemptionError"
"""Error type of an attempt that left its machines on notice."""

_DAMAGED = "SnapshotDamagedError"
_PREEMPTIONS = {PREEMPTED, "NodePreemptedError"}
_CAPACITY = {"WorkerGroupStartupTimeoutError", "WorkerGroupStartupFailedError"}
_ANOMALIES = {"RollbackError"}
_USER = {
    "ValueError",
    "TypeError",
    "KeyError",
    "IndexError",
    "AttributeError",
    "AssertionError",
    "ImportError",
    "ModuleNotFoundError",
    "NotImplementedError",
    "FileNotFoundError",
    "PermissionError",
    "NotADirectoryError",
    "IsADirectoryError",
    "CorruptCheckpointError",
    "TeacherUnavailableError",
}
_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"  # XLA's word for it, and TensorStore's for a full disk
_FULL_DISK = "No space left"
_AGAINST_IT = (
    "The devices' memory does not hold a step. `resume` may change this: --set "
    "batch.microbatches=N works through the step in N parts, --set remat=layers computes "
    "activations anew, and a larger mesh.fsdp divides the state among more devices. A new run may "
    "also have fewer batch.rows or a shorter data.row_length"
)
_ORDER = [
    ({DRIVER_DIED}, FaultKind.DRIVER_DIED),
    ({HUNG}, FaultKind.HOST_HUNG),
    ({"CorruptOwnCheckpointError"}, FaultKind.CORRUPT_CHECKPOINT),
    ({_DAMAGED}, FaultKind.SNAPSHOT_LOST),
    ({"SnapshotLostError"}, FaultKind.SNAPSHOT_LOST),
    (_PREEMPTIONS, FaultKind.PREEMPTED),
    (_USER, FaultKind.USER_ERROR),
    (_ANOMALIES, FaultKind.ANOMALY),
    (_DEATHS, FaultKind.HOST_DIED),
    (_CAPACITY, FaultKind.NO_CAPACITY),
    # What the next try may not meet: a full disk, a storage that is away.
    ({"OSError"}, FaultKind.STORAGE),
]


def cause(failures: tuple[Failure, ...]) -> tuple[FaultKind, Failure]:
    """The fault behind the failures of an attempt's hosts.

    One death makes many errors: the survivors' broken collectives are echoes. What a user has to
    mend comes before a death, since an error in one host ends the others too.
    """
    assert failures, "an attempt that failed says how"
    for failure in failures:
        if _OUT_OF_MEMORY in failure.message and _FULL_DISK not in failure.message:
            told = dataclasses.replace(failure, message=f"{failure.message}. {_AGAINST_IT}")
            return FaultKind.USER_ERROR, told
    for names, kind in _ORDER:
        for failure in failures:
            if not names.isdisjoint(failure.error_types):
                return kind, failure
    for failure in failures:
        if _ECHOES.intersection(failure.error_types):
            return FaultKind.HOST_DIED, failure
    return FaultKind.UNKNOWN, failures[0]


def decide(
    kind: FaultKind, message: str, num_recent: int, budgets: FaultConfig
) -> Relaunch | GiveUp:
    """Whether a fault is outlived, after `num_recent` others of its kind; see `recent`."""
    if kind is FaultKind.USER_ERROR:
        return GiveUp(message)
    if kind in UNBOUNDED:
        return Relaunch(0)
    budget = getattr(budgets, kind.value)
    if num_recent >= budget:
        times = "once" if num_recent == 0 else f"{num_recent + 1} times"
        return GiveUp(
            f"{kind.value} happened {times} within {budgets.forget_after_s:g} s, and "
            f"faults.{kind.value} allows {budget}; the last one: {message}"
        )
    if kind is FaultKind.PREEMPTED:
        return Relaunch(_AFTER_NOTICE_S)
    if not num_recent:
        return Relaunch(0)
    return Relaunch(min(_FIRST_PAUSE_S * 2 ** min(num_recent - 1, 10), LONGEST_PAUSE_S))


def snapshots_useless(
    kind: FaultKind,
    failure: Failure,
    recent_s: Mapping[str, Sequence[float]],
    now_s: float,
    budgets: FaultConfig,
) -> bool:
    """Whether nothing that is in memory outside the gang may be used any more.

    One that is lost went with its machine, and another may be whole; the second loss within
    `faults.forget_after_s` ends that hope.
    """
    if kind is FaultKind.SNAPSHOT_LOST:
        before = recent(recent_s.get(kind.value, ()), now_s, budgets)
        return _DAMAGED in failure.error_types or bool(before)
    # They have taken in what is to be left out.
    return kind is FaultKind.ANOMALY


def recent(times_s: Sequence[float], now_s: float, budgets: FaultConfig) -> tuple[float, ...]:
    """Those of the times of faults that still count: a run of months outlives any number."""
    return tuple(time_s for time_s in times_s if now_s - time_s < budgets.forget_after_s)
