"""The Gemma 2 decoder (arXiv 2408.00118) as functions over a nested dict of float32 parameters.

tokens → `hidden_states` → `unembed` → logits. The two halves are apart so that a loss can
take the logits of a few positions at a time. Legend: B rows, T positions, D width, R embedding
rows, V the R logits of a position.
"""

from typing import Any, cast

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from model.attention import MASKED_LOGIT, Attention
from model.config import ModelConfig
from model.layers import FeedForward, RMSNorm, soft_cap

Params = dict[str, Any]


class Block(nn.Module):
    """One layer: attention and feed-forward, each normalised before and after."""

    config: ModelConfig
    window: int | None
    dtype: DTypeLike

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        segments_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
    ) -> Float[Array, "B T D"]:
        c = self.config
        y_BTD = RMSNorm(c.norm_eps, name="pre_attention_norm")(x_BTD)
        y_BTD = Attention(c, self.window, self.dtype, name="attention")(
            y_BTD, segments_BT, positions_BT
        )
        x_BTD = x_BTD + RMSNorm(c.norm_eps, name="post_attention_norm")(y_BTD)
        y_BTD = RMSNorm(c.norm_eps, name="pre_feed_forward_norm")(x_BTD)
        y_BTD = FeedForward(c.feed_forward, self.dtype, name="feed_forward")(y_BTD)
        return x_BTD + RMSNorm(c.norm_eps, name="post_feed_forward_norm")(y_BTD)


class Transformer(nn.Module):
    """The decoder up to its final norm; `embedding` is tied to the output."""

    config: ModelConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        segments_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
    ) -> Float[Array, "B T D"]:
        c = self.config
        # Times sqrt(D) below, embeddings enter at unit variance; as output rows they keep the
        # first logits near unit variance too.
        init = nn.initializers.normal(c.width**-0.5)
        embedding_RD = self.param("embedding", init, (c.embedding_rows, c.width))
        # The published weights were trained with the factor rounded to the activation dtype.
        x_BTD = embedding_RD[tokens_BT].astype(self.dtype) * jnp.asarray(c.width**0.5, self.dtype)
        for i in range(c.num_layers):
            window = c.window if i % 2 == 0 else None  # local first, then global, in turn
            x_BTD = Block(c, window, self.dtype, name=f"layer_{i}")(
                x_BTD, segments_BT, positions_BT
            )
        return RMSNorm(c.norm_eps, name="final_norm")(x_BTD)


def init_params(config: ModelConfig, key: Array) -> Params:
    """Fresh float32 parameters as a nested dict; works under `jax.jit` and `jax.eval_shape`."""
    empty_BT = jnp.zeros((1, 1), jnp.int32)
    variables = Transformer(config).init(key, empty_BT, empty_BT, empty_BT)
    return cast(Params, variables["params"])


def hidden_states(
    params: Params,
    config: ModelConfig,
    tokens_BT: Int[Array, "B T"],
    segments_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "B T D"]:
    """Run the decoder and return its normalised output of type `dtype`.

    Args:
        tokens_BT: token ids below `config.vocab_size`.
        segments_BT: 0 for padding; a token attends within its own non-zero segment only.
        positions_BT: position inside the document, for the rotary embedding.
        dtype: type of the computation; parameters stay float32.

    Raises:
        ValueError: the rows are longer than `config.context_length`.
    """
    if tokens_BT.shape[1] > config.context_length:
        raise ValueError(
            f"rows of {tokens_BT.shape[1]} tokens are longer than the model's context_length="
            f"{config.context_length}: shorten the rows or raise context_length"
        )
    model = Transformer(config, dtype)
    return cast(Array, model.apply({"params": params}, tokens_BT, segments_BT, positions_BT))


def unembed(
    params: Params, config: ModelConfig, x_BTD: Float[Array, "B T D"]
) -> Float[Array, "B T V"]:
    """Soft-capped float32 logits of hidden states, one per embedding row.

    Rows from `vocab_size` on get a logit so low that their probability is exactly zero.
    """
    embedding_RD = params["embedding"].astype(x_BTD.dtype)
    logits_BTV = jnp.einsum("BTD,RD->BTR", x_BTD, embedding_RD, preferred_element_type=jnp.float32)
    logits_BTV = soft_cap(logits_BTV, config.final_softcap)
    if config.embedding_rows == config.vocab_size:
        return logits_BTV
    real_V = jnp.arange(config.embedding_rows) < config.vocab_size
    return jnp.where(real_V, logits_BTV, MASKED_LOGIT)
