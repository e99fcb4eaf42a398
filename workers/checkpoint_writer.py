"""Puts a checkpoint on storage, in the background: arrays, digests of the files, the entry."""

import dataclasses
import logging
import threading
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from workers.checkpoint import (
    FOLDER,
    CheckpointMeta,
    checkpoint_url,
    entry_url,
    optimizer_part,
)
from workers.epochs import Epoch, SupersededError, check_epoch
from workers.integrity import sealed, write_file_digests
from workers.storage import exists, join, list_names, remove_tree, write_json
from workers.train_step import TrainState

# What Orbax calls a folder that it has not finished, where it can rename folders.
_UNFINISHED = ".orbax-checkpoint-tmp"


_log = logging.getLogger(__name__)


class NotSavedError(OSError):
    """Storage did not take a checkpoint."""


class CheckpointWriter:
    """Saves asynchronously, one at a time; all processes of the gang call it alike.

    Args:
        epoch: outside of which nothing is committed; None: it always is.

    Attributes:
        pending: becomes done when the last save is committed, or
            NotSavedError: it could not be;
            SupersededError: it must not be.
    """

    def __init__(
        self, run_url: str, on_commit: Callable[[CheckpointMeta], None], epoch: Epoch | None = None
    ):
        self._run_url = run_url
        self._on_commit = on_commit
        self._epoch = epoch
        self.pending = _done()
        self._left: list[Future[None]] = []

    def save(self, state: TrainState, meta: CheckpointMeta) -> None:
        """Starts to save `state`; returns when its arrays are copied off the devices.

        Raises:
            NotSavedError: it could not be begun.
        """
        try:
            response = ocp.save_checkpointables_async(
                checkpoint_url(self._run_url, meta.step),
                {"params": state.params, "optimizer": optimizer_part(state)},
                overwrite=True,
                custom_metadata=sealed(dataclasses.asdict(meta)),
            )
        except Exception as error:
            raise _not_saved(meta.step, error) from error
        self.pending = Future()
        arguments = response, meta, self.pending
        threading.Thread(target=self._commit, args=arguments, name="commit", daemon=True).start()

    def leave(self) -> None:
        """The last save is over for the gang, even if this host still waits for another in it."""
        self._left = [each for each in (*self._left, self.pending) if not each.done()]
        self.pending = _done()

    def wait_for_left(self) -> None:
        """Returns when no save is under way that was left: two of a step share their files."""
        futures.wait(self._left)

    def remove_unfinished(self) -> None:
        """Frees what saves that did not come to their end have left on storage."""
        self._check_epoch()
        folder = join(self._run_url, FOLDER)
        names = list_names(folder)
        counted = {Path(name).stem for name in names if name.endswith((".json", ".quarantined"))}
        for name in names:
            if name.removesuffix(_UNFINISHED).isdecimal() and Path(name).stem not in counted:
                try:
                    remove_tree(join(folder, name))
                except OSError as error:  # it costs room, and nothing else
                    _log.warning("What an unfinished save left stays: %s", error)

    def remove_existing(self, step: int) -> None:
        """Removes the files of a checkpoint that is to be made anew, such as a quarantined one."""
        url = checkpoint_url(self._run_url, step)
        if exists(url):
            self._check_epoch()
            remove_tree(url)

    def _check_epoch(self) -> None:
        if self._epoch is not None:
            check_epoch(self._run_url, self._epoch)

    def _commit(self, response: Any, meta: CheckpointMeta, pending: Future[None]) -> None:
        try:
            response.result()
            if jax.process_index() == 0:
                self._check_epoch()
                write_file_digests(checkpoint_url(self._run_url, meta.step))
                write_json(entry_url(self._run_url, meta.step), dataclasses.asdict(meta))
                self._on_commit(meta)
        except SupersededError as error:
            pending.set_exception(error)
        except Exception as error:
            pending.set_exception(_not_saved(meta.step, error))
        else:
            pending.set_result(None)


def _not_saved(step: int, error: Exception) -> NotSavedError:
    # TensorStore has a type of its own for what the operating system says of a file, and hosts
    # that wait for one in vain have another.
    reason = f"{type(error).__name__}: {error}".splitlines()[0]
    return NotSavedError(f"step {step} is not saved: {reason}")


def _done() -> Future[None]:
    future = Future[None]()
    future.set_result(None)
    return future
