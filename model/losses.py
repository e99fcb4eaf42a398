"""Losses from whole logits, as (sum, weight) pairs: the caller adds pairs up and divides once.

Each sum runs over the positions where `mask_BT` is true (or weighs them by it), `weight` is
the mask's sum, and both are float32 scalars (float64 from float64 logits). So the mean is right
over microbatches and hosts of unequal padding. These are the readable forms; training takes
`chunked_loss`, which is equal to them and never holds all logits.

A `temperature` divides the logits before the softmax, and the divergence is multiplied by its
square, so that gradients keep their size (arXiv 1503.02531, section 2).
Legend: B rows, T positions, V vocabulary, M targets per position.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from model.kernels import MASKED_LOGIT
from model.targets import SparseTargets

Logits = Float[Array, "B T V"]
Mask = Bool[Array, "B T"] | Float[Array, "B T"]
LossParts = tuple[Float[Array, ""], Float[Array, ""]]


def _masked_sum(loss_BT: Float[Array, "B T"], mask_BT: Mask) -> LossParts:
    weight_BT = mask_BT.astype(loss_BT.dtype)
    # Not a product: whatever stands in a padding position, even an infinity, stays out.
    return jnp.sum(jnp.where(weight_BT > 0, loss_BT * weight_BT, 0.0)), jnp.sum(weight_BT)


def _wide(logits_BTV: Logits) -> Logits:
    return logits_BTV.astype(jnp.promote_types(logits_BTV.dtype, jnp.float32))


def _log_probs(logits_BTV: Logits, temperature: float) -> Logits:
    return jax.nn.log_softmax(_wide(logits_BTV) / temperature, axis=-1)


def distillation_loss(
    logits_BTV: Logits, targets: SparseTargets, mask_BT: Mask, temperature: float = 1.0
) -> LossParts:
    """Cross-entropy −Σ_i w_i log q_i of the student q under sparse teacher targets w.

    Also right where the weights of a position do not sum to one (top-k): the gradient in the
    logits is (Σ w) · q − w. The targets are taken as they are; they were made at `temperature`.
    A tail adds − tail · log Σ q over all other tokens: on the targets the gradient is q − w, and
    elsewhere q_j (Σ w − Σ q of the targets) / (1 − Σ q of the targets).
    """
    scaled_BTV = _wide(logits_BTV) / temperature
    chosen_BTM = jnp.take_along_axis(scaled_BTV, targets.ids_BTM, axis=-1)
    log_norm_BT = jax.nn.logsumexp(scaled_BTV, axis=-1)
    loss_BT = jnp.sum(targets.weights_BTM * (log_norm_BT[..., None] - chosen_BTM), axis=-1)
    if targets.tail_BT is not None:
        others_BTV = jnp.put_along_axis(
            scaled_BTV, targets.ids_BTM, MASKED_LOGIT, axis=-1, inplace=False
        )
        log_rest_BT = jax.nn.logsumexp(others_BTV, axis=-1) - log_norm_BT
        loss_BT -= targets.tail_BT * log_rest_BT
    return _masked_sum(temperature**2 * loss_BT, mask_BT)


def next_token_loss(logits_BTV: Logits, labels_BT: Int[Array, "B T"], mask_BT: Mask) -> LossParts:
    """Cross-entropy −log q of the labels, in nats."""
    logits_BTV = _wide(logits_BTV)
    chosen_BT = jnp.take_along_axis(logits_BTV, labels_BT[..., None], axis=-1)[..., 0]
    return _masked_sum(jax.nn.logsumexp(logits_BTV, axis=-1) - chosen_BT, mask_BT)


def z_loss(logits_BTV: Logits, mask_BT: Mask) -> LossParts:
    """log² Σ exp logits, which holds the normaliser near one (arXiv 2204.02311, section 5)."""
    return _masked_sum(jnp.square(jax.nn.logsumexp(_wide(logits_BTV), axis=-1)), mask_BT)


def full_cross_entropy(
    teacher_logits_BTV: Logits, student_logits_BTV: Logits, mask_BT: Mask, temperature: float = 1.0
) -> LossParts:
    """−Σ p log q over the whole vocabulary (Gemma 2 report, section 3): forward KL and a constant.

    The constant is the teacher's entropy, which has no gradient.
    """
    p_BTV = jnp.exp(_log_probs(teacher_logits_BTV, temperature))
    loss_BT = -jnp.sum(p_BTV * _log_probs(student_logits_BTV, temperature), axis=-1)
    return _masked_sum(temperature**2 * loss_BT, mask_BT)


def full_kl(teacher_logits_BTV: Logits, student_logits_BTV: Logits, mask_BT: Mask) -> LossParts:
    """KL(teacher ‖ student) over the whole vocabulary, in nats: what evaluation reports."""
    loss_BT = _kl(_log_probs(teacher_logits_BTV, 1.0), _log_probs(student_logits_BTV, 1.0))
    return _masked_sum(loss_BT, mask_BT)


def reverse_kl(
    teacher_logits_BTV: Logits, student_logits_BTV: Logits, mask_BT: Mask, temperature: float = 1.0
) -> LossParts:
    """KL(student ‖ teacher) over the whole vocabulary, which seeks the teacher's modes."""
    loss_BT = _kl(
        _log_probs(student_logits_BTV, temperature), _log_probs(teacher_logits_BTV, temperature)
    )
    return _masked_sum(temperature**2 * loss_BT, mask_BT)


def generalised_jsd(
    teacher_logits_BTV: Logits,
    student_logits_BTV: Logits,
    mask_BT: Mask,
    beta: float,
    temperature: float = 1.0,
) -> LossParts:
    """β KL(p ‖ m) + (1 − β) KL(q ‖ m) with m = βp + (1 − β)q (arXiv 2306.13649, section 2).

    p is the teacher, q the student, 0 < β < 1. Divided by β it tends to the forward KL for
    β → 0, divided by 1 − β to the reverse one for β → 1.
    """
    log_p_BTV = _log_probs(teacher_logits_BTV, temperature)
    log_q_BTV = _log_probs(student_logits_BTV, temperature)
    log_m_BTV = jnp.logaddexp(log_p_BTV + jnp.log(beta), log_q_BTV + jnp.log1p(-beta))
    loss_BT = beta * _kl(log_p_BTV, log_m_BTV) + (1 - beta) * _kl(log_q_BTV, log_m_BTV)
    return _masked_sum(temperature**2 * loss_BT, mask_BT)


def _kl(log_p_BTV: Logits, log_q_BTV: Logits) -> Float[Array, "B T"]:
    return jnp.sum(jnp.exp(log_p_BTV) * (log_p_BTV - log_q_BTV), axis=-1)
