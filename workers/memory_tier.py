"""The students' state in memory outside their gang: what is kept, and what of it can be used.

Plain data and a pure choice; no Ray, no JAX. `workers.snapshots` takes and puts back snapshots,
`workers.snapshot_keeper` holds them.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import xxhash

Bounds = tuple[tuple[int, int], ...]
"""First and last+1 index along each axis."""


class SnapshotLostError(RuntimeError):
    """A snapshot that was to be restored is gone or incomplete."""


class SnapshotDamagedError(SnapshotLostError):
    """A snapshot that was to be restored is not what was taken."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of one leaf of the state."""

    leaf: str
    bounds: Bounds
    array: np.ndarray
    digest: str

    @classmethod
    def of(cls, leaf: str, bounds: Bounds, array: np.ndarray) -> "Piece":
        """A piece with the digest of its bytes."""
        return cls(leaf, bounds, array, _digest(array))

    def check(self) -> None:
        """Raises SnapshotDamagedError unless the bytes are those that were taken."""
        if _digest(self.array) != self.digest:
            raise SnapshotDamagedError(f"The snapshot of {self.leaf} {self.bounds} has changed")


def _digest(array: np.ndarray) -> str:
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


@dataclasses.dataclass(frozen=True)
class HostSnapshot:
    """What one student host had after a step.

    Args:
        step: steps made.
        attempt, host: who took it.
        groups: for each host of the gang which part of the state lies there; hosts with the same
            number have the same part, as those of several slices do.
        writer: the host's name in the run's record.
        lines: its lines of the record that may not have been on storage.
        pieces: its part of the state; empty in a copy that is kept for the lines alone.
    """

    step: int
    attempt: int
    host: int
    groups: tuple[int, ...]
    writer: str
    lines: tuple[str, ...]
    pieces: tuple[Piece, ...]

    @property
    def holding(self) -> "Holding":
        return Holding(self.attempt, self.step, self.host, self.groups, bool(self.pieces))


class Holding(NamedTuple):
    """What a keeper says of a snapshot."""

    attempt: int
    step: int
    host: int
    groups: tuple[int, ...]
    has_pieces: bool


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the snapshots of a step are.

    Args:
        pieces: by host of the gang that took them, the keeper that has its part of the state; the
            hosts have the whole state between them.
        lines: the same, of every host's lines.
    """

    attempt: int
    step: int
    pieces: dict[int, str]
    lines: dict[int, str]


def newest_complete(
    held: Mapping[str, Iterable[Holding]], before: int | None = None
) -> Source | None:
    """The newest step of which the keepers have the whole state and every line.

    Args:
        held: by keeper, what it has.
        before: only steps before this one.
    """
    found: dict[tuple[int, int], list[tuple[str, Holding]]] = {}
    for keeper, holdings in sorted(held.items()):
        for each in holdings:
            if before is None or each.step < before:
                found.setdefault((each.attempt, each.step), []).append((keeper, each))
    for (attempt, step), each in sorted(found.items(), reverse=True):
        lines = {holding.host: keeper for keeper, holding in each}
        pieces = {holding.host: keeper for keeper, holding in each if holding.has_pieces}
        groups = each[0][1].groups
        whole = {groups[host] for host in pieces} == set(groups)
        if whole and lines.keys() == set(range(len(groups))):
            return Source(attempt, step, pieces, lines)
    return None


class Peer(NamedTuple):
    """Another host whose keeper has a copy too, of the whole snapshot or of its lines alone."""

    host: int
    with_pieces: bool


def peer_of(
    host: int, nodes: Sequence[str], groups: Sequence[int], hosts_per_slice: int
) -> Peer | None:
    """Who keeps a copy of a host's snapshot, so that the loss of its machine is survived.

    One of the next slice, so that the loss of a slice is too. What other slices have anyway is not
    sent. None: there is no other machine.

    Args:
        nodes: the machine of each host.
        groups: as in `HostSnapshot`.
    """
    num_hosts = len(nodes)
    step = hosts_per_slice if hosts_per_slice < num_hosts else 1
    around = [(host + step + more) % num_hosts for more in range(num_hosts)]
    others = [each for each in around if nodes[each] != nodes[host]]
    if not others:
        return None
    replicated = any(groups[each] == groups[host] for each in others)
    return Peer(others[0], with_pieces=not replicated)


class Snapshots(Protocol):
    """The snapshots that an attempt starts from."""

    def pieces(self, first_host: int) -> Iterator[tuple[Piece, ...]]:
        """Pieces host by host, beginning with one host's, which most often are all it needs.

        Raises:
            SnapshotLostError: they are gone.
        """
        ...

    def lines(self) -> dict[str, tuple[str, ...]]:
        """The lines of all hosts, by their names in the record. Raises as `pieces`."""
        ...
