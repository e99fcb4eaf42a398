"""A text read through the cache gets the logits that it gets when it is read at once."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.cache import LayerCache, empty_cache, extend, visible_slots
from model.transformer import continue_texts, unembed
from tests.helpers.small_models import logits_at_once, random_params, small_config

pytestmark = pytest.mark.slow


@partial(jax.jit, static_argnames="config")
def read_on(params, config, cache, tokens_BT, positions_BT, valid_BT):
    x_BTD, cache = continue_texts(params, config, cache, tokens_BT, positions_BT, valid_BT)
    return unembed(params, config, x_BTD), cache


def logits_through_cache(params, config, tokens_BT, lengths_B, first):
    """The first `lengths_B` tokens of each row at once, at most `first`; then one at a time."""
    B, T = tokens_BT.shape
    logits_BTV = np.full((B, T, config.embedding_rows), np.nan)
    cache = empty_cache(config, B, T)
    positions_BT = np.tile(np.arange(first), (B, 1))
    valid_BT = positions_BT < np.array(lengths_B)[:, None]
    # What lies beyond a row's length must not matter.
    prompts_BT = np.where(valid_BT, tokens_BT[:, :first], config.vocab_size - 1)
    logits, cache = read_on(params, config, cache, prompts_BT, positions_BT, valid_BT.astype(int))
    logits_BTV[:, :first][valid_BT] = logits[valid_BT]
    for step in range(T - min(lengths_B)):
        position_B = np.array(lengths_B) + step
        valid_B = position_B < T
        token_B = np.where(valid_B, tokens_BT[np.arange(B), np.minimum(position_B, T - 1)], 0)
        logits, cache = read_on(
            params,
            config,
            cache,
            token_B[:, None],
            position_B[:, None],
            valid_B.astype(int)[:, None],
        )
        logits_BTV[np.flatnonzero(valid_B), position_B[valid_B]] = logits[valid_B, 0]
    return logits_BTV


def check_same_logits(config, lengths, first, num_positions, seed):
    params, rng = random_params(config, seed), np.random.default_rng(seed)
    tokens_BT = rng.integers(0, config.vocab_size, (len(lengths), num_positions))
    np.testing.assert_allclose(
        logits_through_cache(params, config, tokens_BT, lengths, first),
        logits_at_once(params, config, tokens_BT),
        atol=1e-4,
        rtol=0,
    )


def test_many_times_round_the_ring():
    check_same_logits(small_config(num_layers=5), (1, 13, 4), 13, 40, seed=0)


# Of few shapes, since each is compiled.
@settings(max_examples=6, deadline=None)
@given(
    num_layers=st.integers(1, 3),
    window=st.sampled_from([1, 3, 8, 30]),
    lengths=st.lists(st.integers(1, 8), min_size=2, max_size=2),
    seed=st.integers(0, 99),
)
def test_any_text_gets_the_same_logits(num_layers, window, lengths, seed):
    check_same_logits(small_config(num_layers, window), lengths, 8, 20, seed)


@settings(max_examples=40, deadline=None)
@given(
    num_slots=st.integers(1, 7),
    lengths=st.lists(st.integers(0, 12), min_size=2, max_size=2),
    num_more=st.integers(0, 9),
)
def test_a_layer_keeps_the_last_positions_with_their_keys(num_slots, lengths, num_more):
    cache = LayerCache(
        jnp.zeros((2, num_slots, 1, 1)),
        jnp.zeros((2, num_slots, 1, 1)),
        jnp.full((2, num_slots), -1),
    )

    def remember(cache, positions_BT, valid_BT):
        # Rows differ, and values from keys.
        keys_BTKH = jnp.asarray(positions_BT + np.array([[100], [200]]), float)[..., None, None]
        return extend(cache, keys_BTKH, -keys_BTKH, jnp.asarray(positions_BT), valid_BT)

    # Backwards, so that the order in which they come cannot stand in for their positions.
    positions_BT = np.tile(np.arange(12)[::-1], (2, 1))
    cache = remember(cache, positions_BT, jnp.asarray(positions_BT < np.array(lengths)[:, None]))
    for step in range(num_more):  # only the first row goes on
        position_B1 = np.array(lengths)[:, None] + step
        cache = remember(cache, position_B1, jnp.array([[True], [False]]))

    for row, count in enumerate((lengths[0] + num_more, lengths[1])):
        held = np.asarray(cache.positions_BS[row])
        expected = set(range(max(0, count - num_slots), count))
        assert set(held[held >= 0].tolist()) == expected
        assert (held >= 0).sum() == len(expected)
        keys = np.asarray(cache.keys_BSKH[row, :, 0, 0])[held >= 0]
        assert (keys == held[held >= 0] + 100 * (row + 1)).all()
        assert (np.asarray(cache.values_BSKH[row, :, 0, 0])[held >= 0] == -keys).all()


def test_a_position_sees_what_is_there_not_ahead_and_within_the_window():
    nothing = jnp.zeros((1, 6, 1, 1))
    cache = LayerCache(nothing, nothing, jnp.array([[6, 7, 2, 3, -1, 5]]))

    def seen(window):
        return visible_slots(cache, jnp.array([[6]]), window)[0, 0].astype(int).tolist()

    assert seen(None) == [1, 0, 1, 1, 0, 1]
    assert seen(3) == [1, 0, 0, 0, 0, 1]
    assert seen(4) == [1, 0, 0, 1, 0, 1]
