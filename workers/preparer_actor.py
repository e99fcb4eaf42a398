"""The thin Ray shell around the making of tokenizer and rows."""

import os
from typing import Any

from configs.data import DataConfig


class PreparerActor:
    """Makes what a run needs of its text, and says meanwhile how far it is."""

    def __init__(self) -> None:
        self._state: dict[str, Any] = {}

    def prepare(
        self,
        config: DataConfig,
        vocab_size: int,
        storage_url: str,
        run_url: str,
        teacher_url: str | None,
    ) -> dict[str, Any]:
        """The fields of `workers.preparer.Prepared`."""
        from workers.preparer import prepare

        num_workers = min(8, os.cpu_count() or 1)
        places = storage_url, run_url, teacher_url
        return vars(prepare(config, vocab_size, *places, num_workers, self._note))

    def progress(self) -> dict[str, Any]:
        """What is being made, and how far it is."""
        return self._state

    def _note(self, what: str, done: int, total: int) -> None:
        self._state = {"what": what, "done": done, "total": total}
