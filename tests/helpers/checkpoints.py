"""Checkpoints of untrained tiny models for tests, saved by the real writer."""

import functools
from pathlib import Path
from typing import Any

import jax

from configs.load import parse_run
from configs.run import RunConfig
from tests.helpers.runs import tiny_values
from workers.checkpoint import CheckpointMeta, checkpoint_url, describe
from workers.checkpoint_writer import CheckpointWriter
from workers.train_step import TrainState, init_state


def tiny_config(storage: Path, name: str = "run", **changes: Any) -> RunConfig:
    """A run on one layer, over this process's eight devices."""
    values = tiny_values(storage, name) | {"cluster": {"devices_per_host": 8}}
    values["model"] = {**values["model"], "num_layers": 1}
    return parse_run(values | changes, "test")


def fresh_state(config: RunConfig, seed: int = 0) -> TrainState:
    """An untrained student on the first device."""
    return _fresh_state(config.model_dump_json(), seed)


@functools.cache
def _fresh_state(config_json: str, seed: int) -> TrainState:
    config = RunConfig.model_validate_json(config_json)
    return jax.jit(lambda: init_state(config, seed))()


def save_state(
    run_url: str,
    state: TrainState,
    config: RunConfig,
    *,
    tokenizer_digest: str = "tokenizer",
    dataset_digest: str = "dataset",
) -> tuple[str, CheckpointMeta]:
    """Saves `state` as a checkpoint of its step; where it lies, and what it says about itself."""
    meta = describe(
        state,
        config,
        tokenizer_digest=tokenizer_digest,
        dataset_digest=dataset_digest,
        teacher_digest=None,
        attempt=1,
    )
    writer = CheckpointWriter(run_url, lambda meta: None)
    writer.save(state, meta)
    writer.pending.result()
    return checkpoint_url(run_url, meta.step), meta
