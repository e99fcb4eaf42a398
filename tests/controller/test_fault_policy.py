"""What is made of a fault: its kind, whose budget it uses, and how long the pause is."""

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.run import FaultConfig
from orchestrator.fault_policy import (
    DRIVER_DIED,
    UNBOUNDED,
    Failure,
    FaultKind,
    GiveUp,
    Relaunch,
    cause,
    decide,
    recent,
)

ECHOES = ("JaxRuntimeError", "XlaRuntimeError")
BUDGETS = FaultConfig()
BUDGETED = [kind for kind in FaultKind if kind not in {FaultKind.USER_ERROR, *UNBOUNDED}]


def failure(*names: str, host: int | None = 0) -> Failure:
    return Failure(host, names, f"{names[-1] if names else 'none'} on {host}")


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        ((DRIVER_DIED,), FaultKind.DRIVER_DIED),
        (("PreemptionError",), FaultKind.PREEMPTED),
        (("WorkerHealthCheckFailedError", "PreemptionError"), FaultKind.PREEMPTED),
        (("WorkerHealthCheckFailedError", "ActorDiedError"), FaultKind.HOST_DIED),
        (("WorkerHealthCheckTimeoutError",), FaultKind.HOST_DIED),
        (("NodeDiedError",), FaultKind.HOST_DIED),
        (("OwnerDiedError", "ObjectLostError"), FaultKind.HOST_DIED),
        (("ControllerError", "WorkerGroupStartupTimeoutError"), FaultKind.NO_CAPACITY),
        (("RayTaskError", "ValueError"), FaultKind.USER_ERROR),
        (("CorruptCheckpointError", "ValueError"), FaultKind.USER_ERROR),
        (("TeacherUnavailableError", "RuntimeError", "ActorDiedError"), FaultKind.USER_ERROR),
        (("FileNotFoundError", "OSError"), FaultKind.USER_ERROR),
        (("PermissionError", "OSError"), FaultKind.USER_ERROR),
        (("AnomalyError", "ValueError"), FaultKind.USER_ERROR),
        (("RollbackError", "RuntimeError"), FaultKind.ANOMALY),
        (("OSError",), FaultKind.STORAGE),  # a full disk
        (("ConnectionResetError", "ConnectionError", "OSError"), FaultKind.STORAGE),
        (("TimeoutError", "OSError"), FaultKind.STORAGE),
        (("CorruptOwnCheckpointError", "ValueError"), FaultKind.CORRUPT_CHECKPOINT),
        (("SnapshotLostError", "ActorDiedError"), FaultKind.SNAPSHOT_LOST),
        (("JaxRuntimeError", "RuntimeError"), FaultKind.HOST_DIED),
        (("SomethingNew",), FaultKind.UNKNOWN),
        ((), FaultKind.UNKNOWN),
    ],
)
def test_kind_of_a_single_failure(names: tuple[str, ...], kind: FaultKind):
    only = failure(*names)
    assert cause((only,)) == (kind, only)


@pytest.mark.parametrize("echo", ECHOES)
@pytest.mark.parametrize("name", ["ActorDiedError", "ValueError", "PreemptionError"])
@given(order=st.permutations(range(4)))
def test_an_echo_is_never_the_cause(echo: str, name: str, order: list[int]):
    others = [failure(echo, "RuntimeError", host=host) for host in range(3)]
    real = failure(name, host=3)
    failures = [*others, real]
    assert cause(tuple(failures[index] for index in order))[1] is real


@given(order=st.permutations(range(3)))
def test_an_anomaly_comes_before_the_deaths_it_made(order: list[int]):
    failures = [
        failure("ActorDiedError", host=0),
        failure("JaxRuntimeError", host=1),
        failure("RollbackError", "RuntimeError", host=2),
    ]
    kind, told = cause(tuple(failures[index] for index in order))
    assert (kind, told.host) == (FaultKind.ANOMALY, 2)


@given(order=st.permutations(range(3)))
def test_what_a_user_has_to_mend_comes_before_the_deaths_it_made(order: list[int]):
    failures = [
        failure("ActorDiedError", host=0),
        failure("JaxRuntimeError", host=1),
        failure("ValueError", host=2),
    ]
    kind, told = cause(tuple(failures[index] for index in order))
    assert (kind, told.host) == (FaultKind.USER_ERROR, 2)


def test_a_lost_connection_does_not_hide_the_death_behind_it():
    lost = failure("ConnectionResetError", "ConnectionError", "OSError", host=0)
    died = failure("ActorDiedError", host=1)
    assert cause((lost, died)) == (FaultKind.HOST_DIED, died)


def test_no_failure_at_all_is_a_mistake_of_the_caller():
    with pytest.raises(AssertionError):
        cause(())


def test_each_kind_but_the_users_has_a_budget():
    assert {kind.value for kind in BUDGETED} == set(FaultConfig.model_fields) - {"forget_after_s"}
    assert get_args(Relaunch | GiveUp) == (Relaunch, GiveUp)


def test_what_comes_to_an_end_by_itself_is_outlived_at_once():
    for kind in UNBOUNDED:
        assert decide(kind, "lost", 1000, BUDGETS) == Relaunch(0)


def test_a_users_error_is_given_up_at_once_in_its_own_words():
    assert decide(FaultKind.USER_ERROR, "wrong", 0, BUDGETS) == GiveUp("wrong")


@pytest.mark.parametrize("kind", BUDGETED)
@given(budget=st.integers(0, 50))
def test_a_budget_of_n_outlives_n_faults(kind: FaultKind, budget: int):
    budgets = FaultConfig(**{kind.value: budget})
    count = 0
    while isinstance(decide(kind, "it broke", count, budgets), Relaunch):
        count += 1
        assert count <= budget
    assert count == budget


@given(st.lists(st.floats(0, 1e6)), st.floats(0, 1e6))
def test_faults_are_forgotten(times_s: list[float], now_s: float):
    kept = recent(times_s, now_s, FaultConfig(forget_after_s=100.0))
    assert list(kept) == [time_s for time_s in times_s if now_s - time_s < 100]


def test_giving_up_says_how_often_what_is_allowed_and_the_last_error():
    budgets = FaultConfig(host_died=2, unknown=0)
    told = decide(FaultKind.HOST_DIED, "it broke", 2, budgets)
    assert isinstance(told, GiveUp)
    for part in ("3 times", "faults.host_died allows 2", "it broke"):
        assert part in told.reason
    told = decide(FaultKind.UNKNOWN, "odd", 0, budgets)
    assert isinstance(told, GiveUp)
    assert "once" in told.reason


def test_pauses_grow_and_are_bounded():
    budgets = FaultConfig(host_died=100_000)
    pauses = []
    for count in [*range(20), 99_999]:
        decision = decide(FaultKind.HOST_DIED, "", count, budgets)
        assert isinstance(decision, Relaunch)
        pauses.append(decision.after_s)
    assert pauses[0] == 0
    assert pauses == sorted(pauses)
    assert pauses[1] > 0
    assert pauses[-1] == max(pauses) <= 60
