"""What targets say: exact heads, fair draws, unbiased gradients, and where there is a bias."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.codecs.blocks import find_head
from model.codecs.values import restore_values, round_values
from model.losses import distillation_loss
from model.targets import (
    Gemma3Codec,
    HybridCodec,
    SampledCodec,
    SparseTargets,
    TopKCodec,
)
from tests.helpers.codec_cases import dense, encode, keys, zipf_logits

EXACT = {"values": "float32"}


@settings(max_examples=40, deadline=None)
@given(
    V=st.integers(1, 300),
    share=st.floats(0, 1),
    seed=st.integers(0, 99),
    distinct=st.integers(1, 400),
)
def test_the_head_is_the_largest_logits_and_of_equal_ones_the_first(V, share, seed, distinct):
    k = 1 + int(share * (V - 1))
    logits = np.random.default_rng(seed).integers(0, distinct, (3, V)).astype(np.float32)
    head = find_head(jnp.asarray(logits), k)
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :k]
    np.testing.assert_array_equal(head.ids_Ck, order)
    np.testing.assert_array_equal(head.logits_Ck, np.take_along_axis(logits, order, -1))


@pytest.mark.parametrize("values", ["float32", "bfloat16", "uint8"])
def test_heads_are_the_largest_probabilities_and_weights_sum_to_one(values):
    V, codec = 61, HybridCodec(8, 16, values)
    logits = jax.random.normal(jax.random.key(0), (2, 7, V)) * 3
    targets = codec.decode(encode(codec, logits, keys(2)), V)
    probs = np.asarray(jax.nn.softmax(logits))
    assert targets.ids_BTM.shape == (2, 7, 24)
    assert targets.ids_BTM.dtype == jnp.int32 and targets.weights_BTM.dtype == jnp.float32
    largest = -np.sort(-probs)[..., :8]
    step = {"float32": 1e-6, "bfloat16": 2**-7, "uint8": 0.072}[values]
    np.testing.assert_allclose(targets.weights_BTM[..., :8], largest, rtol=step)
    at_ids = np.take_along_axis(probs, np.asarray(targets.ids_BTM), -1)
    np.testing.assert_allclose(at_ids[..., :8], largest, rtol=1e-6)
    np.testing.assert_allclose(targets.weights_BTM.sum(-1), np.ones((2, 7)), 1e-5)
    head, draws = np.split(np.asarray(targets.ids_BTM), [8], axis=-1)
    assert not (head[..., :, None] == draws[..., None, :]).any()


def gradient_samples(codec, rows=400, T=16, V=200):
    """Gradients of rows × T independent encodings, and the exact one."""
    teacher, student = zipf_logits(V), zipf_logits(V, seed=1) * 0.5
    encoded = encode(codec, jnp.broadcast_to(teacher, (rows, T, V)), keys(rows))
    targets = jax.jit(codec.decode, static_argnums=1)(encoded, V)
    mask = jnp.ones((rows, T), bool)
    z = jnp.broadcast_to(student, (rows, T, V))
    gradient = jax.jit(jax.grad(lambda z: distillation_loss(z, targets, mask)[0]))(z)
    exact = np.asarray(jax.nn.softmax(student) - jax.nn.softmax(teacher), np.float64)
    return np.asarray(gradient, np.float64).reshape(-1, V), exact


def scores_of(samples, exact):
    """Mean error over its standard error, where an entry is random at all."""
    error, standard_error = (
        samples.mean(0) - exact,
        samples.std(0, ddof=1) / np.sqrt(len(samples)),
    )
    random = standard_error > 1e-8
    np.testing.assert_allclose(error[~random], 0, atol=1e-6)
    return error[random] / standard_error[random]


@pytest.mark.parametrize(
    "codec",
    [
        SampledCodec(12),
        HybridCodec(8, 12, "float32"),
        HybridCodec(8, 12, "bfloat16"),
        HybridCodec(8, 12, "uint8"),
    ],
    ids=lambda codec: codec.name,
)
def test_the_expected_gradient_is_that_of_the_full_distribution(codec):
    scores = scores_of(*gradient_samples(codec))
    assert len(scores) >= 192  # every tail token was drawn at some time
    # Some 200 roughly normal scores: their mean square is 1 ± 0.1, none is beyond 5.
    assert np.abs(scores).max() < 5
    assert 0.7 < np.mean(scores**2) < 1.4


def test_own_probabilities_renormalised_are_biased_towards_the_head():
    samples, exact = gradient_samples(Gemma3Codec(12, "float32"))
    error = samples.mean(0) - exact
    head = np.argsort(-np.asarray(zipf_logits(200)))[:8]
    assert error[head].sum() < -0.05 and np.delete(error, head).sum() > 0.05
    assert np.mean(scores_of(samples, exact) ** 2) > 100


@pytest.mark.parametrize("values", ["float32", "bfloat16"])
def test_the_ghost_makes_the_gradient_exact_on_the_head_and_keeps_the_tails_total(values):
    samples, exact = gradient_samples(TopKCodec(8, values), rows=400 if values != "float32" else 1)
    head = np.argsort(-np.asarray(zipf_logits(200)))[:8]
    tail = np.delete(np.arange(200), head)
    if values == "float32":
        np.testing.assert_allclose(samples[0, head], exact[head], atol=1e-6)
        assert samples[0, tail].sum() == pytest.approx(exact[tail].sum(), abs=1e-6)
        assert np.abs(samples[0, tail] - exact[tail]).max() > 1e-3, "the tail's spread is unknown"
        q = np.asarray(jax.nn.softmax(zipf_logits(200, seed=1) * 0.5), np.float64)
        a, Q = np.asarray(jax.nn.softmax(zipf_logits(200)))[head].sum(), q[head].sum()
        np.testing.assert_allclose(samples[0, tail], q[tail] * (a - Q) / (1 - Q), rtol=1e-4)
    else:
        assert np.abs(scores_of(samples[:, head], exact[head])).max() < 5


def test_top_k_renormalised_is_biased():
    """What the ghost is for: without it a head of mass a is learnt as p / a."""
    V, student = 200, zipf_logits(200, seed=1) * 0.5
    codec = TopKCodec(8, "float32")
    targets = codec.decode(encode(codec, zipf_logits(V)[None, None], keys(1)), V)
    weights = targets.weights_BTM / targets.weights_BTM.sum(-1, keepdims=True)
    bare = SparseTargets(targets.ids_BTM, weights)
    mask = jnp.ones((1, 1), bool)
    gradient = jax.grad(lambda z: distillation_loss(z, bare, mask)[0])(student[None, None])[0, 0]
    exact = jax.nn.softmax(student) - jax.nn.softmax(zipf_logits(V))
    error = np.asarray(gradient - exact)
    head = np.asarray(targets.ids_BTM)[0, 0]
    assert error[head].sum() < -0.1 and np.delete(error, head).sum() > 0.1


@pytest.mark.parametrize("confident", [10.0, 40.0, 120.0])
def test_the_tails_loss_does_not_cancel(confident):
    """1 − Q of a student that is all but certain, where a difference in float32 gives 0."""
    z = jnp.array([confident, 1.0, 0.0, -1.0])[None, None]
    targets = SparseTargets(
        jnp.zeros((1, 1, 1), jnp.int32), jnp.full((1, 1, 1), 0.9), jnp.full((1, 1), 0.1)
    )
    loss = distillation_loss(z, targets, jnp.ones((1, 1), bool))[0]
    log_rest = np.log(np.exp([1.0, 0.0, -1.0]).sum()) - confident
    assert float(loss) == pytest.approx(-0.1 * log_rest, rel=1e-3)


def mean_squared_error(codec, logits, V):
    probs = np.asarray(jax.nn.softmax(logits), np.float64)
    targets = codec.decode(encode(codec, logits, keys(len(logits))), V)
    return np.mean((dense(targets, V) - probs) ** 2)


def test_the_error_falls_with_the_root_of_the_draws_and_with_a_head():
    V = 97
    logits = jnp.broadcast_to(zipf_logits(V), (20, 8, V))
    few, many = (mean_squared_error(HybridCodec(4, n, "float32"), logits, V) for n in (16, 1024))
    assert np.sqrt(few / many) == pytest.approx(8, rel=0.15)
    # At 20 entries in all: with a head of four, less than half the variance.
    assert few < mean_squared_error(SampledCodec(20), logits, V) / 2


@given(
    st.lists(st.floats(-40, 40, width=32), min_size=1, max_size=40),
    st.sampled_from([SampledCodec(5), HybridCodec(1, 5, "float32"), HybridCodec(7, 5, "float32")]),
)
@settings(max_examples=60, deadline=None)
def test_only_tokens_of_some_probability_outside_the_head_are_drawn(values, codec):
    logits = np.full((1, 1, 43), -1e30, np.float32)
    logits[0, 0, : len(values)] = values
    targets = codec.decode(encode(codec, logits, keys(1)), 43)
    probs = np.asarray(jax.nn.softmax(logits))[0, 0]
    ids, weights = np.asarray(targets.ids_BTM)[0, 0], np.asarray(targets.weights_BTM)[0, 0]
    k = getattr(codec, "k", 0)
    assert ids.max() < len(probs) and weights.min() > -1e-6
    assert weights.sum() == pytest.approx(1, abs=1e-5)
    if np.sort(probs)[: len(probs) - k].sum() > 0:
        assert (probs[ids[k:]] > 0).all()
        assert not set(ids[:k]) & set(ids[k:])


@pytest.mark.parametrize("codec", [HybridCodec(3, 8), TopKCodec(3), SampledCodec(8)])
def test_zeros_of_either_sign_are_one_logit(codec):
    """A sort tells them apart and a comparison does not: a token between would be in no part."""
    signed = np.full((1, 1, 200), -0.0, np.float32)
    signed[..., 1::2] = 0.0
    found, expected = (encode(codec, jnp.asarray(z), keys(1)) for z in (signed, np.abs(signed)))
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def test_small_probabilities_are_drawn_as_often_as_they_should():
    """Tokens of 2e-7 each at a large vocabulary: a running sum over all would lose them."""
    V, T = 100_000, 512
    logits = np.full((1, T, V), np.log(0.02 / V), np.float32)
    logits[..., 77] = np.log(0.98)
    codec = SampledCodec(256)
    ids = np.asarray(codec.decode(encode(codec, jnp.asarray(logits), keys(1)), V).ids_BTM)
    small = ids[ids != 77]
    num = ids.size * 0.02
    assert len(small) == pytest.approx(num, abs=5 * np.sqrt(num))
    # Spread evenly: as many in the odd as in the even places, and in each tenth.
    tenths = np.bincount(small * 10 // V, minlength=10)
    assert np.abs(tenths - num / 10).max() < 5 * np.sqrt(num / 10)
    assert np.mean(small % 2) == pytest.approx(0.5, abs=2.5 / np.sqrt(num))


@settings(max_examples=30, deadline=None)
@given(
    probability=st.floats(1e-9, 1.0) | st.sampled_from([1.0, 0.5, 1e-12]),
    to=st.sampled_from(["bfloat16", "uint8"]),
)
def test_rounding_keeps_the_mean_and_takes_a_neighbour(probability, to):
    num = 4096
    words = jnp.arange(num, dtype=jnp.uint32) * np.uint32(2**32 // num)  # evenly, not at random
    probs = jnp.full(num, probability, jnp.float32)[:, None]
    found = np.asarray(restore_values(round_values(probs, to, words[:, None])), np.float64)
    step = probability * {"bfloat16": 2**-7, "uint8": 0.072}[to]
    step = max(step, 2.3e-8 if to == "uint8" else 0.0)
    assert len(np.unique(found)) <= 2
    assert np.abs(found - probability).max() <= step * 1.001
    assert found.mean() == pytest.approx(probability, abs=step * 2 / num + 3e-7 * probability)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_belongs_to_the_encoding(temperature):
    logits = jax.random.normal(jax.random.key(0), (1, 1, 20)) * 3
    expected = jax.nn.softmax(logits / temperature)
    codec = TopKCodec(20, "float32", temperature=temperature)
    targets = codec.decode(encode(codec, logits, keys(1)), 20)
    assert targets.tail_BT is None, "nothing is left"
    np.testing.assert_allclose(dense(targets, 20), expected, rtol=1e-5)
