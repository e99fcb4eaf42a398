"""What crosses the wire: names, keys, bytes, and that a row's bytes are its own."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend.random import threefry_2x32

from configs.distillation import CODEC_DEFAULTS, CodecConfig
from model.codecs import rows
from model.codecs.bits import Places, pack, random_words, unpack
from model.codecs.rows import encode_rows
from model.config import MODEL_PRESETS
from model.targets import (
    CODECS,
    Codec,
    HybridCodec,
    SampledCodec,
    bytes_per_token,
    from_wire,
    make_codec,
    row_key,
    wire_view,
)
from model.transformer import unembed
from tests.helpers.codec_cases import encode, keys

SMALL = {
    "hybrid": {"k": 3, "draws": 5},
    "topk": {"k": 4},
    "sampled": {"draws": 7},
    "gemma3": {"draws": 6},
    "hidden": {},
    "full": {},
}


@pytest.mark.parametrize("kind", SMALL)
def test_a_row_does_not_feel_its_slot_its_neighbours_or_the_pieces(kind, monkeypatch):
    """Equal bit for bit, however rows are ordered and however many logits there are at once."""
    codec = make_codec(kind, **SMALL[kind])
    model = MODEL_PRESETS["tiny"].model_copy(update={"vocab_size": 50, "num_embeddings": 56})
    params = {"embedding": jax.random.normal(jax.random.key(0), (56, 32))}
    x = jax.random.normal(jax.random.key(1), (4, 6, 32))

    def encoded(order: list[int]) -> dict[str, np.ndarray]:
        chosen = np.array(order)
        found = jax.jit(lambda x, keys: encode_rows(codec, params, model, x, keys))(
            x[chosen], keys(4)[chosen]
        )
        return {name: np.asarray(array) for name, array in found.items()}

    plain = encoded([0, 1, 2, 3])
    for order in ([3, 1, 0, 2], [2, 2, 2, 2], [1]):
        moved = encoded(order)
        assert moved.keys() == plain.keys()
        for name, array in moved.items():
            np.testing.assert_array_equal(array.view("u1"), plain[name][order].view("u1"))
    at_once = encode(codec, unembed(params, model, x)[..., :50], keys(4), x)
    monkeypatch.setattr(rows, "PIECE_LOGITS_BYTES", 4 * 50 * 4)  # pieces of 3, of 6 positions
    in_pieces = encoded([0, 1, 2, 3])
    for name, array in in_pieces.items():
        assert array.shape == at_once[name].shape and array.dtype == at_once[name].dtype
        if name == "ids":
            np.testing.assert_array_equal(array, at_once[name])
            np.testing.assert_array_equal(array, plain[name])


@pytest.mark.parametrize("codec", [HybridCodec(3, 5), SampledCodec(7)])
def test_draws_differ_by_row_seed_and_position(codec):
    logits = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (50,)), (2, 2, 50))
    ids = [
        np.asarray(codec.decode(encode(codec, logits, keys(2, seed)), 50).ids_BTM)
        for seed in (0, 5)
    ]
    draws = [tuple(row) for array in ids for row in array.reshape(4, -1)]
    assert len(set(draws)) == len(draws) == 8


def test_draws_and_keys_are_pinned():
    """The random numbers are part of the format: caches outlive versions."""
    assert row_key(1, 2, 3).tolist() == [3860511351, 3036371597]
    codec = SampledCodec(6)
    encoded = encode(codec, jnp.zeros((1, 2, 1000)), row_key(1, 2, 3)[None])
    assert codec.decode(encoded, 1000).ids_BTM.tolist() == [PINNED_DRAWS]


PINNED_DRAWS = [[371, 792, 261, 922, 832, 553], [744, 605, 20, 498, 751, 962]]


def test_random_words_are_those_of_the_paper():
    """Threefry-2x32 with 20 rounds, against JAX's own and one known answer of its authors."""
    words = random_words(Places(jnp.zeros(2, jnp.uint32), jnp.zeros(1, jnp.uint32)), 0, 2)
    assert [hex(word) for word in words[0].tolist()] == ["0x6b200159", "0x99ba4efe"]
    key, positions = jnp.asarray(row_key(1, 2, 3)), np.array([0, 5, 2**32 - 1], np.uint32)
    found = random_words(Places(key, jnp.asarray(positions)), 1, 5)
    for place in range(3):
        counters = [*[positions[place]] * 3, *((1 << 24) + np.arange(3))]
        expected = threefry_2x32(key, np.array(counters, np.uint32))
        np.testing.assert_array_equal(found[place], expected[:5])


@settings(max_examples=25, deadline=None)
@given(
    vocab_size=st.integers(2, 1 << 31) | st.sampled_from([2, 256, 257, 65_536, 65_537, 256_000]),
    num_ids=st.integers(1, 70),
    seed=st.integers(0, 99),
)
def test_packed_ids_come_back_and_take_no_more_words_than_needed(vocab_size, num_ids, seed):
    ids = np.random.default_rng(seed).integers(0, vocab_size, (3, num_ids), np.int32)
    ids[0], ids[1] = 0, vocab_size - 1
    packed = jax.jit(pack, static_argnums=1)(ids, vocab_size)
    bits = max(int(vocab_size - 1).bit_length(), 1)
    assert packed.dtype == jnp.uint32 and packed.shape == (3, -(-num_ids * bits // 32))
    as_one = sum(int(word) << (32 * place) for place, word in enumerate(np.asarray(packed[2])))
    assert as_one == sum(int(each) << (bits * place) for place, each in enumerate(ids[2]))
    unpacked = jax.jit(unpack, static_argnums=(1, 2))(packed, num_ids, vocab_size)
    np.testing.assert_array_equal(unpacked, ids)


@pytest.mark.parametrize(
    ("kind", "params", "num_bytes"),
    [
        ("hybrid", {"k": 16, "draws": 32}, 27 * 4 + 32),
        ("hybrid", {"k": 16, "draws": 32, "values": "uint8"}, 27 * 4 + 16),
        ("hybrid", {"k": 16, "draws": 32, "values": "float32"}, 27 * 4 + 64),
        ("topk", {"k": 64}, 144 + 128),
        ("sampled", {"draws": 50}, 116),
        ("gemma3", {"draws": 256}, 576 + 512),
        ("hidden", {}, 2 * 3584 + 4),
        ("full", {}, 4 * 256_000),
    ],
)
def test_bytes_per_token_at_the_vocabulary_of_gemma(kind, params, num_bytes):
    assert bytes_per_token(make_codec(kind, **params), 256_000, 3584) == num_bytes
    counted = CodecConfig(kind=kind, **params).bytes_per_token(256_000)
    assert counted == (None if kind == "hidden" else num_bytes), "without JAX, for `--check`"


def test_bytes_of_hidden_states_need_a_width():
    with pytest.raises(ValueError, match="give width"):
        bytes_per_token(make_codec("hidden"), 256_000)


@pytest.mark.parametrize("kind", SMALL)
def test_arrays_cross_the_wire_as_unsigned_numbers_and_come_back_equal(kind):
    codec, V = make_codec(kind, **SMALL[kind]), 65_537
    x = jax.random.normal(jax.random.key(1), (2, 3, 8))
    encoded = encode(codec, jax.random.normal(jax.random.key(0), (2, 3, V)), keys(2), x)
    wire = wire_view(encoded)
    assert all(isinstance(a, np.ndarray) and a.dtype.kind == "u" for a in wire.values())
    assert sum(a.nbytes for a in wire.values()) == 6 * bytes_per_token(codec, V, 8)
    back = from_wire(wire)
    assert back.keys() == encoded.keys()
    for name in encoded:
        assert back[name].dtype == encoded[name].dtype
        np.testing.assert_array_equal(back[name], encoded[name])


def test_codecs_are_named_by_kind_and_all_parameters():
    codec = make_codec("hybrid", k=16, draws=32)
    assert codec == HybridCodec(16, 32) and isinstance(codec, Codec)
    assert codec.name == "hybrid(draws=32,k=16,temperature=1.0,values=bfloat16)"
    changes = {"k": 3, "draws": 3, "values": "uint8", "temperature": 2}
    names = {
        make_codec(kind, **{**defaults, **dict(some)}).name
        for kind, defaults in CODEC_DEFAULTS.items()
        for number in range(5)
        for some in itertools.combinations(changes.items(), number)
        if {name for name, _ in some} <= {*defaults, "temperature"}
    }
    assert len(names) == 2**4 + 2**3 + 2**2 + 2**3 + 2 + 2
    assert make_codec("full", temperature=1).name == make_codec("full", temperature=1.0).name


def test_every_kind_of_the_configuration_has_a_codec():
    assert set(CODEC_DEFAULTS) == set(CODECS)
    for kind in CODECS:
        assert isinstance(
            make_codec(kind, **CodecConfig.model_validate({"kind": kind}).params()), Codec
        )


@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [
        ("hybird", {}, "unknown codec kind 'hybird': choose one of hybrid, topk"),
        ("hybrid", {"k": 1, "draws": 1, "drwas": 2}, "drwas"),
        ("topk", {"k": 1, "draws": 1}, "draws"),
        ("hybrid", {"k": 0, "draws": 4}, "k should be at least 1"),
        ("sampled", {"draws": 0}, "draws should be at least 1"),
        ("topk", {"k": 4, "values": "int4"}, "values should be one of bfloat16, uint8, float32"),
        ("hidden", {"temperature": 0.0}, "above 0"),
    ],
)
def test_wrong_codecs_are_refused(kind, params, message):
    with pytest.raises(ValueError, match=message):
        make_codec(kind, **params)


def test_a_head_larger_than_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="asks for 9 of 8 logits: lower k"):
        encode(make_codec("topk", k=9), jnp.zeros((1, 1, 8)), keys(1))


def test_row_keys_take_64_bits_and_nothing_else():
    assert row_key(2**64 - 1, 0, 0).shape == (2,)
    with pytest.raises(ValueError, match="index=-1"):
        row_key(0, 0, -1)
