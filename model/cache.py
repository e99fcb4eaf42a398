"""What a decoder remembers of the tokens it has seen, so that the next one costs one position.

A local layer keeps a ring of its window, a global layer the whole text. Legend: B rows,
T new positions, S slots, K key-value heads, H head size.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from model.config import ModelConfig


class LayerCache(NamedTuple):
    """Keys and values of one layer, rotated already; position p lies in slot p modulo S."""

    keys_BSKH: Float[Array, "*L B S K H"]
    values_BSKH: Float[Array, "*L B S K H"]
    positions_BS: Int[Array, "*L B S"]
    """The position that a slot holds, -1 where it holds none."""


Cache = dict[str, LayerCache | dict[str, LayerCache]]
"""The caches of all layers, nested as their parameters are."""


def empty_cache(
    config: ModelConfig, num_rows: int, num_positions: int, dtype: DTypeLike = jnp.float32
) -> Cache:
    """A cache for `num_rows` texts of up to `num_positions` tokens."""

    def layer(num_slots: int, *stack: int) -> LayerCache:
        shape = (*stack, num_rows, num_slots, config.num_kv_heads, config.head_dim)
        return LayerCache(
            jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.full(shape[:-2], -1, jnp.int32)
        )

    local, num_pairs = min(config.window, num_positions), config.num_layers // 2
    cache: Cache = {}
    if num_pairs:
        cache["pairs"] = {
            "local": layer(local, num_pairs),
            "global": layer(num_positions, num_pairs),
        }
    if config.num_layers % 2:
        cache["last"] = layer(local)
    return cache


def extend(
    cache: LayerCache,
    keys_BTKH: Float[Array, "B T K H"],
    values_BTKH: Float[Array, "B T K H"],
    positions_BT: Int[Array, "B T"],
    valid_BT: Bool[Array, "B T"],
) -> LayerCache:
    """With the valid new positions in; of more than there are slots, the last ones stay."""
    B, S = cache.positions_BS.shape
    last_B1 = jnp.max(jnp.where(valid_BT, positions_BT, -1), axis=1, keepdims=True)
    kept_BT = valid_BT & (positions_BT > last_B1 - S)
    slots_BT = jnp.where(kept_BT, positions_BT % S, S)  # S is no slot: those are dropped
    at = (jnp.arange(B)[:, None], slots_BT)
    return LayerCache(
        cache.keys_BSKH.at[at].set(keys_BTKH, mode="drop"),
        cache.values_BSKH.at[at].set(values_BTKH, mode="drop"),
        cache.positions_BS.at[at].set(positions_BT, mode="drop"),
    )


def visible_slots(
    cache: LayerCache, positions_BT: Int[Array, "B T"], window: int | None
) -> Bool[Array, "B T S"]:
    """True where a position may look: at what is there, not ahead, within `window`."""
    distance_BTS = positions_BT[:, :, None] - cache.positions_BS[:, None, :]
    allowed_BTS = (cache.positions_BS >= 0)[:, None, :] & (distance_BTS >= 0)
    return allowed_BTS if window is None else allowed_BTS & (distance_BTS < window)
