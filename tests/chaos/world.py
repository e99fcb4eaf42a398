"""What a run of the chaos stands on: a simulated cluster, its network, disk and clock."""

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from orchestrator.cluster import SimulatedCluster, simulated_cluster
from orchestrator.launch import connect
from orchestrator.slices import draining_nodes
from tests.chaos import disk, network
from tests.chaos.disk import Disk
from tests.chaos.network import Network

NUM_SLICES = 2
_CLOCKS = Path(__file__).parent / "clock"
_JOIN_WITHIN_S = 300.0


class World:
    """Two slices of one machine each.

    Attributes:
        storage: a folder on the disk.
        disk: None where this process may not make one.
        network: None where this process may not make one.
    """

    def __init__(
        self,
        cluster: SimulatedCluster,
        storage: Path,
        disk: Disk | None,
        network: Network | None,
        clock_file: Path,
    ):
        self.cluster, self.storage = cluster, storage
        self.disk, self.network, self._clock = disk, network, clock_file

    def add_slice(self, index: int) -> None:
        """Has a slice join, and waits until it has."""
        before = self.node(index)  # Ray may not know yet that the last one is gone
        if self.network is None:
            self.cluster.add_slice(index)
        else:
            with self.network.inside(index) as address:
                self.cluster.add_slice(index, node_ip_address=address)
        deadline = time.monotonic() + _JOIN_WITHIN_S
        while self.node(index) in (None, before):
            assert time.monotonic() < deadline, f"slice-{index} did not join"
            time.sleep(0.2)

    def node(self, index: int) -> str | None:
        """What Ray calls the machine of a slice; None while it is not there."""
        for node in ray.nodes():
            name = node.get("Labels", {}).get("ray.io/tpu-slice-name")
            if node["Alive"] and name == f"slice-{index}":
                return node["NodeID"]
        return None

    def replace_taken_back(self) -> None:
        """Slices that Ray drains, or that have left because of it, come again as new machines."""
        leaving = draining_nodes()
        for index in range(NUM_SLICES):
            if (node := self.node(index)) is None or node in leaving:
                self.cluster.lose_slice(index)
                self.add_slice(index)

    def lost_slice(self) -> int:
        """A slice that is not there, as soon as the head knows it."""
        deadline = time.monotonic() + _JOIN_WITHIN_S
        while time.monotonic() < deadline:
            for index in range(NUM_SLICES):
                if self.node(index) is None:
                    return index
            time.sleep(0.2)
        raise AssertionError("all slices are there")

    @contextlib.contextmanager
    def clock(self, ahead_s: float) -> Iterator[None]:
        """The wall clock of every process of the cluster is wrong."""
        self._clock.write_text(str(ahead_s))
        try:
            yield
        finally:
            self._clock.write_text("0")


@contextlib.contextmanager
def world() -> Iterator[World]:
    """Makes one below a temporary folder, and takes all of it away.

    The environment of this process, and of what it starts, is changed meanwhile.
    """
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sh-chaos-")))
        storage = scratch / "storage"
        made_disk = made_network = None
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            made_disk = stack.enter_context(disk.disk(storage))
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            made_network = stack.enter_context(network.network(NUM_SLICES))
        storage.mkdir(exist_ok=True)
        environment = {
            "STILLHOUSE_CLOCK_SHIFT": str(scratch / "clock"),
            "PYTHONPATH": os.pathsep.join(
                [str(_CLOCKS), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
            # The head comes back as it was.
            "RAY_gcs_storage": "rocksdb",
            "RAY_gcs_storage_path": str(scratch / "gcs"),
            # Nobody is there.
            "WANDB_BASE_URL": "http://127.0.0.1:9",
            "WANDB_API_KEY": "0" * 40,
        }
        changed = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in environment.items():
            changed.setenv(name, value)
        changed.delenv("WANDB_MODE", raising=False)
        cluster = stack.enter_context(simulated_cluster(0, "2x2x1", "v4", dashboard=True))
        connect(cluster.address)
        made = World(cluster, storage, made_disk, made_network, scratch / "clock")
        for index in range(NUM_SLICES):
            made.add_slice(index)
        yield made
