"""When students count as hung: on a clock of its own, and from what their hosts say."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.run import WatchdogConfig
from orchestrator.run_state import Hung, KillAttempt, State
from orchestrator.student_pulse import StudentPulse
from orchestrator.watchdog import STACKS_WITHIN_S, Signs, Watch
from tests.helpers.controller_bench import TO, Bench, make_config, of, said
from workers import host_watch
from workers.host_watch import BUSY_EVERY_S, HostWatch, hosts_with_stacks, stacks_url
from workers.phases import Doing, Phase, Phases, allowed_s
from workers.tally import Tally

CONFIG = WatchdogConfig(
    start_within_s=300, compile_within_s=200, checkpoint_within_s=100, step_at_least_s=50
)
HUNG = Doing(Phase.STEP, 1000.0)


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_a_phase_lasts_until_the_next_and_the_longest_of_the_last_steps_is_known():
    clock = Clock()
    phases = Phases(clock)
    for phase, seconds in [
        (Phase.COMPILE, 60.0),
        (Phase.STEP, 2.0),
        (Phase.TARGETS, 30.0),
        (Phase.STEP, 3.0),
        *[(Phase.STEP, 1.0)] * 98,
    ]:
        phases.enter(phase)
        clock.now_s += seconds
    assert phases.doing() == Doing(Phase.STEP, 1.0, 3.0)
    for _ in range(100):
        phases.enter(Phase.STEP)
        clock.now_s += 1.0
    assert phases.doing().longest_step_s == 1.0  # a long one is forgotten in time


@pytest.mark.parametrize(
    ("doing", "limit_s"),
    [
        (Doing(Phase.START, 9), 300),
        (Doing(Phase.COMPILE, 9), 200),
        (Doing(Phase.CHECKPOINT, 9, 60.0), 100),
        (Doing(Phase.TARGETS, 9, 60.0), None),
        (Doing(Phase.STEP, 9, 0.1), 50),
        (Doing(Phase.STEP, 9, 6.0), 120),
    ],
)
def test_each_phase_has_a_time_of_its_own(doing: Doing, limit_s: float | None):
    assert allowed_s(doing, CONFIG) == limit_s


def looked(watch: Watch, signs: Signs, seconds: int, attempt: int = 1, at_s: int = 0) -> list[str]:
    """What it says, looking once a second."""
    found = (watch.look(attempt, signs, float(at_s + second)) for second in range(seconds))
    return [reason for reason in found if reason]


def test_an_attempt_that_never_comes_up_hangs():
    watch = Watch(CONFIG)
    silent = int(CONFIG.start_within_s + STACKS_WITHIN_S)
    assert looked(watch, Signs(), silent) == []
    assert "`start` for 311 s, where 300 s are allowed" in looked(watch, Signs(), 2, 1, silent)[0]


def test_a_step_that_never_ends_hangs_and_a_wait_for_a_teacher_does_not():
    step, wait = (Doing(phase, 61.0, 0.1) for phase in (Phase.STEP, Phase.TARGETS))
    watch = Watch(CONFIG)
    looked(watch, Signs(1, 0, step), 20)  # long enough for others to say that they are busy
    [reason] = [watch.look(1, Signs(2, 0, step), 20.0)]
    assert reason is not None and "`step` for 61 s, where 50 s are allowed" in reason
    assert "20 times the longest of its last steps, 0.10 s" in reason
    assert watch.look(1, Signs(3, 0, wait), 21.0) is None


def test_a_step_that_waits_for_another_host_is_no_hang_while_that_one_is_busy():
    watch, num_busy = Watch(CONFIG), 0
    for second in range(600):
        num_busy += second % int(BUSY_EVERY_S) == 0
        assert watch.look(1, Signs(second, num_busy, HUNG), float(second)) is None
    later = [watch.look(1, Signs(600 + n, num_busy, HUNG), 600.0 + n) for n in range(30)]
    assert later[0] is None and later[-1] is not None


def test_a_host_without_a_sign_of_life_hangs_in_any_phase():
    signs = Signs(5, 0, Doing(Phase.TARGETS, 3.0))
    watch = Watch(CONFIG)
    assert looked(watch, signs, int(CONFIG.silent_within_s)) == []
    assert "no sign of life for 121 s" in looked(watch, signs, 3, 1, 120)[0]


def test_time_in_which_nobody_looked_blames_none():
    watch = Watch(CONFIG)
    step = Signs(1, 1, Doing(Phase.STEP, 40.0))
    assert watch.look(1, step, 0.0) is None
    assert watch.look(1, step, 10_000.0) is None  # the controller was stopped, say
    # A new attempt begins anew.
    assert looked(watch, Signs(), 200, 2, 10_001) == []


def test_signs_are_those_of_one_attempt():
    pulse = StudentPulse()
    pulse.beat(1, {}, Tally(), HUNG)
    pulse.busy(1)
    pulse.beat(1, {}, Tally(), HUNG)
    assert pulse.signs(1) == Signs(2, 1, HUNG) and pulse.signs(2) == Signs()
    pulse.busy(2)
    assert pulse.signs(1) == Signs() and pulse.signs(2) == Signs(0, 1)


def test_what_hangs_is_ended_and_started_again_within_its_budget():
    bench = Bench(make_config(faults={"host_hung": 1}))
    bench.feed(*TO[State.TRAINING])
    assert bench.feed(Hung(0, "of the past")) == []
    done = bench.feed(Hung(1, "it hangs"))
    assert of(KillAttempt, done) == [KillAttempt(1)]
    assert said("attempt_failed", done)[0]["kind"] == "host_hung"
    assert bench.snapshot.used == {"host_hung": 1} and bench.state is State.STARTING
    bench.feed(Hung(2, "it hangs again"))
    assert bench.state is State.FAILED
    assert "faults.host_hung allows 1; the last one: it hangs again" in str(bench.snapshot.reason)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_watch, "_LOOK_EVERY_S", 0.01)


def wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.01)


def test_a_host_that_hangs_writes_its_stacks_and_takes_them_back_if_it_goes_on(
    tmp_path: Path, quick: None
):
    clock, told = Clock(), []
    phases = Phases(clock)
    phases.enter(Phase.STEP)
    url = stacks_url(str(tmp_path), 3, 7)
    watch = HostWatch(url, phases, CONFIG, lambda: told.append(clock.now_s))
    clock.now_s += 51.0
    wait_for(lambda: hosts_with_stacks(str(tmp_path), 3) == [7])
    text = Path(url).read_text()
    assert text.startswith("In phase `step` for 51 s")
    assert "in wait_for" in text and "in _watch" in text  # this thread and the other
    assert hosts_with_stacks(str(tmp_path), 2) == []
    phases.enter(Phase.TARGETS)
    wait_for(lambda: hosts_with_stacks(str(tmp_path), 3) == [])
    assert told == []
    for count in (1, 2):
        clock.now_s += BUSY_EVERY_S
        wait_for(lambda count=count: len(told) == count)
    watch.close()
