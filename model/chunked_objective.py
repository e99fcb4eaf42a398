"""What a student minimises against a teacher, and the divergences of two whole distributions.

Legend: C tokens, R the embedding rows at hand; sums over them are completed by `total`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from model.config import DivergenceName


@dataclass(frozen=True)
class Objective:
    """The divergence from the teacher, and what is added to it.

    forward_kl is the cross-entropy −Σ p log q (Gemma 2 report, section 3), KL(p ‖ q) but for a
    constant; reverse_kl is KL(q ‖ p); jsd is β KL(p ‖ m) + (1 − β) KL(q ‖ m) with
    m = βp + (1 − β)q (arXiv 2306.13649, section 2).

    Raises:
        ValueError: a number out of its range.
    """

    divergence: DivergenceName = "forward_kl"
    beta: float = 0.5
    """Of jsd: towards 0 it behaves as forward_kl, towards 1 as reverse_kl."""
    temperature: float = 1.0
    """Of both distributions; the divergence is multiplied by its square (arXiv 1503.02531)."""
    z_weight: float = 0.0
    """Of log² Σ exp logits (arXiv 2204.02311, section 5)."""

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise ValueError(
                f"beta={self.beta} does not lie between 0 and 1: choose a number inside, or one of "
                "the ends by divergence=forward_kl or reverse_kl"
            )
        if not self.temperature > 0:
            raise ValueError(
                f"temperature={self.temperature} divides the logits: give a number above 0"
            )
        if not self.z_weight >= 0:
            raise ValueError(f"z_weight={self.z_weight} would reward large logits: give 0 or more")


class LossSums(NamedTuple):
    """Losses in nats summed over the masked positions, float32. Only `loss` has a gradient."""

    loss: Float[Array, ""]
    kd_loss: Float[Array, ""]
    ce_loss: Float[Array, ""]
    z_loss: Float[Array, ""]


class Divergence(NamedTuple):
    """A divergence in nats, and its gradient in the logits over the temperature."""

    loss_C: Float[Array, " C"]
    gradient_CR: Float[Array, "C R"]


def divergence(
    objective: Objective,
    log_p_CR: Float[Array, "C R"],
    log_q_CR: Float[Array, "C R"],
    total: Callable[[Float[Array, "C R"]], Float[Array, " C"]],
) -> Divergence:
    """How far the student q is from the teacher p, before the factor temperature².

    Args:
        log_p_CR: log-probabilities, finite also where they stand for zero; `log_q_CR` likewise.
        total: the sum over R, on all devices that hold a share.
    """
    p_CR, q_CR = jnp.exp(log_p_CR), jnp.exp(log_q_CR)
    if objective.divergence == "forward_kl":
        return Divergence(-total(p_CR * log_q_CR), q_CR - p_CR)
    # KL(q ‖ r) of q = softmax(z) has the gradient q (f − Σ q f) in z with f = log q − log r. If r
    # is the mixture m, what r adds through its share of q is what KL(p ‖ m) takes away.
    if objective.divergence == "reverse_kl":
        ratio_CR = log_q_CR - log_p_CR
        loss_C = total(q_CR * ratio_CR)
        return Divergence(loss_C, q_CR * (ratio_CR - loss_C[:, None]))
    assert objective.divergence == "jsd"
    beta = objective.beta
    log_m_CR = jnp.logaddexp(log_p_CR + jnp.log(beta), log_q_CR + jnp.log1p(-beta))
    ratio_CR = log_q_CR - log_m_CR
    kl_q_C, kl_p_C = total(q_CR * ratio_CR), total(p_CR * (log_p_CR - log_m_CR))
    gradient_CR = (1 - beta) * q_CR * (ratio_CR - kl_q_C[:, None])
    return Divergence(beta * kl_p_C + (1 - beta) * kl_q_C, gradient_CR)
