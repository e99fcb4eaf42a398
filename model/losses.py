"""Losses as (sum, weight) pairs: the caller adds pairs up and divides once.

Each sum runs over the positions where `mask_BT` is true (or weighs them by it), `weight` is
the mask's sum, and both are float32 scalars. So the mean is right over microbatches and hosts
of unequal padding. Legend: B rows, T positions, V vocabulary, M targets per position.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from model.targets import SparseTargets

Mask = Bool[Array, "B T"] | Float[Array, "B T"]
LossParts = tuple[Float[Array, ""], Float[Array, ""]]


def _masked_sum(loss_BT: Float[Array, "B T"], mask_BT: Mask) -> LossParts:
    weight_BT = mask_BT.astype(jnp.float32)
    # Not a product: whatever stands in a padding position, even an infinity, stays out.
    return jnp.sum(jnp.where(weight_BT > 0, loss_BT * weight_BT, 0.0)), jnp.sum(weight_BT)


def distillation_loss(
    logits_BTV: Float[Array, "B T V"], targets: SparseTargets, mask_BT: Mask
) -> LossParts:
    """Cross-entropy −Σ_i w_i log q_i of the student q under sparse teacher targets w.

    Also right where the weights of a position do not sum to one (top-k): the gradient in the
    logits is (Σ w) · q − w.
    """
    logits_BTV = logits_BTV.astype(jnp.float32)
    chosen_BTM = jnp.take_along_axis(logits_BTV, targets.ids_BTM, axis=-1)
    log_norm_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    loss_BT = jnp.sum(targets.weights_BTM * (log_norm_BT[..., None] - chosen_BTM), axis=-1)
    return _masked_sum(loss_BT, mask_BT)


def next_token_loss(
    logits_BTV: Float[Array, "B T V"], labels_BT: Int[Array, "B T"], mask_BT: Mask
) -> LossParts:
    """Cross-entropy −log q of the labels, in nats."""
    logits_BTV = logits_BTV.astype(jnp.float32)
    chosen_BT = jnp.take_along_axis(logits_BTV, labels_BT[..., None], axis=-1)[..., 0]
    return _masked_sum(jax.nn.logsumexp(logits_BTV, axis=-1) - chosen_BT, mask_BT)


def full_kl(
    teacher_logits_BTV: Float[Array, "B T V"],
    student_logits_BTV: Float[Array, "B T V"],
    mask_BT: Mask,
) -> LossParts:
    """KL(teacher ‖ student) over the whole vocabulary, in nats; for evaluation."""
    log_p_BTV = jax.nn.log_softmax(teacher_logits_BTV.astype(jnp.float32), axis=-1)
    log_q_BTV = jax.nn.log_softmax(student_logits_BTV.astype(jnp.float32), axis=-1)
    return _masked_sum(jnp.sum(jnp.exp(log_p_BTV) * (log_p_BTV - log_q_BTV), axis=-1), mask_BT)
