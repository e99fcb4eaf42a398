"""The codecs that send a part of the distribution, and whether they leave the gradient unbiased.

Legend: B rows, T positions, C positions of a piece of one row, V vocabulary, k head entries, N
draws, M ids per position, W words of packed ids.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float32, Int

from model.codecs.base import Codec, Encoded, ScoredPiece, SparseTargets, Unembedding
from model.codecs.bits import DRAWS, ROUNDING, Places, pack, random_words, unpack
from model.codecs.blocks import BlockSums, Tail, draw_ids, find_head, sum_blocks
from model.codecs.values import restore_values, round_values


@dataclasses.dataclass(frozen=True)
class _SparseCodec(Codec):
    """Encodes tempered logits; how, each codec says."""

    def encode(self, piece: ScoredPiece) -> Encoded:
        """`ids` packed, uint32 [C, W], and where their probabilities differ `probs`.

        `probs` are [C, k] or [C, N], of the type that `values` names.
        """
        C, V = piece.logits_CV.shape
        if (k := getattr(self, "k", 0)) > V:
            raise ValueError(f"{self.name} asks for {k} of {V} logits: lower k")
        scaled_CV = piece.logits_CV / self.temperature
        # Logits are compared for equality: each pass has to see the same bits, not make its own,
        # and no zero below zero, which top_k takes for less and a comparison for equal.
        logits_CV = jax.lax.optimization_barrier(jnp.where(scaled_CV == 0, 0.0, scaled_CV))
        first = jnp.asarray(piece.first_position, jnp.uint32)
        positions_C = first + jnp.arange(C, dtype=jnp.uint32)
        return self._encode(logits_CV, Places(jnp.asarray(piece.row_key_2), positions_C))

    @abc.abstractmethod
    def _encode(self, logits_CV: Float32[Array, "C V"], places: Places) -> Encoded: ...


@dataclasses.dataclass(frozen=True)
class TopKCodec(_SparseCodec):
    """The `k` largest probabilities, and that all other tokens share the rest.

    The rest counts as one token more (a ghost), so the gradient on the k is that of the whole
    distribution, q − p, and the student's tail keeps its total; how the tail is spread the
    student is not told: biased.
    """

    kind: ClassVar[str] = "topk"
    k: int
    values: str = "bfloat16"

    def _encode(self, logits_CV: Float32[Array, "C V"], places: Places) -> Encoded:
        head = find_head(logits_CV, self.k)
        probs_Ck = jnp.exp(head.logits_Ck - jax.nn.logsumexp(logits_CV, axis=-1, keepdims=True))
        words_Ck = random_words(places, ROUNDING, self.k)
        return {
            "ids": pack(head.ids_Ck, logits_CV.shape[-1]),
            "probs": round_values(probs_Ck, self.values, words_Ck),
        }

    def decode(
        self,
        encoded: Mapping[str, ArrayLike],
        vocab_size: int,
        unembedding: Unembedding | None = None,
    ) -> SparseTargets:
        """k targets, and the tail's mass: where rounding went up, a little below zero."""
        probs_BTk = restore_values(encoded["probs"])
        tail_BT = 1.0 - probs_BTk.sum(axis=-1) if self.k < vocab_size else None
        return SparseTargets(_unpacked(encoded, self.k, vocab_size), probs_BTk, tail_BT)


@dataclasses.dataclass(frozen=True)
class SampledCodec(_SparseCodec):
    """Ids drawn from the teacher's distribution, each of weight 1 / `draws`.

    The expected targets are the distribution, and so the expected gradient is exact (Sparse
    Logit Sampling, arXiv 2503.16870). The variance of a target is p (1 − p) / draws.
    """

    kind: ClassVar[str] = "sampled"
    draws: int

    def _encode(self, logits_CV: Float32[Array, "C V"], places: Places) -> Encoded:
        tail = Tail.below(logits_CV, None)
        ids_CN = _draw(tail, sum_blocks(tail), places, self.draws)
        return {"ids": pack(ids_CN, logits_CV.shape[-1])}

    def decode(
        self,
        encoded: Mapping[str, ArrayLike],
        vocab_size: int,
        unembedding: Unembedding | None = None,
    ) -> SparseTargets:
        """Targets of equal weight; an id that was drawn twice is there twice."""
        ids_BTN = _unpacked(encoded, self.draws, vocab_size)
        return SparseTargets(ids_BTN, jnp.full(ids_BTN.shape, 1 / self.draws, jnp.float32))


@dataclasses.dataclass(frozen=True)
class Gemma3Codec(_SparseCodec):
    """Drawn ids that keep their own probabilities, renormalised over the distinct ones.

    One reading of what the Gemma 3 report says (arXiv 2503.19786, section 2.2: 256 logits per
    token, weighted by teacher probabilities, others zero, renormalised). Biased: a likely token
    is nearly always drawn, so the head comes out too large. `sampled` is the other reading.
    """

    kind: ClassVar[str] = "gemma3"
    draws: int
    values: str = "bfloat16"

    def _encode(self, logits_CV: Float32[Array, "C V"], places: Places) -> Encoded:
        tail = Tail.below(logits_CV, None)
        sums = sum_blocks(tail)
        ids_CN = _draw(tail, sums, places, self.draws)
        drawn_CN = jnp.take_along_axis(logits_CV, ids_CN, axis=-1)
        probs_CN = jnp.exp(drawn_CN - tail.peak_C1) / sums.total_C1
        before_NN = jnp.tri(self.draws, k=-1, dtype=bool)
        again_CN = jnp.any((ids_CN[:, :, None] == ids_CN[:, None]) & before_NN, axis=-1)
        words_CN = random_words(places, ROUNDING, self.draws)
        return {
            "ids": pack(ids_CN, logits_CV.shape[-1]),
            "probs": round_values(jnp.where(again_CN, 0.0, probs_CN), self.values, words_CN),
        }

    def decode(
        self,
        encoded: Mapping[str, ArrayLike],
        vocab_size: int,
        unembedding: Unembedding | None = None,
    ) -> SparseTargets:
        """Targets that sum to one; an id that was drawn again weighs nothing."""
        probs_BTN = restore_values(encoded["probs"])
        sum_BT1 = probs_BTN.sum(axis=-1, keepdims=True)
        whole_BT1 = jnp.where(sum_BT1 > 0, sum_BT1, 1.0)
        return SparseTargets(_unpacked(encoded, self.draws, vocab_size), probs_BTN / whole_BT1)


@dataclasses.dataclass(frozen=True)
class HybridCodec(_SparseCodec):
    """The `k` largest probabilities, and the rest through `draws` samples of the tail.

    With a the head's mass, each of the N draws carries (1 − a) / N: the targets sum to one and
    their expectation is the teacher's distribution, so the student's expected gradient is exact
    (the sampling argument of arXiv 2503.16870, with the head taken out of the lottery).
    """

    kind: ClassVar[str] = "hybrid"
    k: int
    draws: int
    values: str = "bfloat16"

    def _encode(self, logits_CV: Float32[Array, "C V"], places: Places) -> Encoded:
        head = find_head(logits_CV, self.k)
        tail = Tail.below(logits_CV, head)
        sums = sum_blocks(tail)
        ids_CM = jnp.concatenate([head.ids_Ck, _draw(tail, sums, places, self.draws)], axis=-1)
        masses_Ck = jnp.exp(head.logits_Ck - tail.peak_C1)
        # A sum of its parts: the tail as what the head leaves of the whole would be rounded away.
        probs_Ck = masses_Ck / (masses_Ck.sum(axis=-1, keepdims=True) + sums.total_C1)
        words_Ck = random_words(places, ROUNDING, self.k)
        return {
            "ids": pack(ids_CM, logits_CV.shape[-1]),
            "probs": round_values(probs_Ck, self.values, words_Ck),
        }

    def decode(
        self,
        encoded: Mapping[str, ArrayLike],
        vocab_size: int,
        unembedding: Unembedding | None = None,
    ) -> SparseTargets:
        """Targets of M = k + draws entries: the head first, then the draws.

        Where rounding brings the head above one, the draws weigh a little less than nothing:
        without that they would be too heavy on average.
        """
        probs_BTk = restore_values(encoded["probs"])
        ids_BTM = _unpacked(encoded, self.k + self.draws, vocab_size)
        tail_BT1 = 1.0 - jnp.sum(probs_BTk, axis=-1, keepdims=True)
        shape = (*probs_BTk.shape[:-1], self.draws)
        weights_BTN = jnp.broadcast_to(tail_BT1 / self.draws, shape)
        return SparseTargets(ids_BTM, jnp.concatenate([probs_BTk, weights_BTN], axis=-1))


def _unpacked(
    encoded: Mapping[str, ArrayLike], num_ids: int, vocab_size: int
) -> Int[Array, "B T M"]:
    words_BTW = jnp.asarray(encoded["ids"])
    flat_CM = unpack(words_BTW.reshape(-1, words_BTW.shape[-1]), num_ids, vocab_size)
    return flat_CM.reshape(*words_BTW.shape[:-1], num_ids)


def _draw(tail: Tail, sums: BlockSums, places: Places, num: int) -> Int[Array, "C N"]:
    return draw_ids(tail, sums, random_words(places, DRAWS, 3 * num))
