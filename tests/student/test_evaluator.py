"""A checkpoint's numbers on held-out text are those that a direct computation gives."""

import dataclasses
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from model.tokenizer import Tokenizer
from model.transformer import hidden_states, unembed
from tests.helpers.checkpoints import fresh_state, save_state, tiny_config
from workers.checkpoint import load_params
from workers.evaluator import Evaluation, Evaluator
from workers.jobs import EvaluationJob
from workers.preparer import Prepared, tokenizer_url
from workers.rows import BatchArrays, RowReader, batch_arrays

NUM_ROWS = 7
RUN = "runs/teacher"


@pytest.fixture(scope="module")
def urls(text_storage: Path, facts: Prepared) -> list[str]:
    """Two checkpoints of the same run folder: of step 0 and, with other weights, of step 1."""
    config = tiny_config(text_storage)
    states = [fresh_state(config, 0), fresh_state(config, 1)]
    states[1] = states[1]._replace(step=states[1].step + 1)
    run, digest = str(text_storage / RUN), facts.tokenizer_digest
    saved = (save_state(run, state, config, tokenizer_digest=digest) for state in states)
    return [url for url, _ in saved]


@pytest.fixture(scope="module")
def job(text_storage: Path, facts: Prepared, urls: list[str]) -> EvaluationJob:
    return EvaluationJob(
        storage_url=str(text_storage),
        dataset_digest=facts.dataset_digest,
        tokenizer_url=tokenizer_url(urls[0]),
        max_rows=NUM_ROWS,
        rows_per_batch=4,
        compute_dtype="float32",
        teacher_url=urls[0],
    )


@pytest.fixture(scope="module")
def evaluations(job: EvaluationJob, urls: list[str]) -> list[Evaluation]:
    evaluator = Evaluator(job)
    return [evaluator.evaluate(url) for url in urls]


@pytest.fixture(scope="module")
def held_out(text_storage: Path, facts: Prepared, tmp_path_factory) -> BatchArrays:
    cache = str(tmp_path_factory.mktemp("cache"))
    reader = RowReader.open(str(text_storage), facts.dataset_digest, "held_out", cache)
    assert len(reader.all_ids()) > NUM_ROWS
    return batch_arrays(reader.read(reader.all_ids()[:NUM_ROWS]))


def log_probs(url: str, rows: BatchArrays) -> np.ndarray:
    model, params = load_params(url)

    @jax.jit
    def compute(inputs: jax.Array, segments: jax.Array, positions: jax.Array) -> jax.Array:
        x = hidden_states(params, model, inputs, segments, positions)
        return jax.nn.log_softmax(unembed(params, model, x))

    return np.asarray(compute(rows.inputs, rows.segments, rows.positions), np.float64)


def test_loss_and_bits_per_byte_are_those_of_a_direct_sum(
    text_storage, evaluations, urls, held_out
):
    tokenizer = Tokenizer.load(text_storage / RUN / "tokenizer.model")
    for url, evaluation in zip(urls, evaluations, strict=True):
        log_q = log_probs(url, held_out)
        nats, num_bytes, num_tokens = 0.0, 0, 0
        for row, slot in zip(*np.nonzero(held_out.mask), strict=True):
            label = held_out.labels[row, slot]
            nats -= log_q[row, slot, label]
            text = b"" if label == tokenizer.eos_id else tokenizer.decode([label]).encode()
            num_bytes += int(tokenizer.piece_bytes()[label])
            # Bytes that are no text by themselves decode to a stand-in of three.
            assert int(tokenizer.piece_bytes()[label]) == len(text) or b"\xef\xbf\xbd" in text
            num_tokens += 1
        assert evaluation.num_tokens == num_tokens and evaluation.num_bytes == num_bytes
        assert evaluation.loss == pytest.approx(nats / num_tokens, rel=1e-5)
        assert evaluation.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


def test_divergence_from_the_teacher_is_exact_and_nothing_from_itself(evaluations, urls, held_out):
    log_p, log_q = (log_probs(url, held_out) for url in urls)
    expected = (np.exp(log_p) * (log_p - log_q)).sum(-1)[held_out.mask].mean()
    assert evaluations[1].kl_to_teacher == pytest.approx(expected, rel=1e-4)
    assert expected > 0.1
    assert evaluations[0].kl_to_teacher == pytest.approx(0, abs=1e-6)


def test_steps_and_digests_are_those_of_the_checkpoint(evaluations):
    assert [evaluation.step for evaluation in evaluations] == [0, 1]
    assert evaluations[0].digest != evaluations[1].digest
    assert evaluations[0].loss != evaluations[1].loss


def test_a_shorter_window_is_that_of_the_model_and_changes_the_judgement(job, urls, evaluations):
    whole = Evaluator(dataclasses.replace(job, window=32)).evaluate(urls[1])
    assert whole.loss == evaluations[1].loss  # no row is longer than the trained window
    short = Evaluator(dataclasses.replace(job, window=1)).evaluate(urls[1])
    assert short.loss != evaluations[1].loss


def test_padding_rows_do_not_count(job, urls, evaluations):
    """Seven rows are one padded batch of sixteen, or two batches of four with one row padded."""
    other = Evaluator(dataclasses.replace(job, rows_per_batch=16, teacher_url=None))
    found = other.evaluate(urls[1])
    assert found.num_tokens == evaluations[1].num_tokens
    assert found.num_bytes == evaluations[1].num_bytes
    assert found.loss == pytest.approx(evaluations[1].loss, rel=1e-6)
    assert found.kl_to_teacher is None


def test_a_checkpoint_of_another_tokenizer_is_refused(job, text_storage, tmp_path):
    config = tiny_config(text_storage)
    url, _ = save_state(str(tmp_path), fresh_state(config), config, tokenizer_digest="f" * 64)
    evaluator = Evaluator(dataclasses.replace(job, teacher_url=None))
    with pytest.raises(ValueError, match="trained with tokenizer ffffffffffff, the held-out"):
        evaluator.evaluate(url)


def test_without_held_out_rows_it_says_so(job):
    with pytest.raises(ValueError, match=r"no held-out rows: raise data.held_out_fraction"):
        Evaluator(dataclasses.replace(job, max_rows=0, teacher_url=None))
