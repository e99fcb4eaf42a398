"""What a teacher sends: its distribution over the vocabulary, in few bytes per token.

A codec turns logits into small arrays on the teacher's device (`encode`) and those into targets
on the student's (`decode`); `wire_view` and `from_wire` carry them between processes. The codecs
themselves stand in `model.codecs`.
"""

import hashlib
import struct
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from model.codecs.base import (
    Codec,
    Encoded,
    FullTargets,
    HiddenTargets,
    ScoredPiece,
    SparseTargets,
    Targets,
    Unembedding,
)
from model.codecs.sparse import Gemma3Codec, HybridCodec, SampledCodec, TopKCodec
from model.codecs.whole import FullCodec, HiddenCodec

__all__ = [
    "CODECS",
    "Codec",
    "Encoded",
    "FullTargets",
    "HiddenCodec",
    "HiddenTargets",
    "ScoredPiece",
    "SparseTargets",
    "Targets",
    "Unembedding",
    "bytes_per_token",
    "encoded_shapes",
    "from_wire",
    "make_codec",
    "row_key",
    "wire_view",
]

_KINDS = (HybridCodec, TopKCodec, SampledCodec, Gemma3Codec, HiddenCodec, FullCodec)
CODECS: dict[str, Callable[..., Codec]] = {codec.kind: codec for codec in _KINDS}


def make_codec(kind: str, **params: int | float | str) -> Codec:
    """Build a codec by its kind, one of `CODECS`, and parameters.

    Raises:
        ValueError: unknown kind, or parameters the kind does not take.
    """
    if kind not in CODECS:
        raise ValueError(f"unknown codec kind {kind!r}: choose one of {', '.join(CODECS)}")
    try:
        return CODECS[kind](**params)
    except TypeError as error:
        raise ValueError(f"codec {kind!r} does not take these parameters: {error}") from error


def encoded_shapes(
    codec: Codec, vocab_size: int, width: int | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of one encoded position, [1, …].

    Args:
        width: the teacher's, which decides what hidden states take.

    Raises:
        ValueError: hidden states of no known width, or as `Codec.encode`.
    """
    if width is None and isinstance(codec, HiddenCodec):
        raise ValueError("hidden states take bytes by the teacher's width: give width")
    return jax.eval_shape(
        lambda *piece: codec.encode(ScoredPiece(*piece)),
        jax.ShapeDtypeStruct((1, vocab_size), jnp.float32),
        jax.ShapeDtypeStruct((2,), jnp.uint32),
        jax.ShapeDtypeStruct((1, width or 1), jnp.bfloat16),
    )


def bytes_per_token(codec: Codec, vocab_size: int, width: int | None = None) -> int:
    """Bytes on the wire per position; raises as `encoded_shapes`."""
    shapes = encoded_shapes(codec, vocab_size, width).values()
    return sum(leaf.size * leaf.dtype.itemsize for leaf in shapes)


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
