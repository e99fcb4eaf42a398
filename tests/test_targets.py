"""The codecs: exact heads, fair draws, unbiased gradients, stable random numbers, the wire."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.losses import distillation_loss
from model.targets import (
    Codec,
    HybridCodec,
    bytes_per_token,
    from_wire,
    make_codec,
    row_key,
    wire_view,
)


def keys(count, seed=0):
    return np.stack([row_key(seed, 0, i) for i in range(count)])


@partial(jax.jit, static_argnums=0)
def encode(codec, logits, row_keys):
    return codec.encode(logits, row_keys)


def zipf_logits(V, seed=0):
    """A long-tailed distribution in shuffled order."""
    order = np.random.default_rng(seed).permutation(V)
    return jnp.asarray(-1.2 * np.log1p(order), jnp.float32)


def dense(targets, V):
    """Sum of the target weights per id, [B, T, V]."""
    B, T, _ = targets.ids_BTM.shape
    rows, cols = np.ogrid[:B, :T]
    out = np.zeros((B, T, V))
    np.add.at(out, (rows[..., None], cols[..., None], targets.ids_BTM), targets.weights_BTM)
    return out


@pytest.mark.parametrize("codec", [HybridCodec(8, 16), HybridCodec(0, 24), HybridCodec(8, 0)])
def test_the_head_is_exact_and_the_weights_sum_to_what_they_should(codec):
    V = 61
    logits = jax.random.normal(jax.random.key(0), (2, 7, V)) * 3
    targets = codec.decode(encode(codec, logits, keys(2)))
    probs = np.asarray(jax.nn.softmax(logits))
    assert targets.ids_BTM.shape == (2, 7, codec.k + codec.draws)
    assert targets.ids_BTM.dtype == jnp.int32 and targets.weights_BTM.dtype == jnp.float32
    largest = -np.sort(-probs)[..., : codec.k]
    np.testing.assert_allclose(targets.weights_BTM[..., : codec.k], largest, rtol=1e-6)
    at_ids = np.take_along_axis(probs, np.asarray(targets.ids_BTM), -1)
    np.testing.assert_allclose(at_ids[..., : codec.k], largest, rtol=1e-6)
    total = 1.0 if codec.draws else largest.sum(-1)
    np.testing.assert_allclose(targets.weights_BTM.sum(-1), np.broadcast_to(total, (2, 7)), 1e-5)
    head, draws = np.split(np.asarray(targets.ids_BTM), [codec.k], axis=-1)
    assert not (head[..., :, None] == draws[..., None, :]).any()


def gradient_error(codec, rows=400, T=16, V=200):
    """Mean gradient over rows × T independent encodings minus q − p, and its standard error."""
    teacher, student = zipf_logits(V), zipf_logits(V, seed=1) * 0.5
    encoded = encode(codec, jnp.broadcast_to(teacher, (rows, T, V)), keys(rows))
    targets = jax.jit(codec.decode)(encoded)
    mask = jnp.ones((rows, T), bool)
    z = jnp.broadcast_to(student, (rows, T, V))
    gradient = jax.grad(lambda z: distillation_loss(z, targets, mask)[0])(z)
    samples = np.asarray(gradient, np.float64).reshape(-1, V)
    exact = np.asarray(jax.nn.softmax(student) - jax.nn.softmax(teacher), np.float64)
    return samples.mean(0) - exact, samples.std(0, ddof=1) / np.sqrt(len(samples))


@pytest.mark.parametrize("codec", [HybridCodec(8, 12), HybridCodec(0, 12)])
def test_the_expected_gradient_is_that_of_the_full_distribution(codec):
    error, standard_error = gradient_error(codec)
    drawn = standard_error > 1e-8
    assert drawn.sum() >= 192  # every tail token was drawn at some time
    scores = error[drawn] / standard_error[drawn]
    # 200 roughly normal scores: their mean square is 1 ± 0.1, none is beyond 5.
    assert np.abs(scores).max() < 5
    assert 0.7 < np.mean(scores**2) < 1.4
    np.testing.assert_allclose(error[~drawn], 0, atol=1e-6)


def test_the_gradient_of_top_k_is_biased_towards_the_head():
    error, _ = gradient_error(HybridCodec(8, 0), rows=1)
    probs = np.asarray(jax.nn.softmax(zipf_logits(200)))
    head = np.argsort(-probs)[:8]
    tail = np.delete(np.arange(200), head)
    # On the tail a·q_j instead of q_j − p_j: the mean error is far from zero.
    assert error[head].sum() < -0.01 and error[tail].sum() > 0.01


def test_the_error_falls_with_the_root_of_the_draws():
    logits = jnp.broadcast_to(zipf_logits(97), (20, 8, 97))
    probs = np.asarray(jax.nn.softmax(zipf_logits(97)))

    def error(draws):
        codec = HybridCodec(4, draws)
        return np.sqrt(
            np.mean((dense(codec.decode(encode(codec, logits, keys(20))), 97) - probs) ** 2)
        )

    assert error(16) / error(1024) == pytest.approx(8, rel=0.15)
    pure = HybridCodec(0, 16)
    pure_error = np.sqrt(
        np.mean((dense(pure.decode(encode(pure, logits, keys(20))), 97) - probs) ** 2)
    )
    assert error(16) < pure_error / 2


def test_draws_of_a_row_depend_on_its_key_and_logits_alone():
    codec = HybridCodec(4, 9)
    logits = jax.random.normal(jax.random.key(0), (3, 6, 50))
    together = encode(codec, logits, keys(3))
    alone = encode(codec, logits[1:2], keys(3)[1:2])
    moved = encode(codec, logits[jnp.array([1, 0, 1, 2, 2])], keys(3)[[1, 0, 1, 2, 2]])
    shorter = encode(codec, logits[1:2, :4], keys(3)[1:2])
    for name in together:
        np.testing.assert_array_equal(alone[name][0], together[name][1])
        np.testing.assert_array_equal(moved[name][2], together[name][1])
        np.testing.assert_array_equal(shorter[name][0], together[name][1, :4])
    other = encode(codec, logits[1:2], keys(1, seed=5))
    assert not np.array_equal(other["draw_ids"], alone["draw_ids"])
    same_logits = encode(codec, jnp.broadcast_to(logits[:1, :1], (1, 2, 50)), keys(1))["draw_ids"]
    assert not np.array_equal(same_logits[0, 0], same_logits[0, 1])


def test_draws_and_keys_are_pinned():
    """The random numbers are part of the format: caches outlive versions."""
    assert row_key(1, 2, 3).tolist() == [3860511351, 3036371597]
    draws = HybridCodec(0, 6).encode(jnp.zeros((1, 2, 1000)), row_key(1, 2, 3)[None])["draw_ids"]
    assert draws.tolist() == [[[752, 470, 299, 186, 754, 437], [611, 651, 761, 156, 204, 736]]]


@given(
    st.lists(st.floats(-40, 40, width=32), min_size=1, max_size=40),
    st.sampled_from([HybridCodec(0, 5), HybridCodec(1, 5), HybridCodec(7, 5)]),
)
@settings(max_examples=60, deadline=None)
def test_only_tokens_of_some_probability_outside_the_head_are_drawn(values, codec):
    logits = np.full((1, 1, 43), -1e30, np.float32)
    logits[0, 0, : len(values)] = values
    targets = codec.decode(encode(codec, logits, keys(1)))
    probs = np.asarray(jax.nn.softmax(logits))[0, 0]
    ids, weights = np.asarray(targets.ids_BTM)[0, 0], np.asarray(targets.weights_BTM)[0, 0]
    assert ids.max() < len(probs) and (weights >= 0).all()
    assert weights.sum() == pytest.approx(1, abs=1e-5)
    if np.sort(probs)[: len(probs) - codec.k].sum() > 0:
        assert (probs[ids[codec.k :]] > 0).all()
        assert not set(ids[: codec.k]) & set(ids[codec.k :])


def test_temperature_belongs_to_the_encoding():
    logits = jax.random.normal(jax.random.key(0), (1, 1, 20)) * 3
    targets = HybridCodec(20, 0, temperature=2.0).decode(
        HybridCodec(20, 0, temperature=2.0).encode(logits, keys(1))
    )
    np.testing.assert_allclose(dense(targets, 20), jax.nn.softmax(logits / 2.0), rtol=1e-5)


@pytest.mark.parametrize(("V", "id_bytes"), [(65_536, 2), (65_537, 4)])
def test_arrays_cross_the_wire_as_unsigned_numbers_and_come_back_equal(V, id_bytes):
    codec = HybridCodec(3, 5)
    encoded = encode(codec, jax.random.normal(jax.random.key(0), (2, 3, V)), keys(2))
    wire = wire_view(encoded)
    assert all(isinstance(a, np.ndarray) and a.dtype.kind == "u" for a in wire.values())
    assert bytes_per_token(codec, V) == 3 * (id_bytes + 4) + 5 * id_bytes
    assert sum(a.nbytes for a in wire.values()) == 6 * bytes_per_token(codec, V)
    back = from_wire(wire)
    for name in encoded:
        assert back[name].dtype == encoded[name].dtype
        np.testing.assert_array_equal(back[name], encoded[name])
    sent, received = codec.decode(encoded), jax.jit(codec.decode)(back)
    np.testing.assert_array_equal(sent.ids_BTM, received.ids_BTM)
    np.testing.assert_allclose(sent.weights_BTM, received.weights_BTM, rtol=1e-6)


def test_bfloat16_values_cross_the_wire_too():
    values = jnp.arange(4, dtype=jnp.bfloat16)
    wire = wire_view({"values": values})
    assert [a.dtype for a in wire.values()] == [np.dtype("uint16")]
    np.testing.assert_array_equal(from_wire(wire)["values"], values)


def test_codecs_are_made_and_named_by_kind_and_parameters():
    codec = make_codec("hybrid", k=16, draws=32)
    assert codec == HybridCodec(16, 32) and isinstance(codec, Codec)
    assert codec.name == "hybrid(k=16,draws=32,temperature=1.0)"
    assert HybridCodec(16, 32, 2.0).name == "hybrid(k=16,draws=32,temperature=2.0)"


@pytest.mark.parametrize(
    ("kind", "params", "message"),
    [
        ("hybird", {}, "unknown codec kind 'hybird': choose one of hybrid"),
        ("hybrid", {"k": 1, "draws": 1, "drwas": 2}, "drwas"),
        ("hybrid", {"k": 0, "draws": 0}, "sends nothing"),
        ("hybrid", {"k": -1, "draws": 4}, "at least 0"),
        ("hybrid", {"k": 1, "draws": 4, "temperature": 0.0}, "above 0"),
    ],
)
def test_wrong_codecs_are_refused(kind, params, message):
    with pytest.raises(ValueError, match=message):
        make_codec(kind, **params)


def test_a_head_larger_than_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="lower k"):
        HybridCodec(9, 0).encode(jnp.zeros((1, 1, 8)), keys(1))


def test_row_keys_take_64_bits_and_nothing_else():
    assert row_key(2**64 - 1, 0, 0).shape == (2,)
    with pytest.raises(ValueError, match="index=-1"):
        row_key(0, 0, -1)
