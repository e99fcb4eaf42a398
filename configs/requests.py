"""How many steps of targets go into one request, so that each replica has something to do."""

import math

from configs.distillation import TeacherConfig


def steps_together(
    teacher: TeacherConfig,
    *,
    rows_per_step: int,
    prefetch_steps: int,
    num_hosts: int,
    replicas: int,
) -> int:
    """Steps of a host's next request: the more replicas there are, the fewer.

    A request goes to one replica. So each host has its part of as many requests on their way as
    there are replicas, as far as it asks ahead, and unless they would not fill a replica's batch.

    Args:
        rows_per_step: of the host.
        prefetch_steps: that the host may have on their way.
        num_hosts: that ask for other rows of the same steps.
        replicas: that answer all of them.
    """
    num_requests = math.ceil(max(replicas, 1) / num_hosts)
    fewest = math.ceil(teacher.rows_per_batch / rows_per_step)
    together = max(prefetch_steps // num_requests, fewest)
    return min(together, teacher.steps_per_request, prefetch_steps)
