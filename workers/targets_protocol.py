"""What a student asks of a teacher, and what comes back: plain data, no Ray, no JAX."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from workers.rows import RowId


@dataclasses.dataclass(frozen=True)
class TargetSpec:
    """What decides a row's targets besides the row: part of their one key everywhere."""

    dataset_digest: str
    teacher_digest: str
    codec: str
    seed: int


@dataclasses.dataclass(frozen=True)
class TargetRequest:
    """Rows to score, in order. Asking twice gives the same bytes."""

    spec: TargetSpec
    rows: tuple[RowId, ...]
    inputs: Int32[np.ndarray, "B T"]
    segments: Int32[np.ndarray, "B T"]
    positions: Int32[np.ndarray, "B T"]

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
        )

    def part(self, start: int) -> "TargetRequest":
        """The request without its first `start` rows."""
        return TargetRequest(
            self.spec,
            self.rows[start:],
            self.inputs[start:],
            self.segments[start:],
            self.positions[start:],
        )


@dataclasses.dataclass(frozen=True)
class TargetChunk:
    """Targets of the next rows of a request, as unsigned views ready for the wire."""

    rows: tuple[RowId, ...]
    arrays: dict[str, np.ndarray]
    replica: str
    score_s: float


@dataclasses.dataclass(frozen=True)
class Answer:
    """A chunk as it arrived; `wire_s` is the part of the wait that its bytes were on their way."""

    chunk: TargetChunk
    wire_s: float


class TeacherUnavailableError(RuntimeError):
    """No answer this time: the replica died or there is none. Asking again may help."""


@runtime_checkable
class TargetSource(Protocol):
    """The one interface to teachers, whatever serves them."""

    def ask(self, request: TargetRequest) -> Iterator[Answer]:
        """Chunks in the order of the request's rows.

        Raises:
            TeacherUnavailableError: ask again, for the rows that have not come.
            ValueError: the request does not fit this teacher; asking again is of no use.
        """
        ...
