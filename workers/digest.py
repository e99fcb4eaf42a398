"""One number that tells whether two states are the same, bit for bit."""

import zlib
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32

Sums = tuple[UInt32[Array, ""], UInt32[Array, ""]]

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def state_digest(tree: Any) -> str:
    """Sixteen hex digits that depend on every bit of every leaf, its name and its position.

    Each element is mixed with its leaf's name and its own index and then summed modulo 2^32,
    so the digest is computed where the shards lie and does not depend on the mesh. A change in
    one element always changes it.

    Leaves that look alike share a program, so that little has to be compiled for it.
    """
    sums = [_own_sums(leaf, key) for leaf, key in _leaves(tree)]
    total = np.stack(jax.device_get(sums)).sum(axis=0, dtype=np.uint32)
    return hex_digest((total[0], total[1]))


def hex_digest(sums: Sums | tuple[np.uint32, np.uint32]) -> str:
    """The digest that `tree_sums` are of; waits for them."""
    low, high = sums
    return f"{int(high):08x}{int(low):08x}"


def join_digests(digests: Iterable[str]) -> str:
    """The digest of a tree from those of trees that hold its leaves between them."""
    halves = [(int(digest[:8], 16), int(digest[8:], 16)) for digest in digests]
    high, low = (sum(half) % 2**32 for half in zip(*halves, strict=True))
    return f"{high:08x}{low:08x}"


@jax.jit
def tree_sums(tree: Any) -> Sums:
    """The digest of a tree in one program, still on the devices: for what is digested often."""
    low, high = jnp.stack([_sums(leaf, key) for leaf, key in _leaves(tree)]).sum(
        axis=0, dtype=jnp.uint32
    )
    return low, high


def _leaves(tree: Any) -> list[tuple[Any, np.uint32]]:
    """Each leaf, and what its name adds to its digest."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(leaf, np.uint32(zlib.crc32(_name(path).encode()))) for path, leaf in leaves]


def _sums(leaf: Any, key: UInt32[Array, ""] | np.uint32) -> UInt32[Array, "2"]:
    bits = _bits(leaf)
    index = _linear_index(bits.shape)
    first = _mix(bits ^ _mix(index + key))
    second = _mix(first + index + jnp.uint32(0x9E3779B9))
    return jnp.stack([first.sum(dtype=jnp.uint32), second.sum(dtype=jnp.uint32)])


_own_sums = jax.jit(_sums)


def _name(path: Any) -> str:
    """A leaf's name, equal for a named tuple, a dict or the object read back from storage."""
    return "/".join(str(getattr(k, "name", getattr(k, "key", getattr(k, "idx", k)))) for k in path)


def _bits(leaf: Array) -> UInt32[Array, "..."]:
    if leaf.dtype == jnp.bool_:
        return leaf.astype(jnp.uint32)
    unsigned = _UNSIGNED.get(leaf.dtype.itemsize)
    assert unsigned is not None, f"no digest for {leaf.dtype}"
    return jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)


def _linear_index(shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    return index


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A bijection of 32 bits in which each input bit reaches each output bit (MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
