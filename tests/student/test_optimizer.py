"""The optimizer: its learning rates, what decays, and how gradients are clipped."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.run import OptimizerConfig
from tests.helpers.train_steps import BATCH, BETA1, config_of, fresh, one_device, run_steps
from workers.optimizer import learning_rate, make_optimizer


def test_learning_rate_warms_up_and_falls_along_a_cosine():
    config = OptimizerConfig(peak_lr=0.5, final_lr_ratio=0.2, warmup_steps=4)
    schedule = learning_rate(config, 20)
    for step in range(5):
        assert np.asarray(schedule(step)) == pytest.approx(
            0.5 * (step + 1) / 5 if step < 4 else 0.5
        )
    for step in range(4, 25):
        done = min(step - 4, 16) / 16
        expected = 0.5 * (0.2 + 0.8 * (1 + np.cos(np.pi * done)) / 2)
        assert np.asarray(schedule(step)) == pytest.approx(expected, rel=1e-5)


def test_a_step_uses_and_tells_the_learning_rate_of_its_number():
    config = config_of()
    schedule = learning_rate(config.optimizer, config.steps)
    ran = [run_steps(config, BATCH, one_device(), num_steps=number) for number in (1, 2, 3)]
    rates = [float(metrics.lr) for _, metrics in ran]
    before, after = fresh().params["embedding"], ran[0][0].params["embedding"]
    assert rates == [pytest.approx(np.asarray(schedule(number))) for number in range(3)]
    # Adam's first step is one learning rate long, plus decay.
    moved = np.abs(after - before * (1 - rates[0] * config.optimizer.weight_decay))
    assert np.median(moved) == pytest.approx(rates[0], rel=1e-2)


def test_only_matrices_decay():
    config = OptimizerConfig(peak_lr=0.5, weight_decay=0.1)
    params = jax.tree.map(jnp.ones_like, fresh().params)
    optimizer = make_optimizer(config, 10)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(lambda: optimizer.update(zeros, optimizer.init(params), params))()
    scales = 0
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        is_scale = jax.tree_util.keystr(path, simple=True, separator=".").endswith("scale")
        scales += is_scale
        np.testing.assert_allclose(update, 0.0 if is_scale else -0.5 * 0.1, rtol=1e-6)
    assert scales == 4 + 1


@pytest.mark.parametrize(("norm", "factor"), [(10.0, 0.2), (1.5, 1.0)])
def test_gradients_are_clipped_by_their_global_norm(norm, factor):
    optimizer = make_optimizer(OptimizerConfig(clip_norm=2.0, beta1=BETA1), 10)
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones(5)}
    grads = jax.tree.map(lambda p: jnp.full_like(p, norm / 3), params)
    assert float(optax.global_norm(grads)) == pytest.approx(norm)
    _, state = optimizer.update(grads, optimizer.init(params), params)
    mean = optax.tree_utils.tree_get(state, "mu")
    for leaf in jax.tree.leaves(mean):
        np.testing.assert_allclose(leaf, (1 - BETA1) * factor * norm / 3, rtol=1e-6)
