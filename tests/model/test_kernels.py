"""Every kernel of attention against the plain one: values, gradients, memory, devices."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.kernels import (
    BLOCK,
    LANES,
    attend_blocked,
    attend_plain,
    attend_splash,
    attend_tokamax,
    choose_kernel,
)
from model.sharding import batch_sharding, make_mesh

splash = partial(attend_splash, interpret=True)


def inputs(num_rows, length, num_heads, num_kv_heads, head_dim, segments=None, seed=0):
    """Queries large enough that the soft-cap bends, keys, values, and packed segments."""
    generator = np.random.default_rng(seed)
    q, k, v = (
        jnp.asarray(generator.normal(size=(num_rows, length, heads, head_dim)), jnp.float32)
        for heads in (num_heads, num_kv_heads, num_kv_heads)
    )
    if segments is None:
        first = generator.integers(1, length, (num_rows, 1))
        last = generator.integers(1, length + 1, (num_rows, 1))
        index = np.arange(length)
        segments = np.where(index < first, 1, np.where(index < np.maximum(first, last), 2, 0))
    return q * 3 * head_dim**-0.5, k, v, jnp.asarray(segments, jnp.int32)


def assert_same(kernel, window, *cases, softcap=2.0):
    """Equal values and gradients wherever there is no padding, for inputs of the same sizes."""

    def values(attend, q, k, v, segments):
        attended = attend(q, k, v, segments, window=window, softcap=softcap)
        return jnp.where((segments != 0)[..., None, None], attended, 0.0)

    def total(attend, *arrays):
        attended = values(attend, *arrays)
        return jnp.sum(jnp.sin(attended)), attended

    def differentiated(attend):
        return jax.jit(jax.grad(partial(total, attend), (0, 1, 2), has_aux=True))

    alone = jax.jit(partial(values, kernel))  # without its gradient a kernel may do otherwise
    ours, plain = differentiated(kernel), differentiated(attend_plain)
    for arrays in cases:
        gradients, attended = ours(*arrays)
        expected_gradients, expected = plain(*arrays)
        np.testing.assert_allclose(alone(*arrays), expected, atol=2e-6)
        np.testing.assert_allclose(attended, expected, atol=2e-6)
        for found, wanted in zip(gradients, expected_gradients, strict=True):
            np.testing.assert_allclose(found, wanted, atol=2e-5)


# Of few sizes, since each is compiled.
@settings(max_examples=5, deadline=None)
@given(
    length=st.integers(1, 40),
    window=st.none() | st.integers(1, 50),
    block=st.sampled_from([1, 4, 8, 64]),
    kv_heads=st.sampled_from([1, 2, 4]),
    seeds=st.lists(st.integers(0, 99), min_size=3, max_size=3, unique=True),
)
def test_blocks_change_nothing(length, window, block, kv_heads, seeds):
    segments = None if length > 1 else np.ones((2, 1))
    cases = [inputs(2, length, 4, kv_heads, 6, segments, seed) for seed in seeds]
    assert_same(partial(attend_blocked, block=block), window, *cases)


@pytest.mark.parametrize(("window", "kv_heads"), [(None, 2), (None, 1), (37, 1), (300, 2)])
def test_the_tpu_kernel_computes_the_same(window, kv_heads):
    assert_same(splash, window, inputs(2, 2 * LANES, 2, kv_heads, 128))


@pytest.mark.parametrize("window", [None, 37])
def test_the_gpu_kernel_computes_the_same(window):
    pytest.importorskip("tokamax")
    assert_same(attend_tokamax, window, inputs(2, 64, 4, 2, 16))


def test_long_rows_never_have_all_logits_at_once():
    arrays = inputs(1, 4096, 2, 1, 8)

    def temporary_bytes(kernel, window):
        def total(q, k, v, s):
            return jnp.sum(kernel(q, k, v, s, window=window, softcap=50.0))

        gradient = jax.jit(jax.grad(total, (0, 1, 2)))
        memory = gradient.lower(*arrays).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    plain_bytes = temporary_bytes(attend_plain, None)
    assert plain_bytes > 4 * 2 * 4096**2  # float32 logits of two heads
    assert temporary_bytes(attend_blocked, None) < plain_bytes / 5
    assert temporary_bytes(attend_blocked, 256) < plain_bytes / 25


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_each_device_attends_with_its_rows_and_heads(kv_heads, monkeypatch):
    monkeypatch.setattr("model.kernels.attend_splash", splash)
    mesh = make_mesh({"data": 2, "fsdp": 2, "model": 2})
    arrays = inputs(4, LANES, 2, kv_heads, 128)
    expected = attend_plain(*arrays, window=50, softcap=2.0)
    divided = [jax.device_put(array, batch_sharding(mesh)) for array in arrays]
    attend = jax.jit(partial(choose_kernel("splash", LANES, mesh), window=50, softcap=2.0))
    real = np.asarray(arrays[3] != 0)[..., None, None]
    np.testing.assert_allclose(attend(*divided) * real, expected * real, atol=2e-6)


def test_auto_suits_the_platform_and_the_length():
    assert choose_kernel("auto", BLOCK, None) is attend_plain
    assert choose_kernel("auto", BLOCK + 1, None) is attend_blocked
    assert choose_kernel("plain", 8192, None) is attend_plain


def test_a_gpu_kernel_that_is_not_installed_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    with pytest.raises(ValueError, match=r"install the extra `gpu`, or choose the kernel"):
        attend_tokamax(*inputs(1, 8, 2, 1, 8), window=None, softcap=2.0)


def test_the_tpu_kernel_refuses_rows_that_do_not_fit():
    arrays = inputs(1, 100, 2, 1, 128)
    with pytest.raises(ValueError, match="multiple of 128 tokens, not 100: change"):
        attend_splash(*arrays, window=None, softcap=2.0)
