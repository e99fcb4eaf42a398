"""A stand-in for a cluster of TPU slices on a machine without TPUs.

`simulated_cluster` starts a local Ray cluster that looks to Ray Train like TPU slices while JAX
computes on the CPU.
"""

import contextlib
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from configs.topology import Topology, slice_topology
from orchestrator.cpu_devices import cpu_devices
from orchestrator.slices import POD_TYPE, SLICE_NAME, TOPOLOGY, WORKER_ID

_ENDED_WITHIN_S = 20.0


class SimulatedCluster:
    """A running local cluster; `address` is for `ray.init`, the dashboard's for jobs."""

    def __init__(self, cluster: Any, shape: Topology, cpus_per_host: int):
        self._cluster, self._shape, self._cpus_per_host = cluster, shape, cpus_per_host
        self._slices: dict[int, list[Any]] = {}
        self.address: str = cluster.address
        url = cluster.head_node.webui_url
        self.dashboard_url = f"http://{url}" if url else None

    def add_slice(self, index: int, topology: str | None = None, **node: Any) -> None:
        """Has the machines of `slice-<index>` join; returns before they have.

        Args:
            topology: another one than that of the cluster's slices.
            node: more that Ray is to know of them.
        """
        shape = self._shape
        if topology is not None:
            shape = slice_topology(shape.accelerator, topology)
        self._slices[index] = [
            self._cluster.add_node(
                wait=False,
                num_cpus=self._cpus_per_host,
                **_host_node(shape, f"slice-{index}", worker_id),
                **node,
            )
            for worker_id in range(shape.num_hosts)
        ]

    def lose_slice(self, index: int) -> None:
        """Kills the machines of `slice-<index>`, with all that runs on them."""
        for node in self._slices.pop(index):
            self._cluster.remove_node(node, allow_graceful=False)

    def restart_head(self) -> None:
        """Kills the service by which the machines know one another, and starts it again."""
        self._cluster.head_node.kill_gcs_server()
        self._cluster.head_node.start_gcs_server()


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
            temp_dir = Path(tempfile.mkdtemp(prefix="sh-"))
            stack.callback(_remove, temp_dir)
        _check_socket_length(temp_dir)
        ray_dir = temp_dir / "ray"
        ray_dir.mkdir(parents=True, exist_ok=True)
        # RAY_TMPDIR also holds the file by which other Rays on this machine find "the" cluster.
        # Jobs run `python`: let it be this one.
        path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
        values = {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": str(temp_dir), "PATH": path}
        # Else students would give way to every other process of the machine.
        values["RAY_worker_niceness"] = "0"
        stack.enter_context(_environment(values))

        import ray
        from ray.cluster_utils import Cluster

        cluster = Cluster()
        stack.callback(cluster.shutdown)
        stack.callback(ray.shutdown)
        cluster.add_node(
            num_cpus=head_cpus,
            temp_dir=str(ray_dir),
            include_dashboard=dashboard,
            # Ray's own choices, 8265 and 52365, may belong to another Ray on this machine.
            dashboard_port=_free_port() if dashboard else None,
            dashboard_agent_listen_port=_free_port() if dashboard else None,
            env_vars={"JAX_PLATFORMS": "cpu"},
        )
        simulated = SimulatedCluster(cluster, shape, cpus_per_host)
        for index in range(num_slices):
            simulated.add_slice(index)
        cluster.wait_for_nodes()
        yield simulated


def _host_node(shape: Topology, slice_name: str, worker_id: int) -> dict[str, Any]:
    """What makes a Ray node a TPU host: all of it is needed, or placement hangs."""
    resources = {"TPU": shape.chips_per_host, f"accelerator_type:{shape.ray_accelerator_type}": 1}
    if worker_id == 0:
        resources[f"TPU-{shape.pod_type}-head"] = 1
    return {
        "resources": resources,
        "labels": {
            SLICE_NAME: slice_name,
            WORKER_ID: str(worker_id),
            POD_TYPE: shape.pod_type,
            TOPOLOGY: shape.topology,
        },
        "env_vars": {
            "TPU_NAME": slice_name,
            "TPU_WORKER_ID": str(worker_id),
            "TPU_TOPOLOGY": shape.topology,
            "TPU_ACCELERATOR_TYPE": shape.pod_type,
            **cpu_devices(shape.chips_per_host),
        },
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _remove(folder: Path) -> None:
    """Some of Ray's agents write on for a moment after they have been ended."""
    deadline = time.monotonic() + _ENDED_WITHIN_S
    while folder.exists():
        try:
            shutil.rmtree(folder)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


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
