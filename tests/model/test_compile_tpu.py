"""The training step through the real TPU compiler; needs libtpu (the extra `tpu`), but no TPU."""

import os

import pytest

from benchmarks.step_program import config_of, step_and_shapes
from model.sharding import MESH_AXES, make_mesh

pytest.importorskip("libtpu")
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"


def compiled(topology: str, mesh: dict[str, int], **options: int):
    from jax.experimental import topologies

    found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    placed = make_mesh(mesh, found.devices)
    model = {
        "preset": "tiny",
        "num_layers": 3,
        "width": 256,
        "head_dim": 128,  # the least that the kernel takes
        "context_length": 512,
        "window": 128,
    }
    num_rows = placed.size // placed.shape["model"]
    config = config_of("tiny", num_rows, 512, model=model, compute_dtype="bfloat16", remat="layers")
    step, shapes = step_and_shapes(config, placed)
    return placed, step.lower(*shapes).compile()


def test_a_step_over_all_axes_compiles_with_the_kernel_inside():
    mesh, program = compiled("v5e:4x4", {"data": 2, "fsdp": 4, "model": 2})
    assert mesh.axis_names == MESH_AXES
    text = program.as_text()
    assert text.count("tpu_custom_call") >= 3 * 2, "splash attention, forward and backward"
    assert "all-gather" in text and "all-reduce" in text
    memory = program.memory_analysis()
    assert 0 < memory.temp_size_in_bytes < 2**30


def test_only_the_slice_axis_crosses_slices():
    mesh, _ = compiled("v5e:2x2", {"slice": 2, "fsdp": 4}, num_slices=2)
    for index, part in enumerate(mesh.devices):
        assert {device.slice_index for device in part.flat} == {index}
