"""The codecs whose targets are the whole distribution, which every divergence can take.

Legend: B rows, T positions, V vocabulary, D the teacher's width.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from model.codecs.base import (
    HIDDEN_DTYPE,
    Encoded,
    FullTargets,
    HiddenTargets,
    Named,
    RowKeys,
    Unembedding,
)


@dataclasses.dataclass(frozen=True)
class HiddenCodec(Named):
    """The final hidden state, of which the student makes the teacher's whole distribution.

    Exact for the state as it is sent, of which the teacher's logits have to be made too. Costs
    the student 2 · D · V FLOPs per token, and bytes by the teacher's width.
    """

    kind: ClassVar[str] = "hidden"
    temperature: float = 1.0

    def encode(
        self,
        logits_BTV: Float[Array, "B T V"],
        row_keys_B: RowKeys,
        x_BTD: Float[Array, "B T D"] | None = None,
        first_position: int | Int[Array, ""] = 0,
    ) -> Encoded:
        """`x` [B, T, D] and `log_norm` [B, T], log Σ exp of the logits over the temperature."""
        assert x_BTD is not None, "the logits were made of hidden states"
        log_norm_BT = jax.nn.logsumexp(logits_BTV / self.temperature, axis=-1)
        return {"x": x_BTD.astype(HIDDEN_DTYPE), "log_norm": log_norm_BT}

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
class FullCodec(Named):
    """Every log-probability in float32: what the others are measured against, for small runs."""

    kind: ClassVar[str] = "full"
    temperature: float = 1.0

    def encode(
        self,
        logits_BTV: Float[Array, "B T V"],
        row_keys_B: RowKeys,
        x_BTD: Float[Array, "B T D"] | None = None,
        first_position: int | Int[Array, ""] = 0,
    ) -> Encoded:
        """`log_probs` [B, T, V]."""
        scaled_BTV = logits_BTV.astype(jnp.float32) / self.temperature
        return {"log_probs": jax.nn.log_softmax(scaled_BTV, axis=-1)}

    def decode(
        self,
        encoded: Mapping[str, ArrayLike],
        vocab_size: int,
        unembedding: Unembedding | None = None,
    ) -> FullTargets:
        """The whole distribution."""
        return FullTargets(jnp.asarray(encoded["log_probs"]))
