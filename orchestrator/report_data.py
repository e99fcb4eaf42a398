"""A run's record as figures: what the tables and the page of a report are made from."""

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from configs.run import RunConfig
from model.config import param_count
from orchestrator.goodput import StepTimes, account
from orchestrator.history import AttemptLines, Line, counted, read_attempts, read_events
from orchestrator.ledger import GROUPS, Ledger
from orchestrator.liveness import seen_alive
from orchestrator.run_folder import RunFolder
from orchestrator.run_state import State

MISSING = "–"
STALL_PARTS = ("data", "teacher", "wire", "decode", "checkpoint")
COLUMNS = (
    "run",
    "params",
    "bits per byte",
    "loss",
    "KL to teacher",
    "tokens/s",
    "teacher wait",
    "training time",
)
_TIME_BINS = 240
_TIME_UNITS = (("days", 86400), ("hours", 3600), ("minutes", 60), ("seconds", 1))


@dataclasses.dataclass(frozen=True)
class RunData:
    """All that a report reads of one run."""

    name: str
    config: RunConfig
    state: str
    status: dict[str, Any]
    steps: list[Line]
    evaluations: list[dict[str, Any]]
    events: list[Line]
    ledger: Ledger | None
    """Where its time went; None where it has not begun."""


def read_run(folder: RunFolder) -> RunData:
    """Reads a run in whatever state it is. Raises ConfigError if its configuration is faulty."""
    status, alive = folder.status() or {}, bool(seen_alive([folder]))
    attempts, events = read_attempts(folder.url), read_events(folder.url)
    return RunData(
        name=folder.name,
        config=folder.config(),
        state=shown_state(status, alive),
        status=status,
        steps=counted(attempts),
        evaluations=folder.evaluations(),
        events=events,
        ledger=_ledger(attempts, events, alive),
    )


def read_ledger(folder: RunFolder, alive: bool = False) -> Ledger | None:
    """Where a run's time went, from its whole record; None where it has not begun.

    Args:
        alive: whether a controller works on the run.
    """
    return _ledger(read_attempts(folder.url), read_events(folder.url), alive)


def _ledger(attempts: Sequence[AttemptLines], events: list[Line], alive: bool) -> Ledger | None:
    steps = {each.attempt: StepTimes.of(each) for each in attempts}
    return account(events, steps, time.time() if alive else None)


def shown_state(status: dict[str, Any], alive: bool) -> str:
    """The state that `status` tells, or `lost` where nobody works on an unfinished run."""
    state = status.get("state", "created")
    if state == "created" or alive or State(state).is_terminal:
        return state
    return "lost"


def summarise(run: RunData) -> dict[str, Any]:
    """The figures of a run; None where there is nothing to tell them from.

    Rates and shares leave out the first step of each attempt, which compiles. `stall_share` is
    seconds of waiting per second of training, by part; `training_s` is the time of all steps
    that count, without restarts and what was done twice; `goodput` is the share of the wall-clock
    that they took, without compilation and waiting.
    """
    status, steps = run.status, run.steps
    last = run.evaluations[-1] if run.evaluations else {}
    judged = [each for each in run.evaluations if math.isfinite(each["bits_per_byte"])]
    best = min(judged, key=lambda each: each["bits_per_byte"], default={})
    return {
        "name": run.name,
        "state": run.state,
        "objective": run.config.objective.kind,
        "parameters": param_count(run.config.model).total,
        "steps": steps[-1]["step"] if steps else 0,
        "num_steps": run.config.steps,
        "tokens": sum(line["tokens"] for line in steps),
        "held_out_step": last.get("step"),
        "held_out_loss": last.get("loss"),
        "bits_per_byte": last.get("bits_per_byte"),
        "kl_to_teacher": last.get("kl_to_teacher"),
        "best_bits_per_byte": best.get("bits_per_byte"),
        "best_step": best.get("step"),
        **_rates(_without_compilation(steps)),
        "training_s": sum(line["step_s"] for line in steps) if steps else None,
        "goodput": run.ledger.goodput if run.ledger else None,
        "attempts": status.get("attempt", 0),
        "faults": status.get("faults", {}),
        "digest": status.get("digest"),
    }


def _rates(lines: Sequence[Line]) -> dict[str, Any]:
    step_s = sum(line["step_s"] for line in lines)
    if not step_s:
        return {"tokens_per_s": None, "stall_share": {}, "total_stall_share": None}
    share = {
        part: sum(line["stall_s"].get(part, 0.0) for line in lines) / step_s for part in STALL_PARTS
    }
    return {
        "tokens_per_s": sum(line["tokens"] for line in lines) / step_s,
        "stall_share": share,
        "total_stall_share": sum(share.values()),
    }


def _without_compilation(steps: Sequence[Line]) -> list[Line]:
    attempts = [None, *(line["attempt"] for line in steps)]
    return [
        line for before, line in zip(attempts, steps, strict=False) if line["attempt"] == before
    ]


def comparison(runs: Sequence[RunData]) -> list[tuple[str, ...]]:
    """One row of text per run, in the order of `COLUMNS`; the first cell has two lines."""
    return [_comparison_row(run, role(run, runs)) for run in runs]


def role(run: RunData, runs: Sequence[RunData]) -> str:
    """What a run is among others: `distilled`, `teacher` of one of them, or `next token`."""
    if run.config.distilled:
        return "distilled"
    teachers = {each.config.teacher.checkpoint for each in runs if each.config.teacher}
    is_teacher = run.name in {checkpoint.partition("@")[0] for checkpoint in teachers}
    return "teacher" if is_teacher else "next token"


def _comparison_row(run: RunData, role: str) -> tuple[str, ...]:
    figures = summarise(run)
    share = figures["stall_share"]
    wait = share["teacher"] + share["wire"] if share and run.config.distilled else None
    state = "" if run.state == State.FINISHED else f", {run.state}"
    return (
        f"{run.name}\n{role}{state}",
        shown_count(figures["parameters"]),
        shown(figures["bits_per_byte"], ".4f"),
        shown(figures["held_out_loss"], ".4f"),
        shown(figures["kl_to_teacher"], ".4f"),
        shown(figures["tokens_per_s"], ",.0f"),
        shown(wait, ".1%"),
        shown_duration(figures["training_s"]),
    )


def time_spent(
    ledger: Ledger,
) -> tuple[str, Float[np.ndarray, " borders"], dict[int, Float[np.ndarray, " bins"]]]:
    """What a run's time went into, over its length.

    Returns:
        A unit of time, the borders of equal bins in it, and in each bin the share of each group of
        categories that there is, by its place in `GROUPS`.
    """
    length_s = float(ledger.edges_s[-1])
    unit, size_s = next(each for each in _TIME_UNITS if length_s >= 2 * each[1] or each[1] == 1)
    bins_s = np.linspace(0, length_s, _TIME_BINS + 1)
    by_category, totals_s = ledger.shares(bins_s), ledger.totals_s
    shares = {
        number: np.sum([by_category[category] for category in categories], axis=0)
        for number, categories in enumerate(GROUPS.values())
        if any(totals_s[category] for category in categories)
    }
    return unit, bins_s / size_s, shares


def shown(value: float | None, form: str) -> str:
    """A number in a format, or a dash."""
    return MISSING if value is None else format(value, form)


def shown_count(value: int) -> str:
    """A large number in three digits: 2,614,341,888 is `2.61 B`."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return str(value)


def shown_duration(seconds: float | None) -> str:
    """A length of time in its two largest units."""
    if seconds is None:
        return MISSING
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
