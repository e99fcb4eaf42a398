"""What is told of runs: figures and tables."""

import math
import re

import pytest
from rich.console import Console

from orchestrator.report import comparison_table, runs_table, status_table, summary
from orchestrator.report_data import read_ledger, shown_count, shown_duration, time_spent
from orchestrator.report_figures import thinned
from tests.helpers.reported_runs import (
    HOSTILE,
    make_folder,
    status_of,
    step_line,
    student_of,
    teacher_of,
    write_evaluation,
)


def text_of(renderable) -> str:
    console = Console(width=200, record=True, file=None, force_terminal=False)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def test_the_figures_of_a_run(tmp_path):
    student = student_of(tmp_path)
    figures = summary(student)
    assert figures["objective"] == "distill"
    assert (figures["steps"], figures["num_steps"], figures["tokens"]) == (20, 20, 20 * 128)
    assert (figures["held_out_step"], figures["bits_per_byte"]) == (20, 2.75)
    assert (figures["held_out_loss"], figures["kl_to_teacher"]) == (5.5, 0.6)
    assert (figures["best_step"], figures["best_bits_per_byte"]) == (10, 2.5)
    assert (figures["attempts"], figures["digest"]) == (2, "c0ffee")
    # Steps 1 and 11 compile: rates are told from the other 18.
    assert figures["tokens_per_s"] == pytest.approx(64)
    assert figures["stall_share"] == pytest.approx(
        {"data": 0.05, "teacher": 0.2, "wire": 0.1, "decode": 0.05, "checkpoint": 0.0}
    )
    assert figures["total_stall_share"] == pytest.approx(0.4)
    assert figures["training_s"] == pytest.approx(2 * 100 + 18 * 2)
    # Of 300 s: each of the twenty steps waits for 0.8 s, two compile for 90 s.
    assert figures["goodput"] == pytest.approx((2 * (100 - 90 - 0.8) + 18 * (2 - 0.8)) / 300)


def test_the_figures_of_a_run_without_any(tmp_path):
    figures = summary(make_folder(tmp_path, "new"))
    assert figures["state"] == "created"
    assert (figures["steps"], figures["tokens"], figures["attempts"]) == (0, 0, 0)
    for name in ("bits_per_byte", "best_step", "tokens_per_s", "training_s", "goodput", "digest"):
        assert figures[name] is None
    assert figures["parameters"] > 0


def test_an_evaluation_that_is_no_number_is_not_the_best(tmp_path):
    folder = make_folder(tmp_path, "diverged")
    write_evaluation(folder, 10, 2.5)
    write_evaluation(folder, 20, math.nan)
    assert summary(folder)["best_step"] == 10
    assert math.isnan(summary(folder)["bits_per_byte"])


def test_runs_are_compared_with_dashes_for_what_is_missing(tmp_path):
    student = student_of(tmp_path)
    text = text_of(comparison_table([student, teacher_of(tmp_path), make_folder(tmp_path, "new")]))
    lines = text.splitlines()[1:]
    assert [line.strip() for line in lines[1::2]] == ["distilled", "teacher", "next token, created"]
    of_student, of_teacher, of_new = lines[::2]
    for cell in ("student", "2.7500", "5.5000", "0.6000", "64", "30.0%", "3 min 56 s"):
        assert cell in of_student
    assert of_teacher.startswith("elder ")
    assert "2.0000" in of_teacher and "–" in of_teacher  # no teacher of its own
    assert of_new.startswith("new ") and of_new.count("–") == 6


def test_the_list_tells_lost_runs_from_those_under_way(tmp_path):
    student = student_of(tmp_path)
    lost, alive = make_folder(tmp_path, "lost"), make_folder(tmp_path, "alive")
    judged = {"10": 2.5, "15": None, "20": 2.75}
    for folder in (lost, alive):
        values = {"checkpoints": [10, 15], "bits_per_byte": judged}
        folder.write_status(status_of(folder, "training", **values))
    alive.write_lease("someone", "here")
    foreign = make_folder(tmp_path, "foreign")
    (tmp_path / "runs" / "foreign" / "config.yaml").write_text("name: foreign\nodd: 1\n")
    folders = [lost, alive, student, foreign, make_folder(tmp_path, "new")]
    rows = [re.split(r" {2,}", line.strip()) for line in text_of(runs_table(folders)).splitlines()]
    assert rows[1:] == [
        ["lost", "lost", "15/20", "2.5000", "next token"],
        ["alive", "training", "15/20", "2.5000", "next token"],
        ["student", "finished", "0/20", "–", "distilled from elder@20"],
        ["foreign", "created", "–", "–", "unknown: its configuration does not fit this version"],
        ["new", "created", "–", "–", "next token"],
    ]


def test_the_status_of_a_run(tmp_path):
    student = student_of(tmp_path)
    line = step_line(2, 20, kd=True)
    status = status_of(student, "training", step=20, line=line, reason=HOSTILE, alive=True)
    status["teachers"] = {"wanted": 3, "needed": 4, "replicas": {"RUNNING": 2}}
    text = text_of(status_table(status))
    for part in (
        "training",
        "20 of 20",
        "64",
        "teacher 20.0%",
        "3 wanted, 4 needed, 2 running",
        HOSTILE,
    ):
        assert part in text
    assert "goodput" not in text
    text = text_of(status_table(status, read_ledger(student)))
    assert "13.3% of 5 min 00 s; compile 60.0%, evaluating 6.7%, start 4.7%" in text
    status["teachers"]["pool"] = "elders"
    assert "2 running in the shared pool elders" in text_of(status_table(status))
    assert "lost" in text_of(status_table(status | {"alive": False}))
    assert "created" in text_of(status_table({"name": "x", "state": "created", "alive": False}))
    preparing = {"what": "packing rows", "done": 3, "total": 8}
    status = status_of(student, "preparing", preparing=preparing, alive=True)
    assert "packing rows 3/8" in text_of(status_table(status))


def test_long_curves_are_thinned_to_means():
    values = list(range(1000))
    few = thinned(values)
    assert len(few) == 500
    assert few[:2].tolist() == [0.5, 2.5]
    assert thinned(range(1201))[-1] == 1200.0
    assert thinned([1.0, 2.0]).tolist() == [1.0, 2.0]


def test_the_time_spent_adds_up_in_each_bin(tmp_path):
    ledger = read_ledger(student_of(tmp_path))
    assert ledger is not None
    unit, borders, shares = time_spent(ledger)
    assert (unit, borders[0], borders[-1]) == ("minutes", 0.0, pytest.approx(5.0))
    assert sum(shares.values()) == pytest.approx(1.0)
    # Nothing but start-up until the compilation ends, 110 s after the begin.
    assert shares[1][borders[1:] <= 110 / 60] == pytest.approx(1.0)
    assert set(shares) == set(range(6))


@pytest.mark.parametrize(
    ("value", "text"),
    [(999, "999"), (35_400, "35.4 k"), (2_614_341_888, "2.61 B"), (1_000_000, "1 M")],
)
def test_counts_in_three_digits(value, text):
    assert shown_count(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "–"), (3.25, "3.2 s"), (59.9, "1 min 00 s"), (236, "3 min 56 s"), (7384, "2 h 03 min")],
)
def test_durations_in_two_units(seconds, text):
    assert shown_duration(seconds) == text
