"""`stillhouse evaluate`: one checkpoint on the held-out rows of its own run, on this machine."""

import dataclasses
from typing import Any

from configs.load import parse_run
from orchestrator.catalogue import find_checkpoint
from orchestrator.run_folder import RunFolder
from workers.jobs import EvaluationJob
from workers.preparer import tokenizer_url


def evaluate_checkpoint(name: str, storage_url: str, window: int | None = None) -> dict[str, Any]:
    """The evaluation of `RUN`, `RUN@STEP` or a path, as JSON values.

    Args:
        window: of the local layers, in place of the one that they were trained with (Gemma 2
            report, ablations: what a shorter one at inference costs).

    Raises:
        ValueError: there is no such checkpoint, or its data set or tokenizer is not below
            `storage_url`.
    """
    url, entry = find_checkpoint(name, storage_url)
    if not entry["dataset_digest"]:
        raise ValueError(
            f"{url} holds imported weights, which have no held-out text of their own: start a run "
            "from them (start_from.checkpoint), and evaluate that"
        )
    config = parse_run(entry["config"], url)
    from workers.evaluator import Evaluator

    job = EvaluationJob(
        storage_url=storage_url,
        dataset_digest=entry["dataset_digest"],
        tokenizer_url=tokenizer_url(url),
        max_rows=config.data.held_out_rows,
        rows_per_batch=config.evaluation.rows_per_batch,
        compute_dtype=config.compute_dtype,
        teacher_url=_teacher_url(config.name, storage_url) if config.distilled else None,
        window=window,
    )
    return dataclasses.asdict(Evaluator(job).evaluate(url))


def _teacher_url(run: str, storage_url: str) -> str | None:
    folder = RunFolder(storage_url, run)
    return folder.identity()["teacher_url"] if folder.exists() else None
