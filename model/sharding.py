"""Where parameters and batches live on the device mesh.

Two tables decide: `PARAM_AXES` names the dims of each parameter by its leaf name, `AXIS_RULES`
lays each of those logical axes on a mesh axis. Parameters below `STACKED` have a first dim more,
one entry per pair of layers, which stays whole.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Outermost first: slices talk over the data-centre network, the "model" axis most often.
MESH_AXES = ("slice", "data", "fsdp", "model")
BATCH_AXES = ("slice", "data", "fsdp")

PARAM_AXES: dict[str, tuple[str, ...]] = {
    "embedding": ("vocab", "width"),
    "query": ("width", "heads", "head_dim"),
    "key": ("width", "kv_heads", "head_dim"),
    "value": ("width", "kv_heads", "head_dim"),
    "output": ("heads", "head_dim", "width"),
    "gate": ("width", "feed_forward"),
    "up": ("width", "feed_forward"),
    "down": ("feed_forward", "width"),
    "scale": ("norm",),
}

STACKED = "pairs"

AXIS_RULES: dict[str, str | None] = {
    "layers": None,
    "vocab": "model",
    "width": "fsdp",
    "heads": "model",
    "kv_heads": "model",
    "head_dim": None,
    "feed_forward": "model",
    "norm": None,
}

# Few and small: where they do not divide, every device of the axis keeps all of them.
REPLICABLE_AXES = frozenset({"kv_heads"})


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of `MESH_AXES` with the given sizes (1 where left out) over all or given devices.

    Raises:
        ValueError: unknown axis, or sizes whose product is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if unknown := sorted(set(sizes) - set(MESH_AXES)):
        raise ValueError(f"unknown mesh axes {unknown}: the axes are {', '.join(MESH_AXES)}")
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    if np.prod(shape) != len(devices):
        raise ValueError(
            f"mesh {dict(zip(MESH_AXES, shape, strict=True))} needs {np.prod(shape)} devices, "
            f"there are {len(devices)}: change the sizes so that their product fits"
        )
    # Auto: the compiler propagates shardings, and with_sharding_constraint is a hint to it.
    types = (AxisType.Auto,) * len(MESH_AXES)
    # Sizes need not be those of the torus: an axis may take a part of one of its dimensions.
    split = {"allow_split_physical_axes": True}
    # Elsewhere than on TPU a slice is what JAX calls a host: the order of processes will do.
    on_tpu = devices[0].platform == "tpu"
    if on_tpu and len({getattr(device, "slice_index", 0) for device in devices}) > 1:
        # Only the axis "slice" may cross from one to another.
        inside, across = (1, *shape[1:]), (shape[0], 1, 1, 1)
        placed = mesh_utils.create_hybrid_device_mesh(inside, across, devices, **split)
    else:
        placed = mesh_utils.create_device_mesh(shape, devices, **split)
    return Mesh(placed, MESH_AXES, axis_types=types)


def param_shardings(params: Any, mesh: Mesh) -> Any:
    """The NamedSharding of each leaf of `params`: arrays or shapes, nested in any way.

    The last name on a leaf's path decides, so optimizer states that mirror the parameters work
    too. Scalars are replicated.

    Raises:
        ValueError: a leaf without an entry in `PARAM_AXES` or of another rank, or a dim that its
            mesh axis does not divide.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _partition(path, leaf.shape, mesh)), params
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over slices, data and fsdp; whatever follows is replicated over "model"."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def _partition(path: tuple[Any, ...], shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    if not shape:
        return PartitionSpec()
    leaf = jax.tree_util.keystr(path, simple=True, separator="/")
    *groups, name = leaf.split("/")
    if name not in PARAM_AXES:
        raise ValueError(f"{leaf} has no sharding: name its dims in PARAM_AXES (model/sharding.py)")
    stack = ("layers",) if STACKED in groups else ()
    axes = (*stack, *PARAM_AXES[name])
    if len(axes) != len(shape):
        raise ValueError(f"{leaf} has shape {shape}, but PARAM_AXES gives it the dims {axes}")
    return PartitionSpec(
        *(_mesh_axis(leaf, axis, dim, mesh) for axis, dim in zip(axes, shape, strict=True))
    )


def _mesh_axis(leaf: str, axis: str, dim: int, mesh: Mesh) -> str | None:
    mesh_axis = AXIS_RULES[axis]
    if mesh_axis is None or dim % mesh.shape[mesh_axis] == 0:
        return mesh_axis
    if axis in REPLICABLE_AXES:
        return None
    raise ValueError(
        f"{leaf}: its dim {axis} of size {dim} does not divide by the mesh axis {mesh_axis!r} of "
        f"size {mesh.shape[mesh_axis]}: choose a size for {mesh_axis!r} that divides {dim}"
    )
