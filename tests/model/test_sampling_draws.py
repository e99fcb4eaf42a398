"""Tokens are drawn as temperature, top-k and top-p say, each by a draw of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from model.sampling import Sampling, candidates, generate
from tests.helpers.small_models import (
    CONFIG,
    PARAMS,
    logits_at_once,
    prompts_of,
    random_params,
    small_config,
    texts_of,
)


def plain_probs(logits_V, temperature, top_k, top_p):
    """Temperature, then top-k, then top-p, in float64, a token at a time; None too near a tie."""
    scaled_V = logits_V.astype(float) / temperature
    probs_V = np.exp(scaled_V - scaled_V.max())
    order = np.argsort(-logits_V, kind="stable")[: top_k or len(logits_V)]
    total = probs_V[order].sum()
    kept_V, mass = np.zeros_like(probs_V), 0.0
    for token in order:
        if abs(mass - top_p) < 1e-5 and top_p < 1:
            return None
        if mass < top_p:
            kept_V[token] = probs_V[token]
        mass += probs_V[token] / total
    return kept_V / kept_V.sum()


def candidate_probs(logits_BV, temperature, top_k, top_p):
    ids_BC, kept_BC = candidates(logits_BV, temperature, top_k, top_p)
    probs_BV = np.zeros(logits_BV.shape)
    np.put_along_axis(probs_BV, np.asarray(ids_BC), np.asarray(jax.nn.softmax(kept_BC)), axis=1)
    return probs_BV


@settings(max_examples=100, deadline=None)
@given(
    logits=arrays(np.float32, (2, 9), elements=st.floats(-30, 30, width=32)),
    temperature=st.floats(0.05, 20),
    top_k=st.none() | st.integers(1, 12),
    top_p=st.floats(0.01, 1),
)
def test_what_may_be_drawn_agrees_with_the_plain_definition(logits, temperature, top_k, top_p):
    logits = logits + 0.0  # XLA sorts -0.0 below 0.0
    expected = [plain_probs(row, temperature, top_k, top_p) for row in logits]
    assume(all(row is not None for row in expected))
    found = candidate_probs(jnp.asarray(logits), temperature, top_k, top_p)
    np.testing.assert_allclose(found, np.array(expected), atol=1e-5)
    far_from_zero = np.array(expected) > 1e-6
    assert (found[far_from_zero] > 0).all()


def test_all_tokens_stay_when_all_the_probability_is_wanted():
    logits_BV = jax.random.normal(jax.random.key(0), (1, 20_000))
    _, kept_BC = candidates(logits_BV, 1.0, None, 1.0)
    assert np.isfinite(kept_BC).all()


def test_the_coldest_temperature_takes_the_likeliest():
    logits_BV = jnp.array([[1.0, 30.0, 29.9, -30.0]])
    assert candidate_probs(logits_BV, 1e-37, None, 1.0).tolist() == [[0, 1, 0, 0]]


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0.7, top_p=0.8), Sampling(1.5, top_k=6), Sampling(2, 6, 0.6)]
)
def test_tokens_come_as_often_as_they_should(sampling):
    num_rows = 4096
    prompt_1T, _ = prompts_of((4,))
    logits_V = np.asarray(logits_at_once(PARAMS, CONFIG, jnp.asarray(prompt_1T)))[0, -1]
    probs_V = plain_probs(logits_V, sampling.temperature, sampling.top_k, sampling.top_p)
    assert probs_V is not None
    drawn = generate(
        PARAMS,
        CONFIG,
        np.repeat(prompt_1T, num_rows, axis=0),
        np.full(num_rows, 4),
        max_new_tokens=1,
        seed=3,
        sampling=sampling,
    )
    counts_V = np.bincount(np.asarray(drawn.tokens_BM)[:, 0], minlength=CONFIG.vocab_size)
    assert (counts_V[probs_V == 0] == 0).all()
    deviation_V = np.sqrt(num_rows * probs_V * (1 - probs_V))
    assert (np.abs(counts_V - num_rows * probs_V) <= 4.5 * deviation_V + 1).all()


def test_each_position_has_a_draw_of_its_own():
    all_alike = jax.tree.map(np.zeros_like, PARAMS)
    drawn = generate(all_alike, CONFIG, *prompts_of((3, 8)), max_new_tokens=50)
    assert all(len(set(text)) > 20 for text in texts_of(drawn))


def test_surplus_embedding_rows_are_never_drawn():
    config = small_config(vocab_size=5, num_embeddings=48)
    prompts_BT = np.zeros((64, 2), np.int32)
    drawn = generate(
        random_params(config),
        config,
        prompts_BT,
        np.full(64, 2),
        max_new_tokens=8,
        sampling=Sampling(1e9),
    )
    assert set(np.asarray(drawn.tokens_BM).ravel().tolist()) == set(range(5))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
    ],
)
def test_wrong_sampling_is_refused(changes, said):
    with pytest.raises(ValueError, match=said):
        Sampling(**changes)
