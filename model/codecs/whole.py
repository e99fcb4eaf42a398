"""The codecs whose targets are the whole distribution, which every divergence can take.

Legend: B rows, T positions, C positions of a piece of one row, V vocabulary, D the teacher's width.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from model.codecs.base import (
    HIDDEN_DTYPE,
    Codec,
    Encoded,
    FullTargets,
    HiddenTargets,
    ScoredPiece,
    Unembedding,
)


@dataclasses.dataclass(frozen=True)
class HiddenCodec(Codec):
    """The final hidden state, of which the student makes the teacher's whole distribution.

    Exact for the state as it is sent, of which the teacher's logits have to be made too. Costs
    the student 2 · D · V FLOPs per token, and bytes by the teacher's width.
    """

    kind: ClassVar[str] = "hidden"

    def encode(self, piece: ScoredPiece) -> Encoded:
        """`x` [C, D] in bfloat16, and `log_norm` [C] in float32.

        `log_norm` is log Σ exp of the logits over the temperature.
        """
        assert piece.x_CD is not None, "the logits were made of hidden states"
        log_norm_C = jax.nn.logsumexp(piece.logits_CV / self.temperature, axis=-1)
        return {"x": piece.x_CD.astype(HIDDEN_DTYPE), "log_norm": log_norm_C}

    def decode(
        self,
        encoded: Mapping[str, ArrayLike],
        vocab_size: int,
        unembedding: Unembedding | None = None,
    ) -> HiddenTargets:
        """The hidden states with the teacher's unembedding."""
        assert unembedding is not None, "hidden states are nothing without it"
        log_norm_BT = jnp.asarray(encoded["log_norm"])
        return HiddenTargets(jnp.asarray(encoded["x"]), *unembedding, log_norm_BT)


@dataclasses.dataclass(frozen=True)
class FullCodec(Codec):
    """Every log-probability in float32: what the others are measured against, for small runs."""

    kind: ClassVar[str] = "full"

    def encode(self, piece: ScoredPiece) -> Encoded:
        """`log_probs` [C, V] in float32."""
        return {"log_probs": jax.nn.log_softmax(piece.logits_CV / self.temperature, axis=-1)}

    def decode(
        self,
        encoded: Mapping[str, ArrayLike],
        vocab_size: int,
        unembedding: Unembedding | None = None,
    ) -> FullTargets:
        """The whole distribution."""
        return FullTargets(jnp.asarray(encoded["log_probs"]))
