"""Folders of runs that never ran, with what a report is made of."""

from typing import Any

from configs.load import parse_run
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


def student_of(root) -> RunFolder:
    """A distilled run that lost its students once, after step 12."""
    folder = distilled(root)
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
