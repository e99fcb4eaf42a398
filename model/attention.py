"""Grouped-query attention with rotary embedding, as a sublayer.

Legend: B rows, T positions, D width, N query heads, K key-value heads, H head size.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from model.cache import LayerCache, extend, visible_slots
from model.config import ModelConfig
from model.execution import Execution
from model.kernels import choose_kernel, mix

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


class Attention(nn.Module):
    """Self-attention sublayer; `window` None looks at the whole segment."""

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
        c, dtype = self.config, self.how.dtype
        N, K, H = c.num_heads, c.num_kv_heads, c.head_dim
        query_DNH = self.param("query", _project_init, (c.width, N, H)).astype(dtype)
        key_DKH = self.param("key", _project_init, (c.width, K, H)).astype(dtype)
        value_DKH = self.param("value", _project_init, (c.width, K, H)).astype(dtype)
        output_NHD = self.param("output", _output_init, (N, H, c.width)).astype(dtype)
        q_BTNH = rotate(jnp.einsum("BTD,DNH->BTNH", x_BTD, query_DNH), positions_BT, c.rope_base)
        q_BTNH *= jnp.asarray(c.query_factor, dtype)
        k_BTKH = rotate(jnp.einsum("BTD,DKH->BTKH", x_BTD, key_DKH), positions_BT, c.rope_base)
        v_BTKH = jnp.einsum("BTD,DKH->BTKH", x_BTD, value_DKH)
        if cache is not None:
            cache = extend(cache, k_BTKH, v_BTKH, positions_BT, segments_BT != 0)
        if cache is not None and x_BTD.shape[1] == 1:
            mask_BTS = visible_slots(cache, positions_BT, self.window)
            mixed_BTNH = mix(
                q_BTNH, cache.keys_BSKH, cache.values_BSKH, mask_BTS, c.attention_softcap
            )
        else:
            attend = choose_kernel(self.how.attention, x_BTD.shape[1], self.how.mesh)
            mixed_BTNH = attend(
                q_BTNH,
                k_BTKH,
                v_BTKH,
                segments_BT,
                window=self.window,
                softcap=c.attention_softcap,
            )
        return jnp.einsum("BTNH,NHD->BTD", mixed_BTNH, output_NHD), cache
