"""What a teacher sends: its distribution over the vocabulary, in few bytes per token.

A codec turns logits into small arrays on the teacher's device (`encode`) and those into sparse
targets on the student's (`decode`); `wire_view` and `from_wire` carry them between processes.
Legend: B rows, T positions, V vocabulary, k head entries, N draws, M = k + N targets.
"""

import hashlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, UInt32

Encoded = dict[str, Array]
RowKeys = UInt32[Array, "B 2"] | UInt32[np.ndarray, "B 2"]


class SparseTargets(NamedTuple):
    """Target probabilities of a few tokens per position; an id may occur more than once."""

    ids_BTM: Int[Array, "B T M"]
    weights_BTM: Float[Array, "B T M"]


@runtime_checkable
class Codec(Protocol):
    """How a distribution becomes targets. Both methods are pure and may be called inside jit."""

    @property
    def name(self) -> str:
        """Canonical: equal exactly when kind and all parameters are equal."""
        ...

    def encode(self, logits_BTV: Float[Array, "B T V"], row_keys_B: RowKeys) -> Encoded:
        """Arrays of leading shape [B, T]; a row's bytes depend on its logits and key alone."""
        ...

    def decode(self, encoded: Mapping[str, ArrayLike]) -> SparseTargets:
        """int32 ids and float32 weights, the loss being −Σ weight · log q."""
        ...


@dataclass(frozen=True)
class HybridCodec:
    """The `k` largest probabilities exactly, and the rest through `draws` samples of the tail.

    With a the head's mass, each of the N draws carries (1 − a) / N: the targets sum to one and
    their expectation is the teacher's distribution, so the student's expected gradient is exact
    (the sampling argument of arXiv 2503.16870, with the head taken out of the lottery).
    draws=0 is plain top-k, which is biased; k=0 is plain sampling.
    """

    k: int
    draws: int
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.k < 0 or self.draws < 0 or self.k + self.draws == 0:
            raise ValueError(
                f"hybrid codec with k={self.k} and draws={self.draws} sends nothing: both must be "
                "at least 0 and one of them above 0"
            )
        if not self.temperature > 0:
            raise ValueError(
                f"hybrid codec with temperature={self.temperature}: it divides the logits, so "
                "give a number above 0 (1.0 leaves the teacher as it is)"
            )

    @property
    def name(self) -> str:
        return f"hybrid(k={self.k},draws={self.draws},temperature={float(self.temperature)!r})"

    def encode(self, logits_BTV: Float[Array, "B T V"], row_keys_B: RowKeys) -> Encoded:
        """Return head_ids and head_probs [B, T, k] and draw_ids [B, T, N].

        Ids are uint16 where the vocabulary allows it, else uint32.

        Raises:
            ValueError: k exceeds the vocabulary.
        """
        V = logits_BTV.shape[-1]
        if self.k > V:
            raise ValueError(f"{self.name} asks for more entries than the {V} logits: lower k")
        probs_BTV = jax.nn.softmax(logits_BTV.astype(jnp.float32) / self.temperature, axis=-1)
        head_probs_BTk, head_ids_BTk = jax.lax.top_k(probs_BTV, self.k)
        if self.draws:
            tail_BTV = jnp.put_along_axis(probs_BTV, head_ids_BTk, 0.0, axis=-1, inplace=False)
            draw_ids_BTN = _draw(tail_BTV, _uniforms(row_keys_B, logits_BTV.shape[1], self.draws))
        else:
            draw_ids_BTN = jnp.zeros((*logits_BTV.shape[:2], 0), jnp.int32)
        id_dtype = jnp.uint16 if V <= 1 << 16 else jnp.uint32
        return {
            "head_ids": head_ids_BTk.astype(id_dtype),
            "head_probs": head_probs_BTk,
            "draw_ids": draw_ids_BTN.astype(id_dtype),
        }

    def decode(self, encoded: Mapping[str, ArrayLike]) -> SparseTargets:
        """Sparse targets of M = k + draws entries: the head first, then the draws."""
        head_probs_BTk = jnp.asarray(encoded["head_probs"])
        draw_ids_BTN = jnp.asarray(encoded["draw_ids"]).astype(jnp.int32)
        head_ids_BTk = jnp.asarray(encoded["head_ids"]).astype(jnp.int32)
        if not self.draws:
            return SparseTargets(head_ids_BTk, head_probs_BTk)
        tail_BT1 = jnp.maximum(1.0 - jnp.sum(head_probs_BTk, axis=-1, keepdims=True), 0.0)
        draw_weights_BTN = jnp.broadcast_to(tail_BT1 / self.draws, draw_ids_BTN.shape)
        return SparseTargets(
            jnp.concatenate([head_ids_BTk, draw_ids_BTN], axis=-1),
            jnp.concatenate([head_probs_BTk, draw_weights_BTN], axis=-1),
        )


def _uniforms(row_keys_B: RowKeys, T: int, draws: int) -> Float[Array, "B T N"]:
    """Uniform numbers in [0, 1), a function of row key, position and draw alone."""

    def position(key: Array, t: Array) -> Array:
        return jax.random.bits(jax.random.fold_in(key, t), (draws,), jnp.uint32)

    # The generator is named, since the default one can be changed by configuration.
    keys_B = jax.random.wrap_key_data(jnp.asarray(row_keys_B), impl="threefry2x32")
    bits_BTN = jax.vmap(jax.vmap(position, (None, 0)), (0, None))(keys_B, jnp.arange(T))
    return (bits_BTN >> 8).astype(jnp.float32) * 2.0**-24


def _draw(mass_BTV: Float[Array, "B T V"], uniform_BTN: Float[Array, "B T N"]) -> Array:
    """Draw indices in proportion to `mass_BTV`, never one without mass.

    Descends a tree of pairwise sums. Against a cumulative sum with binary search this takes as
    many look-ups, builds faster, and keeps small masses that a long running sum would round away.
    """
    below_one = 1.0 - 2.0**-23  # keeps a remainder under its subtree's mass despite rounding
    levels = [mass_BTV]
    while levels[-1].shape[-1] > 1:
        level = levels[-1]
        if level.shape[-1] % 2:
            level = jnp.pad(level, ((0, 0), (0, 0), (0, 1)))
            levels[-1] = level
        levels.append(level[..., 0::2] + level[..., 1::2])
    index_BTN = jnp.zeros(uniform_BTN.shape, jnp.int32)
    rest_BTN = jnp.minimum(uniform_BTN, below_one) * levels[-1]
    for level in reversed(levels[:-1]):
        left_BTN = jnp.take_along_axis(level, 2 * index_BTN, axis=-1)
        right_BTN = jnp.take_along_axis(level, 2 * index_BTN + 1, axis=-1)
        goes_right_BTN = rest_BTN >= left_BTN
        in_right_BTN = jnp.minimum(rest_BTN - left_BTN, right_BTN * below_one)
        rest_BTN = jnp.where(goes_right_BTN, in_right_BTN, rest_BTN)
        index_BTN = 2 * index_BTN + goes_right_BTN
    # A row without any mass walks off to the right; its draws weigh nothing.
    return jnp.minimum(index_BTN, mass_BTV.shape[-1] - 1)


def row_key(seed: int, source: int, index: int) -> np.ndarray:
    """The uint32[2] key of one row's draws: row `index` of data source `source` under `seed`.

    The same on every machine and in every version of the libraries.

    Raises:
        ValueError: a number is negative or does not fit 64 bits.
    """
    for name, value in (("seed", seed), ("source", source), ("index", index)):
        if not 0 <= value < 1 << 64:
            raise ValueError(f"{name}={value} cannot name a row: give a number from 0 to 2**64 - 1")
    digest = hashlib.blake2b(struct.pack("<3Q", seed, source, index), digest_size=8).digest()
    return np.frombuffer(digest, "<u4").astype(np.uint32)


def wire_view(arrays: Mapping[str, ArrayLike]) -> dict[str, np.ndarray]:
    """Host arrays that cross processes without a copy: values viewed as unsigned integers.

    A viewed array's name gains its dtype, as in "head_probs:float32", for `from_wire`.
    """
    wire = {}
    for name, device_array in arrays.items():
        array = np.ascontiguousarray(device_array)
        if array.dtype.kind == "u":
            wire[name] = array
        else:
            wire[f"{name}:{array.dtype.name}"] = array.view(f"u{array.dtype.itemsize}")
    return wire


def from_wire(wire: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Undo `wire_view`, without a copy."""
    arrays = {}
    for wire_name, array in wire.items():
        name, _, dtype = wire_name.partition(":")
        arrays[name] = array.view(np.dtype(dtype)) if dtype else array
    return arrays


def bytes_per_token(codec: Codec, vocab_size: int) -> int:
    """Bytes on the wire per position."""
    logits_BTV = jax.ShapeDtypeStruct((1, 1, vocab_size), jnp.float32)
    row_keys_B = jax.ShapeDtypeStruct((1, 2), jnp.uint32)
    encoded = jax.eval_shape(codec.encode, logits_BTV, row_keys_B)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(encoded))


CODECS: dict[str, type[HybridCodec]] = {"hybrid": HybridCodec}


def make_codec(kind: str, **params: int | float) -> Codec:
    """Build a codec by its kind, one of `CODECS`, and parameters.

    Raises:
        ValueError: unknown kind, or parameters the kind does not take.
    """
    if kind not in CODECS:
        raise ValueError(f"unknown codec kind {kind!r}: choose one of {', '.join(sorted(CODECS))}")
    try:
        return CODECS[kind](**params)  # pyright: ignore[reportArgumentType]
    except TypeError as error:
        raise ValueError(f"codec {kind!r} does not take these parameters: {error}") from error
