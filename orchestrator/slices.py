"""Which TPU slices of a cluster nobody uses."""

import math
import time
from collections.abc import Iterable, Mapping, Set
from typing import Any

import ray
from ray._private.state import available_resources_per_node, state

from configs.topology import Topology

# The labels and resources that Ray gives a node that is a TPU host (docs.ray.io, "Use labels to
# control scheduling").
SLICE_NAME = "ray.io/tpu-slice-name"
WORKER_ID = "ray.io/tpu-worker-id"
POD_TYPE = "ray.io/tpu-pod-type"
TOPOLOGY = "ray.io/tpu-topology"


def free_slices(
    nodes: Iterable[Mapping[str, Any]],
    available: Mapping[str, Mapping[str, float]],
    draining: Set[str],
    shape: Topology,
) -> set[str]:
    """Names of the slices of `shape` that are whole, unused and here to stay. Pure.

    Args:
        nodes: as `ray.nodes()` tells them.
        available: by node, the resources that are free.
        draining: nodes that are to be taken away.
    """
    hosts: dict[str, int] = {}
    for node in nodes:
        labels = node.get("Labels", {})
        same = (labels.get(POD_TYPE), labels.get(TOPOLOGY)) == (shape.pod_type, shape.topology)
        free = available.get(node["NodeID"], {}).get("TPU", 0)
        stays = node["Alive"] and node["NodeID"] not in draining
        if stays and same and free >= shape.chips_per_host:
            hosts[labels[SLICE_NAME]] = hosts.get(labels[SLICE_NAME], 0) + 1
    return {name for name, num in hosts.items() if num == shape.num_hosts}


def num_free_slices(shape: Topology) -> int:
    """How many slices of `shape` the connected cluster has that nobody uses."""
    # Ray has no public way to ask what is free on each node without its dashboard.
    available: Any = available_resources_per_node()
    return len(free_slices(ray.nodes(), available, draining_nodes(), shape))


def draining_nodes(within_s: float = math.inf) -> set[str]:
    """Nodes of the connected cluster that are to be taken away, and of those that say when (most
    do) the ones that go within `within_s`."""
    latest_ms = 1e3 * (time.time() + within_s)
    deadlines_ms: Any = state.get_draining_nodes()
    return {node for node, deadline_ms in deadlines_ms.items() if deadline_ms <= latest_ms}
