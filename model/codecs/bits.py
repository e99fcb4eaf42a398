"""Random words and packed ids: the bits that codecs are made of.

Legend: C positions of a piece of one row, n words per position, M ids per position, W words that
hold them.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt32

DRAWS, ROUNDING = 0, 1
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_KEY_PARITY = np.uint32(0x1BD11BDA)


class Places(NamedTuple):
    """Where the positions of a piece stand: the key of their row, and their numbers in it."""

    row_key_2: UInt32[Array, "2"]
    positions_C: UInt32[Array, " C"]


def random_words(places: Places, stream: int, num: int) -> UInt32[Array, "C n"]:
    """n = `num` random words, a function of row key, position, `stream` and `num` alone.

    Threefry-2x32 with 20 rounds (Salmon et al., SC 2011) in counter mode: a block of two words has
    as counter its position, and its number with the stream above it. Written out, so that no
    configuration or version of a library can change what a key means.
    """
    half = -(-num // 2)
    key0, key1 = places.row_key_2
    schedule = (key0, key1, key0 ^ key1 ^ _KEY_PARITY)
    counter = np.arange(half, dtype=np.uint32) | np.uint32(stream << 24)
    x0 = places.positions_C[:, None] + schedule[0]
    x1 = counter + schedule[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x0 = x0 + x1
            x1 = (x1 << rotation | x1 >> (32 - rotation)) ^ x0
        x0 = x0 + schedule[(group + 1) % 3]
        x1 = x1 + schedule[(group + 2) % 3] + np.uint32(group + 1)
    return jnp.concatenate([x0, x1], axis=-1)[:, :num]


def id_bits(vocab_size: int) -> int:
    """Bits that an id takes, at least 1: 18 at a vocabulary of 256,000."""
    return max((vocab_size - 1).bit_length(), 1)


def pack(ids_CM: Int[Array, "C M"], vocab_size: int) -> UInt32[Array, "C W"]:
    """Ids below `vocab_size`, one after the other from the lowest bit, in as few words as do."""
    bits, num_ids = id_bits(vocab_size), ids_CM.shape[-1]
    begin_W = 32 * np.arange(-(-num_ids * bits // 32))
    words_CW = jnp.zeros((len(ids_CM), len(begin_W)), jnp.uint32)
    first_W = begin_W // bits
    # Ids that reach into a word: the first may begin in the word before, the last end in the next.
    for more in range(31 // bits + 2):
        id_W = first_W + more
        left_W = id_W * bits - begin_W
        there_W = (id_W < num_ids) & (left_W < 32)
        value_CW = ids_CM[:, np.minimum(id_W, num_ids - 1)].astype(jnp.uint32)
        up_W = np.clip(left_W, 0, 31).astype(np.uint32)
        down_W = np.clip(-left_W, 0, 31).astype(np.uint32)
        words_CW |= jnp.where(there_W, value_CW << up_W >> down_W, jnp.uint32(0))
    return words_CW


def unpack(words_CW: UInt32[Array, "C W"], num_ids: int, vocab_size: int) -> Int[Array, "C M"]:
    """The ids that `pack` was given, as int32."""
    bits = id_bits(vocab_size)
    begin_M = np.arange(num_ids) * bits
    word_M, offset_M = begin_M // 32, begin_M % 32
    low_CM = words_CW[:, word_M] >> offset_M.astype(np.uint32)
    next_M = np.minimum(word_M + 1, words_CW.shape[-1] - 1)
    # Two shifts, since one by 32 is not defined.
    high_CM = words_CW[:, next_M] << (31 - offset_M).astype(np.uint32) << np.uint32(1)
    split_M = offset_M + bits > 32
    ids_CM = low_CM | jnp.where(split_M, high_CM, jnp.uint32(0))
    return (ids_CM & np.uint32((1 << bits) - 1)).astype(jnp.int32)
