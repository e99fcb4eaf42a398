"""Puts a checkpoint on storage, in the background: arrays, digests of the files, the entry."""

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from workers.checkpoint import CheckpointMeta, checkpoint_url, entry_url, optimizer_part
from workers.epochs import SupersededError, check_epoch
from workers.integrity import sealed, write_file_digests
from workers.storage import write_json
from workers.train_step import TrainState


class NotSavedError(OSError):
    """Storage did not take a checkpoint."""


class CheckpointWriter:
    """Saves asynchronously, one at a time; all processes of the gang call it alike.

    Args:
        epoch: outside of which nothing is committed; None: it always is.
    """

    def __init__(
        self, run_url: str, on_commit: Callable[[CheckpointMeta], None], epoch: int | None = None
    ):
        self._run_url = run_url
        self._on_commit = on_commit
        self._epoch = epoch
        self._pending: Future[None] | None = None

    def save(self, state: TrainState, meta: CheckpointMeta) -> None:
        """Starts to save `state`; returns when its arrays are copied off the devices.

        Waits for the save before, and raises what that one met.
        """
        self.wait()
        response = ocp.save_checkpointables_async(
            checkpoint_url(self._run_url, meta.step),
            {"params": state.params, "optimizer": optimizer_part(state)},
            overwrite=True,
            custom_metadata=sealed(dataclasses.asdict(meta)),
        )
        self._pending = Future()
        threading.Thread(
            target=self._commit, args=(response, meta, self._pending), name="commit"
        ).start()

    def wait(self) -> None:
        """Returns when the last save is committed.

        Raises:
            NotSavedError: it could not be.
            SupersededError: it must not be.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def _commit(self, response: Any, meta: CheckpointMeta, pending: Future[None]) -> None:
        try:
            response.result()
            if jax.process_index() == 0:
                if self._epoch is not None:
                    check_epoch(self._run_url, self._epoch)
                write_file_digests(checkpoint_url(self._run_url, meta.step))
                write_json(entry_url(self._run_url, meta.step), dataclasses.asdict(meta))
                self._on_commit(meta)
        except SupersededError as error:
            pending.set_exception(error)
        except Exception as error:
            # TensorStore has a type of its own for what the operating system says of a file.
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            pending.set_exception(NotSavedError(f"step {meta.step} is not saved: {reason}"))
        else:
            pending.set_result(None)
