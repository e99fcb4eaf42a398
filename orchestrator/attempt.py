"""One life of the student gang: one `JaxTrainer.fit()` in an actor of its own.

The actor never restarts: it lives exactly as long as its attempt, apart from the controller, so
that the controller's death leaves the students alone and only the controller relaunches.
"""

import threading
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from configs.checks import Layout, layout
from configs.run import ClusterConfig
from configs.topology import slice_topology
from orchestrator.cpu_devices import cpu_devices
from orchestrator.fault_policy import PREEMPTED, Failure
from orchestrator.ray_calls import beside_me, start_actor
from workers.anomalies import RollbackError
from workers.student_host import NAMESPACE, train_loop

# Ray Train looks after its workers this often; the default adds seconds to each end of a run.
_TRAIN_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Nobody reads them, and each wakes the students' machine many times a second.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    # Slices take minutes to appear.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "900",
    "RAY_TRAIN_V2_ENABLED": "1",
}

_ANSWER_AFTER_S = 5.0


def attempt_name(run_id: str, attempt: int) -> str:
    """Name of an attempt's actor in the project's namespace."""
    return f"attempt-{run_id}-{attempt:04d}"


class AttemptDriver:
    """Runs `fit()` in a thread, and says how it ended."""

    def __init__(self, payload: dict[str, Any], trainer_name: str, scratch: str):
        self._failures: tuple[Failure, ...] = ()
        self._thread = threading.Thread(
            target=self._fit, args=(payload, trainer_name, scratch), daemon=True
        )
        self._thread.start()

    def outcome(self) -> tuple[bool, tuple[Failure, ...]]:
        """(whether it has ended, what failed); waits a while for the end."""
        self._thread.join(_ANSWER_AFTER_S)
        return not self._thread.is_alive(), self._failures

    def _fit(self, payload: dict[str, Any], trainer_name: str, scratch: str) -> None:
        try:
            _trainer(payload, trainer_name, scratch).fit()
        except Exception as error:
            self._failures = failures_of(error)


def start_attempt(run_id: str, attempt: int, payload: dict[str, Any], scratch: str) -> Any:
    """Starts the actor of an attempt, and with it the gang."""
    name = attempt_name(run_id, attempt)
    return start_actor(
        AttemptDriver,
        *(payload, name, scratch),
        **beside_me(),
        max_restarts=0,
        max_concurrency=16,  # each life of the controller may leave a call behind
        name=name,
        namespace=NAMESPACE,
        lifetime="detached",
        runtime_env={"env_vars": _TRAIN_ENVIRONMENT},
    )


def failures_of(error: BaseException) -> tuple[Failure, ...]:
    """The failures of the hosts behind an error of `fit()`, or the error itself."""
    workers = getattr(error, "worker_failures", None)
    if workers:
        return tuple(_failure(host, workers[host]) for host in sorted(workers))
    return (_failure(None, error),)


def _failure(host: int | None, error: BaseException) -> Failure:
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = _behind(link)
    # The innermost error says what went wrong; what wraps it only says where it passed.
    names = tuple(name for link in chain for name in _class_names(link))
    told = [link for link in chain if isinstance(link, RollbackError)]
    return Failure(host, names, _sentence(chain[-1]), told[0].steps if told else ())


def _behind(error: BaseException) -> BaseException | None:
    """What an error wraps: Ray keeps it under names of its own."""
    for name in ("cause", "controller_failure", "health_check_failure", "__cause__"):
        if isinstance(wrapped := getattr(error, name, None), BaseException):
            return wrapped
    return None


def _class_names(error: BaseException) -> list[str]:
    # Ray tells this by a property of an ordinary death, Ray Train by a class.
    if isinstance(error, RayActorError) and error.preempted:
        return [PREEMPTED]
    return [c.__name__ for c in type(error).__mro__ if c not in (Exception, BaseException, object)]


def _sentence(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


def remove_leftover_placement_groups() -> None:
    """Frees what a killed attempt had reserved: Ray Train's own cleaner misses the slice heads.

    Only unnamed groups of this job are touched; Serve names its own.
    """
    from ray._raylet import PlacementGroupID

    job = ray.get_runtime_context().get_job_id()
    for group_id, entry in placement_group_table().items():
        if entry["state"] != "REMOVED" and not entry["name"] and group_id.endswith(job):
            group = PlacementGroup(PlacementGroupID(bytes.fromhex(group_id)))
            remove_placement_group(group)


def _trainer(payload: dict[str, Any], name: str, scratch: str) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import (
        PlacementGroupCleanerCallback,
    )
    from ray.train.v2.jax import JaxTrainer
    from ray.train.v2.jax.config import JaxConfig

    class Trainer(JaxTrainer):
        """Starts two processes less, for which a start would wait.

        Rows are not read through Ray Data, and `remove_leftover_placement_groups` frees machines.
        """

        def _create_default_callbacks(self) -> list[Any]:
            unused = DatasetsCallback, PlacementGroupCleanerCallback
            return [
                each for each in super()._create_default_callbacks() if not isinstance(each, unused)
            ]

    config = payload["job"].config
    plan = layout(config)
    run_config = RunConfig(
        name=name,
        storage_path=scratch,
        # Unset limits would have Ray Train start the gang again by itself, from the old checkpoint.
        failure_config=FailureConfig(
            max_failures=0, controller_failure_limit=0, max_preemption_failures=0
        ),
        worker_runtime_env={"env_vars": _host_environment(config.cluster, plan)},
    )
    if config.cluster.accelerator == "cpu":
        scaling = ScalingConfig(
            num_workers=plan.num_hosts, resources_per_worker={"CPU": config.cluster.cpus_per_host}
        )
    else:
        topology = slice_topology(config.cluster.accelerator, config.cluster.topology or "")
        scaling = ScalingConfig(
            use_tpu=True,
            num_workers=plan.num_hosts,
            topology=config.cluster.topology,
            accelerator_type=topology.ray_accelerator_type,
            resources_per_worker={"TPU": plan.devices_per_host},
        )
    return Trainer(
        train_loop,
        train_loop_config=payload,
        jax_config=JaxConfig(use_tpu=True),
        scaling_config=scaling,
        run_config=run_config,
    )


def _host_environment(cluster: ClusterConfig, plan: Layout) -> dict[str, str]:
    """Variables that JAX reads when it is imported, before any code of ours runs in the host."""
    if cluster.accelerator != "cpu":
        return {}
    return cpu_devices(plan.devices_per_host, plan.num_hosts)
