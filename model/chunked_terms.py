"""The losses of one chunk of tokens, and their gradient in the product of x and the embedding.

Legend: C tokens, D width (E the teacher's), R embedding rows on this device, M sparse targets per
token, K = 1 + M picked logits: the label's, then the targets'. A token is taught if it has targets.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from model.chunked_objective import Divergence, LossSums, Objective, divergence
from model.chunked_vocabulary import VocabularyShare


class ChunkTargets(NamedTuple):
    """What the teacher says of a chunk, in one of three forms. Without sparse targets M = 0."""

    ids_CM: Int[Array, "C M"]
    weights_CM: Float[Array, "C M"]
    tail_C: Float[Array, " C"] | None = None
    x_CE: Float[Array, "C E"] | None = None
    log_norm_C: Float[Array, " C"] | None = None
    log_p_CR: Float[Array, "C R"] | None = None


class Chunk(NamedTuple):
    """Leading axis C, before they are cut B and T."""

    x_CD: Float[Array, "C D"]
    labels_C: Int[Array, " C"]
    mask_C: Array
    taught_C: Bool[Array, " C"]
    targets: ChunkTargets


def without_masked(chunk: Chunk) -> Chunk:
    """Zeros in masked positions, and a float32 mask: 0 · NaN would be NaN.

    So are the targets of positions that have none.
    """

    def clean(tree: Any, real_C: Array) -> Any:
        return jax.tree.map(
            lambda a: jnp.where(jnp.expand_dims(real_C, tuple(range(1, a.ndim))), a, 0), tree
        )

    real_C = chunk.mask_C > 0
    cleaned = clean(chunk, real_C)
    return cleaned._replace(
        mask_C=cleaned.mask_C.astype(jnp.float32),
        targets=clean(chunk.targets, real_C & chunk.taught_C),
    )


def chunk_terms(
    objective: Objective,
    student: VocabularyShare,
    teacher: VocabularyShare | None,
    label_weight: Float[Array, ""],
    chunk: Chunk,
) -> tuple[LossSums, Float[Array, "C R"]]:
    """The chunk's losses, and the gradient of `loss` in x Eᵀ, which the soft-cap comes after.

    Args:
        label_weight: of tokens that are taught; others have their label's loss alone.
    """
    tau, weight_C1 = objective.temperature, chunk.mask_C[:, None]
    targets = chunk.targets
    logits_CR = student.logits(chunk.x_CD)
    log_norm_C, tempered_norm_C = student.log_norm(logits_CR), student.log_norm(logits_CR / tau)
    ids_CK = jnp.concatenate([chunk.labels_C[:, None], targets.ids_CM], axis=-1)
    picked_CK = student.pick(logits_CR, ids_CK)

    log_q_CR = logits_CR / tau - tempered_norm_C[:, None]
    log_p_CR = targets.log_p_CR
    if teacher is not None:
        assert targets.x_CE is not None, "hidden targets are a table and hidden states"
        logits_p_CR, log_norm_p_C = teacher.logits(targets.x_CE) / tau, targets.log_norm_C
        if log_norm_p_C is None:
            log_norm_p_C = teacher.log_norm(logits_p_CR)
        log_p_CR = logits_p_CR - log_norm_p_C[:, None]
    if log_p_CR is not None:
        kd = divergence(objective, log_p_CR, log_q_CR, student.total)
    else:
        mass_C = targets.weights_CM.sum(axis=-1)
        chosen_C = jnp.sum(targets.weights_CM * picked_CK[:, 1:], axis=-1) / tau
        kd = Divergence(mass_C * tempered_norm_C - chosen_C, mass_C[:, None] * jnp.exp(log_q_CR))
        if targets.tail_C is not None:
            kd = _with_tail(kd, student, targets.ids_CM, targets.tail_C, log_q_CR)

    ce_C = log_norm_C - picked_CK[:, 0]
    kd_sum = tau**2 * jnp.sum(chunk.mask_C * jnp.where(chunk.taught_C, kd.loss_C, 0))
    ce_sum = jnp.sum(chunk.mask_C * ce_C)
    untaught_sum = jnp.sum(chunk.mask_C * jnp.where(chunk.taught_C, 0, ce_C))
    z_sum = jnp.sum(chunk.mask_C * jnp.square(log_norm_C))
    of_targets = kd_sum + untaught_sum
    loss = (1 - label_weight) * of_targets + label_weight * ce_sum + objective.z_weight * z_sum

    # Where a target or label stands its weight comes off. As the slope there is known from the
    # picked logit, the gradient of all other logits takes one pass.
    share_C = jnp.where(chunk.taught_C, label_weight, 1.0)
    kd_share_C1 = ((1 - share_C) * tau)[:, None]
    of_q_C = share_C + 2 * objective.z_weight * log_norm_C
    d_logits_CR = of_q_C[:, None] * jnp.exp(logits_CR - log_norm_C[:, None])
    d_logits_CR += kd_share_C1 * kd.gradient_CR
    less_CK = jnp.concatenate([share_C[:, None], kd_share_C1 * targets.weights_CM], axis=-1)
    gradient_CR = student.subtract(
        weight_C1 * d_logits_CR * student.slope(logits_CR),
        ids_CK,
        weight_C1 * less_CK * student.slope(picked_CK),
    )
    return LossSums(loss, kd_sum, ce_sum, z_sum), gradient_CR


def _with_tail(
    kd: Divergence,
    student: VocabularyShare,
    ids_CM: Int[Array, "C M"],
    tail_C: Float[Array, " C"],
    log_q_CR: Float[Array, "C R"],
) -> Divergence:
    """Adds − tail · log(1 − Q), with Q the student's probability of `ids_CM`.

    1 − Q is summed over the others, not taken as a difference, which would round to zero.
    """
    others_CR = student.without(log_q_CR, ids_CM)
    log_rest_C = student.log_norm(others_CR)
    spread_CR = jnp.exp(log_q_CR) - jnp.exp(others_CR - log_rest_C[:, None])
    return Divergence(kd.loss_C - tail_C * log_rest_C, kd.gradient_CR + tail_C[:, None] * spread_CR)
