"""With how many slices the next attempt starts, and when one is worth starting for more. Pure."""

import dataclasses

from configs.elastic import possible_slices
from configs.run import RunConfig
from orchestrator.run_state import Snapshot, State


def slices_to_launch(snapshot: Snapshot, config: RunConfig, now_s: float) -> int | None:
    """Slices of the attempt that is due; None: it is better to wait."""
    cluster, free = config.cluster, snapshot.slices_free
    if cluster.min_slices is None:
        return cluster.num_slices
    if free is None:
        return None
    possible = possible_slices(config, free)
    waited = now_s - snapshot.relaunch_at_s >= cluster.resize_after_s
    return possible if possible == cluster.num_slices or (possible and waited) else None


def note_free(
    snapshot: Snapshot, config: RunConfig, num_free: int, now_s: float
) -> tuple[Snapshot, bool]:
    """Takes note of the slices that nobody uses; whether an attempt with more is to be started."""
    more = possible_slices(config, snapshot.num_slices + num_free) > snapshot.num_slices
    if snapshot.state is not State.TRAINING or not more:
        since_s, due = None, False
    else:
        since_s = now_s if snapshot.more_since_s is None else snapshot.more_since_s
        due = now_s - since_s >= config.cluster.resize_after_s
    noted = {"slices_free": num_free, "more_since_s": None if due else since_s}
    return dataclasses.replace(snapshot, **noted), due
