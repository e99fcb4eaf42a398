"""One step: the right average, the same on every mesh and division, in the right types."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from model.sharding import MESH_AXES, make_mesh
from tests.helpers.train_steps import (
    BATCH,
    SOME,
    assert_close,
    config_of,
    encoded_by,
    fresh,
    gradients,
    log_probs,
    one_device,
    run_steps,
)
from workers.digest import state_digest
from workers.train_step import StepMetrics, TrainState, make_init


@pytest.fixture(scope="module")
def direct() -> tuple[float, Any]:
    """Loss and gradients over all labelled tokens at once, written down plainly."""

    def mean_loss(params: Any) -> jax.Array:
        of_label = jnp.take_along_axis(log_probs(params, BATCH), BATCH.labels[..., None], -1)[
            ..., 0
        ]
        return -jnp.sum(of_label * BATCH.mask) / jnp.sum(BATCH.mask)

    loss, grads = jax.jit(jax.value_and_grad(mean_loss))(fresh().params)
    return float(loss), jax.device_get(grads)


@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_every_labelled_token_weighs_the_same(direct, microbatches):
    state, metrics = run_steps(config_of(microbatches=microbatches), BATCH, one_device())
    loss, grads = direct
    assert metrics.loss == pytest.approx(loss, rel=1e-5)
    assert metrics.ce_loss == metrics.loss and metrics.kd_loss == 0
    assert metrics.tokens == BATCH.mask.sum()
    assert metrics.grad_norm == pytest.approx(float(optax.global_norm(grads)), rel=1e-5)
    assert_close(gradients(state), grads)


@pytest.fixture(scope="module")
def distilled_alone() -> tuple[TrainState, StepMetrics]:
    config = config_of(distilled=True, label_weight=0.25)
    return run_steps(config, BATCH, one_device(), SOME, encoded_by(SOME))


@pytest.mark.parametrize(
    ("shape", "microbatches"),
    [((1, 8, 1, 1), 2), ((1, 1, 8, 1), 1), ((2, 1, 2, 2), 4), ((1, 2, 1, 4), 1)],
)
def test_meshes_agree_with_one_device(distilled_alone, shape, microbatches):
    config = config_of(distilled=True, label_weight=0.25, microbatches=microbatches)
    mesh = make_mesh(dict(zip(MESH_AXES, shape, strict=True)))
    encoded = encoded_by(SOME)
    state, metrics = run_steps(config, BATCH, mesh, SOME, encoded)
    alone, alone_metrics = distilled_alone
    np.testing.assert_allclose(
        np.array(metrics, np.float64), np.array(alone_metrics, np.float64), rtol=1e-5
    )
    assert_close(gradients(state), gradients(alone))
    # Adam divides by the gradient's size: where that is nearly 0, only the bound on a step holds.
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(alone.params), strict=True):
        assert np.abs(a - b).max() <= 2.1 * metrics.lr
        assert np.mean(np.abs(a - b)) <= 1e-2 * metrics.lr
    assert state.step == 1


def test_the_same_mesh_gives_the_same_bits():
    config = config_of(distilled=True, label_weight=0.25, microbatches=4)
    mesh = make_mesh({"slice": 2, "fsdp": 2, "model": 2})
    encoded = encoded_by(SOME)
    signals = [0, 0, 0, 0, 0, 3, 1, 0]
    first, metrics = run_steps(config, BATCH, mesh, SOME, encoded, signals, num_steps=3)
    again, metrics_again = run_steps(config, BATCH, mesh, SOME, encoded, signals, num_steps=3)
    assert state_digest(first) == state_digest(again)
    assert [float(m).hex() for m in metrics] == [float(m).hex() for m in metrics_again]
    assert metrics.signal == 3, "the largest of all devices"
    assert first.step == 3


def test_a_new_student_does_not_depend_on_the_mesh():
    made = make_init(config_of(), make_mesh({"slice": 2, "fsdp": 2, "model": 2}))()
    assert state_digest(made) == state_digest(fresh())
    assert state_digest(fresh(1)) != state_digest(fresh())


def test_bfloat16_computes_roughly_and_keeps_float32_weights(direct):
    config = config_of(compute_dtype="bfloat16")
    state, metrics = run_steps(config, BATCH, one_device())
    loss, _ = direct
    assert metrics.loss == pytest.approx(loss, rel=2e-2)
    assert metrics.loss != pytest.approx(loss, rel=1e-7), "bfloat16 was used"
    leaves = jax.tree.leaves((state.params, state.opt_state))
    assert {leaf.dtype.name for leaf in leaves} == {"float32", "int32"}
    embedding = state.params["embedding"]
    rounded = embedding.astype(jnp.bfloat16).astype(np.float32)
    assert np.mean(embedding != rounded) > 0.9


def test_a_batch_without_labels_changes_nothing_but_decay():
    config = config_of()
    empty = BATCH._replace(mask=jnp.zeros_like(BATCH.mask))
    state, metrics = run_steps(config, empty, one_device())
    assert metrics.loss == 0 and metrics.grad_norm == 0 and metrics.tokens == 0
    kept = 1 - metrics.lr * config.optimizer.weight_decay
    before = fresh().params["embedding"]
    np.testing.assert_allclose(state.params["embedding"], before * kept, rtol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 2, 2)])
def test_a_guarded_step_takes_in_a_loss_up_to_its_limit(shape):
    config = config_of()
    mesh = make_mesh(dict(zip(MESH_AXES, shape, strict=True)), jax.devices()[: math.prod(shape)])
    plain, metrics = run_steps(config, BATCH, mesh)
    taken, taken_metrics = run_steps(config, BATCH, mesh, limit=float(metrics.loss))
    assert taken_metrics.loss == metrics.loss
    assert_close(gradients(taken), gradients(plain))
    assert state_digest(taken.params) != state_digest(fresh().params)

    below = float(np.nextafter(metrics.loss, np.float32(0)))
    left, left_metrics = run_steps(config, BATCH, mesh, limit=below)
    assert left_metrics == taken_metrics, "it is told all the same"
    assert_only_counted(left, fresh())


def test_a_guarded_step_that_is_not_finite_changes_nothing():
    """Of a teacher whose answer is no number; with no limit on the loss."""
    config = config_of(distilled=True, label_weight=0.25, microbatches=4)
    mesh = make_mesh({"slice": 2, "fsdp": 2, "model": 2})
    encoded = encoded_by(SOME)
    encoded["probs"] = encoded["probs"].at[3, 0].set(jnp.nan)
    state, metrics = run_steps(config, BATCH, mesh, SOME, encoded, num_steps=2, limit=np.inf)
    assert np.isnan(metrics.loss) and np.isnan(metrics.grad_norm)
    assert_only_counted(state, fresh(), num_steps=2)


def assert_only_counted(state: TrainState, before: TrainState, num_steps: int = 1) -> None:
    """The steps went on, and the schedule with them; Adam has seen none of them."""
    assert state.step == before.step + num_steps
    found, expected = (optax.tree_utils.tree_get_all_with_path(s.opt_state, "count")
                       for s in (state, before))  # fmt: skip
    moved = [int(now) - int(was) for (_, now), (_, was) in zip(found, expected, strict=True)]
    assert sorted(moved) == [0, num_steps]
    assert state_digest(state.params) == state_digest(before.params)
    for name in ("mu", "nu"):
        moments = [optax.tree_utils.tree_get(s.opt_state, name) for s in (state, before)]
        assert state_digest(moments[0]) == state_digest(moments[1])
