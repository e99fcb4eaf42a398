"""What the first student host tells the controller, and what the controller makes of it."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestrator.student_pulse import StudentPulse
from workers import student_host
from workers.phases import Doing, Phase, Phases
from workers.student_host import Heartbeat
from workers.tally import Tally

STEP = Doing(Phase.STEP, 0.1, 0.1)


def line(step: int) -> dict[str, Any]:
    stall_s = {"teacher": 0.5}
    return {"step": step, "step_s": 2.0, "tokens": 9, "stall_s": stall_s, "teacher_busy_s": 3.0}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the system has no /proc")
def test_a_process_knows_how_old_it_is():
    age_s = time.time() - psutil.Process().create_time()
    assert student_host._process_s() == pytest.approx(age_s, abs=5)


@pytest.fixture
def heartbeat(monkeypatch: pytest.MonkeyPatch) -> Iterator[Heartbeat]:
    monkeypatch.setattr(student_host, "HEARTBEAT_S", 3600)  # nobody is told
    beat = Heartbeat("run-1", 1, Phases())
    yield beat
    beat.close()


def test_every_step_counts_but_the_one_that_compiles(heartbeat: Heartbeat):
    for step in range(7, 11):
        heartbeat.progress(line(step))
    assert heartbeat._line == line(10)
    assert heartbeat._tally == Tally(3, 6.0, 1.5, 9.0)


def test_measures_are_passed_on_once(heartbeat: Heartbeat, monkeypatch: pytest.MonkeyPatch):
    metrics, told = heartbeat._metrics, []

    def note(name: str):
        return lambda value, tags: told.append((name, value, tags))

    monkeypatch.setattr(metrics._stall, "inc", note("stall"))
    monkeypatch.setattr(metrics._rows, "inc", note("rows"))
    for name, counter in metrics._counters.items():
        monkeypatch.setattr(counter, "inc", note(name))
    pool = {"bytes": 100, "retries": 1, "hedged": 0}
    heartbeat.progress({**line(1), "targets": {"from": {"cache": 2, "a1b2": 3}}, "pool": pool})
    heartbeat.progress(line(2))
    metrics.tell()
    run = {"run": "run-1"}
    assert sorted(told, key=str) == sorted(
        [
            ("steps", 2, run),
            ("tokens", 18, run),
            ("stall", 1.0, {**run, "part": "teacher"}),
            ("rows", 2, {**run, "origin": "cache"}),
            ("rows", 3, {**run, "origin": "pool"}),
            ("target_bytes", 100, run),
            ("retries", 1, run),
        ],
        key=str,
    )
    told.clear()
    metrics.tell()
    assert told == []


def test_windows_follow_each_other_without_gap_and_within_an_attempt():
    pulse, tallies = StudentPulse(), [Tally()]
    for step in range(20):
        tallies.append(tallies[-1].plus(line(step)))
    pulse.beat(1, {}, Tally(), STEP)
    assert pulse.line(1) == {} and pulse.window(1) is None
    pulse.beat(1, line(0), tallies[0], STEP)
    assert pulse.line(1) == line(0) and pulse.line(2) == {}
    windows = []
    for step in range(1, 10):
        pulse.beat(1, line(step), tallies[step], STEP)
        windows.append(pulse.window(1))
    # Looked at first after step 1; three steps are 6 s.
    whole = Tally(3, 6.0, 1.5, 9.0)
    assert windows == [None, None, None, whole, None, None, whole, None, None]
    pulse.beat(2, line(4), tallies[1], STEP)
    assert pulse.window(1) is None and pulse.window(2) is None
    pulse.beat(2, line(9), tallies[6], STEP)
    assert pulse.window(2) == Tally(5, 10.0, 2.5, 15.0)
