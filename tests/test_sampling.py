"""Generated texts are those of the plain definition: one forward pass of the whole text each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import model.sampling
from model.execution import DEFAULT, Execution
from model.sampling import Generated, Sampling, candidates, complete, generate
from model.transformer import unembed
from tests.test_cache import logits_at_once, random_params, small_config

GREEDY = Sampling(temperature=0)
CONFIG = small_config()
PARAMS = random_params(CONFIG)


def prompts_of(lengths, width=None, seed=0):
    """Random prompts, and beyond their ends other tokens, that must not matter."""
    tokens = np.random.default_rng(seed).integers(
        0, CONFIG.vocab_size, (len(lengths), width or max(lengths))
    )
    return tokens.astype(np.int32), np.array(lengths, np.int32)


def texts_of(generated):
    """Each row's new tokens; what lies behind them has to be 0."""
    texts = []
    for tokens, length in zip(*map(np.asarray, generated), strict=True):
        assert (tokens[length:] == 0).all()
        texts.append(tokens[:length].tolist())
    return texts


def check_greedy(config, lengths, num_new, width=None, seed=0, how=DEFAULT, atol=1e-4):
    """Each new token has the largest logit in one uncached pass over its row's whole text."""
    params = random_params(config, seed)
    prompts_BT, lengths_B = prompts_of(lengths, width, seed)
    options = {"max_new_tokens": num_new, "sampling": GREEDY, "how": how}
    texts = texts_of(generate(params, config, prompts_BT, lengths_B, **options))
    whole_BT = np.pad(prompts_BT, ((0, 0), (0, num_new)))
    for row, new in enumerate(texts):
        assert len(new) == num_new
        whole_BT[row, lengths[row] :][:num_new] = new
    logits_BTV = np.asarray(logits_at_once(params, config, jnp.asarray(whole_BT), how))
    for row, new in enumerate(texts):
        logits_MV = logits_BTV[row, lengths[row] - 1 :][:num_new]
        chosen_M = logits_MV[np.arange(num_new), new]
        np.testing.assert_allclose(chosen_M, logits_MV.max(axis=-1), atol=atol, rtol=0)
    return texts


@pytest.mark.parametrize("num_layers", [2, 3])
def test_greedy_texts_are_those_of_the_uncached_model_far_past_the_window(num_layers):
    texts = check_greedy(small_config(num_layers), (3, 11, 1, 7), 30)
    assert min(len(set(text)) for text in texts) > 3, "a text that repeats itself shows little"


def test_greedy_texts_in_bfloat16():
    check_greedy(CONFIG, (2, 9), 12, how=Execution("bfloat16"), atol=0.1)


# Of few shapes, since each is compiled.
@settings(max_examples=3, deadline=None)
@given(
    num_layers=st.integers(1, 3),
    window=st.sampled_from([1, 4, 30]),
    lengths=st.lists(st.integers(1, 8), min_size=2, max_size=2),
    seed=st.integers(0, 99),
)
def test_any_greedy_text_is_that_of_the_uncached_model(num_layers, window, lengths, seed):
    check_greedy(small_config(num_layers, window), lengths, 12, width=8, seed=seed)


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


def sampled(prompts_BT, lengths_B, seed=0, rows=None, **changes):
    options = {"max_new_tokens": 12, "sampling": Sampling(3.0)} | changes
    rows_B = None if rows is None else np.array(rows)
    return texts_of(
        generate(PARAMS, CONFIG, prompts_BT, lengths_B, seed=seed, rows_B=rows_B, **options)
    )


def test_a_text_depends_on_its_row_and_seed_and_not_on_its_neighbours():
    prompts_BT, lengths_B = prompts_of((3, 8, 5, 8))
    texts = sampled(prompts_BT, lengths_B)
    assert len({tuple(text) for text in texts}) == 4

    order = [2, 0, 3, 1]
    moved = sampled(prompts_BT[order], lengths_B[order], rows=order)
    assert moved == [texts[row] for row in order]

    others_BT, other_lengths_B = prompts_of((8, 2, 8, 1), seed=9)
    others_BT[2], other_lengths_B[2] = prompts_BT[2], lengths_B[2]
    others_BT[2, lengths_B[2] :] = 7  # nor on what lies behind its prompt
    assert sampled(others_BT, other_lengths_B)[2] == texts[2]

    assert sampled(prompts_BT, lengths_B, seed=1) != texts
    same_BT = np.repeat(prompts_BT[:1], 4, axis=0)
    of_rows = sampled(same_BT, np.repeat(lengths_B[:1], 4))
    assert len({tuple(text) for text in of_rows}) == 4


def test_each_position_has_a_draw_of_its_own():
    all_alike = jax.tree.map(np.zeros_like, PARAMS)
    drawn = generate(all_alike, CONFIG, *prompts_of((3, 8)), max_new_tokens=50)
    assert all(len(set(text)) > 20 for text in texts_of(drawn))


def test_texts_do_not_depend_on_how_prompts_are_put_into_batches():
    prompts_BT, lengths_B = prompts_of((3, 8, 5, 1, 17))
    prompts = [
        prompt[:length].tolist() for prompt, length in zip(prompts_BT, lengths_B, strict=True)
    ]

    def completed(rows_per_batch):
        return list(
            complete(
                PARAMS,
                CONFIG,
                prompts,
                max_new_tokens=9,
                seed=5,
                sampling=Sampling(2.0, top_p=0.9),
                rows_per_batch=rows_per_batch,
            )
        )

    together = completed(8)
    assert together == completed(2)
    assert [len(text) for text in together] == [9] * 5


def test_prompts_of_similar_length_share_a_shape(monkeypatch):
    shapes = []

    def nothing(params, config, prompts_BT, lengths_B, **options):
        shapes.append(prompts_BT.shape)
        return Generated(jnp.zeros((len(lengths_B), 1)), jnp.zeros(len(lengths_B), int))

    monkeypatch.setattr(model.sampling, "generate", nothing)
    config = small_config(context_length=24)
    for length in (1, 2, 3, 4, 5, 8, 9, 17, 24):
        assert list(complete({}, config, [[1] * length], max_new_tokens=1)) == [[]]
    assert [T for _, T in shapes] == [1, 2, 4, 4, 8, 8, 16, 24, 24]


def test_only_another_shape_or_top_k_compiles_anew(monkeypatch):
    traces = []

    def counted(*args):
        traces.append(args)
        return unembed(*args)

    monkeypatch.setattr(model.sampling, "unembed", counted)
    prompts_BT, lengths_B = prompts_of((6, 2, 3))

    def traces_of(prompts_BT=prompts_BT, **changes):
        before = len(traces)
        sampled(prompts_BT, lengths_B, max_new_tokens=5, **changes)
        return len(traces) - before

    assert traces_of() > 0
    assert traces_of(sampling=Sampling(0.5), stop_ids=()) == 0
    assert traces_of(sampling=GREEDY) == 0
    assert traces_of(sampling=Sampling(1.0, top_p=0.5), seed=8, rows=[7, 8, 9]) == 0
    assert traces_of(sampling=Sampling(1.0, top_k=3)) > 0
    assert traces_of(np.pad(prompts_BT, ((0, 0), (0, 1)))) > 0


def test_a_text_ends_with_the_first_stop_id():
    prompts_BT, lengths_B = prompts_of((3, 8, 5, 8))
    free = sampled(prompts_BT, lengths_B)
    stop_ids = [free[0][4], free[1][7]]
    stopped = sampled(prompts_BT, lengths_B, stop_ids=stop_ids)
    for text, whole in zip(stopped, free, strict=True):
        hits = [i for i, token in enumerate(whole) if token in stop_ids]
        assert text == (whole[: hits[0] + 1] if hits else whole)
    assert len(stopped[0]) <= 5
    assert len(stopped[1]) <= 8


def test_a_text_ends_with_the_context():
    config = small_config(context_length=10)
    prompts_BT, lengths_B = prompts_of((10, 7, 2))
    longer = small_config(context_length=32)
    texts, free = (
        texts_of(
            generate(
                random_params(each), each, prompts_BT, lengths_B, max_new_tokens=20, sampling=GREEDY
            )
        )
        for each in (config, longer)
    )
    assert [len(text) for text in texts] == [1, 4, 9]
    assert texts == [whole[: len(text)] for text, whole in zip(texts, free, strict=True)]


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
    ("lengths", "said"),
    [((3, 0), "prompt 2 is empty"), ((65, 3), "prompt 1 has 65 tokens.*context_length is 64")],
)
def test_empty_and_too_long_prompts_are_refused(lengths, said):
    prompts_BT, lengths_B = prompts_of(lengths, width=65)
    with pytest.raises(ValueError, match=said):
        sampled(prompts_BT, lengths_B)
    prompts = [
        prompt[:length].tolist() for prompt, length in zip(prompts_BT, lengths_B, strict=True)
    ]
    with pytest.raises(ValueError, match=said):
        next(complete(PARAMS, CONFIG, prompts, max_new_tokens=3))


def test_a_text_of_no_tokens_is_refused():
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        sampled(*prompts_of((3,)), max_new_tokens=0)


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
