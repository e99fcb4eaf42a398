"""Reads a run's record back: each step once, whatever its attempts wrote."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from workers.record import EVENTS, LOGS, STEPS
from workers.storage import join, list_names, read_bytes

Line = dict[str, Any]


def read_steps(run_url: str) -> list[Line]:
    """One line per training step, in order; see `merge_steps`."""
    return merge_steps(_segments(run_url, STEPS))


def merge_steps(segments: Iterable[tuple[str, list[Line]]]) -> list[Line]:
    """The lines that count, of (writer, lines) segments in any order of writers.

    Writers are named `aATTEMPT-hHOST`. An attempt that starts at step s supersedes what earlier
    attempts wrote of later steps. Host 0 writes a step's line; of the other hosts the largest
    stall counts, part by part, since the slowest host holds up the gang.
    """
    attempts: dict[int, dict[int, Line]] = {}
    stalls: dict[tuple[int, int], Line] = {}
    starts: dict[int, int] = {}
    for writer, lines in segments:
        attempt = int(writer[1:5])
        for line in lines:
            if "start_step" in line:
                starts[attempt] = line["start_step"]
            elif "loss" in line:
                attempts.setdefault(attempt, {})[line["step"]] = line
            else:
                before = stalls.get((attempt, line["step"]), {})
                stalls[attempt, line["step"]] = _largest(before, line["stall_s"])
    steps: dict[int, Line] = {}
    for attempt, first in sorted(starts.items()):
        steps = {step: line for step, line in steps.items() if step <= first}
        steps |= attempts.get(attempt, {})
    return [_with_stalls(steps[step], stalls) for step in sorted(steps)]


class Tail:
    """What comes new into one of a run's folders of segments, each line once."""

    def __init__(self, run_url: str, folder: str):
        self._url = join(run_url, folder)
        self._seen: set[str] = set()

    def new(self) -> list[Line]:
        """Lines of the segments since the last call; after an OSError the next call has them."""
        names = [name for name in list_names(self._url) if name.endswith(".jsonl")]
        names = [name for name in names if name not in self._seen]
        lines = [line for name in names for line in _read_segment(join(self._url, name))]
        self._seen.update(names)
        return lines


def read_events(run_url: str) -> list[Line]:
    """What happened, in the order of time."""
    lines = [line for _, lines in _segments(run_url, EVENTS) for line in lines]
    return sorted(lines, key=lambda line: (line["time_s"], line["who"], line["order"]))


def read_logs(run_url: str) -> list[Line]:
    """What the run's processes logged, in the order of time."""
    lines = [line for _, lines in _segments(run_url, LOGS) for line in lines]
    return sorted(lines, key=lambda line: line["time_s"])


def _with_stalls(line: Line, stalls: dict[tuple[int, int], Line]) -> Line:
    others = stalls.get((line["attempt"], line["step"]), {})
    return {**line, "stall_s": _largest(line["stall_s"], others)}


def _largest(one: Line, other: Line) -> Line:
    return {part: max(one.get(part, 0.0), other.get(part, 0.0)) for part in one | other}


def _segments(run_url: str, folder: str) -> Iterator[tuple[str, list[Line]]]:
    url = join(run_url, folder)
    for name in list_names(url):
        if name.endswith(".jsonl"):
            writer = name.removesuffix(".jsonl").rpartition("-")[0]
            yield writer, _read_segment(join(url, name))


def _read_segment(url: str) -> list[Line]:
    return [json.loads(line) for line in read_bytes(url).decode().splitlines()]
