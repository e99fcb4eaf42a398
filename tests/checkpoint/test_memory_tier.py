"""Which snapshots can be used, and who keeps copies of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.memory_tier import (
    Holding,
    Peer,
    Piece,
    SnapshotLostError,
    newest_complete,
    peer_of,
)

# Two slices of two hosts: the slices have the same state.
GROUPS = (0, 1, 0, 1)
NODES = ("a", "b", "c", "d")


def holding(step: int, host: int, attempt: int = 1, has_pieces: bool = True) -> Holding:
    return Holding(attempt, step, host, GROUPS, has_pieces)


def kept_of(host: int, steps: list[int]) -> dict[str, list[Holding]]:
    """What a host's own keeper and its peer's have of its snapshots."""
    peer = peer_of(host, NODES, GROUPS, 2)
    assert peer is not None
    held = {NODES[host]: [holding(step, host) for step in steps]}
    copies = [holding(step, host, has_pieces=peer.with_pieces) for step in steps]
    return held | {NODES[peer.host]: copies}


def kept(steps: dict[int, list[int]]) -> dict[str, list[Holding]]:
    held: dict[str, list[Holding]] = {}
    for host, made in steps.items():
        for node, holdings in kept_of(host, made).items():
            held.setdefault(node, []).extend(holdings)
    return held


def test_the_newest_step_that_all_hosts_have_is_used():
    held = kept({0: [4, 5], 1: [4, 5], 2: [4, 5], 3: [3, 4]})
    source = newest_complete(held)
    assert source is not None and source.step == 4
    assert source.lines.keys() == {0, 1, 2, 3}
    assert newest_complete(held, before=4) is None
    assert newest_complete({}) is None


def test_a_later_attempt_counts_before_a_later_step():
    held = kept({host: [9] for host in range(4)})
    for node, host in zip(NODES, range(4), strict=True):
        held[node] += [holding(7, host, attempt=2)]
    source = newest_complete(held)
    assert source is not None and (source.attempt, source.step) == (2, 7)


@pytest.mark.parametrize("lost", [{"a"}, {"b"}, {"c"}, {"d"}, {"a", "b"}, {"c", "d"}])
def test_the_loss_of_any_host_or_slice_is_survived(lost: set[str]):
    held = kept({host: [5] for host in range(4)})
    source = newest_complete({node: each for node, each in held.items() if node not in lost})
    assert source is not None and source.step == 5
    assert {GROUPS[host] for host in source.pieces} == {0, 1}
    assert not lost & {*source.pieces.values(), *source.lines.values()}


def test_the_loss_of_both_slices_is_not():
    held = kept({host: [5] for host in range(4)})
    assert newest_complete({"a": held["a"], "b": []}) is None


def test_one_slice_sends_its_state_to_another_machine():
    groups = (0, 1, 2)
    assert peer_of(0, ("a", "b", "c"), groups, 3) == Peer(1, with_pieces=True)
    assert peer_of(2, ("a", "b", "c"), groups, 3) == Peer(0, with_pieces=True)
    # Hosts of one machine are no help to each other.
    assert peer_of(0, ("a", "a", "b"), groups, 3) == Peer(2, with_pieces=True)
    assert peer_of(0, ("a", "a", "a"), groups, 3) is None
    assert peer_of(0, ("a",), (0,), 1) is None


@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_copies_of_several_slices_are_lines_alone(slices: int, hosts: int, data: st.DataObject):
    nodes = [f"n{number}" for number in range(slices * hosts)]
    groups = [number % hosts for number in range(slices * hosts)]
    host = data.draw(st.integers(0, len(nodes) - 1))
    peer = peer_of(host, nodes, groups, hosts)
    if len(nodes) == 1:
        assert peer is None
        return
    assert peer is not None and peer.host != host
    assert peer.with_pieces == (slices == 1)
    if slices > 1:
        assert peer.host // hosts != host // hosts


def test_a_changed_piece_is_refused():
    piece = Piece.of("x", ((0, 2),), np.ones(2, np.float32))
    piece.check()
    piece.array[1] = 2
    with pytest.raises(SnapshotLostError, match="has changed"):
        piece.check()
