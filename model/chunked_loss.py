"""The student's output loss and its gradient, a chunk of tokens at a time.

With a vocabulary of 256k the logits of a batch are its largest array by far. Here only those of
one chunk exist: from the logits come the losses, the gradient in the logits and at once those in
the hidden states and the embedding. All of it happens in the forward pass, and the backward pass
scales the result. So the matrix products are the three of the plain way, none of them done twice.

Legend: B rows, T positions, C tokens of a chunk, n chunks, N tokens, D width (E the teacher's, d a
device's part), R embedding rows, M targets per position. Below `shard_map` they count what one
device has.
"""

from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from model.chunked_objective import LossSums, Objective
from model.chunked_terms import Chunk, ChunkTargets, chunk_terms, without_masked
from model.chunked_vocabulary import VocabularyShare
from model.config import ModelConfig
from model.kernels import MASKED_LOGIT
from model.losses import Mask
from model.sharding import BATCH_AXES
from model.targets import FullTargets, HiddenTargets, SparseTargets, Targets

# Of a chunk's float32 logits on one device. A smaller chunk adds to the embedding's gradient
# more often: below some 500 tokens accelerators would wait for memory at a vocabulary of 256k.
CHUNK_LOGITS_BYTES = 1 << 29


class _Plan(NamedTuple):
    """What is fixed when the loss is compiled."""

    model: ModelConfig
    objective: Objective
    mesh: Mesh | None
    chunk_tokens: int | None


class _Axes(NamedTuple):
    """The mesh axes over which a device's part is one of many; none outside of `shard_map`."""

    replicas: tuple[str, ...] = ()
    width: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ()

    @property
    def batch(self) -> tuple[str, ...]:
        return self.replicas + self.width


def chunked_loss(
    x_BTD: Float[Array, "B T D"],
    embedding_RD: Float[Array, "R D"],
    labels_BT: Int[Array, "B T"],
    mask_BT: Mask,
    targets: Targets | None,
    label_weight: float | Float[Array, ""],
    *,
    model: ModelConfig,
    objective: Objective,
    taught_BT: Bool[Array, "B T"] | None = None,
    mesh: Mesh | None = None,
    chunk_tokens: int | None = None,
) -> LossSums:
    """Sums of (1 − label_weight) · kd + label_weight · ce + z_weight · z over masked positions.

    `ce` is the cross-entropy of the labels, `z` is log² Σ exp logits, and `kd` the divergence
    from the teacher, for sparse targets w the cross-entropy −Σ w log q, whose gradient in the
    logits is (Σ w) · q − w. Without targets the loss is ce + z_weight · z. What stands in a
    masked position, even a NaN, stays out of sums and gradients, and so do the targets of a
    position that is not taught: `label_weight` is 1 there.

    Args:
        x_BTD: final hidden states, float32 or bfloat16, the type of all products; sums, and
            the embedding's gradient over the chunks, are float32.
        embedding_RD: the tied embedding; rows from `model.vocab_size` on are never predicted.
        mask_BT: where the losses count, or by what weight.
        taught_BT: positions that have targets; None: all of them.
        mesh: arrays are global, laid out as `model.sharding` says, the gradients likewise; the
            embedding's gradient is summed over devices once, after the last chunk. None: one
            device.
        chunk_tokens: tokens of a chunk per device; None: as many as keep a chunk's logits
            within `CHUNK_LOGITS_BYTES`.

    Raises:
        ValueError: an objective that sparse targets cannot serve, a teacher of another
            vocabulary, embedding rows that do not divide by the mesh, or no token in a chunk.
    """
    _check(embedding_RD.shape[0], targets, model, objective, mesh, chunk_tokens)
    if isinstance(targets, HiddenTargets):
        # Cast before it is gathered, and with as many rows as the student has.
        teacher_RD = targets.embedding_RD[: embedding_RD.shape[0]].astype(targets.x_BTD.dtype)
        missing = embedding_RD.shape[0] - teacher_RD.shape[0]
        targets = targets._replace(embedding_RD=jnp.pad(teacher_RD, ((0, missing), (0, 0))))
    elif isinstance(targets, FullTargets):
        surplus = ((0, 0), (0, 0), (0, embedding_RD.shape[0] - model.vocab_size))
        log_probs_BTR = jnp.pad(targets.log_probs_BTV, surplus, constant_values=MASKED_LOGIT)
        targets = FullTargets(log_probs_BTR)
    plan = _Plan(model, objective, mesh, chunk_tokens)
    share = jnp.asarray(1.0 if targets is None else label_weight, jnp.float32)
    taught_BT = jnp.ones(labels_BT.shape, bool) if taught_BT is None else taught_BT
    return _loss_sums(plan, x_BTD, embedding_RD, labels_BT, mask_BT, taught_BT, targets, share)


def _check(
    num_rows: int,
    targets: Targets | None,
    model: ModelConfig,
    objective: Objective,
    mesh: Mesh | None,
    chunk_tokens: int | None,
) -> None:
    if isinstance(targets, SparseTargets) and objective.divergence != "forward_kl":
        raise ValueError(
            f"{objective.divergence} needs the teacher's whole distribution, and sparse targets "
            "hold a few of its probabilities: send hidden states, or take forward_kl"
        )
    if isinstance(targets, HiddenTargets) and len(targets.embedding_RD) < model.vocab_size:
        raise ValueError(
            f"the teacher's embedding has {len(targets.embedding_RD)} rows for a vocabulary of "
            f"{model.vocab_size}: take a teacher of the student's vocabulary"
        )
    if isinstance(targets, FullTargets) and targets.log_probs_BTV.shape[-1] != model.vocab_size:
        raise ValueError(
            f"the teacher gives {targets.log_probs_BTV.shape[-1]} log-probabilities for a "
            f"vocabulary of {model.vocab_size}: take a teacher of the student's vocabulary"
        )
    if mesh is not None and num_rows % mesh.shape["model"]:
        raise ValueError(
            f"{num_rows} embedding rows do not divide by the mesh axis 'model' of size "
            f"{mesh.shape['model']}: raise num_embeddings to a multiple of it"
        )
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} makes no progress: give 1 or more")


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss_sums(plan: _Plan, *arrays: Any) -> LossSums:
    return _on_mesh(plan, False, *arrays)[0]


def _forward(plan: _Plan, *arrays: Any) -> tuple[LossSums, Any]:
    return _on_mesh(plan, True, *arrays)


def _backward(plan: _Plan, gradients: Any, cotangents: LossSums) -> tuple[Any, ...]:
    scaled = jax.tree.map(lambda g: (g * cotangents.loss).astype(g.dtype), gradients)
    return (*scaled, None, None, None, None, None)


_loss_sums.defvjp(_forward, _backward)


def _on_mesh(plan: _Plan, with_gradients: bool, *arrays: Any) -> tuple[LossSums, Any]:
    """The sums, and the gradients in hidden states and embedding (None where not wanted)."""
    if plan.mesh is None:
        return _on_device(plan, with_gradients, _Axes(), *arrays)
    rows: Any = PartitionSpec(BATCH_AXES)
    embedding, whole = PartitionSpec("model", "fsdp"), PartitionSpec()
    targets = rows
    if isinstance(arrays[5], HiddenTargets):
        by_rows = cast(Any, PartitionSpec("model"))
        targets = HiddenTargets(rows, by_rows, cast(Any, whole), rows)
    elif isinstance(arrays[5], FullTargets):
        targets = PartitionSpec(BATCH_AXES, None, "model")
    return jax.shard_map(
        partial(_on_device, plan, with_gradients, _Axes(("slice", "data"), ("fsdp",), ("model",))),
        mesh=plan.mesh,
        in_specs=(rows, embedding, rows, rows, rows, targets, whole),
        out_specs=(whole, (rows, embedding) if with_gradients else None),
    )(*arrays)


def _on_device(
    plan: _Plan,
    with_gradients: bool,
    axes: _Axes,
    x_BTD: Float[Array, "B T D"],
    embedding_RD: Float[Array, "R d"],
    labels_BT: Int[Array, "B T"],
    mask_BT: Mask,
    taught_BT: Bool[Array, "B T"],
    targets: Targets | None,
    label_weight: Float[Array, ""],
) -> tuple[LossSums, Any]:
    """The same for a device's own rows and its block of the embedding."""
    table_RD = jax.lax.all_gather(embedding_RD.astype(x_BTD.dtype), axes.width, axis=1, tiled=True)
    share = partial(VocabularyShare, vocab_size=plan.model.vocab_size, axes=axes.vocabulary)
    student = share(table_RD, plan.model.final_softcap)
    teacher = None
    if isinstance(targets, HiddenTargets):
        teacher = share(targets.embedding_RD, targets.final_softcap)
    tokens = Chunk(x_BTD, labels_BT, mask_BT, taught_BT, _of_chunks(targets, labels_BT))
    chunks = _cut(tokens, plan.chunk_tokens, len(table_RD))
    terms = partial(chunk_terms, plan.objective, student, teacher, label_weight)

    def step(sum_RD: Array | None, chunk: Chunk) -> tuple[Array | None, Any]:
        chunk = without_masked(chunk)
        losses, gradient_CR = terms(chunk)
        if sum_RD is None:
            return None, (losses, None)
        d_CR = gradient_CR.astype(table_RD.dtype)
        product = partial(jnp.einsum, preferred_element_type=jnp.float32)
        sum_RD += product("CR,CD->RD", d_CR, chunk.x_CD)
        return sum_RD, (losses, product("CR,RD->CD", d_CR, table_RD))

    zeros_RD = None
    if with_gradients:
        zeros_RD = jnp.zeros(table_RD.shape, jnp.float32)
        zeros_RD = jax.lax.pcast(zeros_RD, axes.batch + axes.vocabulary, to="varying")
    sum_RD, (losses, d_x_nCD) = jax.lax.scan(step, zeros_RD, chunks)
    sums = jax.tree.map(lambda loss_n: jax.lax.psum(loss_n.sum(), axes.batch), losses)
    if sum_RD is None:
        return sums, None
    d_x_ND = jax.lax.psum(d_x_nCD, axes.vocabulary).reshape(-1, x_BTD.shape[-1])
    d_x_BTD = d_x_ND[: labels_BT.size].reshape(x_BTD.shape).astype(x_BTD.dtype)
    # Scattered over the fast axis first, so that replicas exchange only what each will keep.
    sum_Rd = jax.lax.psum_scatter(sum_RD, axes.width, scatter_dimension=1, tiled=True)
    d_embedding_Rd = jax.lax.psum(sum_Rd, axes.replicas).astype(embedding_RD.dtype)
    return sums, (d_x_BTD, d_embedding_Rd)


def _of_chunks(targets: Targets | None, labels_BT: Int[Array, "B T"]) -> ChunkTargets:
    """The targets' arrays by token, still with the axes B and T."""
    if isinstance(targets, SparseTargets):
        return ChunkTargets(*targets)
    none = ChunkTargets(labels_BT[..., None][..., :0], jnp.zeros((*labels_BT.shape, 0)))
    if isinstance(targets, HiddenTargets):
        return none._replace(x_CE=targets.x_BTD, log_norm_C=targets.log_norm_BT)
    if isinstance(targets, FullTargets):
        return none._replace(log_p_CR=targets.log_probs_BTV)
    return none


def _cut(tokens: Chunk, chunk_tokens: int | None, num_rows: int) -> Chunk:
    """Arrays [B, T, …] as [num_chunks, C, …], filled up with masked tokens."""
    num_tokens = tokens.labels_C.size
    limit = chunk_tokens or max(CHUNK_LOGITS_BYTES // (4 * num_rows), 1)
    num_chunks = -(-num_tokens // limit)
    size = -(-num_tokens // num_chunks)

    def cut(array: Array) -> Array:
        flat = array.reshape(num_tokens, *array.shape[2:])
        flat = jnp.pad(flat, ((0, num_chunks * size - num_tokens), *((0, 0),) * (flat.ndim - 1)))
        return flat.reshape(num_chunks, size, *flat.shape[1:])

    return jax.tree.map(cut, tokens)
