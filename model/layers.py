"""Layers without attention: normalisation and the gated feed-forward.

Parameters are float32; each module computes in its `dtype`. Legend: B rows, T positions,
D width, F feed-forward.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

# Variance 1 / (product of the input dims): activations keep their size through a projection.
fan_in_init = nn.initializers.variance_scaling(1.0, "fan_in", "normal")


def soft_cap(x: Float[Array, "..."], cap: float | Float[Array, ""]) -> Float[Array, "..."]:
    """Squash `x` smoothly into (-cap, cap)."""
    return cap * jnp.tanh(x / cap)


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32; the scale is stored as an offset from one."""

    eps: float

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        scale_D = self.param("scale", nn.initializers.zeros_init(), x_BTD.shape[-1:])
        x32_BTD = x_BTD.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32_BTD), axis=-1, keepdims=True)
        normed_BTD = x32_BTD * jax.lax.rsqrt(mean_square + self.eps) * (1.0 + scale_D)
        return normed_BTD.astype(x_BTD.dtype)


class FeedForward(nn.Module):
    """GeGLU (arXiv 2002.05202) with the tanh approximation of GELU."""

    hidden: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        width = x_BTD.shape[-1]
        gate_DF = self.param("gate", fan_in_init, (width, self.hidden))
        up_DF = self.param("up", fan_in_init, (width, self.hidden))
        down_FD = self.param("down", fan_in_init, (self.hidden, width))
        gate_BTF = jnp.einsum("BTD,DF->BTF", x_BTD, gate_DF.astype(self.dtype))
        up_BTF = jnp.einsum("BTD,DF->BTF", x_BTD, up_DF.astype(self.dtype))
        hidden_BTF = nn.gelu(gate_BTF, approximate=True) * up_BTF
        return jnp.einsum("BTF,FD->BTD", hidden_BTF, down_FD.astype(self.dtype))
