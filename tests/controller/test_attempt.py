"""Ray's errors, as Ray makes them, read as the fault behind them."""

import pickle
from pathlib import Path
from typing import Any

import pytest
from jax.errors import JaxRuntimeError
from ray import ActorID, JobID
from ray.core.generated import common_pb2
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError
from ray.train import FailureConfig
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupTimeoutError,
    WorkerHealthCheckFailedError,
)
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from configs.load import parse_run
from orchestrator.attempt import _trainer, attempt_name, failures_of
from orchestrator.fault_policy import FaultKind, cause
from tests.helpers.runs import tiny_values
from workers.anomalies import RollbackError
from workers.jobs import StartPoint, StudentJob
from workers.targets_protocol import TeacherUnavailableError


def task_error(error: Exception) -> RayTaskError:
    """What `ray.get` raises of an actor's call that raised `error`."""
    wrapped = RayTaskError("train_loop", "Traceback …", error, proctitle="x", pid=1, ip="::1")
    dual = wrapped.as_instanceof_cause()
    assert isinstance(dual, type(error))
    return dual


def actor_died(preempted: bool = False) -> ActorDiedError:
    # The fields of a generated module are unknown to type checkers.
    messages: Any = common_pb2
    context = messages.ActorDiedErrorContext(
        error_message="The node was terminated.",
        actor_id=ActorID.of(JobID.from_int(1), _root_task(), 1).binary(),
        class_name="RayTrainWorker",
    )
    if preempted:
        context.node_death_info.reason = messages.NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED
    return ActorDiedError(context)


def _root_task() -> Any:
    from ray import TaskID

    return TaskID.for_fake_task(JobID.from_int(1))


def health_check(error: Exception) -> WorkerHealthCheckFailedError:
    """How Ray Train tells of a worker that it could not ask."""
    return WorkerHealthCheckFailedError("A worker health check failed.", failure=error)


def kind_of(error: BaseException) -> tuple[FaultKind, int | None, str]:
    kind, failure = cause(failures_of(error))
    return kind, failure.host, failure.message


def test_a_hosts_own_error_is_told_in_its_words():
    error = WorkerGroupError("text", {0: ValueError("steps must be positive\nmore")})
    assert kind_of(error) == (FaultKind.USER_ERROR, 0, "ValueError: steps must be positive")


def test_the_error_of_a_call_is_the_one_that_was_raised():
    error = task_error(KeyError("loss"))
    assert kind_of(error) == (FaultKind.USER_ERROR, None, "KeyError: 'loss'")


def test_the_dead_host_and_not_its_echoes():
    failures: dict[int, Exception] = {
        0: JaxRuntimeError("INTERNAL: Gloo: connection closed by peer"),
        2: health_check(actor_died()),
        1: JaxRuntimeError("ABORTED"),
    }
    kind, host, message = kind_of(WorkerGroupError("text", failures))
    assert (kind, host) == (FaultKind.HOST_DIED, 2)
    assert message.startswith("ActorDiedError: ")
    assert [failure.host for failure in failures_of(WorkerGroupError("", failures))] == [0, 1, 2]


def test_a_host_that_cannot_be_reached_counts_as_dead():
    error = health_check(ActorUnavailableError("connection reset", None))
    assert kind_of(WorkerGroupError("", {1: error}))[:2] == (FaultKind.HOST_DIED, 1)


@pytest.mark.parametrize("wrap", [health_check, lambda error: error])
def test_a_host_taken_back_by_the_cloud_is_preempted(wrap: Any):
    failures = {0: JaxRuntimeError("ABORTED"), 1: wrap(actor_died(preempted=True))}
    assert kind_of(WorkerGroupError("", failures))[:2] == (FaultKind.PREEMPTED, 1)


def test_an_anomaly_tells_what_to_leave_out():
    """As it comes from another process, through Ray Train."""
    failures = {0: JaxRuntimeError("ABORTED"), 1: RollbackError("Step 7: loss nan", (6, 7))}
    error = pickle.loads(pickle.dumps(WorkerGroupError("text", failures)))
    kind, failure = cause(failures_of(error))
    assert (kind, failure.host, failure.skip_steps) == (FaultKind.ANOMALY, 1, (6, 7))
    assert failure.message == "RollbackError: Step 7: loss nan"


def test_no_room_to_start():
    error = ControllerError(WorkerGroupStartupTimeoutError(num_workers=4))
    kind, host, message = kind_of(error)
    assert (kind, host) == (FaultKind.NO_CAPACITY, None)
    assert message.startswith("WorkerGroupStartupTimeoutError: ")


def test_a_teacher_that_never_answered_is_the_users_to_mend():
    error = TeacherUnavailableError("step 4: nobody answered for 600 s")
    error.__cause__ = actor_died()
    kind, host, message = kind_of(WorkerGroupError("", {0: error}))
    assert (kind, host) == (FaultKind.USER_ERROR, 0)
    assert "ActorDiedError" in message  # the innermost says why


def test_an_error_of_no_known_kind_and_without_words():
    assert kind_of(RuntimeError()) == (FaultKind.UNKNOWN, None, "RuntimeError: no message")


def test_errors_that_name_each_other_end():
    one, other = RuntimeError("one"), RuntimeError("other")
    one.__cause__, other.__cause__ = other, one
    assert kind_of(one) == (FaultKind.UNKNOWN, None, "RuntimeError: other")


def test_each_attempt_has_a_name_of_its_own():
    assert attempt_name("run-1", 1) != attempt_name("run-1", 2) != attempt_name("run-2", 2)


def test_ray_train_never_starts_the_gang_again_by_itself(tmp_path: Any):
    """It would go on from the checkpoint that the attempt began with."""
    config = parse_run(tiny_values(tmp_path, "run"), "test")
    job = StudentJob(
        config=config,
        storage_url=str(tmp_path),
        run_url=str(tmp_path / "runs" / "run"),
        attempt=1,
        start=StartPoint("fresh"),
        dataset_digest="d",
        tokenizer_digest="t",
        teacher_digest=None,
    )
    trainer = _trainer({"job": job}, "attempt-run-1", str(tmp_path / "scratch"))
    failure_config = trainer.run_config.failure_config
    assert isinstance(failure_config, FailureConfig)
    limits = [value for value in vars(failure_config).values() if isinstance(value, int)]
    assert set(limits) == {0}, vars(failure_config)
    assert len(limits) >= 3


def test_ray_train_starts_no_process_that_is_of_no_use() -> None:
    """What else it would start by itself shows here when a new version does."""
    config = parse_run(tiny_values(Path("storage"), "run"), "test")
    job = StudentJob(config, "s", "s/runs/run", 1, StartPoint("fresh"), "data", "tokens", None)
    callbacks = _trainer({"job": job}, "name", "scratch")._create_default_callbacks()
    assert {type(callback).__name__ for callback in callbacks} == {
        "AcceleratorSetupCallback",
        "BackendSetupCallback",
        "ControllerMetricsCallback",
        "UserCallbackHandler",
        "WorkerMetricsCallback",
        "WorkingDirectorySetupCallback",
    }
