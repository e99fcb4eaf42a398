"""Slice shapes, and how nodes are made to look like slices. No cluster is started here."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.topology import GENERATIONS, Topology, slice_topology
from orchestrator import cluster
from orchestrator.cluster import simulated_cluster
from orchestrator.cpu_devices import cpu_devices

POSSIBLE = [
    (accelerator, topology)
    for accelerator, generation in GENERATIONS.items()
    for topology in sorted(generation.topologies)
]
possible_slices = st.sampled_from(POSSIBLE).map(lambda slice_: slice_topology(*slice_))


# Chips, hosts and chips per host from cloud.google.com/tpu/docs (pages v4, v5e, v5p, v6e); pod
# types count two cores a chip on v4 and v5p.
@pytest.mark.parametrize(
    ("accelerator", "topology", "num_chips", "num_hosts", "chips_per_host", "pod_type"),
    [
        ("v4", "2x2x1", 4, 1, 4, "v4-8"),
        ("v4", "2x2x2", 8, 2, 4, "v4-16"),
        ("v4", "4x4x4", 64, 16, 4, "v4-128"),
        ("v4", "12x12x16", 2304, 576, 4, "v4-4608"),
        ("v5e", "1x1", 1, 1, 1, "v5litepod-1"),
        ("v5e", "2x2", 4, 1, 4, "v5litepod-4"),
        ("v5e", "2x4", 8, 1, 8, "v5litepod-8"),
        ("v5e", "4x4", 16, 4, 4, "v5litepod-16"),
        ("v5e", "16x16", 256, 64, 4, "v5litepod-256"),
        ("v5p", "2x2x2", 8, 2, 4, "v5p-16"),
        ("v5p", "16x16x24", 6144, 1536, 4, "v5p-12288"),
        ("v6e", "2x4", 8, 1, 8, "v6e-8"),
        ("v6e", "4x8", 32, 8, 4, "v6e-32"),
    ],
)
def test_slice_facts(accelerator, topology, num_chips, num_hosts, chips_per_host, pod_type):
    shape = slice_topology(accelerator, topology)
    assert (shape.num_chips, shape.num_hosts) == (num_chips, num_hosts)
    assert (shape.chips_per_host, shape.pod_type) == (chips_per_host, pod_type)


@pytest.mark.parametrize(
    ("accelerator", "topology", "complaint"),
    [
        ("v3", "4x4", "unknown accelerator 'v3': choose one of v4, v5e, v5p, v6e"),
        ("v5litepod", "4x4", "unknown accelerator"),
        ("TPU-V4", "2x2x2", "unknown accelerator"),
        ("v4", "", "AxBxC, such as 2x2x2"),
        ("v4", "4x4", "AxBxC, such as 2x2x2"),
        ("v4", "2x2x", "AxBxC"),
        ("v4", "2x2x-2", "AxBxC"),
        ("v4", "0x4x4", "AxBxC"),
        ("v4", "2X2X2", "AxBxC"),
        ("v4", "²x2x2", "AxBxC"),
        ("v5e", "2x2x2", "AxB, such as 4x4"),
        ("v5e", "2x16x16", "AxB, such as 4x4"),
        ("v4", "2x2x3", "there is no v4 slice of topology '2x2x3'"),
        ("v4", "4x4x2", "there is no v4 slice"),
        ("v5e", "2x16", "4x8, 2x8, 4x4"),
        ("v6e", "32x32", "the nearest in size are 16x16"),
    ],
)
def test_impossible_slices_are_refused_with_a_remedy(accelerator, topology, complaint):
    with pytest.raises(ValueError) as refusal:
        slice_topology(accelerator, topology)
    assert complaint in str(refusal.value)


@given(st.sampled_from(["v4", "v5e", "v5p", "v6e"]), st.text(max_size=12))
def test_any_text_is_either_a_slice_or_a_value_error(accelerator, topology):
    try:
        shape = slice_topology(accelerator, topology)
    except ValueError:
        return
    assert (accelerator, shape.topology) in POSSIBLE


@given(possible_slices)
def test_hosts_share_the_chips_evenly(shape: Topology):
    assert shape.num_hosts * shape.chips_per_host == shape.num_chips
    assert shape.num_chips == math.prod(map(int, shape.topology.split("x")))


def test_ray_agrees_on_every_slice():
    from ray._private.accelerators.tpu import (
        TPUAcceleratorManager,
        infer_tpu_pod_type_from_topology,
    )
    from ray.util.tpu import get_tpu_version_from_type, get_tpu_worker_resources

    for accelerator, topology in POSSIBLE:
        shape = slice_topology(accelerator, topology)
        ray_type = shape.ray_accelerator_type
        version = get_tpu_version_from_type(ray_type)
        assert TPUAcceleratorManager.is_valid_tpu_accelerator_topology(version, topology), topology
        num_workers, resources = get_tpu_worker_resources(topology, ray_type)
        assert (num_workers, resources["TPU"]) == (shape.num_hosts, shape.chips_per_host)
        assert infer_tpu_pod_type_from_topology(topology, ray_type) == shape.pod_type


def test_only_the_first_host_of_a_slice_holds_the_head_resource():
    shape = slice_topology("v5e", "4x4")
    hosts = [cluster._host_node(shape, "s", worker_id) for worker_id in range(shape.num_hosts)]
    assert ["TPU-v5litepod-16-head" in host["resources"] for host in hosts] == [
        True,
        False,
        False,
        False,
    ]
    assert all(host["resources"]["accelerator_type:TPU-V5LITEPOD"] == 1 for host in hosts)


def test_simulated_cluster_refuses_before_it_starts_anything():
    with (
        pytest.raises(ValueError, match="there is no v4 slice"),
        simulated_cluster(1, "3x3x3", "v4"),
    ):
        pass
    long_dir = Path("/tmp") / ("x" * 60)
    with (
        pytest.raises(ValueError, match="too long for Ray's sockets"),
        simulated_cluster(1, "2x2x2", "v4", temp_dir=long_dir),
    ):
        pass
    assert not long_dir.exists()


def test_the_environment_is_whole_again_after_an_error(monkeypatch):
    monkeypatch.setenv("STILLHOUSE_KEPT", "before")
    with pytest.raises(RuntimeError), cluster._environment({"STILLHOUSE_KEPT": "inside"}):
        assert os.environ["STILLHOUSE_KEPT"] == "inside"
        os.environ["STILLHOUSE_ADDED"] = "by Ray"
        raise RuntimeError
    assert os.environ["STILLHOUSE_KEPT"] == "before"
    assert "STILLHOUSE_ADDED" not in os.environ


def test_devices_of_one_cpu_have_threads_enough_for_several_collectives_at_once():
    program = (
        "import jax, os\n"
        "assert jax.device_count() == 2\n"
        "jax.block_until_ready(jax.jit(lambda x: x + 1)(1.0))\n"
        "tasks = os.listdir('/proc/self/task')\n"
        "names = [open(f'/proc/self/task/{task}/comm').read() for task in tasks]\n"
        "print(names.count('tf_XLAEigen\\n'))\n"
    )
    environment = {**os.environ, **cpu_devices(2)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, check=True, stdout=subprocess.PIPE
    )
    assert int(done.stdout) == 8
    assert cpu_devices(1, 2)["NPROC"] == "4"
    assert "NPROC" not in cpu_devices(1), "one device takes as many threads as there are cores"
