"""A row's targets are a function of that row, whoever asks for it and along with what."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.distillation import CodecConfig, TeacherConfig
from model.targets import SparseTargets, from_wire
from model.transformer import hidden_states, unembed
from tests.helpers.checkpoints import fresh_state, save_state, tiny_config
from tests.helpers.runs import VOCAB_SIZE
from workers.canary import examine
from workers.checkpoint import CheckpointMeta
from workers.dataset import RowId
from workers.jobs import TeacherJob
from workers.targets_protocol import (
    MIXED,
    OtherClassError,
    TargetChunk,
    TargetRequest,
    TargetSpec,
    WrongTeacherError,
)
from workers.teacher import Teacher, codec_of

NUM_ROWS, ROW_LENGTH, ROWS_PER_BATCH = 12, 32, 4
CODEC = {"k": 4, "draws": 5, "values": "float32"}
CONFIG = tiny_config(Path("unused"))
SETTINGS = TeacherConfig.model_validate(
    {"checkpoint": "teacher", "codec": CODEC, "rows_per_batch": ROWS_PER_BATCH}
)
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(4, VOCAB_SIZE, (NUM_ROWS, ROW_LENGTH), np.int32)
SEGMENTS = np.where(np.arange(ROW_LENGTH) < RNG.integers(1, ROW_LENGTH, (NUM_ROWS, 1)), 1, 2)
SEGMENTS = SEGMENTS.astype(np.int32)
POSITIONS = np.tile(np.arange(ROW_LENGTH, dtype=np.int32), (NUM_ROWS, 1))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, CheckpointMeta]:
    return save_state(str(tmp_path_factory.mktemp("teacher")), fresh_state(CONFIG), CONFIG)


def job(url: str, **changes: Any) -> TeacherJob:
    values = {"config": SETTINGS, "row_length": ROW_LENGTH, "compute_dtype": "float32"} | changes
    return TeacherJob(storage_url="unused", checkpoint_url=url, **values)


@pytest.fixture(scope="module")
def teacher(saved: tuple[str, CheckpointMeta]) -> Teacher:
    return Teacher(job(saved[0]), "replica-1")


def request(meta: CheckpointMeta, rows: list[int], seed: int = 7) -> TargetRequest:
    spec = TargetSpec("dataset", meta.params_digest, codec_of(SETTINGS).name, seed, MIXED)
    names = tuple(RowId(row % 2, row) for row in rows)
    return TargetRequest(spec, names, TOKENS[rows], SEGMENTS[rows], POSITIONS[rows])


def bytes_by_row(chunks: list[TargetChunk]) -> list[dict[str, bytes]]:
    return [
        {name: array[row].tobytes() for name, array in chunk.arrays.items()}
        for chunk in chunks
        for row in range(len(chunk.rows))
    ]


@pytest.fixture(scope="module")
def alone(teacher, saved) -> list[dict[str, bytes]]:
    """Each row's bytes, asked for by itself."""
    requests = [request(saved[1], [row]) for row in range(NUM_ROWS)]
    return [bytes_by_row(list(teacher.score(one)))[0] for one in requests]


@settings(deadline=None, max_examples=40)
@given(rows=st.lists(st.integers(0, NUM_ROWS - 1), min_size=1, max_size=11))
def test_a_row_does_not_feel_its_neighbours(teacher, saved, alone, rows):
    found = bytes_by_row(list(teacher.score(request(saved[1], rows))))
    assert found == [alone[row] for row in rows]


def test_chunks_have_the_compiled_number_of_rows_in_order(teacher, saved):
    asked = request(saved[1], list(range(10)))
    chunks = list(teacher.score(asked))
    assert [len(chunk.rows) for chunk in chunks] == [4, 4, 2]
    assert sum((chunk.rows for chunk in chunks), ()) == asked.rows
    assert {chunk.origin for chunk in chunks} == {"replica-1"}
    for chunk in chunks:
        assert all(len(array) == len(chunk.rows) for array in chunk.arrays.values())
        assert all(array.dtype.kind == "u" for array in chunk.arrays.values()), "for the wire"
        assert len(chunk.digests) == len(set(chunk.digests)) == len(chunk.rows)
    assert all(chunk.busy_s > 0 for chunk in chunks)
    rest = list(teacher.score(asked.only(range(4, 10))))
    assert bytes_by_row(rest) == bytes_by_row(chunks)[4:]
    assert list(teacher.score(asked.only([]))) == []


def test_a_moment_of_the_teacher_is_counted_once(teacher, saved):
    began = time.perf_counter()
    chunks = [c for rows in ([0, 1], range(12)) for c in teacher.score(request(saved[1], [*rows]))]
    assert sum(chunk.busy_s for chunk in chunks) <= time.perf_counter() - began


def test_targets_are_the_checkpoints_probabilities(teacher, saved):
    params, rows = fresh_state(CONFIG).params, [3, 8]

    @jax.jit
    def probabilities(tokens: jax.Array, segments: jax.Array, positions: jax.Array) -> jax.Array:
        x = hidden_states(params, CONFIG.model, tokens, segments, positions)
        return jax.nn.softmax(unembed(params, CONFIG.model, x))

    expected = np.asarray(probabilities(TOKENS[rows], SEGMENTS[rows], POSITIONS[rows]))
    (chunk,) = teacher.score(request(saved[1], rows))
    found = codec_of(SETTINGS).decode(from_wire(chunk.arrays), VOCAB_SIZE)
    assert isinstance(found, SparseTargets) and found.ids_BTM.shape == (2, ROW_LENGTH, 9)
    largest = -np.sort(-expected, axis=-1)[..., :4]
    np.testing.assert_allclose(found.weights_BTM[..., :4], largest, rtol=1e-5)
    of_heads = np.take_along_axis(expected, np.asarray(found.ids_BTM)[..., :4], -1)
    np.testing.assert_allclose(of_heads, largest, rtol=1e-5)


def test_draws_differ_by_row_and_seed(teacher, saved, alone):
    """The same text under another name or seed: the same heads, other draws."""
    meta = saved[1]
    asked = request(meta, [0])
    renamed = TargetRequest(
        asked.spec, (RowId(0, 99),), asked.inputs, asked.segments, asked.positions
    )
    for other in (renamed, request(meta, [0], seed=8)):
        (found,) = bytes_by_row(list(teacher.score(other)))
        assert found["probs:float32"] == alone[0]["probs:float32"]
        assert found["ids"] != alone[0]["ids"]


def test_a_request_for_something_else_is_refused(teacher, saved):
    asked = request(saved[1], [0, 1])
    others = [("teacher_digest", "0123456789abcdef"), ("codec", "hybrid(k=1)")]
    for field, value in others:
        spec = TargetSpec(**{**vars(asked.spec), field: value})
        wrong = TargetRequest(spec, asked.rows, asked.inputs, asked.segments, asked.positions)
        with pytest.raises(ValueError, match="the run and its pool differ") as raised:
            next(teacher.score(wrong))
        assert value in str(raised.value) and saved[1].params_digest in str(raised.value)
    short = (asked.inputs[:, :16], asked.segments[:, :16], asked.positions[:, :16])
    with pytest.raises(ValueError, match="rows of 32 tokens, but was asked for rows of 16"):
        next(teacher.score(TargetRequest(asked.spec, asked.rows, *short)))


def test_rows_longer_than_the_context_are_refused(saved):
    with pytest.raises(ValueError, match=r"row_length 257 is longer than .* 256 tokens"):
        Teacher(job(saved[0], row_length=257), "replica")


@pytest.mark.parametrize("kind", ["hybrid", "hidden", "full"])
def test_a_teacher_over_several_devices_says_the_same_within_rounding(saved, kind):
    url, meta = saved
    config = SETTINGS.model_copy(update={"codec": CodecConfig(kind=kind)})
    found = []
    for num_devices in (1, 2):
        teacher = Teacher(job(url, config=config, num_devices=num_devices), "replica")
        spec = TargetSpec("dataset", meta.params_digest, codec_of(config).name, 7, MIXED)
        rows = [3, 5]
        asked = TargetRequest(
            spec, tuple(RowId(0, r) for r in rows), TOKENS[rows], SEGMENTS[rows], POSITIONS[rows]
        )
        (chunk,) = teacher.score(asked)
        found.append((from_wire(chunk.arrays), teacher.sameness))
    (one, alone), (two, sharded) = found
    assert alone != sharded, "equal within rounding is another class"
    if kind == "full":
        np.testing.assert_allclose(one["log_probs"], two["log_probs"], atol=1e-4)
    elif kind == "hidden":
        np.testing.assert_allclose(one["log_norm"], two["log_norm"], atol=1e-4)
    else:
        assert np.mean(one["ids"] == two["ids"]) > 0.9, "the same draws but at the edges"


def test_a_bfloat16_teacher_holds_half_and_says_the_same(saved):
    url, meta = saved
    teacher = Teacher(job(url, compute_dtype="bfloat16"), "replica")
    matrix = teacher._params["embedding"]
    assert matrix.dtype == jnp.bfloat16
    (chunk,) = teacher.score(request(meta, [3, 8]))
    assert len(chunk.rows) == 2


def test_parameters_that_change_in_memory_are_noticed_before_an_answer_leaves(saved):
    url, meta = saved
    teacher = Teacher(job(url), "replica-1")
    list(teacher.score(request(meta, [1])))
    bits = teacher._params["embedding"].view(jnp.uint32)
    teacher._params["embedding"] = bits.at[1, 1].set(bits[1, 1] ^ 1).view(jnp.float32)
    with pytest.raises(WrongTeacherError, match="replica-1 have changed in memory"):
        list(teacher.score(request(meta, [1])))


def test_copies_of_one_class_make_the_same_of_the_canary(saved, tmp_path):
    url, _ = saved
    first, second = Teacher(job(url), "first"), Teacher(job(url), "second")
    storage = str(tmp_path)
    examine(first, "first", storage)
    examine(second, "second", storage)
    second.canary = lambda: "another"
    with pytest.raises(WrongTeacherError, match="second makes another of the canary rows"):
        examine(second, "second", storage)
    second.sameness = "another class"
    examine(second, "second", storage)


def test_a_teacher_of_another_class_is_no_answer(saved):
    url, meta = saved
    teacher = Teacher(job(url), "replica")
    spec = TargetSpec("dataset", meta.params_digest, codec_of(SETTINGS).name, 7, "tpu-v4")
    asked = request(meta, [1])
    with pytest.raises(OtherClassError, match=r"class 'tpu-v4', .* set teacher.sameness to mixed"):
        list(teacher.score(dataclasses.replace(asked, spec=spec)))
