"""The pool's size under a simulated pool and student: it follows the need, and then it is still."""

import dataclasses
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.teacher_scaling import (
    DOWN_WINDOWS,
    MIN_STEPS,
    STALL_SHARE,
    TARGET_UTILISATION,
    UP_WINDOWS,
    WINDOW_S,
    Bounds,
    Scaling,
    Window,
    judge,
)
from workers.tally import Tally

OWN_S = 0.5
BOUNDS = Bounds(1, 40)
loads = st.floats(0.01, 30)
starts = st.integers(BOUNDS.low, BOUNDS.high)


@dataclasses.dataclass
class World:
    """A student that takes `OWN_S` a step where targets are there, and replicas that make them.

    A step costs the replicas `load * OWN_S` busy seconds, so `load` of them suffice if they never
    rest. A new replica serves after `start_s`. Of a replica's time, `idle_share` cannot be used.
    """

    load: float
    teachers: int
    bounds: Bounds | None = BOUNDS
    start_s: float = 20.0
    noise: float = 0.0
    idle_share: float = 0.0
    seed: int = 0
    num_hosts: int = 1

    def __post_init__(self) -> None:
        self.scaling = Scaling()
        self.random = random.Random(self.seed)
        self.now_s = 1000.0
        self.serving = self.teachers
        self.arrive_s = 0.0
        self.sizes = [self.teachers]

    def live(self, num_windows: int) -> list[int]:
        """The number of teachers after each window."""
        sizes = [self.window() for _ in range(num_windows)]
        self.sizes += sizes
        return sizes

    def window(self) -> int:
        usable = self.serving * (1 - self.idle_share)
        step_s = max(OWN_S, self.load * OWN_S / usable)
        steps = max(MIN_STEPS, math.ceil(WINDOW_S / step_s))
        self.now_s += steps * step_s
        tally = Tally(
            steps,
            step_s=steps * (step_s - OWN_S) + (own_s := steps * OWN_S * self.measured()),
            teacher_stall_s=steps * (step_s - OWN_S),
            teacher_busy_s=steps * self.load * OWN_S * self.measured() / self.num_hosts,
        )
        assert own_s > 0
        window = Window.of(tally, self.num_hosts, self.teachers, self.serving)
        verdict = judge(self.scaling, window, self.teachers, self.bounds, self.now_s)
        self.scaling = verdict.scaling
        if verdict.teachers != self.teachers:
            assert verdict.reason
            self.teachers, self.arrive_s = verdict.teachers, self.now_s + self.start_s
            self.serving = min(self.serving, self.teachers)
        elif self.now_s >= self.arrive_s:
            self.serving = self.teachers
        return self.teachers

    def measured(self) -> float:
        return 1 + self.random.uniform(-self.noise, self.noise)


def needed(load: float) -> int:
    return max(1, math.ceil(round(load / TARGET_UTILISATION, 6)))


def settled(load: float, start: int) -> int:
    """More only for a student that waits, fewer only where fewer are needed."""
    wanted = BOUNDS.clip(needed(load))
    if 1 - start / load > STALL_SHARE:
        return max(start, wanted)
    return min(start, wanted)


@given(load=loads, start=starts, start_s=st.floats(0, 400))
def test_under_constant_load_it_settles_and_is_still(load: float, start: int, start_s: float):
    world = World(load, start, start_s=start_s)
    world.live(3 * DOWN_WINDOWS + 120)
    still = world.live(100)
    assert set(still) == {settled(load, start)}
    # One change suffices.
    assert len(set(world.sizes)) <= 2


@given(load=loads, more=st.floats(1, 10), start=starts)
def test_a_slower_teacher_never_has_fewer_replicas(load: float, more: float, start: int):
    one, other = World(load, start), World(load * more, start)
    assert one.live(150)[-1] <= other.live(150)[-1]


@given(
    loads=st.lists(loads, min_size=1, max_size=6),
    low=st.integers(1, 8),
    span=st.integers(0, 8),
    noise=st.floats(0, 0.9),
    data=st.data(),
)
def test_it_keeps_to_its_bounds(loads, low: int, span: int, noise: float, data: st.DataObject):
    bounds = Bounds(low, low + span)
    start = data.draw(st.integers(bounds.low, bounds.high))
    world = World(1.0, start, bounds, noise=noise, seed=data.draw(st.integers(0, 99)))
    for world.load in loads:
        assert all(bounds.low <= size <= bounds.high for size in world.live(40))


@pytest.mark.parametrize("load", [0.4, 0.8, 1.6, 4.0, 7.3])
def test_a_teacher_four_times_slower_has_four_times_the_replicas_and_back(load: float):
    world = World(load, needed(load), start_s=10.0)
    world.live(30)
    before = world.teachers
    assert before == needed(load)
    world.load = 4 * load
    # At once: not before the pool has what it asked for does it look again.
    assert world.live(UP_WINDOWS)[-1] == needed(4 * load)
    if (load / TARGET_UTILISATION).is_integer():
        assert world.teachers == 4 * before
    world.live(20)
    assert world.scaling.stall_share == 0
    world.load = load
    assert world.live(2 * DOWN_WINDOWS)[-1] == before


@given(load=st.floats(0.4, 8), part=st.floats(0, 1))
def test_windows_that_saw_a_change_of_the_need_do_not_lead_to_half_of_it(load: float, part: float):
    world = World(load, before := needed(load), start_s=10.0)
    world.live(30)
    world.load = (1 + 3 * part) * load
    world.window()
    world.load = 4 * load
    up = world.live(30)
    world.load = (4 - 3 * part) * load
    world.window()
    world.load = load
    down = world.live(3 * DOWN_WINDOWS)
    assert set(up) == {before, needed(4 * load)}
    assert set(down) == {needed(4 * load), before}


@settings(max_examples=200)
@given(load=loads, start=starts, seed=st.integers(0, 10**6))
def test_noise_does_not_make_it_restless(load: float, start: int, seed: int):
    world = World(load, start, noise=0.2, seed=seed)
    world.live(400)
    ways = [b - a for a, b in zip(world.sizes, world.sizes[1:], strict=False) if a != b]
    # Up where the student waits, then down from what noise made too many: never up again.
    assert ways == sorted(ways, key=lambda way: way < 0)
    assert len([way for way in ways if way > 0]) <= 3
    assert world.scaling.stall_share is not None
    assert world.scaling.stall_share <= 0.05 or world.teachers == BOUNDS.high


@given(load=st.floats(0.5, 8), start=st.integers(1, 12), idle_share=st.floats(0, 0.45))
def test_replicas_that_cannot_be_busy_all_the_time_are_made_up_for(
    load: float, start: int, idle_share: float
):
    """What a replica does besides is in no busy second; only the student's wait shows it."""
    world = World(load, start, idle_share=idle_share)
    world.live(300)
    assert world.teachers * (1 - idle_share) >= load * (1 - 2 * STALL_SHARE)
    assert world.teachers <= max(start, needed(2 * load))
    assert len(set(world.live(200))) == 1


def test_replicas_that_are_truly_idle_are_not_multiplied_for_ever():
    """Too little is asked for ahead: the student waits, whatever the number of replicas."""
    scaling, teachers, now_s = Scaling(), 2, 0.0
    for _ in range(200):
        now_s += 10
        window = Window(0.3, load=1.0, utilisation=0.7 / teachers, all_serve=True)
        scaling, teachers, *_ = judge(scaling, window, teachers, BOUNDS, now_s)
    assert teachers == needed(2 * 1.0)


def test_a_dead_replica_is_no_reason_for_more():
    scaling = Scaling()
    for now_s in range(0, 1000, 10):
        window = Window(0.5, load=1.5, utilisation=1.0, all_serve=False)
        scaling, teachers, *_ = judge(scaling, window, 2, BOUNDS, float(now_s))
        assert teachers == 2


@given(load=loads, start=starts)
def test_without_bounds_the_number_stays_and_the_need_is_told(load: float, start: int):
    world = World(load, start, bounds=None)
    assert set(world.live(40)) == {start}
    assert world.scaling.needed == needed(load)


def test_the_need_is_told_beyond_the_bounds():
    world = World(6.4, 1, Bounds(1, 3))
    assert world.live(40)[-1] == 3
    assert world.scaling.needed == 8


def test_hosts_share_the_load():
    one, four = World(3.2, 1), World(3.2, 1, num_hosts=4)
    assert one.live(40) == four.live(40)


def test_what_a_change_did_is_told_once_it_is_in_effect():
    scaling, told = Scaling(stall_share=0.6, needed=4).changed(100.0), []
    waits = Window(0.6, load=3.0, utilisation=1.0, all_serve=False)
    good = Window(0.0, load=3.0, utilisation=0.75, all_serve=True)
    for now_s, window in ((105, good), (120, waits), (130, good), (140, good), (150, good)):
        verdict = judge(scaling, window, 4, BOUNDS, now_s)
        scaling = verdict.scaling
        told.append(verdict.stall_before)
    # Too early, replicas missing, a window that began before all were there; then once.
    assert told == [None, None, None, 0.6, None]
    assert scaling.stall_share == 0.0


def test_replicas_that_never_come_are_not_waited_for_for_ever():
    world = World(3.2, 2, start_s=math.inf)
    world.live(200)
    assert not world.scaling.settling
    assert world.teachers == needed(3.2)
