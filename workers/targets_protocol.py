"""What a student asks of a teacher, and what comes back: plain data, no Ray, no JAX."""

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import xxhash
from jaxtyping import Int32

from workers.dataset import RowId

MIXED = "mixed"
# Where a row's targets are from, if not from a replica.
CACHE, LABELS = "cache", "labels"


@dataclasses.dataclass(frozen=True)
class TargetSpec:
    """What decides a row's targets besides the row: part of their one key everywhere."""

    dataset_digest: str
    teacher_digest: str
    codec: str
    seed: int
    sameness: str
    """The class of teachers whose answers are equal bit for bit; `MIXED` promises tolerance."""

    @property
    def key(self) -> str:
        """Sixteen hex digits that name all of it."""
        text = "\n".join(f"{name}={value}" for name, value in vars(self).items())
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def row_digest(spec: TargetSpec, row: RowId, arrays: Mapping[str, np.ndarray]) -> str:
    """32 hex digits over one row's targets and the key that they answer to.

    Args:
        arrays: the row's own part of each wire array, without the axis of rows.
    """
    hasher = xxhash.xxh3_128(f"{spec.key} {row.source} {row.index}".encode())
    for name in sorted(arrays):
        array = arrays[name]
        hasher.update(f"{name} {array.dtype.str} {array.shape}".encode())
        hasher.update(np.ascontiguousarray(array).data)
    return hasher.hexdigest()


@dataclasses.dataclass(frozen=True)
class TargetRequest:
    """Rows to score. Asking twice gives the same bytes."""

    spec: TargetSpec
    rows: tuple[RowId, ...]
    inputs: Int32[np.ndarray, "B T"]
    segments: Int32[np.ndarray, "B T"]
    positions: Int32[np.ndarray, "B T"]
    student: str = ""
    """Who asks; students that share a pool get equal shares of it."""
    alone: bool = False
    """Each row is to be scored without neighbours: one of them may bring the replica down."""

    @classmethod
    def joined(cls, requests: "Sequence[TargetRequest]") -> "TargetRequest":
        """The rows of several requests, of one teacher and one length of row, as one."""
        return cls(
            requests[0].spec,
            tuple(row for request in requests for row in request.rows),
            *(
                np.concatenate([getattr(request, name) for request in requests])
                for name in ("inputs", "segments", "positions")
            ),
            student=requests[0].student,
        )

    def only(self, places: Sequence[int]) -> "TargetRequest":
        """The request for the rows at some of its places."""
        chosen = list(places)
        return dataclasses.replace(
            self,
            rows=tuple(self.rows[place] for place in chosen),
            inputs=self.inputs[chosen],
            segments=self.segments[chosen],
            positions=self.positions[chosen],
        )


class Row(NamedTuple):
    """One row of a request."""

    request: TargetRequest
    place: int


class Scored(NamedTuple):
    """Targets of a batch of rows: wire arrays with the rows as first axis, and their digests."""

    arrays: dict[str, np.ndarray]
    digests: list[str]


@dataclasses.dataclass(frozen=True)
class TargetChunk:
    """Targets of some rows of a request, as unsigned views ready for the wire.

    `digests` are those of `row_digest`, made where the rows were scored.
    """

    rows: tuple[RowId, ...]
    arrays: dict[str, np.ndarray]
    digests: tuple[str, ...]
    origin: str
    """The replica that scored the rows, or `CACHE`."""
    busy_s: float = 0.0
    """How long these rows kept the replica busy; 0 where nothing was scored."""
    num_waiting: int = 0
    """Rows that waited for the replica when the chunk left."""
    batch_fill: float = 1.0
    """Share of the batches of these rows that was filled, on average."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """A chunk as it arrived; `wire_s` is the part of the wait that its bytes were on their way."""

    chunk: TargetChunk
    wire_s: float
    hedged: bool = False
    """Whether it is of a replica that was asked because another was late."""


class TeacherUnavailableError(RuntimeError):
    """No answer this time: the replica died or there is none. Asking again may help.

    Args:
        replica: the one that was asked, where it is known.
        died: whether it went down with the request.
    """

    def __init__(self, message: str, replica: str | None = None, died: bool = False):
        super().__init__(message)
        self.replica, self.died = replica, died


def check_digests(spec: TargetSpec, chunk: TargetChunk) -> None:
    """Raises TeacherUnavailableError unless the bytes are those that were scored."""
    for index, (row, digest) in enumerate(zip(chunk.rows, chunk.digests, strict=True)):
        arrays = {name: array[index] for name, array in chunk.arrays.items()}
        if row_digest(spec, row, arrays) != digest:
            raise TeacherUnavailableError(
                f"{chunk.origin} sent targets of {row} that are not those it scored", chunk.origin
            )


class OtherClassError(RuntimeError):
    """A replica of another class than the one whose answers the run uses."""


class WrongTeacherError(RuntimeError):
    """A replica that gives other answers than its like; what it said last is not to be used."""


@runtime_checkable
class TargetSource(Protocol):
    """The one interface to teachers, whatever serves them."""

    def sameness(self) -> str:
        """The class of the teachers that answer now.

        Raises:
            TeacherUnavailableError: there is none yet; ask again.
        """
        ...

    def num_replicas(self) -> int:
        """Teachers among which requests are divided, as far as is known by now; at least 1."""
        return 1

    def ask(self, request: TargetRequest) -> Iterator[Answer]:
        """Chunks in any order; a row that is asked for twice is answered once or twice.

        Raises:
            TeacherUnavailableError: ask again, for the rows that have not come.
            ValueError: the request does not fit this teacher; asking again is of no use.
        """
        ...
