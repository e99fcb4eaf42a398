"""The thin Ray shell around the evaluator."""

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

from workers.integrity import own_checkpoint
from workers.jobs import EvaluationJob

if TYPE_CHECKING:
    from workers.evaluator import Evaluator


class EvaluatorActor:
    """Loads its rows, and the teacher where there is one, at the first evaluation."""

    def __init__(self, job: EvaluationJob, run_url: str, code: str):
        from workers.cache import keep_compiled_programs
        from workers.code_identity import check_same_code
        from workers.record import LogSegments

        check_same_code(code)
        keep_compiled_programs()
        logging.getLogger().addHandler(LogSegments(run_url, "evaluator"))
        self._job = job
        self._evaluator: Evaluator | None = None

    def evaluate(self, url: str) -> dict[str, Any]:
        """The evaluation of the checkpoint at `url`, as JSON values."""
        from workers.evaluator import Evaluator

        if self._evaluator is None:
            self._evaluator = Evaluator(self._job)
        with own_checkpoint(url):
            return dataclasses.asdict(self._evaluator.evaluate(url))
