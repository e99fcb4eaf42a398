"""What is told of runs: figures, tables, and a page that stands by itself."""

import html.parser
import math
import re
from typing import Any

import pytest
from rich.console import Console

from configs.load import parse_run
from orchestrator.report import comparison_table, runs_table, status_table, summary, write_report
from orchestrator.report_data import shown_count, shown_duration
from orchestrator.report_figures import thinned
from orchestrator.run_folder import RunFolder
from workers.record import STEPS, EventWriter, SegmentWriter
from workers.storage import join

NEVER_S = 3600.0
HOSTILE = "<script>alert(1)</script> & [red]co"


def make_folder(root, name: str, steps: int = 20, **changes: Any) -> RunFolder:
    values: dict[str, Any] = {
        "name": name,
        "storage": str(root),
        "steps": steps,
        "model": {"preset": "tiny", "vocab_size": 512},
        "data": {
            "sources": [{"name": "text", "path": f"/data/{HOSTILE}"}],
            "tokenizer": {"kind": "train", "vocab_size": 512},
            "row_length": 64,
        },
        "batch": {"rows": 2},
    }
    folder = RunFolder(str(root), name)
    folder.create(parse_run(values | changes, name), {"run_id": f"{name}-1"})
    return folder


def distilled(root, name: str = "student", **changes: Any) -> RunFolder:
    teacher = {"checkpoint": "elder@20"}
    return make_folder(root, name, objective={"kind": "distill"}, teacher=teacher, **changes)


def step_line(attempt: int, step: int, kd: bool, step_s: float = 2.0) -> dict[str, Any]:
    stalls = {"data": 0.1, "teacher": 0.4, "wire": 0.2, "decode": 0.1, "checkpoint": 0.0}
    return {
        "step": step,
        "stall_s": stalls if kd else {"data": 0.1},
        "loss": 8 / step,
        "kd_loss": 4 / step if kd else None,
        "ce_loss": 8 / step,
        "lr": 1e-3,
        "grad_norm": 1.0,
        "tokens": 128,
        "step_s": step_s,
        "attempt": attempt,
    }


def write_steps(folder: RunFolder, attempt: int, start: int, end: int, kd: bool = False) -> None:
    writer = SegmentWriter(join(folder.url, STEPS), f"a{attempt:04d}-h0000", NEVER_S)
    writer.append({"attempt": attempt, "start_step": start})
    for step in range(start + 1, end + 1):
        # The first step of an attempt compiles: as long as fifty others.
        writer.append(step_line(attempt, step, kd, 100.0 if step == start + 1 else 2.0))
    writer.close()


def write_evaluation(folder: RunFolder, step: int, bits: float, kl: float | None = None) -> None:
    folder.write_evaluation(
        {"step": step, "loss": bits * 2, "bits_per_byte": bits, "kl_to_teacher": kl}
    )


def status_of(folder: RunFolder, state: str, **changes: Any) -> dict[str, Any]:
    status = {
        "name": folder.name,
        "state": state,
        "reason": None,
        "attempt": 1,
        "step": None,
        "num_steps": 20,
        "line": {},
        "preparing": None,
        "teachers": {"wanted": 0, "replicas": {}},
        "checkpoints": [],
        "bits_per_byte": {},
        "faults": {},
        "digest": None,
    }
    return status | changes


@pytest.fixture
def student(tmp_path) -> RunFolder:
    """A distilled run that lost its students once, after step 12."""
    folder = distilled(tmp_path)
    write_steps(folder, 1, 0, 12, kd=True)
    write_steps(folder, 2, 10, 20, kd=True)
    write_evaluation(folder, 10, 2.5, 0.8)
    write_evaluation(folder, 20, 2.75, 0.6)
    faults = {"host_died": 1}
    folder.write_status(status_of(folder, "finished", attempt=2, digest="c0ffee", faults=faults))
    events = EventWriter(folder.url, "controller")
    events.say("state", state="training", before="starting", reason=None)
    events.say("attempt_failed", attempt=1, kind="host_died", host=0, message=HOSTILE)
    for step in (11, 12, 13):
        events.say("teacher_retry", step=step, reason="away")
    events.say("settings_changed", changes={"steps": [10, 20]})
    events.say("evaluated", step=20, bits_per_byte=2.75)
    events.say("prepared", dataset_digest="0")
    events.close()
    return folder


def teacher_of(root) -> RunFolder:
    folder = make_folder(root, "elder")
    write_steps(folder, 1, 0, 20)
    write_evaluation(folder, 20, 2.0)
    folder.write_status(status_of(folder, "finished"))
    return folder


def text_of(renderable) -> str:
    console = Console(width=200, record=True, file=None, force_terminal=False)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def test_the_figures_of_a_run(student):
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


def test_the_figures_of_a_run_without_any(tmp_path):
    figures = summary(make_folder(tmp_path, "new"))
    assert figures["state"] == "created"
    assert (figures["steps"], figures["tokens"], figures["attempts"]) == (0, 0, 0)
    for name in ("bits_per_byte", "best_step", "tokens_per_s", "training_s", "digest"):
        assert figures[name] is None
    assert figures["parameters"] > 0


def test_an_evaluation_that_is_no_number_is_not_the_best(tmp_path):
    folder = make_folder(tmp_path, "diverged")
    write_evaluation(folder, 10, 2.5)
    write_evaluation(folder, 20, math.nan)
    assert summary(folder)["best_step"] == 10
    assert math.isnan(summary(folder)["bits_per_byte"])


def test_runs_are_compared_with_dashes_for_what_is_missing(tmp_path, student):
    text = text_of(comparison_table([student, teacher_of(tmp_path), make_folder(tmp_path, "new")]))
    lines = text.splitlines()[1:]
    assert [line.strip() for line in lines[1::2]] == ["distilled", "teacher", "next token, created"]
    of_student, of_teacher, of_new = lines[::2]
    for cell in ("student", "2.7500", "5.5000", "0.6000", "64", "30.0%", "3 min 56 s"):
        assert cell in of_student
    assert of_teacher.startswith("elder ")
    assert "2.0000" in of_teacher and "–" in of_teacher  # no teacher of its own
    assert of_new.startswith("new ") and of_new.count("–") == 6


def test_the_list_tells_lost_runs_from_those_under_way(tmp_path, student):
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


def test_the_status_of_a_run(student):
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
    status["teachers"]["pool"] = "elders"
    assert "2 running in the shared pool elders" in text_of(status_table(status))
    assert "lost" in text_of(status_table(status | {"alive": False}))
    assert "created" in text_of(status_table({"name": "x", "state": "created", "alive": False}))
    preparing = {"what": "packing rows", "done": 3, "total": 8}
    status = status_of(student, "preparing", preparing=preparing, alive=True)
    assert "packing rows 3/8" in text_of(status_table(status))


class Page(html.parser.HTMLParser):
    """Tags must nest; text and what refers elsewhere are kept."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [v or "" for name, v in attrs if name in ("href", "src", "xlink:href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.remove(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read_page(place: str) -> Page:
    with open(place, encoding="utf-8") as file:
        return Page(file.read())


def test_a_page_on_several_runs(tmp_path, student):
    place = write_report([student, teacher_of(tmp_path)], None)
    assert place == join(student.url, "report.html")
    page = read_page(place)
    # Four pictures of all runs, and one on each run's waiting.
    assert page.tags.count("svg") == page.tags.count("figure") == 6
    for title in ("Training loss", "Distillation loss", "Held-out text", "Learning rate"):
        assert title in page.text
    for text in ("student\ndistilled", "2.7500", "at step 10", "(away), and 2 more times"):
        assert text in page.text
    assert "settings changed: steps 10 → 20" in page.text
    assert "attempt 1 failed (host_died)" in page.text
    assert "row_length: 64" in page.text


def test_a_page_needs_nothing_but_itself_and_escapes_what_users_wrote(student):
    page = read_page(write_report([student], None))
    assert "script" not in page.tags and "img" not in page.tags and "link" not in page.tags
    assert all(link.startswith("#") for link in page.links)
    assert page.text.count(HOSTILE) == 2  # in an event's message and in the configuration
    with open(join(student.url, "report.html"), encoding="utf-8") as file:
        content = file.read()
    assert "<script" not in content
    assert not re.search(r"url\((?!#)|@import|https?:", content)


def test_ids_within_a_page_are_single(tmp_path, student):
    with open(write_report([student, teacher_of(tmp_path)], None), encoding="utf-8") as file:
        content = file.read()
    ids = re.findall(r' id="([^"]*)"', content)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([^")]*)', content)) <= set(ids)


@pytest.mark.parametrize("num_steps", [0, 1, 2])
@pytest.mark.parametrize("state", ["preparing", "training", "failed", "stopped"])
def test_a_run_in_any_state_has_a_page(tmp_path, num_steps, state):
    folder = distilled(tmp_path)
    if num_steps:
        write_steps(folder, 1, 0, num_steps, kd=True)
    folder.write_status(status_of(folder, state, reason=HOSTILE))
    output = str(tmp_path / "pages" / "one.html")
    assert write_report([folder], output) == output
    page = read_page(output)
    assert HOSTILE in page.text
    shown = "lost" if state in ("preparing", "training") else state
    assert f"student\ndistilled, {shown}" in page.text
    assert ("No step has been recorded yet" in page.text) == (num_steps == 0)
    assert page.tags.count("svg") == (4 if num_steps else 0)


def test_a_run_that_was_only_created_has_a_page(tmp_path):
    page = read_page(write_report([make_folder(tmp_path, "new")], None))
    assert "new\nnext token, created" in page.text


def test_values_that_are_no_numbers_leave_gaps(tmp_path):
    folder = make_folder(tmp_path, "diverged")
    writer = SegmentWriter(join(folder.url, STEPS), "a0001-h0000", NEVER_S)
    writer.append({"attempt": 1, "start_step": 0})
    for step, loss in enumerate((3.0, math.nan, math.inf), start=1):
        writer.append({**step_line(1, step, kd=False), "ce_loss": loss})
    writer.close()
    write_evaluation(folder, 3, math.nan)
    assert read_page(write_report([folder], None)).tags.count("svg") == 4


def test_many_events_are_cut_in_the_middle_and_the_page_says_so(tmp_path):
    folder = make_folder(tmp_path, "long")
    events = EventWriter(folder.url, "controller")
    events.say("checkpoint", step=1)
    events.close()
    # One segment with the rest: a file for each would only take time.
    writer = SegmentWriter(join(folder.url, "events"), "student", NEVER_S)
    for step in range(2, 501):
        line = {"time_s": 1e12 + step, "who": "s", "order": step, "event": "checkpoint"}
        writer.append({**line, "step": step})
    writer.close()
    page = read_page(write_report([folder], None))
    assert "300 more: stillhouse events long" in page.text
    assert page.tags.count("li") == 201
    assert "checkpoint of step 1" in page.text and "checkpoint of step 500" in page.text


def test_long_curves_are_thinned_to_means():
    values = list(range(1000))
    few = thinned(values)
    assert len(few) == 500
    assert few[:2].tolist() == [0.5, 2.5]
    assert thinned(range(1201))[-1] == 1200.0
    assert thinned([1.0, 2.0]).tolist() == [1.0, 2.0]


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
