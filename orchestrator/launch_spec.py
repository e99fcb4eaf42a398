"""What a launch settles once, and hands to everything that works for the run."""

import dataclasses

from workers.jobs import Work


@dataclasses.dataclass(frozen=True)
class LaunchSpec:
    """The names and places of one run on one cluster."""

    name: str
    run_id: str
    storage_url: str
    run_url: str
    address: str
    """Of the Ray cluster, for people to find it by."""
    code: str
    """Digest of the sources that every process has to run."""
    replicas: int
    teacher_url: str | None
    teacher_digest: str | None
    start_url: str | None
    start_step: int
    work: Work = "train"
