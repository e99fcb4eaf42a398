"""A student's state as snapshots of its hosts' parts, and back, on any mesh. No Ray."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from configs.run import RunConfig
from workers.memory_tier import Bounds, Piece, SnapshotLostError
from workers.train_step import TrainState, init_state, state_shardings


def take_pieces(state: TrainState) -> list[tuple[str, Bounds, np.ndarray]]:
    """Copies of this host's part of `state`, each part of a leaf once, in host memory."""
    shards = [shard for _, leaf in _leaves(state) for shard in leaf.addressable_shards]
    for shard in shards:
        shard.data.copy_to_host_async()
    taken: dict[tuple[str, Bounds], np.ndarray] = {}
    for name, leaf in _leaves(state):
        for shard in leaf.addressable_shards:
            key = name, _bounds(shard.index, leaf.shape)
            if key not in taken:
                # A copy: the next step gives the state's own memory away.
                taken[key] = np.array(shard.data)
    return [(name, bounds, array) for (name, bounds), array in taken.items()]


def groups_of(state: TrainState) -> tuple[int, ...]:
    """For each host a number that it shares with those that have the same part of `state`."""
    parts: list[set[tuple[str, Bounds]]] = [set() for _ in range(jax.process_count())]
    for name, leaf in _leaves(state):
        for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
            parts[device.process_index].add((name, _bounds(index, leaf.shape)))
    return tuple(parts.index(part) for part in parts)


def put_back(config: RunConfig, mesh: Mesh, sources: Iterable[Sequence[Piece]]) -> TrainState:
    """The state on `mesh`, of pieces that are fetched as long as some are missing.

    Raises:
        SnapshotLostError: a piece is damaged, or the pieces are not the whole state.
    """
    shapes = jax.eval_shape(lambda: init_state(config, 0))
    shardings = state_shardings(config, mesh)
    waiting, pieces = iter(sources), dict[str, list[Piece]]()

    def place(path: Any, shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.Array:
        name = jax.tree_util.keystr(path)

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None, "each device has a part of each leaf"
            bounds = _bounds(index, shape.shape)
            while (found := _join(pieces.get(name, []), bounds, shape.dtype)) is None:
                _fetch(waiting, pieces, name)
            return found

        return jax.make_array_from_callback(shape.shape, sharding, part, dtype=shape.dtype)

    return jax.tree_util.tree_map_with_path(place, shapes, shardings)


def _fetch(waiting: Iterator[Sequence[Piece]], into: dict[str, list[Piece]], name: str) -> None:
    more = next(waiting, None)
    if more is None:
        raise SnapshotLostError(f"The snapshots do not hold all of {name}")
    for piece in more:
        piece.check()
        into.setdefault(piece.leaf, []).append(piece)


def _join(pieces: Sequence[Piece], bounds: Bounds, dtype: Any) -> np.ndarray | None:
    """The part of a leaf within `bounds`; None where the pieces do not cover it."""
    for piece in pieces:
        if piece.bounds == bounds:
            return np.array(piece.array)  # its memory is the object store's, and read-only
    shape = tuple(high - low for low, high in bounds)
    whole, covered = np.empty(shape, dtype), np.zeros(shape, bool)
    for piece in pieces:
        common = [
            (max(a, c), min(b, d)) for (a, b), (c, d) in zip(piece.bounds, bounds, strict=True)
        ]
        if all(low < high for low, high in common):
            here = _within(common, bounds)
            whole[here] = piece.array[_within(common, piece.bounds)]
            covered[here] = True
    return whole if covered.all() else None


def _within(part: Sequence[tuple[int, int]], bounds: Bounds) -> tuple[slice, ...]:
    pairs = zip(part, bounds, strict=True)
    return tuple(slice(low - start, high - start) for (low, high), (start, _) in pairs)


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _leaves(state: TrainState) -> list[tuple[str, jax.Array]]:
    paths = jax.tree_util.tree_leaves_with_path(state)
    return [(jax.tree_util.keystr(path), leaf) for path, leaf in paths]
