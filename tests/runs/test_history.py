"""The record read back: whatever died and when, each step counts once, in order."""

import dataclasses
import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.history import (
    Tail,
    group_attempts,
    merge_steps,
    read_events,
    read_logs,
    read_steps,
)
from workers import record
from workers.record import STEPS, EventWriter, SegmentWriter
from workers.storage import join

NEVER_S = 3600.0


def step_line(attempt: int, step: int, **stalls: float) -> dict[str, Any]:
    return {"step": step, "loss": 1.0, "attempt": attempt, "stall_s": {"data": 0.0, **stalls}}


def steps_and_attempts(lines) -> list[tuple[int, int]]:
    return [(line["step"], line["attempt"]) for line in lines]


def test_an_attempt_supersedes_what_earlier_ones_wrote_of_later_steps():
    segments = [
        ("a0001-h0000", [{"attempt": 1, "start_step": 0}, *(step_line(1, s) for s in (1, 2, 3))]),
        ("a0001-h0000", [step_line(1, 4)]),
        ("a0002-h0000", [{"attempt": 2, "start_step": 2}, step_line(2, 3)]),
    ]
    for order in (segments, segments[::-1]):
        assert steps_and_attempts(merge_steps(order)) == [(1, 1), (2, 1), (3, 2)]


def test_an_attempt_that_has_made_no_step_already_supersedes():
    segments = [
        ("a0001-h0000", [{"attempt": 1, "start_step": 0}, step_line(1, 1), step_line(1, 2)]),
        ("a0002-h0000", [{"attempt": 2, "start_step": 1}]),
    ]
    assert steps_and_attempts(merge_steps(segments)) == [(1, 1)]


def test_what_was_superseded_is_told_with_its_attempt():
    segments = [
        ("a0002-h0000", [{"attempt": 2, "start_step": 1}, step_line(2, 2)]),
        ("a0001-h0001", [{"step": 2, "stall_s": {"wire": 0.5}}]),
        ("a0001-h0000", [{"attempt": 1, "start_step": 0}, step_line(1, 1), step_line(1, 2)]),
        ("a0003-h0001", [{"step": 9, "stall_s": {}}]),  # of an attempt that never began
    ]
    first, second = group_attempts(segments)
    assert (first.attempt, first.start_step, second.attempt, second.start_step) == (1, 0, 2, 1)
    assert steps_and_attempts(first.lines) == [(1, 1), (2, 1)]
    assert first.lines[1]["stall_s"] == {"data": 0.0, "wire": 0.5}
    assert steps_and_attempts(second.lines) == [(2, 2)]


def test_a_fork_begins_where_it_was_forked():
    lines = [{"attempt": 1, "start_step": 70}, step_line(1, 71), step_line(1, 72)]
    assert steps_and_attempts(merge_steps([("a0001-h0000", lines)])) == [(71, 1), (72, 1)]


def test_the_slowest_host_counts_part_by_part_and_attempt_by_attempt():
    start, other = {"attempt": 1, "start_step": 0}, {"step": 1}
    segments = [
        ("a0001-h0001", [{**other, "stall_s": {"data": 0.5, "teacher": 0.1}}]),
        ("a0001-h0000", [start, step_line(1, 1, data=0.1, teacher=0.3)]),
        ("a0001-h0002", [{**other, "stall_s": {"data": 0.2, "wire": 0.7}}]),
        ("a0002-h0001", [{**other, "stall_s": {"data": 9.0}}]),
    ]
    (line,) = merge_steps(segments)
    assert line["stall_s"] == {"data": 0.5, "teacher": 0.3, "wire": 0.7}
    assert line["loss"] == 1.0


def test_the_targets_of_all_hosts_are_told_together():
    entry = {"codec": "codec", "teacher": "teacher"}
    lines = [
        {**step_line(1, 1), "targets": {**entry, "from": {"a": 2}, "digest": f"{1:032x}"}},
        {"step": 1, "stall_s": {}, "targets": {**entry, "from": {"a": 1}, "digest": "f" * 32}},
    ]
    segments = [(f"a0001-h{host:04d}", [line]) for host, line in enumerate(lines)]
    segments.append(("a0001-h0000", [{"attempt": 1, "start_step": 0}]))
    (line,) = merge_steps(segments)
    assert line["targets"] == {**entry, "from": {"a": 3}, "digest": "0" * 32}


def test_nothing_written_is_nothing_read(tmp_path):
    assert merge_steps([]) == []
    for read in (read_steps, read_events, read_logs):
        assert read(str(tmp_path)) == []
    assert Tail(str(tmp_path), STEPS).new() == []


@dataclasses.dataclass
class World:
    """What is on storage, and the true line before each state: a chain that names its parts."""

    segments: list[tuple[str, list[dict]]] = dataclasses.field(default_factory=list)
    checkpoints: dict[int, str] = dataclasses.field(default_factory=lambda: {0: "origin"})


def live(
    world: World, attempt: int, start: int, end: int, every: int, rng: random.Random, hosts: int
) -> None:
    """One attempt from a checkpoint to step `end`, where it is killed at some point."""
    tail = world.checkpoints[start]
    written: dict[str, list[dict]] = {f"a{attempt:04d}-h{host:04d}": [] for host in range(hosts)}
    first = f"a{attempt:04d}-h0000"

    def flush(writer: str) -> None:
        if written[writer]:
            world.segments.append((writer, written[writer]))
            written[writer] = []

    written[first].append({"attempt": attempt, "start_step": start})
    flush(first)
    for step in range(start + 1, end + 1):
        own = f"{attempt}/{step}"
        for writer, lines in written.items():
            line: dict[str, Any] = {"step": step, "stall_s": {"data": rng.random()}}
            if writer == first:
                line |= {"loss": 1.0, "attempt": attempt, "id": own, "before": tail}
            lines.append(line)
            if rng.random() < 0.3:
                flush(writer)
        tail = own
        if step % every == 0:
            killed_within = step == end and rng.random() < 0.5
            for writer in written:
                if not (killed_within and rng.random() < 0.5):
                    flush(writer)
            if not killed_within:
                world.checkpoints[step] = tail


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_whatever_the_kill_points_each_step_is_there_once_and_in_order(data):
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    every = data.draw(st.integers(1, 5))
    num_steps = data.draw(st.integers(1, 5)) * every
    world = World()
    for attempt in range(1, data.draw(st.integers(0, 5)) + 1):
        # An older checkpoint is taken where the newest one is damaged.
        start = data.draw(st.sampled_from(sorted(world.checkpoints)))
        world.checkpoints = {s: tail for s, tail in world.checkpoints.items() if s <= start}
        end = data.draw(st.integers(start, num_steps - 1)) if start < num_steps else start
        live(world, attempt, start, end, every, rng, hosts=data.draw(st.integers(1, 3)))
    start = data.draw(st.sampled_from(sorted(world.checkpoints)))
    world.checkpoints = {s: tail for s, tail in world.checkpoints.items() if s <= start}
    live(world, 9, start, num_steps, every, rng, hosts=1)
    final = [line for writer, lines in world.segments for line in lines if writer[1:5] == "0009"]
    reached = max([line["step"] for line in final if "step" in line], default=start)
    rng.shuffle(world.segments)

    lines = merge_steps(world.segments)

    assert [line["step"] for line in lines] == list(range(1, reached + 1))
    # Each line's step was really taken from the state that the line before it left.
    assert [line["before"] for line in lines] == ["origin", *(line["id"] for line in lines)][
        : len(lines)
    ]


def test_the_record_on_storage_is_read_as_it_was_written(tmp_path):
    run = str(tmp_path)
    for attempt, start, end in ((1, 0, 5), (2, 3, 6)):
        writer = SegmentWriter(join(run, STEPS), f"a{attempt:04d}-h0000", NEVER_S)
        writer.append({"attempt": attempt, "start_step": start})
        for step in range(start + 1, end + 1):
            writer.append(step_line(attempt, step))
            if step % 2:
                writer.flush()
        writer.close()
    (tmp_path / STEPS / ".a0002-h0000-00000009.jsonl.1f").write_text('{"half')
    expected = [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)]
    assert steps_and_attempts(read_steps(run)) == expected


def new_steps(tail: Tail) -> list[dict[str, Any]]:
    return [line for line in tail.new() if "loss" in line]


def test_new_lines_are_told_once(tmp_path):
    run = str(tmp_path)
    tail = Tail(run, STEPS)
    first = SegmentWriter(join(run, STEPS), "a0001-h0000", NEVER_S)
    other = SegmentWriter(join(run, STEPS), "a0001-h0001", NEVER_S)
    first.append({"attempt": 1, "start_step": 0})
    first.append(step_line(1, 1))
    other.append({"step": 1, "stall_s": {"data": 1.0}})
    first.flush()
    other.flush()
    assert steps_and_attempts(new_steps(tail)) == [(1, 1)]
    assert new_steps(tail) == []
    first.append(step_line(1, 2))
    first.close()
    other.close()
    assert steps_and_attempts(new_steps(tail)) == [(2, 1)]


def test_new_lines_are_told_later_where_reading_fails(tmp_path, monkeypatch):
    run = str(tmp_path)
    tail = Tail(run, STEPS)
    for attempt in (1, 2):
        writer = SegmentWriter(join(run, STEPS), f"a{attempt:04d}-h0000", NEVER_S)
        writer.append(step_line(attempt, attempt))
        writer.close()

    def fail_on_the_second(url: str) -> bytes:
        if "a0002" in url:
            raise OSError("out of reach")
        return read(url)

    read = record.read_bytes
    with monkeypatch.context() as broken:
        broken.setattr(record, "read_bytes", fail_on_the_second)
        with pytest.raises(OSError, match="out of reach"):
            new_steps(tail)
    assert steps_and_attempts(new_steps(tail)) == [(1, 1), (2, 2)]


def test_events_come_in_the_order_of_time_and_then_of_their_writer(tmp_path):
    lines = [
        {"time_s": 2.0, "who": "b", "order": 0, "event": "third"},
        {"time_s": 1.0, "who": "a", "order": 1, "event": "second"},
        {"time_s": 1.0, "who": "a", "order": 0, "event": "first"},
    ]
    folder = tmp_path / "events"
    folder.mkdir()
    for number, line in enumerate(lines):
        (folder / f"w{number}-00000000.jsonl").write_text(json.dumps(line) + "\n")
    assert [line["event"] for line in read_events(str(tmp_path))] == ["first", "second", "third"]


def test_events_of_several_writers_are_all_read(tmp_path):
    writers = [EventWriter(str(tmp_path), f"host-{number}") for number in range(3)]
    for turn in range(3):
        for writer in writers:
            writer.say("training", turn=turn)
    for writer in writers:
        writer.close()
    told = [(line["who"], line["turn"]) for line in read_events(str(tmp_path))]
    assert sorted(told) == [(f"host-{n}", turn) for n in range(3) for turn in range(3)]
