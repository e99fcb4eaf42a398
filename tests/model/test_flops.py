"""The FLOP formula against what the compiler counts, and against plain counting."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.config import MODEL_PRESETS, ModelConfig, param_count
from model.execution import Execution
from model.flops import forward_flops, mean_visible, training_flops
from model.transformer import hidden_states, init_params, unembed

# Two layers: a longer scan's body would be counted once. Wide: products outweigh all else.
WIDE = ModelConfig(
    num_layers=2,
    width=256,
    feed_forward=1024,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=2048,
    context_length=128,
    window=32,
)


@given(length=st.integers(1, 60), window=st.none() | st.integers(1, 80))
def test_visible_keys_are_counted_right(length, window):
    counts = [min(t + 1, window or length) for t in range(length)]
    assert mean_visible(length, window) == pytest.approx(np.mean(counts))


@pytest.mark.parametrize(("passes", "gradient"), [(1, False), (3, True)])
def test_the_formula_agrees_with_the_compilers_count(passes, gradient):
    tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    params = jax.eval_shape(lambda: init_params(WIDE, jax.random.key(0)))

    def total(params: Any, tokens: jax.Array) -> jax.Array:
        how = Execution(attention="plain")  # which looks at all 128 keys, whatever the mask
        x = hidden_states(params, WIDE, tokens, tokens, tokens, how)
        return jnp.sum(unembed(params, WIDE, x))

    function = jax.grad(total) if gradient else total
    analysis = jax.jit(function).lower(params, tokens).compile().cost_analysis()
    assert analysis is not None
    expected = passes * forward_flops(WIDE, 128, 128) * 2 * 128
    assert analysis["flops"] == pytest.approx(expected, rel=0.06)


@pytest.mark.parametrize("preset", ["gemma2-2b", "gemma2-9b", "gemma2-27b"])
def test_a_large_model_asks_for_six_flops_per_parameter_and_attention(preset):
    config = MODEL_PRESETS[preset]
    # Norm scales are no products: they are less than a ten-thousandth of the parameters.
    weights = 6 * param_count(config).total
    assert training_flops(config, 1) == pytest.approx(weights, rel=1e-3)
    assert weights < training_flops(config, 8192) < 1.35 * weights
