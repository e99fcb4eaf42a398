"""Which steps count as anomalies, and what is made of them: the same decisions after any resume."""

import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.run import AnomalyConfig
from tests.helpers.controller_bench import make_config
from workers.anomalies import (
    Anomalies,
    AnomalyError,
    RollbackError,
    SettledStep,
    loss_limit,
    needs_guard,
    num_remembered,
)


def steps_of(losses: list[float], skipped: dict[int, Any] | None = None) -> list[SettledStep]:
    """Steps from 1 on, some of them skipped for a reason."""
    return [
        SettledStep(step, loss, (skipped or {}).get(step))
        for step, loss in enumerate(losses, start=1)
    ]


def opened(start_step: int = 0, to_skip: tuple[int, ...] = (), **changes: Any) -> Anomalies:
    """Of a run of eight rows a step with a checkpoint after every fourth."""
    config = make_config(anomalies=changes, checkpoint={"every_steps": 4})
    return Anomalies(config, (), to_skip, start_step)


SPIKES = AnomalyConfig(on_spike="skip", window_steps=4, spike_deviations=2.0)


def test_the_limit_is_the_mean_and_so_many_deviations():
    losses = [9.0, 1.0, 2.0, 3.0, 6.0, 100.0]
    expected = 3.0 + 2.0 * float(np.std([1.0, 2.0, 3.0, 6.0]))
    # Step 7 is put on the devices before step 6 is read.
    assert loss_limit(SPIKES, steps_of(losses), 7) == np.float32(expected)
    assert loss_limit(SPIKES, steps_of(losses[:5]), 7) == loss_limit(SPIKES, steps_of(losses), 7)


def test_there_is_no_limit_before_the_window_is_full_or_where_spikes_are_ignored():
    assert loss_limit(SPIKES, steps_of([1.0] * 4), 5) == math.inf
    assert loss_limit(SPIKES, steps_of([1.0] * 4), 6) == 1.0
    ignoring = SPIKES.model_copy(update={"on_spike": "ignore"})
    assert loss_limit(ignoring, steps_of([1.0] * 4), 6) == math.inf


@pytest.mark.parametrize("reason", ["nan", "spike", "rollback"])
def test_skipped_steps_do_not_move_the_limit(reason):
    wild = math.nan if reason == "nan" else 1e9
    steps = steps_of([1.0, 2.0, wild, 3.0], {3: reason})
    expected = 2.0 + 2.0 * float(np.std([1.0, 2.0, 3.0]))
    assert loss_limit(SPIKES, steps, 6) == pytest.approx(expected)
    nearly_all = steps_of([1.0, wild, wild, wild], dict.fromkeys((2, 3, 4), reason))
    assert loss_limit(SPIKES, nearly_all, 6) == math.inf, "one loss has no deviation"


@given(st.data())
def test_a_resumed_attempt_decides_as_one_that_never_stopped(data):
    """Whatever was settled when a step went to the devices, and wherever the run was resumed."""
    config = make_config(
        anomalies={"on_spike": "skip", "window_steps": 3, "spike_deviations": 0.5, "max_skips": 99}
    )
    losses = data.draw(st.lists(st.floats(0, 10, width=32), min_size=2, max_size=20))
    bad = data.draw(st.sets(st.integers(1, len(losses))))

    def run(anomalies: Anomalies, start: int, settled_at_once: set[int]) -> list[SettledStep]:
        made: list[SettledStep] = []

        def settle(step: int) -> None:
            loss = math.nan if step in bad else losses[step - 1]
            anomaly = anomalies.settle(step, loss, 1.0)
            made.append(SettledStep(step, loss, anomaly and anomaly.reason))
            on_device = limits[step]
            assert (anomaly is None) == (loss <= on_device), "hosts and devices agree"

        limits: dict[int, float] = {}
        for step in range(start + 1, len(losses) + 1):
            limits[step] = anomalies.limit(step)
            if step - 1 > start and step - 1 not in settled_at_once:
                settle(step - 1)
            if step in settled_at_once:
                settle(step)
        if len(losses) not in settled_at_once:
            settle(len(losses))
        return made

    everything = run(Anomalies(config, (), (), 0), 0, set())
    at_once = data.draw(st.sets(st.integers(1, len(losses))))
    assert repr(run(Anomalies(config, (), (), 0), 0, at_once)) == repr(everything)
    start = data.draw(st.integers(0, len(losses) - 1))
    known = everything[:start][-num_remembered(config.anomalies) :]
    resumed = run(Anomalies(config, known, (), start), start, at_once)
    assert repr(resumed) == repr(everything[start:])


def test_a_step_is_skipped_for_what_was_wrong_with_it():
    anomalies = opened(to_skip=(3,), on_spike="skip", window_steps=3)
    found = [
        anomalies.settle(step, loss, grad_norm)
        for step, loss, grad_norm in [
            (1, 5.0, 1.0),
            (2, 5.0, 1.0),
            (3, math.nan, 1.0),
            (4, 5.0, math.inf),
            (5, 5.5, 1.0),
            (6, math.inf, 1.0),
        ]
    ]
    reasons = [anomaly and anomaly.reason for anomaly in found]
    assert reasons == [None, None, "rollback", "nan", "spike", "nan"]
    assert [anomaly.limit for anomaly in found if anomaly] == [None, None, 5.0, None]
    assert anomalies.limit(3) == -math.inf


@pytest.mark.parametrize(
    ("changes", "to_skip", "guarded"),
    [
        ({}, (), False),
        ({"on_spike": "stop"}, (), False),
        ({}, (3,), True),
        ({"on_nan": "skip"}, (), True),
        ({"on_spike": "rollback"}, (), True),
    ],
)
def test_the_state_is_guarded_where_it_lives_on(changes, to_skip, guarded):
    assert needs_guard(AnomalyConfig(**changes), to_skip) == guarded


def test_more_skips_than_are_allowed_among_the_newest_steps_stop_the_run():
    anomalies = opened(on_nan="skip", max_skips=2, window_steps=4, to_skip=(3,))
    errors = []
    for step in range(1, 12):
        bad = step in (1, 2, 3, 6, 8, 9)
        anomaly = anomalies.settle(step, math.nan if bad else 5.0, 1.0)
        errors.append(anomaly and anomalies.error(anomaly))
    # Three are within four steps for the first time at step 9; a rollback's step counts for none.
    assert [step for step, error in enumerate(errors, start=1) if error is not None] == [9]
    assert isinstance(errors[8], AnomalyError)
    assert "Step 9, rows 64 to 71 of the stream: loss nan" in str(errors[8])
    assert "3 of the last 4 steps had to be skipped, and anomalies.max_skips allows 2" in str(
        errors[8]
    )


def test_a_stop_says_where_and_how_to_go_on():
    anomalies = opened(on_nan="stop", on_spike="stop", window_steps=2, spike_deviations=1)
    for step, loss in ((1, 1.0), (2, 3.0), (3, 2.0)):
        assert anomalies.settle(step, loss, 1.0) is None
    spike = anomalies.settle(4, 7.0, 1.5)
    assert spike is not None
    error = anomalies.error(spike)
    assert isinstance(error, AnomalyError)
    assert str(error) == (
        "Step 4, rows 24 to 31 of the stream: loss 7, above 3, gradient norm 1.5. Leave the step "
        "out with `stillhouse resume run --set anomalies.on_spike=skip`, or lower optimizer.peak_lr"
    )
    nan = anomalies.settle(5, math.nan, math.nan)
    assert nan is not None
    assert "anomalies.on_nan=skip" in str(anomalies.error(nan))


@pytest.mark.parametrize(
    ("start_step", "rollback_steps", "left_out"),
    [(0, 1, (7,)), (0, 2, (6, 7)), (0, 100, (5, 6, 7)), (6, 100, (7,)), (5, 100, (6, 7))],
)
def test_a_rollback_leaves_out_what_led_to_the_step(start_step, rollback_steps, left_out):
    anomalies = opened(start_step, on_nan="rollback", rollback_steps=rollback_steps)
    anomaly = anomalies.settle(7, math.nan, math.nan)
    assert anomaly is not None
    error = anomalies.error(anomaly)
    assert isinstance(error, RollbackError)
    assert error.steps == left_out
    assert f"leaves out steps {left_out[0]} to 7" in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.steps) == (str(error), error.steps)


def test_what_a_rollback_leaves_out_is_no_anomaly_again():
    anomalies = opened(to_skip=(1,), on_nan="rollback")
    anomaly = anomalies.settle(1, math.nan, math.nan)
    assert anomaly is not None and anomalies.error(anomaly) is None
