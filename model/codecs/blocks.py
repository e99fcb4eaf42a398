"""The largest logits of a position, and draws from the rest, in two passes over the vocabulary.

One pass takes the largest of each block of r neighbours: the k largest logits lie in the k blocks
of the largest maxima. The other sums the probability of each block; a draw first finds a block of
blocks, then a block, then a token, each by a random number of its own. So no sum is longer than a
few hundred terms, and small probabilities are not rounded away.

Logits are equal where a comparison says so: give no zero below zero, which top_k takes for less.
Legend: C positions, V vocabulary, G blocks, r their size, n blocks of blocks, k head entries, N
draws.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32


class Head(NamedTuple):
    """The largest logits in falling order; of equal ones those of the lowest ids."""

    logits_Ck: Float[Array, "C k"]
    ids_Ck: Int[Array, "C k"]


def find_head(logits_CV: Float[Array, "C V"], k: int) -> Head:
    """The k largest logits of each position, k from 1 to V."""
    size = _block_size(logits_CV.shape[-1])
    if k * size >= logits_CV.shape[-1]:
        return Head(*jax.lax.top_k(logits_CV, k))
    blocks_CGr = _blocks(logits_CV, size, -jnp.inf)
    # In the order of ids, which is the order that top_k keeps among equals.
    chosen_Ck = jnp.sort(jax.lax.top_k(blocks_CGr.max(axis=-1), k)[1], axis=-1)
    inside = jnp.take_along_axis(blocks_CGr, chosen_Ck[..., None], axis=1)
    largest_Ck, place_Ck = jax.lax.top_k(inside.reshape(len(logits_CV), k * size), k)
    block_Ck = jnp.take_along_axis(chosen_Ck, place_Ck // size, axis=-1)
    return Head(largest_Ck, block_Ck * size + place_Ck % size)


class Tail(NamedTuple):
    """All logits but a head's: those below its least, and later ids of the same logit."""

    logits_CV: Float[Array, "C V"]
    """Of the whole vocabulary, the head's among them."""
    peak_C1: Float[Array, "C 1"]
    """The largest of all."""
    least_C1: Float[Array, "C 1"]
    """The smallest of the head; +∞ where there is none."""
    last_id_C1: Int[Array, "C 1"]
    """The head's largest id of that logit."""

    @classmethod
    def below(cls, logits_CV: Float[Array, "C V"], head: Head | None) -> "Tail":
        """The rest after a head, or all where there is none."""
        if head is None:
            peak_C1 = logits_CV.max(axis=-1, keepdims=True)
            above_all = jnp.full_like(peak_C1, jnp.inf)
            return cls(logits_CV, peak_C1, above_all, jnp.zeros(peak_C1.shape, jnp.int32))
        # Not its first and last entry: where top_k's output is cut, XLA on CPU sorts everything.
        peak_C1 = head.logits_Ck.max(axis=-1, keepdims=True)
        least_C1 = head.logits_Ck.min(axis=-1, keepdims=True)
        ids_Ck = jnp.where(head.logits_Ck == least_C1, head.ids_Ck, -1)
        return cls(logits_CV, peak_C1, least_C1, ids_Ck.max(axis=-1, keepdims=True))

    def masses(self) -> Float[Array, "C V"]:
        """exp(logit − peak) in the tail, 0 in the head."""
        return _mass(self, self.logits_CV, jnp.arange(self.logits_CV.shape[-1]))


def _mass(tail: Tail, logits: Array, ids: Array) -> Array:
    """The masses of some logits of each position, [C, …], and their ids, of a shape that fits."""
    axes = tuple(range(2, logits.ndim))
    peak, least, last = (
        jnp.expand_dims(x, axes) for x in (tail.peak_C1, tail.least_C1, tail.last_id_C1)
    )
    kept = (logits < least) | ((logits == least) & (ids > last))
    return jnp.where(kept, jnp.exp(logits - peak), 0.0)


class BlockSums(NamedTuple):
    """Masses of the blocks of r tokens, and of the blocks of r of those."""

    blocks_CG: Float[Array, "C G"]
    blocks_of_blocks_Cn: Float[Array, "C n"]

    @property
    def total_C1(self) -> Float[Array, "C 1"]:
        """The tail's whole mass."""
        return self.blocks_of_blocks_Cn.sum(axis=-1, keepdims=True)


def sum_blocks(tail: Tail) -> BlockSums:
    """The tail's masses, block by block."""
    size = _block_size(tail.logits_CV.shape[-1])
    blocks_CG = _blocks(tail.masses(), size, 0.0).sum(axis=-1)
    return BlockSums(blocks_CG, _blocks(blocks_CG, size, 0.0).sum(axis=-1))


def draw_ids(tail: Tail, sums: BlockSums, words: UInt32[Array, "C n"]) -> Int[Array, "C N"]:
    """Draw ids in proportion to the tail's masses, never one without mass if there is any.

    Args:
        words: three random words for each draw.
    """
    C, vocab_size = tail.logits_CV.shape
    size = _block_size(vocab_size)
    uniform_3CN = (words >> 8).astype(jnp.float32).reshape(C, 3, -1) * 2.0**-24
    # Below one by more than a product rounds, so that it stays below the sum.
    uniform_3CN = jnp.moveaxis(jnp.minimum(uniform_3CN, 1.0 - 2.0**-23), 1, 0)
    group_CN = _pick(sums.blocks_of_blocks_Cn[:, None], uniform_3CN[0])
    groups = _blocks(sums.blocks_CG, size, 0.0)
    inside = _pick(jnp.take_along_axis(groups, group_CN[..., None], axis=1), uniform_3CN[1])
    block_CN = group_CN * size + inside
    blocks_CGr = _blocks(tail.logits_CV, size, -jnp.inf)
    # Where the tail has no mass, all choices are the last. Such a draw weighs what rounding left
    # of the head: nothing, or on average nothing.
    block_CN = jnp.minimum(block_CN, blocks_CGr.shape[1] - 1)
    logits_CNr = jnp.take_along_axis(blocks_CGr, block_CN[..., None], axis=1)
    ids_CNr = block_CN[..., None] * size + jnp.arange(size)
    ids_CN = block_CN * size + _pick(_mass(tail, logits_CNr, ids_CNr), uniform_3CN[2])
    return jnp.minimum(ids_CN, vocab_size - 1)


def _pick(masses: Float[Array, "C #N n"], uniform_CN: Float[Array, "C N"]) -> Int[Array, "C N"]:
    """One of n by mass: the first whose running sum is above the random share of the whole."""
    num = masses.shape[-1]
    # As a product: a running sum of many short rows is what matrix units do at once.
    ahead = np.triu(np.ones((num, num), np.float32))
    running = jnp.matmul(masses, ahead, precision=jax.lax.Precision.HIGHEST)
    some = masses > 0
    whole = jnp.max(jnp.where(some, running, 0.0), axis=-1)
    hit = some & (running > (uniform_CN * whole)[..., None])
    return jnp.where(hit, jnp.arange(num), num - 1).min(axis=-1)


def _block_size(vocab_size: int) -> int:
    """About the cube root, so that all three choices of a draw are among equally many."""
    return 1 << max(round(math.log2(vocab_size) / 3), 2)


def _blocks(values: Float[Array, "C n"], size: int, filling: float) -> Float[Array, "C G r"]:
    padding = -values.shape[-1] % size
    padded = jnp.pad(values, ((0, 0), (0, padding)), constant_values=filling)
    return padded.reshape(len(values), -1, size)
