"""A controller lives more than once: what it is called in all its lives, and how one begins."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

import ray

INSIST_EVERY_S = 5.0

_log = logging.getLogger(__name__)
T = TypeVar("T")


def holder() -> str | None:
    """What names this actor in all its lives; None outside of one."""
    return ray.get_runtime_context().get_actor_id() if ray.is_initialized() else None


def is_restarted() -> bool:
    """Whether Ray has made this actor again after it died."""
    return ray.is_initialized() and bool(ray.get_runtime_context().was_current_actor_reconstructed)


def insist(work: Callable[[], T]) -> T:
    """What `work` gets from storage, for which a life that Ray has begun waits.

    The students train on meanwhile, and Ray would not begin another: an actor that fails as it is
    made is dead for good. At the launch somebody is there to hear of it.
    """
    while True:
        try:
            return work()
        except OSError as error:
            if not is_restarted():
                raise
            _log.warning("Storage does not answer, will try again: %s", error)
            time.sleep(INSIST_EVERY_S)
