"""A machine that is to be taken back."""

import time
from typing import Any


def announce_preemption(node: str, left_s: float) -> None:
    """What a node does to itself when the cloud tells it that it will be taken back."""
    import ray._raylet
    from ray.core.generated import autoscaler_pb2

    generated: Any = autoscaler_pb2
    raylet: Any = ray._raylet
    gcs = raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    reason = generated.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int((time.time() + left_s) * 1000)
    accepted, why_not = gcs.drain_node(node, reason, "taken back", deadline_ms)
    assert accepted, why_not
