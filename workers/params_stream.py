"""Parameters of a checkpoint written and read one leaf at a time, so that large models fit."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32
from orbax.checkpoint import v1 as ocp

from model.transformer import init_params
from model.weights import Leaf, nested
from workers.checkpoint import (
    CheckpointMeta,
    compare,
    read_items,
    read_meta,
)
from workers.digest import join_digests, state_digest
from workers.integrity import CorruptCheckpointError, sealed
from workers.storage import remove_tree

# A host that wants a part of a leaf reads no more than the chunks around it.
_CHUNK_BYTES = 64 << 20
_UNFINISHED = ".partial_save"


def save_params(
    url: str,
    leaves: Sequence[Leaf],
    make: Callable[[Leaf], Float32[np.ndarray, "..."]],
    meta: CheckpointMeta,
) -> CheckpointMeta:
    """Saves parameters alone, each made when it is its turn; `url` appears when all are there.

    Returns:
        `meta`, with the digest of the parameters.
    """
    remove_tree(url + _UNFINISHED)  # of a process that was killed
    context = ocp.Context()
    context.array.saving.storage_options.chunk_byte_size = _CHUNK_BYTES
    digests = []
    try:
        with context:
            for leaf in leaves:
                params = nested(leaf.path, jax.device_put(make(leaf), _host()))
                digests.append(state_digest(params))
                described = None
                if leaf is leaves[-1]:
                    meta = dataclasses.replace(meta, params_digest=join_digests(digests))
                    described = sealed(dataclasses.asdict(meta))
                ocp.partial.save(url, params, custom_metadata=described)
                del params
            ocp.partial.finalize(url)
    except BaseException:
        remove_tree(url + _UNFINISHED)
        raise
    return meta


def read_params(
    url: str, leaves: Sequence[Leaf]
) -> Iterator[tuple[Leaf, Float32[np.ndarray, "..."]]]:
    """The parameters at `url`, each read when it is its turn; verified when all have been read.

    Raises:
        ValueError: a model of other shapes than `leaves` has.
        CorruptCheckpointError: after the last, where the bytes are not those that were saved.
    """
    meta = read_meta(url)
    item = meta.params_item
    compare(url, {item: jax.eval_shape(lambda: init_params(meta.model, jax.random.key(0)))})
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    place = jax.sharding.SingleDeviceSharding(_host())
    digests = []
    for leaf in leaves:
        shape = jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=place)
        with context:
            params = read_items(url, {item: nested(leaf.path, shape)})[item]
        digests.append(state_digest(params))
        (parameter,) = jax.tree.leaves(params)
        del params
        yield leaf, np.asarray(parameter)
        del parameter
    if (found := join_digests(digests)) != meta.params_digest:
        raise CorruptCheckpointError(
            f"The parameters in {url} have digest {found}, but {meta.params_digest} was saved: the "
            f"files are damaged; use another checkpoint"
        )


def _host() -> Any:
    return jax.local_devices(backend="cpu")[0]
