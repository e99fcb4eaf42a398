"""Generated texts are those of the plain definition: one forward pass of the whole text each."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import model.sampling
from model.execution import DEFAULT, Execution
from model.sampling import Generated, Sampling, complete, generate
from model.transformer import unembed
from tests.helpers.small_models import (
    CONFIG,
    PARAMS,
    logits_at_once,
    prompts_of,
    random_params,
    small_config,
    texts_of,
)

pytestmark = pytest.mark.slow

GREEDY = Sampling(temperature=0)


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
@settings(max_examples=2, deadline=None)
@given(
    num_layers=st.integers(1, 3),
    window=st.sampled_from([1, 4, 30]),
    cases=st.lists(
        st.tuples(
            st.lists(st.integers(1, 8), min_size=2, max_size=2),
            st.integers(0, 99),
        ),
        min_size=3,
        max_size=3,
    ),
)
def test_any_greedy_text_is_that_of_the_uncached_model(num_layers, window, cases):
    for lengths, seed in cases:
        check_greedy(small_config(num_layers, window), lengths, 12, width=8, seed=seed)


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
