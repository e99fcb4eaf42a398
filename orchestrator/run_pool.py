"""Where a run's teachers are: in a pool of its own, or in one that it shares by name."""

from collections.abc import Callable
from typing import Protocol

from configs.run import ClusterConfig, RunConfig, TeacherConfig
from configs.topology import slice_topology
from orchestrator.launch_spec import LaunchSpec
from orchestrator.pool_members import needs_of
from workers.jobs import TeacherJob


class Pool(Protocol):
    """What a run's controller does with its teachers; only `remove` waits."""

    def scale(self, replicas: int) -> None:
        """Asks for so many replicas; those that run go on running."""
        ...

    def failure(self) -> str | None:
        """Why the run cannot be served at all, as far as it is known."""
        ...

    def status(self) -> dict[str, int]:
        """The pool's replicas by state; {} where there is no pool."""
        ...

    def serving(self) -> int:
        """How many replicas serve the run."""
        ...

    def remove(self) -> None:
        """Gives back what the run has of the pool."""
        ...


def make_pool(spec: LaunchSpec, config: RunConfig, say: Callable[..., None]) -> Pool | None:
    """The pool of a run; None where it needs no teachers. Nothing is started yet.

    Args:
        say: records an event of the run; takes its name and details.
    """
    if not config.distilled:
        return None
    assert config.teacher is not None and spec.teacher_url is not None
    job = TeacherJob(
        storage_url=spec.storage_url,
        checkpoint_url=spec.teacher_url,
        config=config.teacher,
        row_length=config.data.row_length,
        compute_dtype=config.compute_dtype,
        not_on=_students_slices(config.cluster),
    )
    app = _app(spec, config)
    pool = config.teacher.pool
    # Ray Serve takes a second to import, and nobody else in the controller or the launch needs it.
    if pool is None:
        from orchestrator.teacher_groups import GroupedPool

        return GroupedPool(app, job, spec.run_url, spec.code)
    from orchestrator.shared_pool import SharedPool

    return SharedPool(pool, spec.run_id, job, app, needs_of(spec, config), spec.code, say)


def pool_apps(spec: LaunchSpec, config: RunConfig) -> list[str]:
    """The Serve applications that the run's students ask; none where it needs no teachers."""
    return group_apps(_app(spec, config), config.teacher) if config.teacher else []


def app_name(run_id: str, shared_pool: str | None = None) -> str:
    """Name of a pool's Serve application. Others on the cluster are never touched.

    Args:
        shared_pool: the pool that the run shares, if it has none of its own.
    """
    return f"teachers-{run_id}" if shared_pool is None else f"shared-teachers-{shared_pool}"


def group_apps(app: str, config: TeacherConfig) -> list[str]:
    """The Serve applications of a pool: of the first kind, then of each group."""
    return [app, *(f"{app}-{group.name}" for group in config.groups)]


def _students_slices(cluster: ClusterConfig) -> str | None:
    """Ray's name of the kind of slices that the students train on."""
    if cluster.accelerator == "cpu":
        return None
    return slice_topology(cluster.accelerator, cluster.topology or "").pod_type


def _app(spec: LaunchSpec, config: RunConfig) -> str:
    return app_name(spec.run_id, config.teacher.pool if config.teacher else None)
