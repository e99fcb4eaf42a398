"""Each promise of the README and each fault is shown by a test of a change, or has a stand-in."""

import re

import pytest

from tests.promises import (
    MECHANISMS,
    PAGE,
    PROMISES,
    README,
    STAND_INS,
    Shown,
    all_tests,
    known,
    table,
)


@pytest.fixture(scope="module")
def tests() -> list[Shown]:
    return all_tests()


def section(title: str) -> str:
    """Of the README."""
    _, _, rest = README.read_text().partition(f"\n## {title}\n")
    return rest.partition("\n## ")[0]


def test_the_page_is_the_one_that_the_tests_give() -> None:
    assert PAGE.read_text() == table(), "python -m tests.promises > docs/tests.md"


def test_what_is_shown_is_known(tests: list[Shown]) -> None:
    assert {name for test in tests for name in test.shows} <= set(known())


def test_each_promise_and_mechanism_of_ours_is_shown_by_day(tests: list[Shown]) -> None:
    shown = {name for test in tests if test.by_day is None for name in test.shows}
    assert set(PROMISES) | set(MECHANISMS) <= shown


def test_each_fault_of_the_chaos_is_applied_by_day_or_has_a_stand_in(tests: list[Shown]) -> None:
    assert {name for test in tests for name in test.shows} == set(known())
    shown = {name for test in tests if test.by_day is None for name in test.shows}
    assert set(known()) - shown == STAND_INS.keys()
    assert set(STAND_INS.values()) <= shown | {PROMISES[name] for name in shown & PROMISES.keys()}


def test_each_test_of_the_night_has_one_that_stands_in_for_it_by_day(tests: list[Shown]) -> None:
    day = {test.name for test in tests if test.by_day is None}
    assert {test.by_day for test in tests if test.by_day is not None} <= day


def test_the_promises_are_those_of_the_readme() -> None:
    rows = re.findall(r"^\| (?!What happens|---)(.+?) \|", section("What lives how long"), re.M)
    lines = re.findall(r"^- (.+)", section("What it promises"), re.M)
    told = list(PROMISES.values())
    assert told[: len(rows)] == [re.sub(r" \(\[.*", "", row) for row in rows]
    for line, promise in zip(lines, told[len(rows) :], strict=True):
        assert line.startswith(promise)
