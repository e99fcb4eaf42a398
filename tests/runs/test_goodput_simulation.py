"""The simulation of a large run's faults: its seconds add up, and faults cost what they should."""

import dataclasses

import pytest

from benchmarks.goodput import DAY_S, Inputs, Job, goodput, scaled
from orchestrator.ledger import Category


def job(tiered: bool, seed: int = 0, **changes: float) -> Job:
    return Job(dataclasses.replace(Inputs(), **changes), tiered, seed).run()


@pytest.mark.parametrize("tiered", [False, True])
@pytest.mark.parametrize("changes", [{}, {"spare_slices": 0}, {"faults_per_host_day": 0.2}])
def test_the_seconds_of_a_run_add_up(tiered: bool, changes: dict):
    done = job(tiered, **changes)
    assert sum(done.seconds.values()) == pytest.approx(54 * DAY_S)
    assert min(done.seconds.values()) >= 0


def test_without_faults_a_run_starts_once_and_is_held_up_by_its_saves():
    done = job(False, faults_per_host_day=1e-12, days=1.0)
    given = Inputs()
    assert done.num_faults == 0
    start_s = given.schedule_s + given.restore_storage_s
    assert done.seconds[Category.START] == start_s
    assert done.seconds[Category.COMPILE] == given.compile_s
    pace_s = given.step_s + given.save_s / given.save_every_steps
    steps_s = (DAY_S - start_s - given.compile_s) * given.step_s / pace_s
    assert done.seconds[Category.STEP] == pytest.approx(steps_s, abs=2 * pace_s)
    for category in (Category.DETECT, Category.PAUSE, Category.CAPACITY):
        assert done.seconds[category] == 0


def test_a_fault_loses_half_of_an_interval_and_what_was_not_committed():
    alone, tiered = (
        job(arm, seed=1, memory_lost_share=0.0, spare_slices=20, days=540.0)
        for arm in (False, True)
    )
    given = Inputs()
    expected_s = given.save_every_steps / 2 * given.step_s + given.commit_s
    assert alone.seconds[Category.LOST] / alone.num_faults == pytest.approx(expected_s, rel=0.1)
    expected_s = given.snapshot_every_steps / 2 * given.step_s
    assert tiered.seconds[Category.LOST] / tiered.num_faults == pytest.approx(expected_s, rel=0.1)


def test_a_memory_that_is_always_lost_with_the_gang_gains_nothing():
    same = {
        "save_every_steps_tiered": 200,
        "snapshot_s": 0.0,
        "memory_lost_share": 1.0,
        "hand_over_s": 0.0,
    }
    assert job(True, **same).seconds == pytest.approx(job(False).seconds)
    assert goodput([job(True)]) > goodput([job(True, memory_lost_share=1.0)])


def test_a_slice_that_is_missing_is_waited_for():
    waits = [job(True, spare_slices=spare).seconds[Category.CAPACITY] for spare in (0, 1, 2, 20)]
    assert waits == sorted(waits, reverse=True)
    assert waits[0] > 0 and waits[-1] == 0


def test_inputs_are_scaled_within_their_range():
    given = Inputs()
    assert scaled(given, "hardware_share", 2).hardware_share == 1.0
    assert scaled(given, "spare_slices", 0.5).spare_slices == 1
    assert scaled(given, "step_s", 2).step_s == 2 * given.step_s
