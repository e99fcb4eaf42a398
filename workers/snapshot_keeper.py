"""The process beside a student host that owns snapshots, and how students and controller find it.

An object of Ray's dies with the process that owns it, so a keeper copies what it is given.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from workers.memory_tier import (
    Holding,
    HostSnapshot,
    Piece,
    SnapshotLostError,
    Snapshots,
    Source,
    peer_of,
)

NAMESPACE = "stillhouse"
# The newest may be of some hosts only, when the gang dies while it is taken.
_KEPT_PER_HOST = 2
_ANSWER_WITHIN_S = 10.0
_KEEP_WITHIN_S = 60.0


class SnapshotKeeper:
    """Holds the newest snapshots of each host that sends them."""

    def __init__(self) -> None:
        self._held: dict[int, list[HostSnapshot]] = {}

    def put(self, snapshot: HostSnapshot) -> None:
        """Takes a snapshot over; on return it outlives the sender."""
        own = dataclasses.replace(snapshot, pieces=tuple(map(_copy, snapshot.pieces)))
        # Where attempts make a step again and again, the last one that all hosts have stays.
        before = [each for each in self._held.get(own.host, []) if each.step < own.step]
        self._held[own.host] = [*before, own][-_KEPT_PER_HOST:]

    def held(self) -> list[Holding]:
        return [each.holding for held in list(self._held.values()) for each in held]

    def pieces(self, attempt: int, step: int, host: int) -> tuple[Piece, ...]:
        return self._find(attempt, step, host).pieces

    def lines(self, attempt: int, step: int, host: int) -> tuple[str, tuple[str, ...]]:
        """The host's name in the record, and its lines."""
        found = self._find(attempt, step, host)
        return found.writer, found.lines

    def _find(self, attempt: int, step: int, host: int) -> HostSnapshot:
        for each in self._held.get(host, []):
            if (each.attempt, each.step) == (attempt, step):
                return each
        raise SnapshotLostError(f"The snapshot of step {step} of host {host} is gone")


def _copy(piece: Piece) -> Piece:
    return dataclasses.replace(piece, array=np.array(piece.array))


def _prefix(run_id: str) -> str:
    return f"snapshots-{run_id}-"


def start_keeper(run_id: str, node_id: str) -> Any:
    """The keeper of a run on a node, which outlives the gang; starts it where there is none."""
    return (
        ray.remote(SnapshotKeeper)
        .options(
            name=_prefix(run_id) + node_id,
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        )
        .remote()
    )


def keepers(run_id: str) -> list[str]:
    """Names of a run's keepers that are there."""
    actors: Any = ray.util.list_named_actors(all_namespaces=True)
    names = [actor["name"] for actor in actors if actor["namespace"] == NAMESPACE]
    return sorted(name for name in names if name.startswith(_prefix(run_id)))


def held_by_keepers(run_id: str) -> dict[str, list[Holding]]:
    """What the keepers that answer in time have."""
    asked: dict[Any, str] = {}
    for name in keepers(run_id):
        with contextlib.suppress(RayError, ValueError):  # it has just gone
            asked[ray.get_actor(name, NAMESPACE).held.remote()] = name
    held: dict[str, list[Holding]] = {}
    if not asked:
        return held
    ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_WITHIN_S)
    for answer in ready:
        with contextlib.suppress(RayError):
            held[asked[answer]] = ray.get(answer)
    return held


def drop_keepers(run_id: str) -> None:
    """Ends a run's keepers, and with them what they hold."""
    for name in keepers(run_id):
        with contextlib.suppress(ValueError):
            ray.kill(ray.get_actor(name, NAMESPACE))


class Keep:
    """Hands a host's snapshots to the keeper on its own machine, and to a peer's.

    Args:
        nodes: Ray's name of each host's machine.
    """

    def __init__(self, run_id: str, host: int, nodes: Sequence[str], hosts_per_slice: int):
        self._run_id, self._host = run_id, host
        self._nodes, self._hosts_per_slice = nodes, hosts_per_slice

    def __call__(self, snapshot: HostSnapshot) -> None:
        """Returns when the snapshot outlives this process, and this machine if there is another.

        Raises:
            SnapshotLostError: a keeper has died or does not answer; the next may be taken.
        """
        peer = peer_of(self._host, self._nodes, snapshot.groups, self._hosts_per_slice)
        try:
            whole = ray.put(snapshot)
            kept = [self._keeper(self._host).put.remote(whole)]
            if peer is not None:
                copy = whole if peer.with_pieces else dataclasses.replace(snapshot, pieces=())
                kept.append(self._keeper(peer.host).put.remote(copy))
            ray.get(kept, timeout=_KEEP_WITHIN_S)
        except RayError as error:
            raise SnapshotLostError(f"A keeper of snapshots does not take one: {error}") from error

    def _keeper(self, host: int) -> Any:
        return start_keeper(self._run_id, self._nodes[host])


class Fetch(Snapshots):
    """Reads from keepers what a `Source` says that they have."""

    def __init__(self, source: Source):
        self._source = source

    def pieces(self, first_host: int) -> Iterator[tuple[Piece, ...]]:
        hosts = sorted(self._source.pieces, key=lambda host: (host != first_host, host))
        for host in hosts:
            yield self._ask(self._source.pieces[host], "pieces", host)

    def lines(self) -> dict[str, tuple[str, ...]]:
        return dict(self._ask(keeper, "lines", host) for host, keeper in self._source.lines.items())

    def _ask(self, keeper: str, method: str, host: int) -> Any:
        try:
            actor = ray.get_actor(keeper, NAMESPACE)
            call = getattr(actor, method).remote(self._source.attempt, self._source.step, host)
            return ray.get(call)
        except (RayError, ValueError) as error:
            raise SnapshotLostError(f"{keeper} does not give its snapshots: {error}") from error
