"""Reads a run's record back: each step once, whatever its attempts wrote."""

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from workers.record import EVENTS, LOGS, STEPS, read_segment
from workers.storage import join, list_names
from workers.target_ledger import joined

Line = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class AttemptLines:
    """All that one attempt wrote of its steps, whether it still counts or not.

    Args:
        start_step: the step from whose state it began.
        lines: one per step that it made, in order.
    """

    attempt: int
    start_step: int
    lines: list[Line]


def read_steps(run_url: str) -> list[Line]:
    """One line per training step, in order; see `merge_steps`."""
    return merge_steps(_segments(run_url, STEPS))


def read_attempts(run_url: str) -> list[AttemptLines]:
    """What each attempt wrote, in order; see `group_attempts`."""
    return group_attempts(_segments(run_url, STEPS))


def merge_steps(segments: Iterable[tuple[str, list[Line]]]) -> list[Line]:
    """The lines that count, of (writer, lines) segments in any order of writers."""
    return counted(group_attempts(segments))


def counted(attempts: Sequence[AttemptLines]) -> list[Line]:
    """The lines that count, one per step, in order.

    An attempt that starts at step s supersedes what earlier attempts wrote of later steps.
    """
    steps: dict[int, Line] = {}
    for each in attempts:
        steps = {step: line for step, line in steps.items() if step <= each.start_step}
        steps |= {line["step"]: line for line in each.lines}
    return [line for _, line in sorted(steps.items())]


def group_attempts(segments: Iterable[tuple[str, list[Line]]]) -> list[AttemptLines]:
    """The attempts, in order, of (writer, lines) segments in any order of writers.

    Writers are named `aATTEMPT-hHOST`. Host 0 writes a step's line; of the other hosts the
    largest stall counts, part by part, since the slowest host holds up the gang, and what their
    rows' targets were is joined to its own.
    """
    firsts: dict[int, dict[int, Line]] = {}
    others: dict[tuple[int, int], dict[str, Line]] = {}
    starts: dict[int, int] = {}
    for writer, lines in segments:
        attempt = int(writer[1:5])
        for line in lines:
            if "start_step" in line:
                starts[attempt] = line["start_step"]
            elif "loss" in line:
                firsts.setdefault(attempt, {})[line["step"]] = line
            else:
                others.setdefault((attempt, line["step"]), {})[writer] = line
    return [
        AttemptLines(
            attempt,
            start_step,
            [
                functools.reduce(_together, others.get((attempt, step), {}).values(), line)
                for step, line in sorted(firsts.get(attempt, {}).items())
            ],
        )
        for attempt, start_step in sorted(starts.items())
    ]


class Tail:
    """What comes new into one of a run's folders of segments, each line once."""

    def __init__(self, run_url: str, folder: str):
        self._url = join(run_url, folder)
        self._seen: set[str] = set()

    def new(self) -> list[Line]:
        """Lines of the segments since the last call; after an OSError the next call has them."""
        names = [name for name in list_names(self._url) if name.endswith(".jsonl")]
        names = [name for name in names if name not in self._seen]
        lines = [line for name in names for line in read_segment(join(self._url, name))]
        self._seen.update(names)
        return lines


def read_events(run_url: str, writers: str = "") -> list[Line]:
    """What happened, in the order of time.

    Args:
        writers: only those with this in their names are read.
    """
    lines = [line for _, lines in _segments(run_url, EVENTS, writers) for line in lines]
    return sorted(lines, key=lambda line: (line["time_s"], line["who"], line["order"]))


def read_logs(run_url: str) -> list[Line]:
    """What the run's processes logged, in the order of time."""
    lines = [line for _, lines in _segments(run_url, LOGS) for line in lines]
    return sorted(lines, key=lambda line: line["time_s"])


def _together(line: Line, other: Line) -> Line:
    """A host's line of a step with what another one's adds to it."""
    parts, more = line["stall_s"], other["stall_s"]
    stall_s = {part: max(parts.get(part, 0.0), more.get(part, 0.0)) for part in parts | more}
    targets = [each["targets"] for each in (line, other) if "targets" in each]
    return {**line, "stall_s": stall_s, **({"targets": joined(targets)} if targets else {})}


def _segments(run_url: str, folder: str, writers: str = "") -> Iterator[tuple[str, list[Line]]]:
    url = join(run_url, folder)
    for name in list_names(url):
        writer = name.removesuffix(".jsonl").rpartition("-")[0]
        if name.endswith(".jsonl") and writers in writer:
            yield writer, read_segment(join(url, name))
