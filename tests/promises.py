"""What the tests show: each promise of the README, and each way in which a part of a run fails.

    python -m tests.promises      # the table, as it is in docs/tests.md

A test says what it shows by its marker `shows`; one that is left to the night says by its marker
`night` which test stands in for it by day.
"""

import ast
import importlib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parent
README = TESTS.parent / "README.md"
PAGE = TESTS.parent / "docs" / "tests.md"

# By name: how the README begins to say it, a row of its table or a line of its promises.
PROMISES = {
    "ctrl-c": "Ctrl-C in `run` or `resume`",
    "ctrl-c-twice": "Ctrl-C a second time",
    "kill-command": "the terminal is closed, or `kill -9` of the command",
    "ray-job-stop": "`ray job stop`",
    "ray-job-delete": "`ray job delete` (of an ended job)",
    "stop-command": "`stillhouse stop`, from anywhere",
    "run-again": "the same `run` again while it is under way",
    "run-after-end": "the same `run` again after it has ended",
    "attempt-dies": "a student host, a slice or the attempt's driver dies",
    "slice-lost": "a slice is lost and does not come back (`cluster.min_slices`)",
    "slice-preempted": "a slice is to be taken away (Ray has notice of it)",
    "storage-away": "storage is full or away",
    "checkpoint-damaged": "a checkpoint is damaged",
    "not-finite": "a loss or gradient is not finite",
    "host-hangs": "a student host hangs, or the first one gives no sign of life",
    "teacher-dies": "a teacher dies or computes wrongly",
    "evaluator-dies": "the evaluator dies",
    "controller-dies": "the controller dies",
    "head-restarts": "the head's Ray service dies and comes back (with `RAY_gcs_storage=rocksdb`)",
    "resume-elsewhere": "the head or the whole cluster is gone",
    "equal-after-faults": "After a fault the record holds each step once",
    "damage-refused": "A checkpoint is verified when it is read",
    "one-step-at-most": "With a snapshot in memory at each step",
    "said-in-a-sentence": "A wrong setting, another tokenizer or vocabulary",
}

# Ways to fail that are not among the faults of `tests.chaos`.
MECHANISMS = (
    "command: killed",
    "terminal: killed",
    "pool keeper: killed",
    "only teacher: killed, labels go on alone",
    "student host: killed in each phase of a save",
    "student host: its disk full",
    "slice: lost for longer",
    "teacher's machine: preempted",
    "stored targets: damaged",
    "snapshots: damaged",
    "storage: does not answer a save",
    "checkpoint: any bit flipped",
    "run: taken up on two clusters",
)


# Faults that are left to the night: what is applied or tested by day and is mended in the same way.
STAND_INS = {
    "student host and all snapshots: killed": "newest checkpoint: a bit flipped",
    "student host: asked to end": "`ray job stop`",
    "controller: stopped for a while": "controller: killed",
    "student host: killed in a save": "student host: killed in each phase of a save",
    "slice: lost, and back": "slice: lost for longer",
    "slice: ended by Ray's RayletKiller": "slice: lost for longer",
    "whoever is at a task: killed by Ray's WorkerKillerActor": "student host: killed",
    "student hosts: cut between them": "student host: stopped",
    "student host: cut off for a while": "student host: stopped",
    "slice: cut off for good": "slice: lost for longer",
    "newest checkpoint: cut off": "newest checkpoint: a bit flipped",
    "newest checkpoint: half of it zeros": "newest checkpoint: a bit flipped",
    "newest checkpoint: a file lost": "newest checkpoint: a bit flipped",
    "snapshots in memory: a bit flipped": "snapshots: damaged",
    "stored targets: a bit flipped": "stored targets: damaged",
    "storage: away": "storage: write-protected",
    "folder of checkpoints: refused": "storage: write-protected",
    "folder of the record: refused": "storage: write-protected",
    "storage: full": "student host: its disk full",
    "storage: does not answer": "storage: does not answer a save",
    "storage: slow": "storage: does not answer a save",
    "clock: an hour ahead for a while": "clock: an hour behind for a while",
}


class Shown(NamedTuple):
    """A test, and what it says of itself."""

    file: str
    name: str
    shows: tuple[str, ...]
    by_day: str | None
    """The test that stands in for it by day; None for one that runs by day itself."""


def known() -> list[str]:
    """What a test may show, in the order of the table."""
    from tests.chaos.faults import FAULTS

    return [*PROMISES, *FAULTS, *MECHANISMS]


def all_tests() -> list[Shown]:
    return [test for path in sorted(TESTS.rglob("test_*.py")) for test in _tests_of(path)]


def _tests_of(path: Path) -> Iterator[Shown]:
    tree = ast.parse(path.read_text())
    file = path.relative_to(TESTS.parent).as_posix()
    whole = [
        mark
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
        for mark in (node.value.elts if isinstance(node.value, ast.List) else [node.value])
    ]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            marks = [*node.decorator_list, *whole]
            shows = [name for mark in marks for name in _arguments(mark, "shows", file)]
            night = [name for mark in marks for name in _arguments(mark, "night", file)]
            yield Shown(file, node.name, tuple(shows), night[0] if night else None)


def fewer_by_day() -> list[tuple[str, str]]:
    """(file, what) of tests that have more cases or examples by night."""
    found = []
    for path in sorted(TESTS.rglob("test_*.py")):
        tree = ast.parse(path.read_text())
        file = path.relative_to(TESTS).as_posix()
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_BY_NIGHT":
                found += [
                    (file, f"cases of `{name}`") for name in _arguments(node.value, "night", "")
                ]
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "examples":
                day, night = (ast.literal_eval(each.value) for each in node.keywords)
                found.append((file, f"{day:,} examples by day, {night:,} by night"))
    return found


def _arguments(mark: ast.expr, name: str, file: str) -> Iterator[str]:
    if not isinstance(mark, ast.Call) or ast.unparse(mark.func) != f"pytest.mark.{name}":
        return
    for argument in mark.args:
        if isinstance(argument, ast.Starred):
            module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
            yield from getattr(module, ast.unparse(argument.value))
        else:
            yield ast.literal_eval(argument)


def table() -> str:
    """The page: of each promise and mechanism the tests that show it, by day and by night."""
    tests = all_tests()
    mechanisms = [name for name in known() if name not in PROMISES]
    night = [f"| {_cell([test])} | `{test.by_day}` |" for test in tests if test.by_day]
    return "\n".join(
        [
            _HEAD,
            *_section("Promises of the README", "promise", list(PROMISES), tests),
            *_section("Parts that fail", "part, and what happens to it", mechanisms, tests),
            "## Left to the night",
            "",
            "| test | by day |",
            "| --- | --- |",
            *night,
            "",
            "## Fewer cases by day",
            "",
            "| file | what |",
            "| --- | --- |",
            *(f"| {file} | {what} |" for file, what in fewer_by_day()),
            "",
        ]
    )


def _section(title: str, what: str, names: list[str], tests: list[Shown]) -> list[str]:
    by_name: dict[str, list[Shown]] = defaultdict(list)
    for test in tests:
        for name in test.shows:
            by_name[name].append(test)
    rows = []
    for name in names:
        day = _cell([test for test in by_name[name] if not test.by_day])
        day = day or f"instead: {STAND_INS[name]}"
        night = _cell([test for test in by_name[name] if test.by_day])
        rows.append(f"| {PROMISES.get(name, name)} | {day} | {night} |")
    head = f"| {what} | `make test` | `make test-all` too |"
    return [f"## {title}", "", head, "| --- | --- | --- |", *rows, ""]


def _cell(tests: list[Shown]) -> str:
    by_file: dict[str, list[str]] = defaultdict(list)
    for test in tests:
        by_file[test.file.removeprefix("tests/")].append(test.name.removeprefix("test_"))
    return "<br>".join(f"{file}: {', '.join(names)}" for file, names in by_file.items())


_HEAD = """# What the tests show

Made by `python -m tests.promises > docs/tests.md`; a test compares them. `make test` is what a
change has to pass; `make test-all` runs the tests that are left to the night too, the whole chaos
and more examples of property tests among them. Files are named below `tests/`, tests without
`test_`.
"""


if __name__ == "__main__":
    print(table(), end="")
