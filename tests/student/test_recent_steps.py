"""The end of a record, read from its end, is the end of the whole record."""

import json
import uuid

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.history import read_steps
from workers.recent_steps import recent_steps
from workers.storage import join, write_atomic


@given(st.data())
def test_the_newest_steps_are_those_that_count(data):
    """Of attempts that begin anywhere in what is on storage, and die with lines unwritten."""
    run_url = f"memory://{uuid.uuid4().hex}"
    last, num_attempts = 0, data.draw(st.integers(0, 4))
    for attempt in range(1, num_attempts + 1):
        start = data.draw(st.integers(0, last), label="start")
        last = start + data.draw(st.integers(0, 7), label="steps")
        lines = [{"attempt": attempt, "start_step": start}]
        lines += [
            {"step": step, "loss": attempt + step / 100, "attempt": attempt, "stall_s": {}}
            for step in range(start + 1, last + 1)
        ]
        others = [{"step": step, "stall_s": {}} for step in range(start + 1, last + 1)]
        write_segments(run_url, attempt, 0, lines, data.draw(st.integers(1, 4)))
        write_segments(run_url, attempt, 1, others, 2)
    start = data.draw(st.integers(0, last), label="last start")
    now = num_attempts + 1
    # What the reading attempt has written itself does not count.
    write_segments(run_url, now, 0, [{"attempt": now, "start_step": start}], 1)
    expected = [line for line in read_steps(run_url) if line["step"] <= start]
    num_steps = data.draw(st.integers(1, 12))
    assert recent_steps(run_url, now, start, num_steps) == expected[-num_steps:]


def write_segments(run_url: str, attempt: int, host: int, lines: list[dict], size: int) -> None:
    for number, first in enumerate(range(0, len(lines), size)):
        text = "".join(json.dumps(line) + "\n" for line in lines[first : first + size])
        name = f"a{attempt:04d}-h{host:04d}-{number:08d}.jsonl"
        write_atomic(join(run_url, "record", name), text.encode())
