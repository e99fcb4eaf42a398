"""The network against a plain float64 rewriting of the paper's formulas, and its sizes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from model.config import MODEL_PRESETS, ModelConfig, param_count
from model.execution import DEFAULT, Execution
from model.transformer import hidden_states, init_params, unembed

TINY = MODEL_PRESETS["tiny"]

# arXiv 2408.00118, table 2; the query scales from google-deepmind/gemma.
GEMMA_2 = {
    "gemma2-2b": (590_118_912, 2_024_517_888, 256**-0.5),
    "gemma2-9b": (917_962_752, 8_324_201_984, 256**-0.5),
    "gemma2-27b": (1_180_237_824, 26_047_480_320, 144**-0.5),
}


def reference_logits(params, c, tokens, segments, positions):
    """One row, loops over heads and positions, float64 numpy."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    T, H = len(tokens), c.head_dim

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps) * (1 + scale["scale"])

    def rotate(x):
        out = np.empty_like(x)
        for t in range(T):
            for j in range(H // 2):
                angle = positions[t] * c.rope_base ** (-2 * j / H)
                a, b = x[t, j], x[t, j + H // 2]
                out[t, j] = a * np.cos(angle) - b * np.sin(angle)
                out[t, j + H // 2] = a * np.sin(angle) + b * np.cos(angle)
        return out

    def attention(x, w, window):
        out = np.zeros_like(x)
        for n in range(c.num_heads):
            kv = n // (c.num_heads // c.num_kv_heads)
            q = rotate(x @ w["query"][:, n]) * (c.query_scale or H**-0.5)
            k, v = rotate(x @ w["key"][:, kv]), x @ w["value"][:, kv]
            for t in range(T):
                seen = [s for s in range(t + 1) if segments[s] == segments[t] and t - s < window]
                logits = c.attention_softcap * np.tanh(k[seen] @ q[t] / c.attention_softcap)
                weights = np.exp(logits - logits.max())
                out[t] += (weights / weights.sum()) @ v[seen] @ w["output"][n]
        return out

    def feed_forward(x, w):
        g = x @ w["gate"]
        gelu = 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3)))
        return (gelu * (x @ w["up"])) @ w["down"]

    x = p["embedding"][tokens] * np.sqrt(c.width)
    for i in range(c.num_layers):
        layer = layer_of(p, c, i)
        window = c.window if i % 2 == 0 else T
        y = attention(norm(x, layer["pre_attention_norm"]), layer["attention"], window)
        x = x + norm(y, layer["post_attention_norm"])
        y = feed_forward(norm(x, layer["pre_feed_forward_norm"]), layer["feed_forward"])
        x = x + norm(y, layer["post_feed_forward_norm"])
    z = norm(x, p["final_norm"]) @ p["embedding"].T
    return c.final_softcap * np.tanh(z / c.final_softcap)


def layer_of(params, config, i):
    """The parameters of layer `i`, out of its stack."""
    if i // 2 == config.num_layers // 2:
        return params["last"]
    return jax.tree.map(lambda leaf: leaf[i // 2], params["pairs"][("local", "global")[i % 2]])


def logits_of(params, config, tokens, segments=None, positions=None, how=DEFAULT):
    tokens = jnp.atleast_2d(jnp.asarray(tokens))
    if segments is None:
        segments = jnp.ones_like(tokens)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return _logits(params, config, tokens, jnp.atleast_2d(segments), jnp.atleast_2d(positions), how)


@partial(jax.jit, static_argnames=("config", "how"))
def _logits(params, config, tokens, segments, positions, how):
    return unembed(params, config, hidden_states(params, config, tokens, segments, positions, how))


@partial(jax.jit, static_argnums=0)
def fresh_params(config, seed=0):
    return init_params(config, jax.random.key(seed))


@partial(jax.jit, static_argnums=0)
def perturbed_params(config, seed=0):
    """Parameters large enough that both soft-caps bend and the norm scales differ from one."""
    params = fresh_params(config, seed)
    keys = iter(jax.random.split(jax.random.key(seed + 1), 100))
    return jax.tree.map(
        lambda leaf: 2.0 * leaf + 0.3 * jax.random.normal(next(keys), leaf.shape), params
    )


@pytest.mark.parametrize("query_scale", [None, 0.9])
def test_logits_agree_with_the_formulas_past_the_window_and_across_segments(query_scale):
    config = TINY.model_copy(
        update={
            "window": 5,
            "query_scale": query_scale,
            "attention_softcap": 2.0,
            "final_softcap": 4.0,
            "num_layers": 3,
        }
    )
    params = perturbed_params(config)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, 24)
    segments = np.array([1] * 15 + [2] * 9)
    positions = np.concatenate([np.arange(15), np.arange(9)])
    expected = reference_logits(params, config, tokens, segments, positions)
    logits = logits_of(params, config, tokens, segments, positions)
    np.testing.assert_allclose(logits[0], expected, rtol=0, atol=2e-4)


def test_a_packed_segment_equals_the_document_alone_whatever_the_padding():
    params = perturbed_params(TINY)
    tokens = np.random.default_rng(1).integers(0, TINY.vocab_size, (2, 12))
    tokens[1, :4] = tokens[0, :4]
    segments = np.array([[1] * 4 + [2] * 5 + [0] * 3] * 2)
    positions = np.array([[*range(4), *range(5), 0, 0, 0]] * 2)
    packed = logits_of(params, TINY, tokens, segments, positions)
    alone = logits_of(params, TINY, tokens[0, 4:9])
    np.testing.assert_allclose(packed[0, 4:9], alone[0], atol=1e-5)
    np.testing.assert_allclose(packed[0, :4], packed[1, :4], atol=1e-5)
    assert np.isfinite(packed).all()


@pytest.mark.parametrize(("num_layers", "reaches"), [(1, False), (2, True)])
def test_a_local_layer_sees_exactly_its_window_and_the_next_layer_everything(num_layers, reaches):
    config = TINY.model_copy(update={"num_layers": num_layers, "window": 4})
    params = perturbed_params(config)
    tokens = np.arange(10)
    changed = {t: tokens.copy() for t in (5, 6)}
    for t in changed:
        changed[t][t] = 99
    base = logits_of(params, config, tokens)[0, 9]
    assert not np.allclose(logits_of(params, config, changed[6])[0, 9], base, atol=1e-4)
    moved = not np.allclose(logits_of(params, config, changed[5])[0, 9], base, atol=1e-4)
    assert moved == reaches


@pytest.mark.parametrize(("num_kv_heads", "window"), [(4, 5), (2, 300), (1, 64)])
def test_heads_in_groups_of_any_size_and_windows_of_any_length(num_kv_heads, window):
    changes = {"num_kv_heads": num_kv_heads, "window": window, "attention_softcap": 2.0}
    config = TINY.model_copy(update=changes)
    params = perturbed_params(config)
    tokens = np.random.default_rng(2).integers(0, config.vocab_size, 20)
    expected = reference_logits(params, config, tokens, np.ones(20, int), np.arange(20))
    np.testing.assert_allclose(logits_of(params, config, tokens)[0], expected, rtol=0, atol=2e-4)
    # The window may also be changed for a model that is trained already.
    wider = config.model_copy(update={"window": window + 3})
    expected = reference_logits(params, wider, tokens, np.ones(20, int), np.arange(20))
    np.testing.assert_allclose(logits_of(params, wider, tokens)[0], expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("remat", ["projections", "layers"])
def test_rematerialisation_saves_memory_and_changes_no_gradient(remat):
    config = TINY.model_copy(update={"num_layers": 7})
    params = perturbed_params(config)
    tokens = jnp.asarray(np.random.default_rng(3).integers(0, config.vocab_size, (8, 64)))

    def compiled(how):
        def loss(params):
            x = hidden_states(params, config, tokens, tokens * 0 + 1, tokens, how)
            return jnp.sum(jnp.sin(x))

        return jax.jit(jax.grad(loss)).lower(params).compile()

    plain, saving = compiled(DEFAULT), compiled(Execution(remat=remat))
    analyses = plain.memory_analysis(), saving.memory_analysis()
    sizes = [memory.temp_size_in_bytes for memory in analyses if memory is not None]
    assert sizes[1] < 0.7 * sizes[0]
    for a, b in zip(jax.tree.leaves(plain(params)), jax.tree.leaves(saving(params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(a).max())


def test_the_program_does_not_grow_with_depth():
    def size(num_layers):
        config = TINY.model_copy(update={"num_layers": num_layers})
        shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
        tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
        lowered = jax.jit(hidden_states, static_argnums=1).lower(
            shapes, config, tokens, tokens, tokens
        )
        return len(lowered.as_text())

    assert size(20) < 1.1 * size(4)


def test_gradients_are_finite_when_a_row_is_all_padding():
    params = fresh_params(TINY)
    tokens = jnp.zeros((2, 8), jnp.int32)
    segments = tokens.at[0].set(1)

    def loss(params):
        return jnp.sum(logits_of(params, TINY, tokens, segments, tokens)[0] ** 2)

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(params)))


def test_bfloat16_computes_near_float32_and_keeps_float32_parameters():
    params = fresh_params(TINY)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    tokens = jnp.arange(32)[None]
    how = Execution("bfloat16")
    x = hidden_states(params, TINY, tokens, tokens * 0 + 1, tokens, how)
    assert x.dtype == jnp.bfloat16
    logits = logits_of(params, TINY, tokens, how=how)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, logits_of(params, TINY, tokens), atol=0.15)


def test_embedding_rows_beyond_the_vocabulary_have_no_probability():
    config = TINY.model_copy(update={"num_embeddings": TINY.vocab_size + 8})
    params = perturbed_params(config)
    probs = jax.nn.softmax(logits_of(params, config, np.arange(6)))
    assert probs.shape[-1] == TINY.vocab_size + 8
    assert (probs[..., TINY.vocab_size :] == 0).all()
    np.testing.assert_allclose(probs.sum(-1), 1, atol=1e-5)


def test_rows_longer_than_the_context_are_refused():
    tokens = jnp.zeros((1, TINY.context_length + 1), jnp.int32)
    with pytest.raises(ValueError, match="context_length=256"):
        logits_of(fresh_params(TINY), TINY, tokens)


@pytest.mark.parametrize("size", GEMMA_2)
def test_param_count_agrees_with_the_report(size):
    embedding, other, query_factor = GEMMA_2[size]
    config = MODEL_PRESETS[size]
    assert param_count(config) == (embedding, other, embedding + other)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == embedding + other
    assert config.query_factor == pytest.approx(query_factor)
    assert (config.context_length, config.window, config.rope_base) == (8192, 4096, 10_000)
    assert (config.attention_softcap, config.final_softcap, config.norm_eps) == (50, 30, 1e-6)


def test_a_wrong_config_reports_all_faults_with_their_repair():
    wrong = TINY.model_dump() | {"num_kv_heads": 3, "head_dim": 7, "num_embeddings": 100}
    with pytest.raises(ValidationError) as caught:
        ModelConfig(**wrong)
    message = str(caught.value)
    for part in (
        "divides num_heads",
        "choose an even head_dim",
        "smaller than vocab_size=512: raise num_embeddings",
    ):
        assert part in message
    with pytest.raises(ValidationError, match="widht"):
        ModelConfig(**(TINY.model_dump() | {"widht": 3}))


def test_the_quickstart_pair_shares_a_vocabulary_and_the_teacher_is_larger():
    teacher, student = MODEL_PRESETS["teacher-small"], MODEL_PRESETS["student-small"]
    assert teacher.vocab_size == student.vocab_size
    assert teacher.context_length == student.context_length
    assert param_count(teacher).other > 5 * param_count(student).other
