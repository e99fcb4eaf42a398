"""A report is a page that stands by itself, whatever state its runs are in."""

import html.parser
import math
import re

import pytest

from orchestrator.report import write_report
from tests.helpers.reported_runs import (
    HOSTILE,
    NEVER_S,
    distilled,
    make_folder,
    status_of,
    step_line,
    student_of,
    teacher_of,
    write_evaluation,
    write_steps,
)
from workers.record import STEPS, EventWriter, SegmentWriter
from workers.storage import join


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


def test_a_page_on_several_runs(tmp_path):
    student = student_of(tmp_path)
    place = write_report([student, teacher_of(tmp_path)], None)
    assert place == join(student.url, "report.html")
    page = read_page(place)
    # Four pictures of all runs, one on each run's waiting, and where the student's time went.
    assert page.tags.count("svg") == page.tags.count("figure") == 7
    assert "Time spent share, by minutes since the run began" in page.text
    assert "lostlost work4.01.33%" in page.text
    for title in ("Training loss", "Distillation loss", "Held-out text", "Learning rate"):
        assert title in page.text
    for text in ("student\ndistilled", "2.7500", "at step 10", "(away), and 2 more times"):
        assert text in page.text
    assert "settings changed: steps 10 → 20" in page.text
    assert "attempt 1 failed (host_died)" in page.text
    assert "row_length: 64" in page.text


def test_a_page_needs_nothing_but_itself_and_escapes_what_users_wrote(tmp_path):
    student = student_of(tmp_path)
    page = read_page(write_report([student], None))
    assert "script" not in page.tags and "img" not in page.tags and "link" not in page.tags
    assert all(link.startswith("#") for link in page.links)
    assert page.text.count(HOSTILE) == 2  # in an event's message and in the configuration
    with open(join(student.url, "report.html"), encoding="utf-8") as file:
        content = file.read()
    assert "<script" not in content
    assert not re.search(r"url\((?!#)|@import|https?:", content)


def test_ids_within_a_page_are_single(tmp_path):
    student = student_of(tmp_path)
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
