"""Inputs of the chunked loss, and what it has to be equal to: plain formulas in float64."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model.chunked_loss import LossSums, chunked_loss
from model.chunked_objective import Objective
from model.config import MODEL_PRESETS, ModelConfig
from model.losses import (
    distillation_loss,
    full_cross_entropy,
    generalised_jsd,
    next_token_loss,
    reverse_kl,
    z_loss,
)
from model.targets import FullTargets, HiddenTargets, SparseTargets, Targets

TEACHER_SOFTCAP = 3.0
FORWARD = Objective()

OBJECTIVES = {
    "next_token": FORWARD,
    "sparse": FORWARD,
    "tail": FORWARD,
    "forward_kl": FORWARD,
    "reverse_kl": Objective("reverse_kl"),
    "jsd": Objective("jsd", beta=0.3),
    "full": Objective("jsd", beta=0.6),
}


@dataclasses.dataclass
class Case:
    """Arrays in float32, and what chunked_loss has to know of them."""

    model: ModelConfig
    x: Any
    embedding: Any
    labels: Any
    mask: Any
    sparse: SparseTargets
    with_tail: SparseTargets
    full: FullTargets
    hidden: HiddenTargets

    def targets(self, name: str) -> Targets | None:
        """Those that an entry of `OBJECTIVES` is for."""
        others = {
            "next_token": None,
            "sparse": self.sparse,
            "tail": self.with_tail,
            "full": self.full,
        }
        return others.get(name, self.hidden)


def make_case(
    B=3, T=5, D=8, V=13, surplus=3, M=4, teacher_width=6, teacher_surplus=5, softcap=2.0, seed=0
) -> Case:
    """Targets with ids that repeat and weights that do not sum to one; a ragged mask."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    model = MODEL_PRESETS["tiny"].model_copy(
        update={
            "width": D,
            "vocab_size": V,
            "num_embeddings": V + surplus,
            "final_softcap": softcap,
        }
    )
    return Case(
        model=model,
        x=normal(B, T, D),
        embedding=normal(V + surplus, D) * D**-0.5,
        labels=jnp.asarray(rng.integers(0, V, (B, T))),
        mask=jnp.asarray(rng.random((B, T)) < 0.7),
        sparse=SparseTargets(
            jnp.asarray(rng.integers(0, V, (B, T, M))),
            jnp.asarray(rng.random((B, T, M)) / max(M, 1), jnp.float32),
        ),
        with_tail=SparseTargets(
            jnp.asarray(
                rng.permuted(np.tile(np.arange(V), (B, T, 1)), axis=-1)[..., : min(M, V - 1)]
            ),
            jnp.asarray(rng.random((B, T, min(M, V - 1))) / max(M, 1), jnp.float32),
            jnp.asarray(rng.random((B, T)), jnp.float32),
        ),
        full=FullTargets(jax.nn.log_softmax(normal(B, T, V))),
        hidden=HiddenTargets(
            normal(B, T, teacher_width),
            normal(V + teacher_surplus, teacher_width),
            TEACHER_SOFTCAP,
        ),
    )


def sums_of(
    case: Case, x, embedding, targets, label_weight, objective=FORWARD, **options
) -> LossSums:
    """`chunked_loss` with what the case has beside its arguments."""
    return chunked_loss(
        x,
        embedding,
        case.labels,
        case.mask,
        targets,
        label_weight,
        model=case.model,
        objective=objective,
        **options,
    )


def plain_sums(case: Case, x, embedding, targets, label_weight, objective) -> LossSums:
    """The same from whole logits, in the type of the arguments."""
    V, mask, tau = case.model.vocab_size, case.mask, objective.temperature
    logits = _plain_logits(x, embedding, case.model.final_softcap)[..., :V]
    ce, z = next_token_loss(logits, case.labels, mask)[0], z_loss(logits, mask)[0]
    if targets is None:
        return LossSums(ce + objective.z_weight * z, jnp.zeros_like(ce), ce, z)
    if isinstance(targets, SparseTargets):
        kd = distillation_loss(logits, targets, mask, tau)[0]
    else:
        # Of log-probabilities at the temperature, logits that give them at it.
        teacher = (
            targets.log_probs_BTV * tau
            if isinstance(targets, FullTargets)
            else _plain_logits(*targets[:3])[..., :V]
        )
        if objective.divergence == "forward_kl":
            kd = full_cross_entropy(teacher, logits, mask, tau)[0]
        elif objective.divergence == "reverse_kl":
            kd = reverse_kl(teacher, logits, mask, tau)[0]
        else:
            kd = generalised_jsd(teacher, logits, mask, objective.beta, tau)[0]
    loss = (1 - label_weight) * kd + label_weight * ce + objective.z_weight * z
    return LossSums(loss, kd, ce, z)


def _plain_logits(x, embedding, softcap):
    return softcap * jnp.tanh(jnp.einsum("BTD,RD->BTR", x, embedding) / softcap)


def ours(case: Case, targets, label_weight, objective=FORWARD, **options):
    """(sums, (gradient in x, gradient in the embedding)) of `chunked_loss`."""
    arrays = (case.x, case.embedding, case.labels, case.mask, targets, label_weight)
    return _ours(*arrays, model=case.model, objective=objective, **options)


# One program for all cases of the same sizes and objective.
@partial(jax.jit, static_argnames=("model", "objective", "mesh", "chunk_tokens"))
def _ours(x, embedding, labels, mask, targets, label_weight, **options):
    def loss(x, embedding):
        sums = chunked_loss(x, embedding, labels, mask, targets, label_weight, **options)
        return sums.loss, sums

    (_, sums), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(x, embedding)
    return sums, gradients


def expected(case: Case, targets, label_weight, objective=FORWARD, compiled=False):
    """The same of `plain_sums`, in float64.

    Args:
        compiled: as a whole, which is sooner for sizes that come once; else operation by
            operation, which cases of the same sizes share.
    """

    def loss(x, embedding, targets):
        sums = plain_sums(case, x, embedding, targets, label_weight, objective)
        return sums.loss, sums

    compute = jax.value_and_grad(loss, (0, 1), has_aux=True)
    with jax.enable_x64(True):
        arrays = jax.tree.map(jnp.asarray, widened((case.x, case.embedding, targets)))
        (_, sums), gradients = (jax.jit(compute) if compiled else compute)(*arrays)
        return jax.tree.map(np.asarray, (sums, gradients))


def widened(tree: Any) -> Any:
    """Numbers in float64, ids as they are; for use where that type is enabled."""
    arrays = jax.tree.map(np.asarray, tree)
    return jax.tree.map(
        lambda a: a if np.issubdtype(a.dtype, np.integer) else a.astype(np.float64), arrays
    )


def assert_equal(result, reference, tolerance: float = 1e-6) -> None:
    """Float32 against float64, to `tolerance` of the largest entry of each array."""
    for single, double in zip(jax.tree.leaves(result), jax.tree.leaves(reference), strict=True):
        assert single.dtype == jnp.float32 and double.dtype == np.float64
        np.testing.assert_allclose(single, double, rtol=0, atol=tolerance * np.abs(double).max())
