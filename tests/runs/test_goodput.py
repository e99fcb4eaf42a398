"""Where a run's time went: every second once, whatever died and whatever the clocks say."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.goodput import StepTimes, account
from orchestrator.ledger import GROUPS, OF_STEP, STALLS, Category, Ledger
from orchestrator.run_state import State

EPOCH_S = 1.7e9


def event(time_s: float, name: str, **details: Any) -> dict[str, Any]:
    return {"time_s": EPOCH_S + time_s, "event": name, "who": "x", "order": 0, **details}


def state(time_s: float, name: str, attempt: int) -> dict[str, Any]:
    return event(time_s, "state", state=name, before=None, attempt=attempt, reason=None)


def host(time_s: float, attempt: int, ready_after_s: float, process_s: float = 0.0) -> list[dict]:
    """The first host's program begins, `process_s` after its process, and is then ready."""
    ready = event(time_s + ready_after_s, "host_ready", attempt=attempt, host=0, step=0)
    return [event(time_s, "host_started", attempt=attempt, process_s=process_s), ready]


def times(start_step: int, *steps: tuple[float, Mapping[str, float]]) -> StepTimes:
    """(`step_s`, stalls) of steps; `compile` among the stalls is the line's `compile_s`."""
    made = StepTimes(start_step)
    for number, (step_s, parts) in enumerate(steps, start=start_step + 1):
        stalls = {part: seconds for part, seconds in parts.items() if part != "compile"}
        line = {"step": number, "step_s": step_s, "stall_s": stalls}
        made.add({**line, "compile_s": parts["compile"]} if "compile" in parts else line)
    return made


def taken(ledger: Ledger | None) -> dict[str, Any]:
    """Seconds by category, of those there are."""
    assert ledger is not None
    return {name.value: pytest.approx(s, abs=1e-5) for name, s in ledger.totals_s.items() if s}


def check_partition(ledger: Ledger | None) -> Ledger:
    """No gap, no overlap, nothing negative, and all of it together is the run's length."""
    assert ledger is not None
    timeline, length_s = ledger.timeline(), float(ledger.edges_s[-1])
    begins, ends = [begin for _, begin, _ in timeline], [end for _, _, end in timeline]
    assert begins == [0.0, *ends][: len(begins)]
    assert all(end > begin for begin, end in zip(begins, ends, strict=True))
    assert (ends[-1] if ends else 0.0) == length_s
    assert all(each[0] is not after[0] for each, after in itertools.pairwise(timeline))
    totals = ledger.totals_s
    assert min(totals.values()) >= 0
    assert sum(totals.values()) == pytest.approx(length_s, abs=1e-6)
    for category, total_s in totals.items():
        told_s = sum(end - begin for what, begin, end in timeline if what is category)
        assert told_s == pytest.approx(total_s, abs=1e-6)
    assert 0 <= ledger.goodput <= 1 + 1e-9
    return ledger


# A host dies two steps after the checkpoint of step 2.
EVENTS = [
    event(0, "controller_started", state="preparing", away_s=None),
    state(10, "starting", 1),
    *host(17, 1, 3, process_s=5),
    state(31, "training", 1),
    event(40, "attempt_failed", attempt=1, kind="host_died", host=1, message=""),
    state(40, "recovering", 1),
    state(43, "starting", 2),
    *host(46, 2, 2, process_s=1),
    state(54, "training", 2),
    event(58, "attempt_ended", attempt=2, step=4, stopped=False),
    state(58, "evaluating", 2),
    state(63, "finished", 2),
]
STEPS = {
    1: times(
        *(0, (10, {"compile": 7, "data": 1}), (2, {"teacher": 0.5})),
        *((2, {"wire": 0.5}), (2, {})),
    ),
    2: times(2, (5, {"compile": 3}), (2, {"checkpoint": 0.25})),
}
TOTALS = {
    "preparing": 10,
    "capacity": 2 + 2,
    "start": 8 + 3,
    "compile": 7 + 3,
    "stall_data": 1,
    "stall_teacher": 0.5,
    "stall_checkpoint": 0.25,
    "step": 2 + 1.5 + 2 + 1.75,
    "lost": 2 + 2,
    "detect": 4,
    "pause": 3,
    "ending": 3,
    "evaluating": 5,
}


def test_each_second_of_a_run_with_a_fault_is_told_by_what_it_went_into():
    ledger = check_partition(account(EVENTS, STEPS, None))
    assert taken(ledger) == TOTALS
    assert ledger.wall_s == pytest.approx(63)
    assert ledger.goodput == pytest.approx(7.25 / 63)
    assert ledger.losses()[:2] == [
        ("start", pytest.approx(11 / 63)),
        ("preparing", pytest.approx(10 / 63)),
    ]
    names = [category.value for category, _, _ in ledger.timeline()]
    assert names == [
        *("preparing", "capacity", "start", "compile", "stall_data", "step", "stall_teacher"),
        *("step", "lost", "detect", "pause", "capacity", "start", "compile", "step"),
        *("stall_checkpoint", "step", "ending", "evaluating"),
    ]


def test_the_order_in_which_events_are_read_does_not_matter():
    assert taken(account(EVENTS[::-1], STEPS, None)) == TOTALS


def test_other_hosts_events_are_left_out():
    others = [event(19.5, "host_ready", attempt=1, host=number, step=0) for number in (1, 2)]
    assert taken(account([*EVENTS, *others], STEPS, None)) == TOTALS


@pytest.mark.parametrize("ahead_s", [-1000.0, -7.0, -0.5, 0.5, 7.0, 1000.0])
def test_a_host_whose_clock_is_wrong_moves_no_time_beyond_its_attempt(ahead_s: float):
    wrong = [
        {**each, "time_s": each["time_s"] + ahead_s} if each["event"].startswith("host") else each
        for each in EVENTS
    ]
    totals = taken(check_partition(account(wrong, STEPS, None)))
    for name in ("preparing", "pause", "evaluating"):
        assert totals[name] == TOTALS[name]


def test_a_run_under_way_counts_until_now_or_until_it_was_last_heard_of():
    events, steps = EVENTS[:5], {1: STEPS[1]}
    ledger = check_partition(account(events, steps, EPOCH_S + 39))
    assert taken(ledger)["untold"] == 3  # the newest line is three seconds old
    assert taken(ledger).get("lost") is None
    assert "untold" not in taken(check_partition(account(events, steps, None)))
    assert account([], {}, EPOCH_S) is None


def test_an_attempt_that_has_only_begun_supersedes():
    steps = {1: STEPS[1], 2: times(1)}
    assert taken(account(EVENTS[:9], steps, EPOCH_S + 50))["lost"] == 6


def test_what_waits_for_machines_in_vain_is_capacity():
    events = [
        *EVENTS[:2],
        event(910, "attempt_failed", attempt=1, kind="no_capacity", host=None, message=""),
        state(910, "recovering", 1),
        state(911, "failed", 1),
    ]
    assert taken(account(events, {}, None)) == {"preparing": 10, "capacity": 900, "pause": 1}


def test_a_controller_that_was_away_costs_only_what_did_not_go_on_without_it():
    back = event(36, "controller_started", state="training", away_s=8.0)
    assert taken(account([*EVENTS, back], STEPS, None)) == TOTALS
    back = event(62, "controller_started", state="evaluating", away_s=3.0)
    totals = {**TOTALS, "evaluating": 2, "away": 3}
    assert taken(account([*EVENTS, back], STEPS, None)) == totals
    # A lease that is older than the state it was left in says no more than that.
    back = event(62, "controller_started", state="evaluating", away_s=300.0)
    totals = {**TOTALS, "away": 4, "evaluating": 1}
    assert taken(account([*EVENTS, back], STEPS, None)) == totals


def test_a_cluster_that_is_lost_is_away_until_the_run_is_resumed():
    events = [
        *EVENTS[:5],
        event(100, "controller_started", state="recovering", away_s=60.0),
        state(101, "starting", 2),
    ]
    ledger = check_partition(account(events, {1: STEPS[1]}, EPOCH_S + 103))
    told = [(category.value, begin, end) for category, begin, end in ledger.timeline()[-4:]]
    assert told == [
        ("detect", pytest.approx(36), pytest.approx(40)),
        ("away", pytest.approx(40), pytest.approx(100)),
        ("pause", pytest.approx(100), pytest.approx(101)),
        ("capacity", pytest.approx(101), pytest.approx(103)),
    ]


@pytest.mark.parametrize(("end", "counts"), [("finished", False), ("failed", True)])
def test_time_after_a_failure_counts_and_time_in_which_nothing_was_wanted_does_not(end, counts):
    events = [
        *EVENTS[:-1],
        state(63, end, 2),
        event(163, "controller_started", state="recovering", away_s=None),
        state(164, "starting", 3),
    ]
    ledger = check_partition(account(events, STEPS, EPOCH_S + 166))
    assert ledger.wall_s == pytest.approx(166 if counts else 66)
    assert taken(ledger)["failed" if counts else "stopped"] == 100


def test_a_stop_is_an_ending():
    events = [
        *EVENTS[:5],
        state(35, "stopping", 1),
        event(41, "attempt_ended", attempt=1, step=4, stopped=True),
        state(41, "stopped", 1),
    ]
    totals = taken(check_partition(account(events, {1: STEPS[1]}, None)))
    assert totals["ending"] == 5
    assert "detect" not in totals and "lost" not in totals


def test_a_stop_before_the_first_step_is_an_ending_from_then_on():
    events = [*EVENTS[:2], state(12, "stopping", 1), state(14, "stopped", 1)]
    assert taken(account(events, {}, None)) == {"preparing": 10, "capacity": 2, "ending": 2}


def test_waits_of_several_hosts_never_take_more_than_the_step():
    widths = times(0, (2.0, {"data": 3.0, "wire": 1.0})).widths_s(np.inf)
    told = dict(zip(OF_STEP, widths[0].tolist(), strict=True))
    assert told[Category.STALL_DATA] == pytest.approx(1.5)
    assert told[Category.STALL_WIRE] == pytest.approx(0.5)
    assert told[Category.STEP] == 0 and widths.sum() == pytest.approx(2.0)


def test_lines_that_come_again_count_once():
    made = times(0, (2.0, {}), (3.0, {}))
    for number in (1, 2):
        made.add({"step": number, "step_s": 9.0, "stall_s": {}})
    assert made.total_s == 5.0


def test_shares_of_bins_are_those_of_the_timeline():
    ledger = check_partition(account(EVENTS, STEPS, None))
    shares = ledger.shares(np.array([0.0, 10.0, 20.0, 63.0]))
    assert shares[Category.PREPARING].tolist() == pytest.approx([1, 0, 0])
    assert shares[Category.CAPACITY].tolist() == pytest.approx([0, 0.2, 2 / 43])
    assert np.sum(list(shares.values()), axis=0) == pytest.approx(1)


def test_each_category_is_in_one_group():
    grouped = [category for categories in GROUPS.values() for category in categories]
    assert sorted(grouped) == sorted(Category)


MOMENTS = st.floats(0, 300)
ATTEMPTS = st.integers(1, 3)


@st.composite
def any_event(draw: st.DrawFn) -> dict[str, Any]:
    time_s, attempt = draw(MOMENTS), draw(ATTEMPTS)
    kind = draw(st.sampled_from(["life", "state", "started", "ready", "failed", "ended"]))
    if kind == "life":
        away_s = draw(st.none() | MOMENTS)
        return event(
            time_s, "controller_started", state=draw(st.sampled_from(State)), away_s=away_s
        )
    if kind == "state":
        return state(time_s, draw(st.sampled_from(State)), attempt)
    if kind == "started":
        return event(time_s, "host_started", attempt=attempt, process_s=draw(MOMENTS))
    if kind == "ready":
        return event(time_s, "host_ready", attempt=attempt, host=0)
    return event(time_s, f"attempt_{kind}", attempt=attempt)


PARTS = st.dictionaries(st.sampled_from(["compile", *STALLS]), st.floats(0, 20), max_size=4)
MADE = st.lists(st.tuples(st.floats(0, 20), PARTS), max_size=6)


@settings(deadline=None, max_examples=400)
@given(
    st.lists(any_event(), max_size=25),
    st.dictionaries(ATTEMPTS, st.tuples(st.integers(0, 4), MADE)),
    st.none() | MOMENTS,
)
def test_whatever_is_told_the_categories_divide_the_time_up(
    events: Sequence[dict[str, Any]],
    made: dict[int, tuple[int, list]],
    now_s: float | None,
):
    steps = {number: times(start_step, *lines) for number, (start_step, lines) in made.items()}
    ledger = account(events, steps, None if now_s is None else EPOCH_S + now_s)
    begins = [e["time_s"] for e in events if e["event"] in ("controller_started", "state")]
    if not begins:
        assert ledger is None
    else:
        assert check_partition(ledger).began_s == min(begins)
