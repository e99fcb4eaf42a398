"""The calls to Ray that the controller's parts share."""

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def start_actor(cls: type, *args: Any, **options: Any) -> Any:
    """A handle to a new actor of `cls`, made with `args`; `options` are Ray's."""
    return ray.remote(**options)(cls).remote(*args)


def beside_me() -> dict[str, Any]:
    """Options of an actor that needs next to nothing, on the caller's machine while that is there.

    What drives a run should not go down with one of its slices; a launch is most often made from
    the cluster's head.
    """
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    # Ray asks any machine, even one that has just died, to place what needs nothing, and that
    # machine keeps it. For what needs something it asks the caller's.
    return {"num_cpus": 0, "memory": 1, "scheduling_strategy": here}


def is_ready(reference: Any) -> bool:
    """Whether a call has an answer, or an error; returns at once."""
    return bool(ray.wait([reference], timeout=0)[0])


def answer(reference: Any, timeout_s: float | None = None) -> Any:
    """The answer of a call. Raises what the call raised, or ended with."""
    return ray.get(reference, timeout=timeout_s)
