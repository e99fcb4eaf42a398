"""Grouped-query attention with rotary embedding, a logit soft-cap and packed segments.

`attend` is the reference kernel; a faster one is a function of the same signature.
Legend: B rows, T query and S key positions, D width, N query heads, K key-value heads,
G = N / K, H head size.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from model.config import ModelConfig
from model.layers import soft_cap

# Finite, so that a padding row, which sees nothing, gets a uniform softmax and not NaN.
MASKED_LOGIT = -1e30

_project_init = nn.initializers.variance_scaling(
    1.0, "fan_in", "normal", in_axis=0, out_axis=(1, 2)
)
_output_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=(0, 1), out_axis=2)


def rotate(
    x_BTNH: Float[Array, "B T N H"], positions_BT: Int[Array, "B T"], base: float
) -> Float[Array, "B T N H"]:
    """Rotary embedding (arXiv 2104.09864) turning the first half of each head with the second."""
    half = x_BTNH.shape[-1] // 2
    wavelength_h = base ** (jnp.arange(half, dtype=jnp.float32) / half)
    angle_BT1h = (positions_BT[..., None].astype(jnp.float32) / wavelength_h)[:, :, None, :]
    sin, cos = jnp.sin(angle_BT1h), jnp.cos(angle_BT1h)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)


def attention_mask(segments_BT: Int[Array, "B T"], window: int | None) -> Bool[Array, "B T T"]:
    """True where a position may look: its own non-zero segment, not ahead, within `window`."""
    index_T = jnp.arange(segments_BT.shape[1])
    distance_TT = index_T[:, None] - index_T[None, :]
    allowed_TT = distance_TT >= 0
    if window is not None:
        allowed_TT &= distance_TT < window
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    return same_BTT & (segments_BT != 0)[:, :, None] & allowed_TT


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    segments_BT: Int[Array, "B T"],
    *,
    window: int | None,
    softcap: float,
) -> Float[Array, "B T N H"]:
    """Attention of scaled queries; logits, soft-cap (before the mask) and softmax in float32."""
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    logits_BKGTS = jnp.einsum(
        "BTKGH,BSKH->BKGTS", q_BTKGH, k_BTKH, preferred_element_type=jnp.float32
    )
    mask_B11TS = attention_mask(segments_BT, window)[:, None, None]
    logits_BKGTS = jnp.where(mask_B11TS, soft_cap(logits_BKGTS, softcap), MASKED_LOGIT)
    weights_BKGTS = jax.nn.softmax(logits_BKGTS, axis=-1).astype(v_BTKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BTKH).reshape(B, T, N, H)


class Attention(nn.Module):
    """Self-attention sublayer; `window` None looks at the whole segment."""

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
        N, K, H = c.num_heads, c.num_kv_heads, c.head_dim
        query_DNH = self.param("query", _project_init, (c.width, N, H)).astype(self.dtype)
        key_DKH = self.param("key", _project_init, (c.width, K, H)).astype(self.dtype)
        value_DKH = self.param("value", _project_init, (c.width, K, H)).astype(self.dtype)
        output_NHD = self.param("output", _output_init, (N, H, c.width)).astype(self.dtype)
        q_BTNH = rotate(jnp.einsum("BTD,DNH->BTNH", x_BTD, query_DNH), positions_BT, c.rope_base)
        k_BTKH = rotate(jnp.einsum("BTD,DKH->BTKH", x_BTD, key_DKH), positions_BT, c.rope_base)
        v_BTKH = jnp.einsum("BTD,DKH->BTKH", x_BTD, value_DKH)
        mixed_BTNH = attend(
            q_BTNH * jnp.asarray(c.query_factor, self.dtype),
            k_BTKH,
            v_BTKH,
            segments_BT,
            window=self.window,
            softcap=c.attention_softcap,
        )
        return jnp.einsum("BTNH,NHD->BTD", mixed_BTNH, output_NHD)
