"""Folders of runs that never ran, with what a report is made of."""

from typing import Any

from configs.load import parse_run
from orchestrator.run_folder import RunFolder
from workers.record import EVENTS, STEPS, SegmentWriter
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
        if step == start + 1:  # compiles: as long as fifty others
            writer.append({**step_line(attempt, step, kd, 100.0), "compile_s": 90.0})
        else:
            writer.append(step_line(attempt, step, kd))
    writer.close()


def write_events(
    folder: RunFolder, *events: tuple[float, str, dict[str, Any]], writer: str = "controller"
) -> None:
    """(seconds since some moment, name, details) of each."""
    segments = SegmentWriter(join(folder.url, EVENTS), writer, NEVER_S)
    for order, (after_s, name, details) in enumerate(events):
        line = {"time_s": 1.7e9 + after_s, "event": name, "who": writer, "order": order}
        segments.append({**line, **details})
    segments.close()


def told_state(after_s: float, state: str, attempt: int) -> tuple[float, str, dict[str, Any]]:
    return after_s, "state", {"state": state, "before": "", "attempt": attempt, "reason": None}


def told_host(after_s: float, attempt: int, step: int) -> list[tuple[float, str, dict[str, Any]]]:
    """A host's process has been there for 2 s, and is ready 5 s later."""
    ready = {"attempt": attempt, "host": 0, "step": step}
    return [
        (after_s, "host_started", {"attempt": attempt, "process_s": 2.0}),
        (after_s + 5, "host_ready", ready),
    ]


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


def student_of(root) -> RunFolder:
    """A distilled run that lost its students once, after step 12."""
    folder = distilled(root)
    write_steps(folder, 1, 0, 12, kd=True)
    write_steps(folder, 2, 10, 20, kd=True)
    write_evaluation(folder, 10, 2.5, 0.8)
    write_evaluation(folder, 20, 2.75, 0.6)
    faults = {"host_died": 1}
    folder.write_status(status_of(folder, "finished", attempt=2, digest="c0ffee", faults=faults))
    died = {"attempt": 1, "kind": "host_died", "host": 0, "message": HOSTILE}
    write_events(
        folder,
        (0, "controller_started", {"state": "preparing", "away_s": None}),
        (9, "prepared", {"dataset_digest": "0"}),
        told_state(10, "starting", 1),
        *told_host(15, 1, 0),
        told_state(121, "training", 1),
        (150, "attempt_failed", died),
        told_state(150, "recovering", 1),
        told_state(151, "starting", 2),
        *told_host(155, 2, 10),
        told_state(261, "training", 2),
        *((262 + step, "teacher_retry", {"step": step, "reason": "away"}) for step in (1, 2, 3)),
        (270, "settings_changed", {"changes": {"steps": [10, 20]}}),
        (280, "attempt_ended", {"attempt": 2, "step": 20, "digest": "0", "stopped": False}),
        told_state(280, "evaluating", 2),
        (299, "evaluated", {"step": 20, "bits_per_byte": 2.75}),
        told_state(300, "finished", 2),
    )
    return folder


def teacher_of(root) -> RunFolder:
    folder = make_folder(root, "elder")
    write_steps(folder, 1, 0, 20)
    write_evaluation(folder, 20, 2.0)
    folder.write_status(status_of(folder, "finished"))
    return folder
