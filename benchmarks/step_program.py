"""The training step of a distilled preset by itself: its configuration, and what it takes."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from configs.run import RunConfig
from configs.validate import parse_run
from model.config import MODEL_PRESETS
from model.sharding import batch_sharding
from model.targets import encoded_shapes
from workers.teacher import codec_of
from workers.train_step import (
    Batch,
    TrainState,
    TrainStep,
    init_state,
    make_train_step,
    signal_sharding,
    state_shardings,
)


class StepShapes(NamedTuple):
    """The inputs of a step, as shapes with shardings."""

    state: TrainState
    batch: Batch
    encoded: dict[str, jax.ShapeDtypeStruct]
    signals: jax.ShapeDtypeStruct


def config_of(preset: str, num_rows: int, row_length: int, **changes: Any) -> RunConfig:
    """A distilled run of a model preset; on what machines does not matter to the step."""
    values = {
        "name": "step",
        "steps": 1000,
        "model": {"preset": preset, "context_length": max(row_length, 8192)},
        "data": {
            "sources": [{"name": "none", "path": "none"}],
            "tokenizer": {"kind": "train", "vocab_size": MODEL_PRESETS[preset].vocab_size},
            "row_length": row_length,
        },
        "objective": {"kind": "distill"},
        "teacher": {"checkpoint": "none"},
        "batch": {"rows": num_rows},
    }
    return parse_run(values | changes, preset)


def step_and_shapes(config: RunConfig, mesh: Mesh) -> tuple[TrainStep, StepShapes]:
    """The jitted step, and what it takes."""
    assert config.teacher is not None
    codec = codec_of(config.teacher)
    rows = batch_sharding(mesh)
    shape = (config.batch.rows, config.data.row_length)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
    mask = jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=rows)
    encoded = {
        name: jax.ShapeDtypeStruct((*shape, *array.shape[1:]), array.dtype, sharding=rows)
        for name, array in encoded_shapes(codec, config.model.vocab_size).items()
    }
    state = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        jax.eval_shape(lambda: init_state(config, 0)),
        state_shardings(config, mesh),
    )
    signals = jax.ShapeDtypeStruct((mesh.size,), jnp.int32, sharding=signal_sharding(mesh))
    batch: Any = Batch(*cast(Any, (tokens, tokens, tokens, tokens, mask)))
    return make_train_step(config, codec, mesh), StepShapes(state, batch, encoded, signals)
