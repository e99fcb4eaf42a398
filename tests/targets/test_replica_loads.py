"""Work goes to the replica that will be done first."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.replica_loads import ReplicaLoads


def test_an_idle_replica_is_asked_before_a_busy_one():
    loads = ReplicaLoads()
    loads.asked("a", 8)
    assert loads.pick(["a", "b"], 8, ()) == "b"
    loads.asked("b", 16)
    assert loads.pick(["a", "b"], 8, ()) == "a"
    loads.given_up("b", 16)
    assert loads.pick(["a", "b"], 8, ()) == "b"


def test_excluded_ones_are_asked_only_where_there_are_no_others():
    loads = ReplicaLoads()
    loads.asked("b", 99)
    assert loads.pick(["a", "b"], 1, {"a"}) == "b"
    assert loads.pick(["a"], 1, {"a"}) == "a"


@given(speeds=st.lists(st.floats(0.5, 20.0), min_size=1, max_size=5))
def test_replicas_get_work_by_their_speed(speeds):
    loads = ReplicaLoads()
    names = [f"replica-{number}" for number in range(len(speeds))]
    for name, speed in zip(names, speeds, strict=True):
        loads.asked(name, 1)
        loads.answered(name, 1, 1 / speed)
    given_rows: Counter[str] = Counter()
    for _ in range(400):
        chosen = loads.pick(names, 1, ())
        loads.asked(chosen, 1)
        given_rows[chosen] += 1
    for name, speed in zip(names, speeds, strict=True):
        assert given_rows[name] == pytest.approx(400 * speed / sum(speeds), abs=len(speeds) + 1)


def test_a_replica_that_becomes_slow_gets_less():
    loads = ReplicaLoads()
    for _ in range(50):
        for name, busy_s in (("a", 1.0), ("b", 4.0)):
            loads.asked(name, 1)
            loads.answered(name, 1, busy_s)
    assert [loads.pick(["a", "b"], 1, ()) for _ in range(2)] == ["a", "a"]
    loads.asked("a", 2)
    assert loads.pick(["a", "b"], 1, ()) == "a"
    loads.asked("a", 2)
    assert loads.pick(["a", "b"], 1, ()) == "b"
