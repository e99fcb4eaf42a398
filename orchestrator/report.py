"""What is told of runs: tables for the terminal, and a page with curves and figures."""

import math
from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from configs.load import ConfigError
from orchestrator.ledger import Ledger
from orchestrator.liveness import seen_alive
from orchestrator.report_data import (
    COLUMNS,
    MISSING,
    comparison,
    read_run,
    shown,
    shown_duration,
    shown_state,
    summarise,
)
from orchestrator.run_folder import RunFolder
from workers.storage import join, write_atomic

_STATE_STYLES = {"finished": "green", "failed": "red", "lost": "red", "stopped": "yellow"}
_SHOWN_LOSSES = 3


def summary(folder: RunFolder) -> dict[str, Any]:
    """The figures of a run, from its record; see `report_data.summarise`."""
    return summarise(read_run(folder))


def status_table(status: dict[str, Any], ledger: Ledger | None = None) -> Table:
    """Where one run stands.

    Args:
        status: its `status.json`, and `alive`, whether anybody works on it.
        ledger: where its time went.
    """
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    table.add_row("run", Text(status["name"]))
    table.add_row("state", _state_text(shown_state(status, status["alive"])))
    if "attempt" not in status:  # its controller has not said anything yet
        return table
    rows = {
        "reason": status["reason"] or "",
        "preparing": _preparing_text(status["preparing"] or {}),
        "step": f"{_step(status)} of {status['num_steps']}",
        **_line_texts(status["line"]),
        "attempt": str(status["attempt"]),
        "goodput": _goodput_text(ledger) if ledger is not None and ledger.goodput else "",
        "teachers": _teachers_text(status["teachers"]),
        "checkpoints": ", ".join(str(step) for step in status["checkpoints"]),
        "bits per byte": ", ".join(
            f"{shown(value, '.4f')} at {step}" for step, value in status["bits_per_byte"].items()
        ),
        "faults outlived": ", ".join(f"{kind} {n}" for kind, n in status["faults"].items()),
        "state digest": status["digest"] or "",
    }
    for name, text in rows.items():
        if text:
            table.add_row(name, Text(text, overflow="fold"))
    return table


def runs_table(folders: Sequence[RunFolder]) -> Table:
    """One row per run, from what its controller last said."""
    table = Table(box=None, header_style="bold")
    for name in ("run", "state", "step", "best bits per byte", "objective"):
        table.add_column(name)
    alive = seen_alive(folders)
    for folder in folders:
        status = folder.status() or {}
        table.add_row(
            Text(folder.name),
            _state_text(shown_state(status, folder.name in alive)),
            f"{_step(status)}/{status['num_steps']}" if status else MISSING,
            shown(_best(status), ".4f"),
            Text(_objective_text(folder)),
        )
    return table


def comparison_table(folders: Sequence[RunFolder]) -> Table:
    """Runs side by side, judged by the last evaluation of each."""
    table = Table(box=None, header_style="bold", pad_edge=False, collapse_padding=True)
    for number, name in enumerate(COLUMNS):
        # Narrow terminals fold; nothing is cut off.
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in comparison([read_run(folder) for folder in folders]):
        table.add_row(*(Text(cell) for cell in row))
    return table


def write_report(folders: Sequence[RunFolder], output: str | None) -> str:
    """Writes one self-contained page on runs, and returns its place.

    Args:
        output: a path or URL; None puts `report.html` into the first run's folder.

    Raises:
        OSError: it cannot be written.
    """
    from orchestrator.report_page import make_page  # brings in matplotlib

    place = output or join(folders[0].url, "report.html")
    write_atomic(place, make_page([read_run(folder) for folder in folders]).encode())
    return place


def _state_text(state: str) -> Text:
    return Text(state, style=_STATE_STYLES.get(state, "cyan"))


def _step(status: dict[str, Any]) -> int:
    """The newest step that is known: of the running attempt, or of the last checkpoint."""
    return status["step"] or max(status["checkpoints"], default=0)


def _line_texts(line: dict[str, Any]) -> dict[str, str]:
    if not line:
        return {}
    stalls = line["stall_s"].items()
    parts = [f"{part} {stall_s / line['step_s']:.1%}" for part, stall_s in stalls]
    return {
        "loss": f"{line['loss']:.4f}" if "loss" in line else "",
        "tokens/s": f"{line['tokens'] / line['step_s']:,.0f}",
        "waiting for": ", ".join(parts),
    }


def _goodput_text(ledger: Ledger) -> str:
    losses = [
        f"{category.replace('_', ' ')} {share:.1%}"
        for category, share in ledger.losses()[:_SHOWN_LOSSES]
    ]
    return f"{ledger.goodput:.1%} of {shown_duration(ledger.wall_s)}; {', '.join(losses)}"


def _preparing_text(made: dict[str, Any]) -> str:
    return f"{made['what']} {made['done']}/{made['total']}" if made else ""


def _teachers_text(teachers: dict[str, Any]) -> str:
    if not teachers["wanted"]:
        return ""
    replicas = [f"{count} {state.lower()}" for state, count in teachers["replicas"].items()]
    # Not told by runs of earlier versions, nor before the student has made some steps.
    needed = [f"{count} needed"] if (count := teachers.get("needed")) else []
    text = ", ".join([f"{teachers['wanted']} wanted", *needed, *replicas])
    return f"{text} in the shared pool {pool}" if (pool := teachers.get("pool")) else text


def _best(status: dict[str, Any]) -> float | None:
    values = [value for value in status.get("bits_per_byte", {}).values() if value is not None]
    return min((value for value in values if math.isfinite(value)), default=None)


def _objective_text(folder: RunFolder) -> str:
    try:
        config = folder.config()
    except ConfigError:
        # The other runs are listed all the same; commands on this one tell its faults.
        return "unknown: its configuration does not fit this version"
    if config.teacher is None or not config.distilled:
        return "next token"
    return f"distilled from {config.teacher.checkpoint}"
