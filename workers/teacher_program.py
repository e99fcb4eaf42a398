"""What a replica of the teacher computes, on one device or sharded over those of its host."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from model.codecs.rows import encode_rows
from model.config import ModelConfig
from model.execution import Execution
from model.sharding import PARAM_AXES, make_mesh
from model.targets import Codec
from model.transformer import hidden_states
from workers.checkpoint import load_params

Params = Any


def teacher_mesh(num_devices: int) -> Mesh | None:
    """A mesh whose devices share each matrix product; None for a single device."""
    if num_devices == 1:
        return None
    devices = jax.local_devices()
    if len(devices) < num_devices:
        raise ValueError(
            f"A replica of the teacher is to have {num_devices} devices, and this host shows "
            f"{len(devices)}: lower teacher.tpus_per_replica"
        )
    return make_mesh({"model": num_devices}, devices[:num_devices])


def load_for_scoring(url: str, compute_dtype: str, mesh: Mesh | None) -> tuple[ModelConfig, Params]:
    """A checkpoint's parameters, verified, in the type that they are used in.

    That halves those of a bfloat16 teacher. The scales of the norms stay float32, as the model
    uses them.

    Raises: as `load_params`.
    """
    model, params = load_params(url, mesh)
    named, treedef = jax.tree_util.tree_flatten_with_path(params)
    names = [jax.tree_util.keystr(path[-1:], simple=True) for path, _ in named]
    leaves = [leaf for _, leaf in named]
    del params, named
    for index, name in enumerate(names):
        if PARAM_AXES[name] != ("norm",):
            # One after the other, so that each is freed before the next is made.
            leaves[index] = leaves[index].astype(compute_dtype)
    return model, treedef.unflatten(leaves)


def make_scorer(
    model: ModelConfig, codec: Codec, compute_dtype: str, mesh: Mesh | None
) -> Callable[..., dict[str, Array]]:
    """The jitted `(params, inputs, segments, positions, row keys) → encoded`.

    Args:
        mesh: over which the parameters are laid out as `model.sharding` says; rows and what comes
            out are whole on each device.
    """
    how = Execution(compute_dtype, mesh=mesh)

    def score(
        params: Params, inputs: Array, segments: Array, positions: Array, keys: Array
    ) -> dict[str, Array]:
        x_BTD = hidden_states(params, model, inputs, segments, positions, how)
        return encode_rows(codec, params, model, x_BTD, keys)

    if mesh is None:
        return jax.jit(score)
    return jax.jit(score, out_shardings=NamedSharding(mesh, PartitionSpec()))


def batch_shapes(num_rows: int, row_length: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """What a scorer takes beside the parameters."""
    tokens = jax.ShapeDtypeStruct((num_rows, row_length), jnp.int32)
    return tokens, tokens, tokens, jax.ShapeDtypeStruct((num_rows, 2), jnp.uint32)
