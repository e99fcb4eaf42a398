"""A training step for tests: rows, a teacher's logits, and what the step makes of them."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from configs.load import parse_run
from configs.run import RunConfig
from model.sharding import batch_sharding, make_mesh
from model.targets import Codec, Unembedding, make_codec
from model.transformer import hidden_states, unembed
from tests.helpers.codec_cases import encode
from tests.helpers.runs import VOCAB_SIZE, tiny_values
from workers.train_step import (
    Batch,
    StepMetrics,
    TrainState,
    TrainStep,
    init_state,
    make_train_step,
    signal_sharding,
    state_shardings,
    unembedding_shardings,
)

NUM_ROWS, ROW_LENGTH = 16, 32
BETA1 = 0.9
WHOLE = make_codec("full")
SOME = make_codec("hybrid", k=4, draws=6)


def config_of(distilled: bool = False, **changes: Any) -> RunConfig:
    values = tiny_values(Path("unused"), "run")
    values["model"] = {**values["model"], "num_layers": 1}
    values["batch"] = {"rows": NUM_ROWS, "microbatches": changes.pop("microbatches", 1)}
    values["optimizer"] = {"clip_norm": 1e6, "beta1": BETA1, "warmup_steps": 2}
    values["cluster"] = {"devices_per_host": 1}
    if distilled:
        weight = changes.pop("label_weight", 0.0)
        values["objective"] = {"kind": "distill", "label_weight": weight}
        values["teacher"] = {"checkpoint": "teacher"}
    return parse_run(values | changes, "test")


def _batch() -> Batch:
    """Rows of 0 to 32 labelled tokens, most of them with few; two documents in each."""
    rng = np.random.default_rng(0)
    shape = (NUM_ROWS, ROW_LENGTH)
    tokens = rng.integers(4, VOCAB_SIZE, (NUM_ROWS, ROW_LENGTH + 1), np.int32)
    columns = np.broadcast_to(np.arange(ROW_LENGTH, dtype=np.int32), shape)
    labelled = np.array([0, 1, 1, 2, 32, 1, 3, 1, 32, 1, 1, 30, 2, 1, 0, 17])
    return Batch(
        inputs=jnp.asarray(tokens[:, :-1]),
        labels=jnp.asarray(tokens[:, 1:]),
        positions=jnp.asarray(np.where(columns < 10, columns, columns - 10)),
        segments=jnp.asarray(np.where(columns < 10, 1, 2).astype(np.int32)),
        mask=jnp.asarray(columns < labelled[:, None]),
    )


def _teacher_logits() -> jax.Array:
    logits = np.random.default_rng(1).normal(0, 3, (NUM_ROWS, ROW_LENGTH, VOCAB_SIZE))
    return jnp.asarray(logits, jnp.float32)


BATCH = _batch()
TEACHER_LOGITS = _teacher_logits()


def encoded_by(codec: Codec) -> dict[str, jax.Array]:
    """What the teacher's logits are as targets."""
    keys = np.arange(2 * NUM_ROWS, dtype=np.uint32).reshape(NUM_ROWS, 2)
    return jax.jit(functools.partial(encode, codec))(TEACHER_LOGITS, keys)


@functools.cache
def fresh(seed: int = 0) -> TrainState:
    """A student on the host."""
    return jax.device_get(jax.jit(lambda: init_state(config_of(), seed))())


@functools.cache
def compiled(config_json: str, codec: Codec | None, mesh: Mesh, guarded: bool) -> TrainStep:
    return make_train_step(RunConfig.model_validate_json(config_json), codec, mesh, guarded)


def run_steps(
    config: RunConfig,
    batch: Batch,
    mesh: Mesh,
    codec: Codec | None = None,
    encoded: dict[str, jax.Array] | None = None,
    signals: list[int] | None = None,
    num_steps: int = 1,
    unembedding: tuple[Unembedding, ...] = (),
    limit: float | None = None,
) -> tuple[TrainState, StepMetrics]:
    """Steps on one batch; with a limit on the loss, guarded ones."""
    state = jax.device_put(fresh(), state_shardings(config, mesh))
    step = compiled(config.model_dump_json(), codec, mesh, limit is not None)
    rows, targets = jax.device_put((batch, encoded or {}), batch_sharding(mesh))
    shared = jax.device_put(np.array(signals or [0] * mesh.size, np.int32), signal_sharding(mesh))
    others: list[Any] = [] if limit is None else [np.float32(limit)]
    others += [jax.device_put(each, unembedding_shardings(mesh)) for each in unembedding]
    metrics = None
    for _ in range(num_steps):
        state, metrics = step(state, rows, targets, shared, *others)
    assert metrics is not None
    return jax.device_get(state), jax.device_get(metrics)


def gradients(state: TrainState) -> Any:
    """Of the first step, out of Adam's first moment (nothing was clipped)."""
    mean = optax.tree_utils.tree_get(state.opt_state, "mu")
    return jax.tree.map(lambda m: m / (1 - BETA1), mean)


def log_probs(params: Any, batch: Batch) -> jax.Array:
    model = config_of().model
    x = hidden_states(params, model, batch.inputs, batch.segments, batch.positions)
    return jax.nn.log_softmax(unembed(params, model, x))


def assert_close(found: Any, expected: Any, relative: float = 2e-5) -> None:
    """Each leaf within `relative` of the largest entry of that leaf."""
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        bound = relative * np.abs(b).max()
        np.testing.assert_allclose(a, b, rtol=0, atol=bound, err_msg=jax.tree_util.keystr(path))


def one_device() -> Mesh:
    return make_mesh({}, jax.devices()[:1])
