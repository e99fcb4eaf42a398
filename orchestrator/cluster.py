"""What a cluster of TPU slices looks like, and a stand-in for one on a machine without TPUs.

`slice_topology` knows the shapes that slices come in, `tpu_hosts` reads which slices a cluster
has, and `simulated_cluster` starts a local Ray cluster that looks to Ray Train like TPU slices
while JAX computes on the CPU.
"""

import contextlib
import itertools
import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The labels that Ray gives a node that is a TPU host (docs.ray.io, "Use labels to control
# scheduling").
_SLICE_NAME = "ray.io/tpu-slice-name"
_WORKER_ID = "ray.io/tpu-worker-id"
_POD_TYPE = "ray.io/tpu-pod-type"
_TOPOLOGY = "ray.io/tpu-topology"


@dataclass(frozen=True)
class _Generation:
    ray_name: str  # how Ray spells it in accelerator and pod types
    cores_per_chip: int  # pod types count cores, not chips
    topologies: frozenset[str]


# Sizes: cloud.google.com/tpu/docs, pages v4, v5e, v5p and v6e, "configurations"; cut to those
# that Ray 2.60 agrees to reserve as one slice (the tests hold the two together).
_SLICES_2D = frozenset({"1x1", "2x2", "2x4", "2x8", "4x4", "4x8", "8x8", "8x16", "16x16"})
_SMALL_SLICES_3D = frozenset({"2x2x1", "2x2x2", "2x2x4", "2x4x4"})


def _slices_3d(*largest: int) -> frozenset[str]:
    """The small slices, and every box of whole 4x4x4 cubes up to `largest`."""
    cubes = itertools.product(*(range(4, size + 1, 4) for size in largest))
    return _SMALL_SLICES_3D | {"x".join(map(str, dims)) for dims in cubes}


_GENERATIONS = {
    "v4": _Generation("v4", 2, _slices_3d(12, 12, 16)),
    "v5e": _Generation("v5litepod", 1, _SLICES_2D),
    "v5p": _Generation("v5p", 2, _slices_3d(16, 16, 24)),
    "v6e": _Generation("v6e", 1, _SLICES_2D),
}
# Hosts carry four chips, but a two-dimensional slice of up to eight chips is a single host.
_CHIPS_PER_HOST = 4
_MOST_CHIPS_ON_ONE_HOST = 8


@dataclass(frozen=True)
class Topology:
    """The shape of one TPU slice; made by `slice_topology`, which checks it."""

    accelerator: str
    topology: str

    @property
    def num_chips(self) -> int:
        return math.prod(int(dim) for dim in self.topology.split("x"))

    @property
    def chips_per_host(self) -> int:
        """Chips, and so JAX devices, of each host."""
        is_2d = self.topology.count("x") == 1
        if is_2d and self.num_chips <= _MOST_CHIPS_ON_ONE_HOST:
            return self.num_chips
        return _CHIPS_PER_HOST

    @property
    def num_hosts(self) -> int:
        return self.num_chips // self.chips_per_host

    @property
    def pod_type(self) -> str:
        """Ray's and Google Cloud's name for a slice of this size, such as `v4-16`."""
        generation = _GENERATIONS[self.accelerator]
        return f"{generation.ray_name}-{self.num_chips * generation.cores_per_chip}"

    @property
    def ray_accelerator_type(self) -> str:
        """What Ray Train's `ScalingConfig.accelerator_type` wants, such as `TPU-V5LITEPOD`."""
        return f"TPU-{_GENERATIONS[self.accelerator].ray_name.upper()}"


def slice_topology(accelerator: str, topology: str) -> Topology:
    """The facts of a slice of `accelerator` (such as `v4`) in the shape `topology` (`2x2x2`).

    Raises:
        ValueError: the accelerator is unknown, or has no slices of this shape.
    """
    generation = _GENERATIONS.get(accelerator)
    if generation is None:
        raise ValueError(
            f"unknown accelerator {accelerator!r}: choose one of {', '.join(_GENERATIONS)}"
        )
    if topology in generation.topologies:
        return Topology(accelerator, topology)
    num_dims = next(iter(generation.topologies)).count("x") + 1
    parts = topology.split("x")
    well_formed = all(part.isascii() and part.isdigit() and part[0] != "0" for part in parts)
    if not well_formed or len(parts) != num_dims:
        shape, example = ("AxB", "4x4") if num_dims == 2 else ("AxBxC", "2x2x2")
        raise ValueError(
            f"topology {topology!r} does not describe a {accelerator} slice: "
            f"write its chips by dimension as {shape}, such as {example}"
        )
    raise ValueError(
        f"there is no {accelerator} slice of topology {topology!r}: "
        f"the nearest in size are {', '.join(_nearest_in_size(generation, topology))}"
    )


def _nearest_in_size(generation: _Generation, topology: str) -> list[str]:
    """Three possible topologies, in the order of their distance in chips."""

    def num_chips(candidate: str) -> int:
        return math.prod(int(dim) for dim in candidate.split("x"))

    wanted = num_chips(topology)
    return sorted(generation.topologies, key=lambda t: (abs(num_chips(t) - wanted), t))[:3]


@dataclass(frozen=True)
class TpuSlice:
    """One slice of a running cluster; complete when all hosts of its topology are alive."""

    name: str
    accelerator: str
    topology: str
    num_hosts_alive: int


def tpu_hosts(nodes: Iterable[Mapping[str, Any]]) -> list[TpuSlice]:
    """The living TPU hosts among `nodes` (as `ray.nodes()` lists them), gathered by slice.

    Sorted by slice name. A host without a slice name is a slice of its own, as in Ray.
    """
    num_alive: Counter[tuple[str, str, str]] = Counter()
    for node in nodes:
        labels = node.get("Labels") or {}
        if not node["Alive"] or _POD_TYPE not in labels:
            continue
        ray_name = labels[_POD_TYPE].split("-")[0]
        accelerator = next(
            (name for name, known in _GENERATIONS.items() if known.ray_name == ray_name), ray_name
        )
        name = labels.get(_SLICE_NAME) or node["NodeID"]
        num_alive[name, accelerator, labels.get(_TOPOLOGY, "")] += 1
    return [TpuSlice(*key, num_hosts) for key, num_hosts in sorted(num_alive.items())]


@dataclass(frozen=True)
class SimulatedCluster:
    """A running local cluster; `address` is for `ray.init`."""

    address: str


@contextlib.contextmanager
def simulated_cluster(
    num_slices: int,
    topology: str,
    accelerator: str,
    *,
    head_cpus: int = 4,
    cpus_per_host: int = 2,
    dashboard: bool = False,
    temp_dir: Path | None = None,
) -> Iterator[SimulatedCluster]:
    """A local Ray cluster that looks like TPU slices; every host's chips are JAX CPU devices.

    One Ray node for each TPU host, and a head node whose plain CPUs are for everything else.
    The environment is changed inside the context only, so that the caller and its children can
    connect. On leaving, the caller's Ray connection is closed and every node is stopped.

    Args:
        num_slices: Slices, named `slice-0`, `slice-1` and so on.
        topology: Shape of each slice.
        accelerator: Generation of the slices, such as `v4`.
        head_cpus: CPUs that the head node claims to have.
        cpus_per_host: CPUs that each TPU host claims to have.
        dashboard: Start Ray's dashboard, which jobs and the state API need.
        temp_dir: Where Ray keeps logs and sockets; unset takes a directory that is removed.

    Raises:
        ValueError: there is no such slice, or `temp_dir` is too long for Ray's sockets.
    """
    shape = slice_topology(accelerator, topology)
    with contextlib.ExitStack() as stack:
        if temp_dir is None:
            temp_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sh-")))
        _check_socket_length(temp_dir)
        ray_dir = temp_dir / "ray"
        ray_dir.mkdir(parents=True, exist_ok=True)
        # RAY_TMPDIR also holds the file by which other Rays on this machine find "the" cluster.
        stack.enter_context(
            _environment({"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": str(temp_dir)})
        )

        import ray
        from ray.cluster_utils import Cluster

        cluster = Cluster()
        stack.callback(cluster.shutdown)
        stack.callback(ray.shutdown)
        cluster.add_node(
            num_cpus=head_cpus,
            temp_dir=str(ray_dir),
            include_dashboard=dashboard,
            env_vars={"JAX_PLATFORMS": "cpu"},
        )
        for index in range(num_slices):
            for worker_id in range(shape.num_hosts):
                host = _host_node(shape, f"slice-{index}", worker_id)
                cluster.add_node(wait=False, num_cpus=cpus_per_host, **host)
        cluster.wait_for_nodes()
        assert cluster.address is not None
        yield SimulatedCluster(cluster.address)


def _host_node(shape: Topology, slice_name: str, worker_id: int) -> dict[str, Any]:
    """What makes a Ray node a TPU host: all of it is needed, or placement hangs."""
    resources = {"TPU": shape.chips_per_host, f"accelerator_type:{shape.ray_accelerator_type}": 1}
    if worker_id == 0:
        resources[f"TPU-{shape.pod_type}-head"] = 1
    return {
        "resources": resources,
        "labels": {
            _SLICE_NAME: slice_name,
            _WORKER_ID: str(worker_id),
            _POD_TYPE: shape.pod_type,
            _TOPOLOGY: shape.topology,
        },
        "env_vars": {
            "TPU_NAME": slice_name,
            "TPU_WORKER_ID": str(worker_id),
            "TPU_TOPOLOGY": shape.topology,
            "TPU_ACCELERATOR_TYPE": shape.pod_type,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={shape.chips_per_host}",
        },
    }


def _check_socket_length(temp_dir: Path) -> None:
    # Linux allows 107 bytes for a socket's path, and Ray appends a session and a socket name.
    longest = len("/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.1000")
    if len(os.fsencode(temp_dir)) + longest > 107:
        raise ValueError(
            f"temp_dir {str(temp_dir)!r} is too long for Ray's sockets: "
            f"use one of at most {107 - longest} bytes, such as /tmp/ray-test"
        )


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Sets `values`; on leaving, the environment is whole again (Ray adds names of its own)."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
