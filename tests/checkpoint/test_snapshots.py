"""A state in memory comes back bit for bit, on any mesh, or not at all."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.sharding import make_mesh
from tests.helpers.checkpoints import fresh_state, tiny_config
from workers.memory_tier import HostSnapshot, Piece, SnapshotLostError
from workers.snapshot_keeper import SnapshotKeeper
from workers.snapshots import groups_of, put_back, take_pieces
from workers.train_step import TrainState, state_shardings

CONFIG = tiny_config(Path("unused"))
MESHES = [{"fsdp": 8}, {"slice": 2, "fsdp": 2, "model": 2}, {"fsdp": 4, "model": 2}]


def state_on(axes: dict[str, int]) -> TrainState:
    host = jax.device_get(fresh_state(CONFIG))
    filled = jax.tree.map(lambda leaf: leaf + jnp.asarray(0.25, leaf.dtype), host)
    return jax.device_put(filled, state_shardings(CONFIG, make_mesh(axes)))


def pieces_of(state: TrainState) -> tuple[Piece, ...]:
    return tuple(Piece.of(*each) for each in take_pieces(state))


def assert_same(left: TrainState, right: TrainState) -> None:
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True)


@pytest.mark.parametrize("taken", MESHES)
@pytest.mark.parametrize("wanted", MESHES)
def test_a_snapshot_comes_back_on_any_mesh(taken: dict[str, int], wanted: dict[str, int]):
    state = state_on(taken)
    mesh = make_mesh(wanted)
    back = put_back(CONFIG, mesh, iter([pieces_of(state)]))
    assert_same(state, back)
    for leaf, sharding in zip(
        jax.tree.leaves(back), jax.tree.leaves(state_shardings(CONFIG, mesh)), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def test_what_is_replicated_is_taken_once():
    state = state_on({"slice": 2, "fsdp": 2, "model": 2})
    num_bytes = sum(array.nbytes for _, _, array in take_pieces(state))
    assert num_bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert groups_of(state) == (0,)


def test_the_steps_after_it_do_not_change_a_snapshot():
    """The step gives the state's memory away."""
    state = state_on({"fsdp": 8})
    pieces = pieces_of(state)
    expected = [np.array(leaf) for leaf in jax.tree.leaves(state)]
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 7, s), donate_argnums=0)
    jax.block_until_ready(overwrite(state))
    back = put_back(CONFIG, make_mesh({"fsdp": 8}), iter([pieces]))
    for leaf, array in zip(jax.tree.leaves(back), expected, strict=True):
        np.testing.assert_array_equal(np.asarray(leaf), array)


def test_no_more_is_fetched_than_is_missing():
    state = state_on({"fsdp": 8})
    pieces = pieces_of(state)
    half = len(pieces) // 2
    fetched = []

    def sources():
        for part in (pieces[:half], pieces[half:], ()):
            fetched.append(part)
            yield part

    assert_same(state, put_back(CONFIG, make_mesh({"fsdp": 8}), sources()))
    assert len(fetched) == 2


@pytest.mark.shows("snapshots: damaged")
def test_a_part_that_is_missing_or_changed_is_refused():
    pieces = pieces_of(state_on({"fsdp": 8}))
    mesh = make_mesh({"fsdp": 8})
    with pytest.raises(SnapshotLostError, match="do not hold all of"):
        put_back(CONFIG, mesh, iter([pieces[1:]]))
    largest = max(range(len(pieces)), key=lambda at: pieces[at].array.nbytes)
    flipped = pieces[largest].array.copy()
    flipped.reshape(-1).view(np.uint8)[3] ^= 1
    damaged = list(pieces)
    damaged[largest] = dataclasses.replace(pieces[largest], array=flipped)
    with pytest.raises(SnapshotLostError, match="has changed"):
        put_back(CONFIG, mesh, iter([damaged]))


def test_attempts_that_make_a_step_again_push_out_no_other():
    """Else two that die at the same step would leave nothing that all hosts have."""
    keeper = SnapshotKeeper()

    def put(attempt: int, step: int) -> None:
        keeper.put(HostSnapshot(step, attempt, 0, (0,), "a", (), ()))

    for attempt, step in [(1, 90), (1, 100), (1, 110), (2, 110), (3, 110)]:
        put(attempt, step)
    assert [(each.attempt, each.step) for each in keeper.held()] == [(1, 100), (3, 110)]
    put(3, 120)
    assert [(each.attempt, each.step) for each in keeper.held()] == [(3, 110), (3, 120)]
