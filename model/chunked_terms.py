"""The losses of one chunk of tokens, and their gradient in the product of x and the embedding.

Legend: C tokens, D width (E the teacher's), R embedding rows on this device, M sparse targets per
token, K = 1 + M picked logits: the label's, then the targets'.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from model.chunked_objective import Divergence, LossSums, Objective, divergence
from model.chunked_vocabulary import VocabularyShare


class Chunk(NamedTuple):
    """Leading axis C, before they are cut B and T. Without sparse targets M = 0."""

    x_CD: Float[Array, "C D"]
    labels_C: Int[Array, " C"]
    mask_C: Array
    target_ids_CM: Int[Array, "C M"]
    target_weights_CM: Float[Array, "C M"]
    teacher_x_CD: Float[Array, "C E"] | None


def without_masked(chunk: Chunk) -> Chunk:
    """Zeros in masked positions, and a float32 mask: 0 · NaN would be NaN."""
    real_C = chunk.mask_C > 0

    def clean(array: Array) -> Array:
        return jnp.where(jnp.expand_dims(real_C, tuple(range(1, array.ndim))), array, 0)

    return jax.tree.map(clean, chunk)._replace(mask_C=clean(chunk.mask_C).astype(jnp.float32))


def chunk_terms(
    objective: Objective,
    student: VocabularyShare,
    teacher: VocabularyShare | None,
    label_weight: Float[Array, ""],
    chunk: Chunk,
) -> tuple[LossSums, Float[Array, "C R"]]:
    """The chunk's losses, and the gradient of `loss` in x Eᵀ, which the soft-cap comes after."""
    tau, weight_C1 = objective.temperature, chunk.mask_C[:, None]
    logits_CR = student.logits(chunk.x_CD)
    log_norm_C, tempered_norm_C = student.log_norm(logits_CR), student.log_norm(logits_CR / tau)
    ids_CK = jnp.concatenate([chunk.labels_C[:, None], chunk.target_ids_CM], axis=-1)
    picked_CK = student.pick(logits_CR, ids_CK)

    log_q_CR = logits_CR / tau - tempered_norm_C[:, None]
    if teacher is None:
        mass_C = chunk.target_weights_CM.sum(axis=-1)
        chosen_C = jnp.sum(chunk.target_weights_CM * picked_CK[:, 1:], axis=-1) / tau
        kd = Divergence(mass_C * tempered_norm_C - chosen_C, mass_C[:, None] * jnp.exp(log_q_CR))
    else:
        assert chunk.teacher_x_CD is not None, "hidden targets are a table and hidden states"
        logits_p_CR = teacher.logits(chunk.teacher_x_CD) / tau
        log_p_CR = logits_p_CR - teacher.log_norm(logits_p_CR)[:, None]
        kd = divergence(objective, log_p_CR, log_q_CR, student.total)

    kd_sum = tau**2 * jnp.sum(chunk.mask_C * kd.loss_C)
    ce_sum = jnp.sum(chunk.mask_C * (log_norm_C - picked_CK[:, 0]))
    z_sum = jnp.sum(chunk.mask_C * jnp.square(log_norm_C))
    loss = (1 - label_weight) * kd_sum + label_weight * ce_sum + objective.z_weight * z_sum

    # Where a target or label stands its weight comes off. As the slope there is known from the
    # picked logit, the gradient of all other logits takes one pass.
    of_q_C = label_weight + 2 * objective.z_weight * log_norm_C
    d_logits_CR = of_q_C[:, None] * jnp.exp(logits_CR - log_norm_C[:, None])
    d_logits_CR += (1 - label_weight) * tau * kd.gradient_CR
    label_C1 = jnp.full_like(weight_C1, label_weight)
    less_CK = jnp.concatenate(
        [label_C1, (1 - label_weight) * tau * chunk.target_weights_CM], axis=-1
    )
    gradient_CR = student.subtract(
        weight_C1 * d_logits_CR * student.slope(logits_CR),
        ids_CK,
        weight_C1 * less_CK * student.slope(picked_CK),
    )
    return LossSums(loss, kd_sum, ce_sum, z_sum), gradient_CR
