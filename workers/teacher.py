"""The teacher: rows of tokens in, targets out. Runs without Ray."""

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import xxhash
from jaxtyping import Array

from configs.run import TeacherConfig
from model.targets import Codec, make_codec, row_key, wire_view
from workers.checkpoint import read_meta
from workers.dataset import RowId
from workers.digest import hex_digest, state_digest, tree_sums
from workers.jobs import TeacherJob
from workers.sameness import sameness_class
from workers.targets_protocol import (
    MIXED,
    OtherClassError,
    Row,
    Scored,
    TargetChunk,
    TargetRequest,
    TargetSpec,
    WrongTeacherError,
    row_digest,
)
from workers.teacher_program import batch_shapes, load_for_scoring, make_scorer, teacher_mesh

# Of the canary's tokens and draws: any number, the same for ever.
_CANARY_SEED = 20408


def codec_of(config: TeacherConfig) -> Codec:
    """The codec that a configuration names."""
    return make_codec(config.codec.kind, **config.codec.params())


class _Running(NamedTuple):
    """A batch on the device."""

    rows: Sequence[Row]
    encoded: dict[str, Array]
    params_sums: tuple[Array, Array]


class Teacher:
    """Scores rows in one compiled shape, so that a row's targets do not depend on its neighbours.

    Args:
        job: what to serve.
        replica: this copy's name.

    Raises:
        ValueError: rows longer than the teacher's context, or devices that do not divide it.
    """

    def __init__(self, job: TeacherJob, replica: str):
        self._replica = replica
        self._codec = codec_of(job.config)
        self.num_rows, self._row_length = job.config.rows_per_batch, job.row_length
        self._digest = read_meta(job.checkpoint_url).params_digest
        mesh = teacher_mesh(job.num_devices)
        model, self._params = load_for_scoring(job.checkpoint_url, job.compute_dtype, mesh)
        self._vocab_size = model.vocab_size
        if job.row_length > model.context_length:
            raise ValueError(
                f"data.row_length {job.row_length} is longer than the teacher's context of "
                f"{model.context_length} tokens; use shorter rows or another teacher"
            )
        self._loaded_digest = state_digest(self._params)
        # Compiled now: a replica that is ready answers at once.
        scorer: Any = make_scorer(model, self._codec, job.compute_dtype, mesh)
        shapes = batch_shapes(self.num_rows, job.row_length)
        self._score = scorer.lower(self._params, *shapes).compile()
        self.sameness = sameness_class(
            (self.num_rows, job.row_length), job.compute_dtype, job.num_devices
        )

    def score(self, request: TargetRequest) -> Iterator[TargetChunk]:
        """Targets of the request's rows, `rows_per_batch` at a time, in order.

        Raises:
            ValueError: the request means another teacher, codec or row length.
            WrongTeacherError: as `score_rows`.
        """
        self.check(request)
        places = range(len(request.rows))
        for start in range(0, len(places), self.num_rows):
            began = time.perf_counter()
            rows = [Row(request, place) for place in places[start : start + self.num_rows]]
            arrays, digests = self.score_rows(rows)
            names = tuple(request.rows[row.place] for row in rows)
            busy_s = time.perf_counter() - began
            yield TargetChunk(names, arrays, tuple(digests), self._replica, busy_s)

    @property
    def serves(self) -> str:
        """Teacher and codec, and the length of its rows."""
        return f"{self._digest} {self._codec.name} {self._row_length}"

    def check(self, request: TargetRequest) -> None:
        """Raises ValueError unless the request means this teacher, OtherClassError if not quite."""
        spec = request.spec
        if (spec.teacher_digest, spec.codec) != (self._digest, self._codec.name):
            raise ValueError(
                f"This pool serves teacher {self._digest} with {self._codec.name}, but was asked "
                f"for {spec.teacher_digest} with {spec.codec}; the run and its pool differ"
            )
        if spec.sameness not in (MIXED, self.sameness):
            raise OtherClassError(
                f"the run's targets come from teachers of the class {spec.sameness!r}, and this "
                f"one is of {self.sameness!r}, which may differ in the last bits: give the pool "
                f"machines of the first kind, or set teacher.sameness to mixed"
            )
        if request.inputs.shape[1] != self._row_length:
            raise ValueError(
                f"This pool scores rows of {self._row_length} tokens, but was asked for rows of "
                f"{request.inputs.shape[1]}; the run and its pool differ"
            )

    def score_rows(self, rows: Sequence[Row]) -> Scored:
        """The targets of at most `num_rows` rows that `check` has let pass.

        Raises:
            WrongTeacherError: the parameters are no longer those that were loaded.
        """
        return self._collect(self._dispatch(rows))

    def _dispatch(self, rows: Sequence[Row]) -> _Running:
        assert 0 < len(rows) <= self.num_rows

        def filled(arrays: Sequence[np.ndarray]) -> np.ndarray:
            stacked = np.stack(arrays)
            return np.pad(stacked, ((0, self.num_rows - len(rows)), (0, 0)))

        names = [request.rows[place] for request, place in rows]
        keys = [
            row_key(row.request.spec.seed, name.source, name.index)
            for row, name in zip(rows, names, strict=True)
        ]
        encoded = self._score(
            self._params,
            filled([request.inputs[place] for request, place in rows]),
            filled([request.segments[place] for request, place in rows]),
            filled([request.positions[place] for request, place in rows]),
            filled(keys),
        )
        return _Running(rows, encoded, tree_sums(self._params))

    def _collect(self, running: _Running) -> Scored:
        host = {
            name: np.asarray(array)[: len(running.rows)] for name, array in running.encoded.items()
        }
        if (found := hex_digest(running.params_sums)) != self._loaded_digest:
            raise WrongTeacherError(
                f"The parameters of replica {self._replica} have changed in memory: digest "
                f"{found} instead of {self._loaded_digest}"
            )
        arrays = wire_view(host)
        digests = [
            row_digest(request.spec, request.rows[place], {n: a[i] for n, a in arrays.items()})
            for i, (request, place) in enumerate(running.rows)
        ]
        return Scored(arrays, digests)

    def canary(self) -> str:
        """What this copy makes of a fixed batch: equal for all copies of one class."""
        rng = np.random.default_rng(_CANARY_SEED)
        shape = (self.num_rows, self._row_length)
        tokens = rng.integers(0, self._vocab_size, shape, np.int32)
        half = (np.arange(self._row_length) >= self._row_length // 2).astype(np.int32)
        spec = TargetSpec("canary", self._digest, self._codec.name, _CANARY_SEED, self.sameness)
        request = TargetRequest(
            spec,
            tuple(RowId(0, index) for index in range(self.num_rows)),
            tokens,
            np.tile(half + 1, (self.num_rows, 1)),
            np.tile(np.arange(self._row_length, dtype=np.int32), (self.num_rows, 1)),
        )
        (chunk,) = self.score(request)
        return hex_of(chunk.digests)


def hex_of(digests: Sequence[str]) -> str:
    """One digest of several, in order."""
    return xxhash.xxh3_64("".join(digests).encode()).hexdigest()
