"""The teacher: rows of tokens in, targets out. Runs without Ray."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from configs.run import TeacherConfig
from model.codecs.rows import encode_rows
from model.execution import Execution
from model.targets import Codec, make_codec, row_key, wire_view
from model.transformer import hidden_states
from workers.checkpoint import load_params, read_meta
from workers.jobs import TeacherJob
from workers.targets_protocol import TargetChunk, TargetRequest, row_digest


def codec_of(config: TeacherConfig) -> Codec:
    """The codec that a configuration names."""
    return make_codec(config.codec.kind, **config.codec.params())


class Teacher:
    """Scores rows in one compiled shape, so that a row's targets do not depend on its neighbours.

    Raises:
        ValueError: rows longer than the teacher's context.
    """

    def __init__(self, job: TeacherJob, replica: str):
        self._replica = replica
        self._codec = codec_of(job.config)
        self._num_rows, self._row_length = job.config.rows_per_batch, job.row_length
        self._digest = read_meta(job.checkpoint_url).params_digest
        model, self._params = load_params(job.checkpoint_url)
        if job.row_length > model.context_length:
            raise ValueError(
                f"data.row_length {job.row_length} is longer than the teacher's context of "
                f"{model.context_length} tokens; use shorter rows or another teacher"
            )
        how = Execution(job.compute_dtype)

        def score(
            params: dict, inputs: Array, segments: Array, positions: Array, keys: Array
        ) -> dict[str, Array]:
            x_BTD = hidden_states(params, model, inputs, segments, positions, how)
            return encode_rows(self._codec, params, model, x_BTD, keys)

        shape = jax.ShapeDtypeStruct((self._num_rows, job.row_length), jnp.int32)
        keys = jax.ShapeDtypeStruct((self._num_rows, 2), jnp.uint32)
        # Compiled now: a replica that is ready answers at once.
        self._score = jax.jit(score).lower(self._params, shape, shape, shape, keys).compile()

    def score(self, request: TargetRequest) -> Iterator[TargetChunk]:
        """Targets of the request's rows, `rows_per_batch` at a time, in order.

        The next rows are already on the device while a chunk is handed out.

        Raises:
            ValueError: the request means another teacher, codec or row length.
        """
        self._check(request)
        starts = range(0, len(request.rows), self._num_rows)
        pending: tuple[int, dict[str, Array]] | None = None
        for start in starts:
            encoded = self._dispatch(request, start)
            if pending is not None:
                yield self._chunk(request, *pending)
            pending = (start, encoded)
        if pending is not None:
            yield self._chunk(request, *pending)

    def _dispatch(self, request: TargetRequest, start: int) -> dict[str, Array]:
        rows = request.rows[start : start + self._num_rows]
        padding = ((0, self._num_rows - len(rows)), (0, 0))
        keys = np.stack([row_key(request.spec.seed, row.source, row.index) for row in rows])
        return self._score(
            self._params,
            *(
                np.pad(array[start : start + len(rows)], padding)
                for array in (request.inputs, request.segments, request.positions)
            ),
            np.pad(keys, padding),
        )

    def _chunk(self, request: TargetRequest, start: int, encoded: dict[str, Array]) -> TargetChunk:
        rows = request.rows[start : start + self._num_rows]
        host = {name: np.asarray(array)[: len(rows)] for name, array in encoded.items()}
        wire = wire_view(host)
        digests = tuple(
            row_digest(request.spec, row, {name: array[place] for name, array in wire.items()})
            for place, row in enumerate(rows)
        )
        return TargetChunk(rows, wire, digests, self._replica)

    def _check(self, request: TargetRequest) -> None:
        spec = request.spec
        if (spec.teacher_digest, spec.codec) != (self._digest, self._codec.name):
            raise ValueError(
                f"This pool serves teacher {self._digest} with {self._codec.name}, but was asked "
                f"for {spec.teacher_digest} with {spec.codec}; the run and its pool differ"
            )
        if request.inputs.shape[1] != self._row_length:
            raise ValueError(
                f"This pool scores rows of {self._row_length} tokens, but was asked for rows of "
                f"{request.inputs.shape[1]}; the run and its pool differ"
            )
