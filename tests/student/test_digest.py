"""A digest that tells two states apart by a single bit, wherever their shards lie."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from model.sharding import make_mesh
from workers.digest import state_digest

DTYPES = {"float32": 32, "int32": 32, "bfloat16": 16, "uint8": 8}


class Pair(NamedTuple):
    left: Any
    right: Any


def sample_tree() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    values = {
        name: rng.integers(0, 2**bits, (8, 4), np.uint32).astype(f"u{bits // 8}")
        for name, bits in DTYPES.items()
    }
    return {name: array.view(jnp.dtype(name)) for name, array in values.items()}


TREE = sample_tree()
DIGEST = state_digest(TREE)


def with_flipped(tree: dict[str, Any], name: str, element: int, bit: int) -> dict[str, Any]:
    flipped = tree[name].copy()
    bits = flipped.view(f"u{flipped.dtype.itemsize}").reshape(-1)
    bits[element] ^= bits.dtype.type(1 << bit)
    return {**tree, name: flipped}


@settings(deadline=None, max_examples=200)
@given(st.sampled_from(sorted(DTYPES)), st.integers(0, 31), st.integers(0, 31))
def test_any_bit_changes_it(name, element, bit):
    tree = with_flipped(TREE, name, element, bit % DTYPES[name])
    assert state_digest(tree) != DIGEST
    back = with_flipped(tree, name, element, bit % DTYPES[name])
    assert state_digest(back) == DIGEST


@settings(deadline=None, max_examples=50)
@given(
    st.sets(st.tuples(st.sampled_from(sorted(DTYPES)), st.integers(0, 31)), min_size=2, max_size=6),
    st.integers(0, 7),
)
def test_several_flips_do_not_cancel(places, bit):
    tree = TREE
    for name, element in places:
        tree = with_flipped(tree, name, element, bit)
    assert state_digest(tree) != DIGEST


@pytest.mark.parametrize("low", [0.0, 1.0])
def test_signs_of_zero_and_kinds_of_nan_are_bits(low):
    nans = np.array([0x7FC00000, 0x7FC00001, 0xFFC00000], np.uint32).view(np.float32)
    digests = {state_digest({"x": np.array([low, nan], np.float32)}) for nan in nans}
    assert len(digests) == 3
    zeros = [np.array([low, 0.0], np.float32), np.array([low, -0.0], np.float32)]
    assert state_digest({"x": zeros[0]}) != state_digest({"x": zeros[1]})
    tiny = np.array([low, 1e-45], np.float32)
    assert state_digest({"x": tiny}) != state_digest({"x": zeros[0]}), "denormals are not flushed"


@pytest.mark.parametrize(
    ("sizes", "spec"),
    [
        ({"data": 8}, PartitionSpec("data")),
        ({"data": 8}, PartitionSpec()),
        ({"fsdp": 2, "model": 4}, PartitionSpec("fsdp", "model")),
        ({"fsdp": 4, "model": 2}, PartitionSpec("model", "fsdp")),
        ({"slice": 2, "fsdp": 4}, PartitionSpec(("slice", "fsdp"))),
    ],
)
def test_where_the_shards_lie_does_not_matter(sizes, spec):
    sharding = NamedSharding(make_mesh(sizes), spec)
    assert state_digest(jax.device_put(TREE, sharding)) == DIGEST


def test_names_and_positions_matter():
    x, y = jnp.arange(6, dtype=jnp.int32), jnp.arange(6, dtype=jnp.int32) + 7
    digests = {
        state_digest(tree)
        for tree in (
            {"a": x, "b": y},
            {"a": y, "b": x},
            {"a": x, "c": y},
            {"a": x},
            {"a": {"b": x}, "b": y},
            {"a": x[::-1], "b": y},
            {"a": x.reshape(2, 3).T.reshape(6), "b": y},
        )
    }
    assert len(digests) == 7


def test_zeros_are_counted():
    assert state_digest({"a": jnp.zeros(3)}) != state_digest({"a": jnp.zeros(4)})
    assert state_digest({"a": jnp.zeros(3)}) != state_digest({"b": jnp.zeros(3)})


def test_the_kind_of_container_does_not_matter():
    """Storage gives back dicts and lists where named tuples and tuples were saved."""
    x, y = jnp.arange(3), jnp.ones((2, 2))
    digest = state_digest(Pair(x, (y, x)))
    assert digest == state_digest({"left": x, "right": [y, x]})
    assert digest == state_digest({"left": x, "right": {0: y, 1: x}})
    assert len(digest) == 16 and int(digest, 16) >= 0


def test_both_halves_tell_places_apart_by_themselves():
    """So two states that differ in several places agree by chance once in 2^64, not in 2^32."""
    digests = [state_digest({"a": jnp.array(x, jnp.int32)}) for x in ([1, 2, 3], [2, 1, 3])]
    assert digests[0][:8] != digests[1][:8] and digests[0][8:] != digests[1][8:]
    assert digests[0][:8] != digests[0][8:]
