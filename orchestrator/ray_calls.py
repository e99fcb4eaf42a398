"""The three calls to Ray that the controller's parts share."""

from typing import Any

import ray


def start_actor(cls: type, *args: Any, **options: Any) -> Any:
    """A handle to a new actor of `cls`, made with `args`; `options` are Ray's."""
    return ray.remote(**options)(cls).remote(*args)


def is_ready(reference: Any) -> bool:
    """Whether a call has an answer, or an error; returns at once."""
    return bool(ray.wait([reference], timeout=0)[0])


def answer(reference: Any, timeout_s: float | None = None) -> Any:
    """The answer of a call. Raises what the call raised, or ended with."""
    return ray.get(reference, timeout=timeout_s)
