"""The Gemma 2 decoder (arXiv 2408.00118) as functions over a nested dict of float32 parameters.

tokens → `hidden_states` → `unembed` → logits. The two halves are apart so that a loss can
take the logits of a few positions at a time. Layers lie in pairs, a local and a global one,
stacked along a first axis that a scan goes through: the compiled program does not grow with
depth. With an odd number of layers the `last` one is local and stands alone.

Legend: B rows, T positions, D width, R embedding rows, V the R logits of a position.
"""

from typing import Any, cast

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from model.attention import Attention
from model.cache import Cache, LayerCache
from model.config import ModelConfig
from model.execution import DEFAULT, REMAT_POLICIES, Execution
from model.kernels import MASKED_LOGIT
from model.layers import FeedForward, RMSNorm, soft_cap

Params = dict[str, Any]


class Block(nn.Module):
    """One layer: attention and feed-forward, each normalised before and after."""

    config: ModelConfig
    window: int | None
    how: Execution

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        segments_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        c = self.config
        y_BTD = RMSNorm(c.norm_eps, name="pre_attention_norm")(x_BTD)
        y_BTD, cache = Attention(c, self.window, self.how, name="attention")(
            y_BTD, segments_BT, positions_BT, cache
        )
        x_BTD = x_BTD + RMSNorm(c.norm_eps, name="post_attention_norm")(y_BTD)
        y_BTD = RMSNorm(c.norm_eps, name="pre_feed_forward_norm")(x_BTD)
        y_BTD = FeedForward(c.feed_forward, self.how.dtype, name="feed_forward")(y_BTD)
        return x_BTD + RMSNorm(c.norm_eps, name="post_feed_forward_norm")(y_BTD), cache


class Pair(nn.Module):
    """A local layer and the global one above it."""

    config: ModelConfig
    how: Execution

    @nn.compact
    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        segments_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        caches: dict[str, LayerCache] | None,
    ) -> tuple[Float[Array, "B T D"], dict[str, LayerCache | None]]:
        after: dict[str, LayerCache | None] = {}
        for name, window in (("local", self.config.window), ("global", None)):
            layer = _block(self.how)(self.config, window, self.how, name=name)
            before = None if caches is None else caches[name]
            x_BTD, after[name] = layer(x_BTD, segments_BT, positions_BT, before)
        return x_BTD, after


class Transformer(nn.Module):
    """The decoder up to its final norm; `embedding` is tied to the output."""

    config: ModelConfig
    how: Execution = DEFAULT

    @nn.compact
    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        segments_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Any]]:
        c, how = self.config, self.how
        before: dict[str, Any] = {} if cache is None else cache
        after: dict[str, Any] = {}
        # Times sqrt(D) below, embeddings enter at unit variance; as output rows they keep the
        # first logits near unit variance too.
        init = nn.initializers.normal(c.width**-0.5)
        embedding_RD = self.param("embedding", init, (c.embedding_rows, c.width))
        # The published weights were trained with the factor rounded to the activation dtype.
        x_BTD = embedding_RD[tokens_BT].astype(how.dtype) * jnp.asarray(c.width**0.5, how.dtype)
        if num_pairs := c.num_layers // 2:
            pairs = nn.scan(
                Pair,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(nn.broadcast, nn.broadcast, 0),  # pyright: ignore[reportArgumentType]
                length=num_pairs,
            )
            x_BTD, after["pairs"] = pairs(c, how, name="pairs")(
                x_BTD, segments_BT, positions_BT, before.get("pairs")
            )
        if c.num_layers % 2:
            x_BTD, after["last"] = _block(how)(c, c.window, how, name="last")(
                x_BTD, segments_BT, positions_BT, before.get("last")
            )
        return RMSNorm(c.norm_eps, name="final_norm")(x_BTD), after


def _block(how: Execution) -> type[Block]:
    if how.remat == "none":
        return Block
    # Inside a scan nothing is shared between the passes, so nothing has to be kept from it.
    return nn.remat(Block, policy=REMAT_POLICIES[how.remat], prevent_cse=False)


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
    how: Execution = DEFAULT,
) -> Float[Array, "B T D"]:
    """Run the decoder and return its normalised output of type `how.dtype`.

    Args:
        tokens_BT: token ids below `config.vocab_size`.
        segments_BT: 0 for padding; a token attends within its own non-zero segment only.
        positions_BT: position inside the document, for the rotary embedding.

    Raises:
        ValueError: the rows are longer than `config.context_length`.
    """
    if tokens_BT.shape[1] > config.context_length:
        raise ValueError(
            f"rows of {tokens_BT.shape[1]} tokens are longer than the model's context_length="
            f"{config.context_length}: shorten the rows or raise context_length"
        )
    model = Transformer(config, how)
    x_BTD, _ = cast(Any, model.apply({"params": params}, tokens_BT, segments_BT, positions_BT))
    return x_BTD


def continue_texts(
    params: Params,
    config: ModelConfig,
    cache: Cache,
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    valid_BT: Int[Array, "B T"],
    how: Execution = DEFAULT,
) -> tuple[Float[Array, "B T D"], Cache]:
    """Hidden states of the next tokens of texts that begin in `cache`, and the new cache.

    Either the first tokens of all texts (any T; the cache is empty), or one more (T = 1).

    Args:
        positions_BT: position of each token in its text.
        valid_BT: 0 where a row has no token; those are neither seen nor remembered.
    """
    model = Transformer(config, how)
    return cast(Any, model.apply({"params": params}, tokens_BT, valid_BT, positions_BT, cache))


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
