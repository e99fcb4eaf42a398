"""Small models of large weights, prompts for them, and the texts that they give."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from model.config import ModelConfig
from model.execution import DEFAULT
from model.transformer import hidden_states, init_params, unembed


def small_config(num_layers=2, window=5, **changes):
    """Two query heads on each key-value head, local layers that soon forget."""
    sizes = {"width": 16, "feed_forward": 24, "num_heads": 4, "num_kv_heads": 2, "head_dim": 4}
    limits = {"vocab_size": 48, "context_length": 64}
    return ModelConfig(num_layers=num_layers, window=window, **(sizes | limits | changes))


def random_params(config, seed=0):
    """Large layers and a small embedding: what comes next depends on more than the last token."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: 0.4 * rng.standard_normal(leaf.shape, np.float32), shapes)
    return params | {"embedding": 0.2 * params["embedding"]}


@partial(jax.jit, static_argnames=("config", "how"))
def logits_at_once(params, config, tokens_BT, how=DEFAULT):
    """Float32 [B, T, V] of one pass over whole texts, without a cache."""
    segments_BT = jnp.ones_like(tokens_BT)
    positions_BT = jnp.cumsum(segments_BT, axis=1) - 1
    x_BTD = hidden_states(params, config, tokens_BT, segments_BT, positions_BT, how)
    return unembed(params, config, x_BTD)


CONFIG = small_config()
PARAMS = random_params(CONFIG)


def prompts_of(lengths, width=None, seed=0):
    """Random prompts, and beyond their ends other tokens, that must not matter."""
    tokens = np.random.default_rng(seed).integers(
        0, CONFIG.vocab_size, (len(lengths), width or max(lengths))
    )
    return tokens.astype(np.int32), np.array(lengths, np.int32)


def texts_of(generated):
    """Each row's new tokens; what lies behind them has to be 0."""
    texts = []
    for tokens, length in zip(*map(np.asarray, generated), strict=True):
        assert (tokens[length:] == 0).all()
        texts.append(tokens[:length].tolist())
    return texts
