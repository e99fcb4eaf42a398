"""A run on fewer slices than it asks for: how many, when, and with which batches."""

from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.checks import find_faults, layout
from configs.elastic import on_slices, possible_slices
from configs.topology import slice_topology
from orchestrator.run_state import (
    KillAttempt,
    Noticed,
    Prepared,
    SlicesFree,
    StartAttempt,
    State,
    Stepped,
    Ticked,
)
from orchestrator.slices import free_slices
from tests.helpers.controller_bench import FACTS, Bench, failed, make_config, of, round_trip, said


def elastic(num_slices: int = 4, min_slices: int | None = 1, rows: int = 48, **changes: Any):
    cluster = {"accelerator": "v4", "topology": "2x2x1", "resize_after_s": 30}
    sizes = {"num_slices": num_slices, "min_slices": min_slices}
    batch = {"rows": rows, "microbatches": changes.pop("microbatches", 1)}
    mesh = {"fsdp": 2, "model": 2}
    return make_config(cluster=cluster | sizes, batch=batch, mesh=mesh, **changes)


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 5), st.integers(1, 6))
def test_the_global_batch_stays_and_a_device_has_no_more_of_it(
    num_slices: int, microbatches: int, rows_per_shard: int, num_there: int
):
    rows = num_slices * 2 * microbatches * rows_per_shard
    config = elastic(num_slices, 1, rows, microbatches=microbatches)
    there = possible_slices(config, num_there)
    assert 0 <= there <= min(num_there, num_slices)
    if num_there >= num_slices:
        assert there == num_slices
    if not there:
        return
    changed = on_slices(config, there)
    assert find_faults(changed) == []
    assert layout(changed).num_slices == there and changed.batch.rows == rows
    assert layout(changed).rows_per_shard <= layout(config).rows_per_shard
    if there == num_slices:
        assert changed == config


def test_a_run_without_the_setting_waits_for_all():
    assert possible_slices(elastic(min_slices=None), 3) == 0
    assert possible_slices(elastic(min_slices=None), 4) == 4
    assert possible_slices(elastic(min_slices=2), 1) == 0
    # Twelve rows among two shards of five slices do not divide.
    assert possible_slices(elastic(6, 1, rows=12), 5) == 3


def test_a_lost_slice_is_waited_for_and_then_done_without():
    bench = Bench(elastic())
    assert of(StartAttempt, bench.feed(Prepared(FACTS))) == [StartAttempt(1, 4)]
    bench.feed(Stepped(1), SlicesFree(0), failed(1), at_s=1000)
    assert bench.state is State.RECOVERING, "what was free before is not known now"
    assert not of(StartAttempt, bench.feed(SlicesFree(3), at_s=1010))
    done = bench.feed(SlicesFree(3), at_s=1030)
    assert of(StartAttempt, done) == [StartAttempt(2, 3)]
    assert said("resized", done) == [{"slices": 3, "before": 4}]
    assert round_trip(bench.snapshot) == bench.snapshot


def test_a_slice_that_is_back_in_time_is_used_at_once():
    bench = Bench(elastic())
    bench.feed(Prepared(FACTS), Stepped(1), failed(1), at_s=1000)
    assert of(StartAttempt, bench.feed(SlicesFree(4), at_s=1001)) == [StartAttempt(2, 4)]


def test_too_few_slices_are_waited_for():
    bench = Bench(elastic(min_slices=2))
    bench.feed(Prepared(FACTS), Stepped(1), failed(1), at_s=1000)
    assert not of(StartAttempt, bench.feed(SlicesFree(1), Ticked(), at_s=9000))
    assert of(StartAttempt, bench.feed(SlicesFree(2), at_s=9001)) == [StartAttempt(2, 2)]


def test_a_run_grows_back_when_slices_stay():
    bench = Bench(elastic())
    bench.feed(Prepared(FACTS), Stepped(1), failed(1), at_s=1000)
    bench.feed(SlicesFree(2), at_s=1030)
    bench.feed(Stepped(2), SlicesFree(2), at_s=1100)
    bench.feed(SlicesFree(0), SlicesFree(1), at_s=1120)  # gone again meanwhile
    assert not of(KillAttempt, bench.feed(SlicesFree(1), at_s=1149))
    done = bench.feed(SlicesFree(1), at_s=1150)
    assert of(KillAttempt, done) == [KillAttempt(2)]
    assert bench.state is State.RECOVERING and not of(StartAttempt, done)
    assert of(StartAttempt, bench.feed(SlicesFree(4), at_s=1155)) == [StartAttempt(3, 4)]
    assert "unknown" not in bench.snapshot.used, "to grow is no fault"


def test_a_gang_that_saves_on_notice_is_not_ended_to_grow():
    bench = Bench(elastic())
    bench.feed(Prepared(FACTS), Stepped(1), failed(1), SlicesFree(2), at_s=100)
    bench.feed(Ticked(), at_s=160)
    bench.feed(Stepped(2), SlicesFree(2), Noticed(2, ("node",)), at_s=161)
    assert not of(KillAttempt, bench.feed(SlicesFree(2), at_s=1000))
    assert bench.state is State.TRAINING


def nodes(slices: Iterable[str], alive: bool = True) -> list[dict[str, Any]]:
    labels = {"ray.io/tpu-pod-type": "v4-16", "ray.io/tpu-topology": "2x2x2"}
    return [
        {
            "NodeID": f"{name}-{host}",
            "Alive": alive,
            "Labels": labels | {"ray.io/tpu-slice-name": name},
        }
        for name in slices
        for host in range(2)
    ]


@pytest.mark.parametrize(
    ("taken", "expected"),
    [({}, {"a", "b"}), ({"a-1": 0.0}, {"b"}), ({"a-0": 2.0, "b-1": 0.0}, set())],
)
def test_a_slice_is_free_when_all_of_it_is_and_stays(taken: dict[str, float], expected: set[str]):
    there = [*nodes(["a", "b"]), *nodes(["dead"], alive=False)]
    there += [{"NodeID": "head", "Alive": True, "Labels": {}}, nodes(["half"])[0]]
    free = {node["NodeID"]: {"TPU": taken.get(node["NodeID"], 4.0)} for node in there}
    shape = slice_topology("v4", "2x2x2")
    assert free_slices(there, free, set(), shape) == expected
    assert free_slices(there, free, {"b-0"}, shape) == expected - {"b"}
