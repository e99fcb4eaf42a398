"""Judges a checkpoint on held-out rows. Runs without Ray."""

import dataclasses
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from model.chunked_loss import HiddenTargets, chunked_loss
from model.chunked_objective import LossSums, Objective
from model.config import ModelConfig
from model.execution import Execution
from model.tokenizer import Tokenizer
from model.transformer import hidden_states
from workers.cache import cache_dir
from workers.checkpoint import load_params, read_meta
from workers.jobs import EvaluationJob
from workers.rows import BatchArrays, RowReader, batch_arrays
from workers.storage import read_bytes
from workers.train_step import Batch, Params


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How good a checkpoint is on held-out text."""

    step: int
    loss: float
    """Nats per labelled token, ends of documents included."""
    bits_per_byte: float
    """Bits of all labelled tokens over the UTF-8 bytes that they stand for."""
    kl_to_teacher: float | None
    """Nats per token, KL(teacher ‖ student) over the whole vocabulary."""
    num_tokens: int
    num_bytes: int
    digest: str
    """The state digest of the checkpoint that was judged."""
    seconds: float


class Evaluator:
    """Keeps its rows and its compiled function from one checkpoint to the next."""

    def __init__(self, job: EvaluationJob):
        self._job = job
        tokenizer = Tokenizer.load(read_bytes(job.tokenizer_url))
        self._tokenizer_digest = tokenizer.digest
        self._piece_bytes = jnp.asarray(tokenizer.piece_bytes())
        self._batches = _held_out_batches(job)
        self._teacher = None if job.teacher_url is None else load_params(job.teacher_url)
        self._sums = jax.jit(self._batch_sums, static_argnames="model")
        self._teacher_entropy = 0.0
        if self._teacher is not None:
            entropy = jax.jit(self._entropy)
            self._teacher_entropy = sum(float(entropy(self._teacher[1], b)) for b in self._batches)

    def evaluate(self, url: str) -> Evaluation:
        """Scores the checkpoint at `url` on all held-out rows.

        Raises:
            ValueError: a checkpoint of another tokenizer.
            CorruptCheckpointError: damaged files.
        """
        began = time.perf_counter()
        meta = read_meta(url)
        if meta.tokenizer_digest != self._tokenizer_digest:
            raise ValueError(
                f"{url} was trained with tokenizer {meta.tokenizer_digest[:12]}, the held-out rows "
                f"were made with {self._tokenizer_digest[:12]}; evaluate it on data of its own"
            )
        model, params = load_params(url)
        if self._job.window is not None:
            model = model.model_copy(update={"window": self._job.window})
        teacher_params = None if self._teacher is None else self._teacher[1]
        loss = cross_entropy = 0.0
        num_tokens = num_bytes = 0
        for batch in self._batches:
            sums = self._sums(params, teacher_params, batch, model=model)
            loss += float(sums.ce_loss)
            cross_entropy += float(sums.kd_loss)
            num_tokens += int(batch.mask.sum())
            num_bytes += int(jnp.where(batch.mask, self._piece_bytes[batch.labels], 0).sum())
        return Evaluation(
            step=meta.step,
            loss=loss / num_tokens,
            bits_per_byte=loss / math.log(2) / num_bytes,
            kl_to_teacher=(cross_entropy - self._teacher_entropy) / num_tokens
            if self._teacher is not None
            else None,
            num_tokens=num_tokens,
            num_bytes=num_bytes,
            digest=meta.digest,
            seconds=time.perf_counter() - began,
        )

    def _batch_sums(
        self, params: Params, teacher_params: Params | None, batch: Batch, *, model: ModelConfig
    ) -> LossSums:
        """The student's cross-entropies, of the labels and under the teacher."""
        x_BTD = self._hidden(params, model, batch)
        targets = None if teacher_params is None else self._targets(teacher_params, batch)
        return self._score(x_BTD, params, model, batch, targets)

    def _entropy(self, teacher_params: Params, batch: Batch) -> Float[Array, ""]:
        """The teacher's own: what the student's cross-entropy under it is at best."""
        assert self._teacher is not None
        targets = self._targets(teacher_params, batch)
        return self._score(targets.x_BTD, teacher_params, self._teacher[0], batch, targets).kd_loss

    def _targets(self, teacher_params: Params, batch: Batch) -> HiddenTargets:
        assert self._teacher is not None
        teacher = self._teacher[0]
        x_BTD = self._hidden(teacher_params, teacher, batch)
        return HiddenTargets(x_BTD, teacher_params["embedding"], teacher.final_softcap)

    def _score(
        self,
        x_BTD: Float[Array, "B T D"],
        params: Params,
        model: ModelConfig,
        batch: Batch,
        targets: HiddenTargets | None,
    ) -> LossSums:
        return chunked_loss(
            x_BTD,
            params["embedding"],
            batch.labels,
            batch.mask,
            targets,
            0.0,
            model=model,
            objective=Objective(),
        )

    def _hidden(self, params: Params, model: ModelConfig, batch: Batch) -> Float[Array, "B T D"]:
        how = Execution(self._job.compute_dtype)
        return hidden_states(params, model, batch.inputs, batch.segments, batch.positions, how)


def _held_out_batches(job: EvaluationJob) -> list[Batch]:
    reader = RowReader.open(job.storage_url, job.dataset_digest, "held_out", cache_dir())
    ids = reader.all_ids()[: job.max_rows]
    if not ids:
        raise ValueError(
            "There are no held-out rows: raise data.held_out_fraction, or set "
            "evaluation.enabled=false"
        )
    batches = []
    for start in range(0, len(ids), job.rows_per_batch):
        part = ids[start : start + job.rows_per_batch]
        batches.append(_padded_batch(batch_arrays(reader.read(part)), job.rows_per_batch))
    return batches


def _padded_batch(arrays: BatchArrays, num_rows: int) -> Batch:
    """Rows of zeros up to the compiled shape; their mask is zero as well."""
    padded = (np.pad(array, ((0, num_rows - len(array)), (0, 0))) for array in arrays)
    return Batch(*(jnp.asarray(array) for array in padded))
