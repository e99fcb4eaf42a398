"""Losses against direct formulas, their gradients, and their sums over masked positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.losses import distillation_loss, full_kl, next_token_loss
from model.targets import SparseTargets

B, T, V = 2, 5, 11


@pytest.fixture
def logits():
    return jax.random.normal(jax.random.key(0), (B, T, V)) * 2


@pytest.fixture
def mask():
    return jnp.array([[1, 1, 0, 1, 0], [0, 0, 0, 1, 1]], bool)


def dense_targets(probs):
    ids = jnp.broadcast_to(jnp.arange(V), probs.shape)
    return SparseTargets(ids, probs)


def test_distillation_loss_and_gradient_with_weights_that_do_not_sum_to_one(logits, mask):
    ids = jnp.array([[[3, 7, 3]] * T] * B)  # an id twice: its weights add up
    weights = jnp.array([[[0.2, 0.5, 0.1]] * T] * B)
    total, weight = distillation_loss(logits, SparseTargets(ids, weights), mask)
    log_q = np.asarray(jax.nn.log_softmax(logits))
    expected = -(0.3 * log_q[..., 3] + 0.5 * log_q[..., 7])[np.asarray(mask)].sum()
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert weight == 5
    gradient = jax.grad(lambda z: distillation_loss(z, SparseTargets(ids, weights), mask)[0])(
        logits
    )
    dense = np.zeros(V)
    dense[[3, 7]] = 0.3, 0.5
    by_hand = (0.8 * np.exp(log_q) - dense) * np.asarray(mask)[..., None]
    np.testing.assert_allclose(gradient, by_hand, atol=1e-6)


def test_distillation_with_all_probabilities_is_kl_plus_entropy(logits, mask):
    teacher = jax.random.normal(jax.random.key(1), (B, T, V)) * 2
    probs = jax.nn.softmax(teacher)
    cross_entropy, _ = distillation_loss(logits, dense_targets(probs), mask)
    entropy, _ = distillation_loss(teacher, dense_targets(probs), mask)
    kl, weight = full_kl(teacher, logits, mask)
    np.testing.assert_allclose(kl, cross_entropy - entropy, rtol=1e-5)
    assert kl > 0 and weight == 5
    np.testing.assert_allclose(full_kl(teacher, teacher, mask)[0], 0, atol=1e-6)


def test_next_token_loss_is_distillation_from_a_certain_teacher(logits, mask):
    labels = jnp.arange(B * T).reshape(B, T) % V
    certain = SparseTargets(labels[..., None], jnp.ones((B, T, 1)))
    np.testing.assert_allclose(
        next_token_loss(logits, labels, mask), distillation_loss(logits, certain, mask), rtol=1e-6
    )


def test_masked_positions_stay_out_even_when_they_are_not_finite(logits, mask):
    labels = jnp.zeros((B, T), jnp.int32)
    clean, weight = next_token_loss(logits, labels, mask)
    spoilt = jnp.where(mask[..., None], logits, jnp.nan)
    assert next_token_loss(spoilt, labels, mask) == (clean, weight)
    assert next_token_loss(logits, labels, jnp.zeros_like(mask)) == (0, 0)


def test_kl_ignores_rows_that_neither_model_can_emit(logits, mask):
    teacher = logits[..., ::-1].at[..., -1].set(-1e30)
    student = logits.at[..., -1].set(-1e30)
    with_row, _ = full_kl(teacher, student, mask)
    without, _ = full_kl(teacher[..., :-1], student[..., :-1], mask)
    np.testing.assert_allclose(with_row, without, rtol=1e-6)


def test_bfloat16_logits_are_summed_in_float32(mask):
    logits = (jax.random.normal(jax.random.key(2), (B, T, V)) * 2).astype(jnp.bfloat16)
    labels = jnp.zeros((B, T), jnp.int32)
    total, _ = next_token_loss(logits, labels, mask)
    assert total.dtype == jnp.float32
    expected, _ = next_token_loss(logits.astype(jnp.float32), labels, mask)
    assert total == expected
