"""Losses against direct formulas, their gradients, and their sums over masked positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.losses import (
    distillation_loss,
    full_cross_entropy,
    full_kl,
    generalised_jsd,
    next_token_loss,
    reverse_kl,
    z_loss,
)
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


@pytest.fixture
def pair():
    """Logits of teacher and student in float64, and what numpy makes of them."""
    rng = np.random.default_rng(3)
    teacher, student = 2 * rng.normal(size=(2, B, T, V))
    return teacher, student


def probabilities(logits, temperature=1.0):
    weights = np.exp(logits / temperature)
    return weights / weights.sum(-1, keepdims=True)


def in_float64(loss, *arguments, **options):
    with jax.enable_x64(True):
        total, _ = loss(*(jnp.asarray(argument) for argument in arguments), **options)
        assert total.dtype == jnp.float64
        return float(total)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergences_are_their_formulas(pair, mask, temperature):
    p, q = (probabilities(logits, temperature) for logits in pair)
    m = 0.3 * p + 0.7 * q
    formulas = {
        full_cross_entropy: -p * np.log(q),
        reverse_kl: q * np.log(q / p),
        generalised_jsd: 0.3 * p * np.log(p / m) + 0.7 * q * np.log(q / m),
    }
    for loss, terms in formulas.items():
        options = {"beta": 0.3} if loss is generalised_jsd else {}
        total = in_float64(loss, *pair, mask, temperature=temperature, **options)
        by_hand = temperature**2 * terms.sum(-1)[np.asarray(mask)].sum()
        np.testing.assert_allclose(total, by_hand, rtol=1e-12)


def test_jsd_tends_to_the_forward_and_the_reverse_divergence(pair, mask):
    forward, backward = in_float64(full_kl, *pair, mask), in_float64(reverse_kl, *pair, mask)
    assert abs(forward - backward) > 0.1
    small = 1e-7
    near_0 = in_float64(generalised_jsd, *pair, mask, beta=small) / small
    near_1 = in_float64(generalised_jsd, *pair, mask, beta=1 - small) / small
    np.testing.assert_allclose([near_0, near_1], [forward, backward], rtol=1e-4)


def test_temperature_keeps_the_size_of_the_gradient(pair, mask):
    teacher, student = (jnp.asarray(logits, jnp.float32) for logits in pair)

    def gradient(temperature):
        targets = dense_targets(jax.nn.softmax(teacher / temperature))
        return jax.grad(lambda z: distillation_loss(z, targets, mask, temperature)[0])(student)

    p, q = (probabilities(logits, 3.0) for logits in pair)
    inside = np.asarray(mask)[..., None]
    np.testing.assert_allclose(gradient(3.0), inside * 3.0 * (q - p), atol=1e-6)
    # So soft that softmax is linear: the gradient no longer knows the temperature.
    np.testing.assert_allclose(gradient(200.0), gradient(400.0), atol=1e-2)
    assert np.abs(gradient(400.0)).max() > 0.1


def test_z_loss_is_the_square_of_the_log_normaliser(pair, mask):
    _, student = pair
    by_hand = np.log(np.exp(student).sum(-1))[np.asarray(mask)]
    np.testing.assert_allclose(in_float64(z_loss, student, mask), np.sum(by_hand**2), rtol=1e-12)
