"""Probabilities in fewer bits, rounded at random so that their expectation stays.

Legend: C positions, k probabilities per position.
"""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float32, UInt8, UInt32

from model.config import ValueType

VALUE_TYPES: tuple[str, ...] = get_args(ValueType)

# The byte j stands for 2^(−j / 10), down to 2e-8 in steps of 7 %; the last one for zero.
_STEPS_PER_OCTAVE = 10
_ZERO = 255


def round_values(probs_Ck: Float32[Array, "C k"], to: str, words_Ck: UInt32[Array, "C k"]) -> Array:
    """Probabilities [C, k] as `to`: one of the two neighbours, in expectation the number itself.

    Stochastic rounding (arXiv 1502.02551); float32 stays as it is.

    Args:
        probs_Ck: float32, from 0 to 1.
        to: one of `VALUE_TYPES`.
        words_Ck: random words.
    """
    if to == "float32":
        return probs_Ck
    if to == "bfloat16":
        bits_Ck = jax.lax.bitcast_convert_type(probs_Ck, jnp.uint32) + (words_Ck >> 16)
        return jax.lax.bitcast_convert_type((bits_Ck >> 16).astype(jnp.uint16), jnp.bfloat16)
    assert to == "uint8"
    tiny = np.finfo(np.float32).tiny
    steps_Ck = -_STEPS_PER_OCTAVE * jnp.log2(jnp.clip(probs_Ck, tiny, 1.0))
    above_Ck = jnp.clip(jnp.floor(steps_Ck), 0, _ZERO - 1).astype(jnp.uint8)
    larger_Ck, smaller_Ck = _of_byte(above_Ck), _of_byte(above_Ck + jnp.uint8(1))
    share_Ck = (probs_Ck - smaller_Ck) / (larger_Ck - smaller_Ck)
    goes_down_Ck = (words_Ck >> 8).astype(jnp.float32) * 2.0**-24 >= share_Ck
    return above_Ck + goes_down_Ck.astype(jnp.uint8)


def restore_values(values: ArrayLike) -> Float32[Array, "..."]:
    """The float32 probabilities that rounded values stand for; their type says how."""
    array = jnp.asarray(values)
    return _of_byte(array) if array.dtype == jnp.uint8 else array.astype(jnp.float32)


def _of_byte(steps: UInt8[Array, "..."]) -> Float32[Array, "..."]:
    probs = jnp.exp2(steps.astype(jnp.float32) / -_STEPS_PER_OCTAVE)
    return jnp.where(steps == _ZERO, 0.0, probs)
