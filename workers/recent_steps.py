"""The newest steps of a run's record, read from its end: a long run has very many segments."""

import json
from collections.abc import Sequence
from typing import Any

from workers.anomalies import SettledStep, num_remembered
from workers.jobs import StudentJob
from workers.record import STEPS, read_segment
from workers.storage import join, list_names


def settled_before(job: StudentJob, carried: Sequence[str] = ()) -> list[SettledStep]:
    """What an attempt has to remember of the steps before it.

    Args:
        carried: the first host's lines that came with a snapshot, and may not be on storage.
    """
    num_steps, last_step = num_remembered(job.config.anomalies), job.start.step
    known = recent_steps(job.run_url, job.attempt, last_step, num_steps)
    known += [line for line in map(json.loads, carried) if "loss" in line]
    by_step = {line["step"]: line for line in known if line["step"] <= last_step}
    lines = [by_step[step] for step in sorted(by_step)[-num_steps:]]
    # Records of before there were skips say nothing of them.
    return [SettledStep(line["step"], line["loss"], line.get("skipped")) for line in lines]


def recent_steps(
    run_url: str, attempt: int, last_step: int, num_steps: int
) -> list[dict[str, Any]]:
    """The first host's lines of the `num_steps` steps up to `last_step`, in order.

    They are those that count (as in `orchestrator.history`) for an attempt that starts at
    `last_step`; fewer where the record has no more.

    Args:
        attempt: the one that reads; what it has written itself is left aside.
    """
    folder = join(run_url, STEPS)
    segments: dict[int, list[str]] = {}
    for name in sorted(list_names(folder)):
        if name.endswith(".jsonl") and "-h0000-" in name and int(name[1:5]) < attempt:
            segments.setdefault(int(name[1:5]), []).append(name)
    found: dict[int, dict[str, Any]] = {}
    for _, names in sorted(segments.items(), reverse=True):
        start_step = read_segment(join(folder, names[0]))[0]["start_step"]
        for name in reversed(names):
            if len(found) >= num_steps or last_step <= start_step:
                break
            lines = [line for line in read_segment(join(folder, name)) if "loss" in line]
            # A line that was carried on from memory may be there twice.
            found |= {line["step"]: line for line in lines if line["step"] <= last_step}
        last_step = min(last_step, start_step)
    return [found[step] for step in sorted(found)[-num_steps:]]
