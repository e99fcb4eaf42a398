"""Logits, keys, and targets laid out over the vocabulary."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from model.targets import ScoredPiece, row_key


def keys(count, seed=0):
    return np.stack([row_key(seed, 0, i) for i in range(count)])


@partial(jax.jit, static_argnums=0)
def encode(codec, logits, row_keys, x=None):
    """What the codec makes of whole rows, each a piece."""
    return jax.vmap(lambda *row: codec.encode(ScoredPiece(*row)))(logits, row_keys, x)


def zipf_logits(V, seed=0):
    """A long-tailed distribution in shuffled order."""
    order = np.random.default_rng(seed).permutation(V)
    return jnp.asarray(-1.2 * np.log1p(order), jnp.float32)


def dense(targets, V):
    """Sum of the target weights per id, [B, T, V]."""
    B, T, _ = targets.ids_BTM.shape
    rows, cols = np.ogrid[:B, :T]
    out = np.zeros((B, T, V))
    np.add.at(out, (rows[..., None], cols[..., None], targets.ids_BTM), targets.weights_BTM)
    return out
