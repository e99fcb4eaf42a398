"""A pool whose replicas run on machines of several kinds: a Serve application for each kind."""

import dataclasses
from collections import Counter

from configs.distillation import TeacherConfig
from orchestrator.run_pool import group_apps
from orchestrator.teacher_pool import TeacherPool
from workers.jobs import TeacherJob


class GroupedPool:
    """Behaves as one `TeacherPool`; scaling changes the first kind, the groups are as configured.

    Args:
        app: of the first kind; `group_apps` has them all.
        job: of the first kind.
    """

    def __init__(self, app: str, job: TeacherJob, folder_url: str, code: str):
        self._first, *self._groups = (
            TeacherPool(name, _job_of(job, config), folder_url, code)
            for name, config in zip(group_apps(app, job.config), _configs(job.config), strict=True)
        )
        self._sizes = [group.replicas for group in job.config.groups]

    def scale(self, replicas: int) -> None:
        self._first.scale(replicas)
        for group, size in zip(self._groups, self._sizes, strict=True):
            group.scale(size)

    def failure(self) -> str | None:
        return next((reason for pool in self._all() if (reason := pool.failure())), None)

    def status(self) -> dict[str, int]:
        return dict(sum((Counter(pool.status()) for pool in self._all()), Counter()))

    def serving(self) -> int:
        """How many replicas of the first kind serve."""
        return self._first.serving()

    def remove(self) -> None:
        for pool in self._all():
            pool.remove()

    def _all(self) -> list[TeacherPool]:
        return [self._first, *self._groups]


def _configs(config: TeacherConfig) -> list[TeacherConfig]:
    """What each kind of replica is told."""
    kinds = ("cpus_per_replica", "tpus_per_replica", "gpus_per_replica")
    return [
        config,
        *(
            config.model_copy(update={name: getattr(group, name) for name in kinds})
            for group in config.groups
        ),
    ]


def _job_of(job: TeacherJob, config: TeacherConfig) -> TeacherJob:
    num_devices = max(config.tpus_per_replica, config.gpus_per_replica, 1)
    return dataclasses.replace(job, config=config, num_devices=num_devices)
