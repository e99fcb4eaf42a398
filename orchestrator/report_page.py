"""The report as one HTML page that needs nothing but itself."""

import datetime
import html
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import yaml

from orchestrator.history import Line
from orchestrator.ledger import GROUPS
from orchestrator.report_data import (
    COLUMNS,
    STALL_PARTS,
    RunData,
    comparison,
    shown,
    shown_count,
    shown_duration,
    summarise,
    time_spent,
)
from orchestrator.report_figures import (
    LINE_STYLES,
    NUM_COLOURS,
    Curve,
    line_svg,
    spent_svg,
    stacked_svg,
)
from orchestrator.report_style import STYLE

_MOST_EVENTS = 200
_BORDERS = {"-": "solid", "--": "dashed", ":": "dotted"}


def make_page(runs: Sequence[RunData]) -> str:
    """The whole page on one run, or on several side by side."""
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    made = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    body = [
        f"<header><h1>{_e(title)}</h1><p>Stillhouse report, {made}</p></header>",
        _comparison_section(runs),
        _curves_section(runs),
        *(_run_section(run) for run in runs),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_e(title)} · Stillhouse</title><style>{STYLE}</style></head>\n"
        f"<body><main>{chr(10).join(body)}</main></body></html>\n"
    )


def _e(text: Any) -> str:
    return html.escape(str(text))


def _comparison_section(runs: Sequence[RunData]) -> str:
    head = "".join(f"<th>{_e(name)}</th>" for name in COLUMNS)
    rows = "".join(
        f"<tr>{''.join(f'<td>{_e(cell)}</td>' for cell in row)}</tr>" for row in comparison(runs)
    )
    return (
        f'<section><div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
        "<p>Bits per byte, loss (nats per token) and KL (nats per token) are those of the last "
        "evaluation on held-out text. Tokens/s and the share of time spent waiting for the "
        "teacher leave out the first step of each attempt, which compiles.</p></section>"
    )


# The curves of all runs.


def _curves_section(runs: Sequence[RunData]) -> str:
    figures = [
        _steps_figure(runs, "Training loss", "next token, nats per token", "ce_loss"),
        _steps_figure(runs, "Distillation loss", "nats per token", "kd_loss"),
        _held_out_figure(runs),
        _steps_figure(runs, "Learning rate", "", "lr"),
    ]
    drawn = [figure for figure in figures if figure]
    if not drawn:
        return "<section><h2>Curves</h2><p>No step has been recorded yet.</p></section>"
    return f'<section><h2>Curves</h2><div class="figures">{"".join(drawn)}</div></section>'


def _steps_figure(runs: Sequence[RunData], title: str, unit: str, name: str) -> str:
    def points(run: RunData) -> list[tuple[int, float]]:
        return [(line["step"], line[name]) for line in run.steps if line[name] is not None]

    return _curves_figure(runs, title, unit, name, points)


def _held_out_figure(runs: Sequence[RunData]) -> str:
    def points(run: RunData) -> list[tuple[int, float]]:
        return [(each["step"], each["bits_per_byte"]) for each in run.evaluations]

    return _curves_figure(runs, "Held-out text", "bits per byte", "bits_per_byte", points)


def _curves_figure(
    runs: Sequence[RunData],
    title: str,
    unit: str,
    name: str,
    points: Callable[[RunData], list[tuple[int, float]]],
) -> str:
    curves, legend = [], []
    for number, run in enumerate(runs):
        if found := points(run):
            steps, values = zip(*found, strict=True)
            curves.append(Curve(number, steps, values))
            legend.append(_key(number, run.name))
    return _figure(title, unit, legend, line_svg(curves, unit, name)) if curves else ""


def _figure(title: str, unit: str, legend: Iterable[str], svg: str) -> str:
    caption = f"<b>{_e(title)}</b> <small>{_e(unit)}</small><br>{' '.join(legend)}"
    return f"<figure><figcaption>{caption}</figcaption>{svg}</figure>"


def _key(number: int, text: str) -> str:
    border = _BORDERS[LINE_STYLES[number // NUM_COLOURS % len(LINE_STYLES)]]
    colour = f"var(--series-{number % NUM_COLOURS})"
    return f'<span class="key"><i style="border-top: 3px {border} {colour}"></i>{_e(text)}</span>'


# One run.


def _run_section(run: RunData) -> str:
    config = yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    state = f'<span class="badge {_e(run.state)}">{_e(run.state)}</span>'
    return (
        f"<section><h2>{_e(run.name)} {state}</h2>{_reason(run)}"
        f'{_facts(run)}<div class="figures">{_stall_figure(run)}{_spent_figure(run)}</div>'
        f"{_spent_table(run)}{_timeline(run)}"
        f"<details><summary>Resolved configuration</summary><pre>{_e(config)}</pre></details>"
        "</section>"
    )


def _reason(run: RunData) -> str:
    reason = run.status.get("reason")
    return f'<p class="reason">{_e(reason)}</p>' if reason else ""


def _facts(run: RunData) -> str:
    figures = summarise(run)
    best, share = figures["best_bits_per_byte"], figures["total_stall_share"]
    at = "" if best is None else f" at step {figures['best_step']}"
    faults = ", ".join(f"{kind} {count}" for kind, count in figures["faults"].items())
    facts = {
        "steps": f"{figures['steps']:,} of {figures['num_steps']:,}",
        "tokens": shown_count(figures["tokens"]),
        "parameters": shown_count(figures["parameters"]),
        "best bits per byte": shown(best, ".4f") + at,
        "tokens/s": shown(figures["tokens_per_s"], ",.0f"),
        "time waiting": shown(share, ".1%"),
        "training time": shown_duration(figures["training_s"]),
        "goodput": shown(figures["goodput"], ".1%"),
        "attempts": figures["attempts"],
        "faults outlived": faults or "none",
        "state digest": figures["digest"] or "–",
    }
    pairs = "".join(f"<div><dt>{_e(name)}</dt><dd>{_e(v)}</dd></div>" for name, v in facts.items())
    return f"<dl>{pairs}</dl>"


def _stall_figure(run: RunData) -> str:
    if not run.steps:
        return ""
    parts = {
        number: [line["stall_s"].get(part, 0.0) for line in run.steps]
        for number, part in enumerate(STALL_PARTS)
        if any(line["stall_s"].get(part) for line in run.steps)
    }
    if not parts:
        return ""
    svg = stacked_svg(
        [line["step"] for line in run.steps],
        parts,
        [line["step_s"] for line in run.steps],
        "% of the step",
        f"stall {run.name}",
    )
    legend = [_key(number, STALL_PARTS[number]) for number in parts]
    return _figure("Waiting", "share of each step's time, by cause", legend, svg)


# Where the time went.


def _spent_figure(run: RunData) -> str:
    ledger = run.ledger
    if ledger is None or not ledger.edges_s[-1]:
        return ""
    unit, bins, shares = time_spent(ledger)
    svg = spent_svg(bins, shares, unit, f"spent {run.name}")
    legend = [_key(number, list(GROUPS)[number]) for number in shares]
    return _figure("Time spent", f"share, by {unit} since the run began", legend, svg)


def _spent_table(run: RunData) -> str:
    if run.ledger is None:
        return ""
    totals_s, length_s = run.ledger.totals_s, float(run.ledger.edges_s[-1])
    rows = "".join(
        f"<tr><td>{_e(category.replace('_', ' '))}</td><td>{_e(group)}</td>"
        f"<td>{totals_s[category]:,.1f}</td><td>{totals_s[category] / length_s:.2%}</td></tr>"
        for group, categories in GROUPS.items()
        for category in categories
        if totals_s[category]
    )
    return (
        "<details><summary>Seconds by what they went into</summary>"
        '<div class="scroll"><table><thead><tr><th>category</th><th></th><th>seconds</th>'
        f"<th>share</th></tr></thead><tbody>{rows}</tbody></table></div></details>"
    )


# What happened.


def _timeline(run: RunData) -> str:
    told = _told(run.events)
    if not told:
        return "<p>No event has been recorded yet.</p>"
    began_s = run.events[0]["time_s"]
    items = [_timeline_item(time_s - began_s, kind, text) for time_s, kind, text in told]
    if len(items) > _MOST_EVENTS:
        half = _MOST_EVENTS // 2
        left_out = (
            f'<li class="quiet"><time></time>{len(items) - 2 * half} more: '
            f"<code>stillhouse events {_e(run.name)}</code></li>"
        )
        items = [*items[:half], left_out, *items[-half:]]
    when = datetime.datetime.fromtimestamp(began_s, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return (
        f"<details open><summary>Events since {when}</summary>"
        f'<ol class="timeline">{"".join(items)}</ol></details>'
    )


def _timeline_item(after_s: float, kind: str, text: str) -> str:
    minutes, seconds = divmod(round(after_s), 60)
    time = f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
    return f'<li class="{kind}"><time>{time}</time>{_e(text)}</li>'


def _told(events: Sequence[Line]) -> list[tuple[float, str, str]]:
    """(time, kind, text) of the events that are told; repeated retries become one."""
    told = []
    shown_events = [event for event in events if event["event"] in _TEXTS]
    for name, group in itertools.groupby(shown_events, key=lambda event: event["event"]):
        kind, text_of = _TEXTS[name]
        same = list(group)
        if name == "teacher_retry" and len(same) > 1:
            text = f"{text_of(same[0])}, and {len(same) - 1} more times"
            told.append((same[0]["time_s"], kind, text))
        else:
            told += [(event["time_s"], kind, text_of(event)) for event in same]
    return told


def _text(template: str) -> Callable[[Line], str]:
    return lambda event: template.format(**event)


def _state_text(event: Line) -> str:
    return event["state"] + (f": {event['reason']}" if event["reason"] else "")


def _changes_text(event: Line) -> str:
    changes = [f"{path} {old} → {new}" for path, (old, new) in event["changes"].items()]
    return f"settings changed: {', '.join(changes)}"


_TEXTS: dict[str, tuple[str, Callable[[Line], str]]] = {
    "state": ("state", _state_text),
    "controller_started": ("quiet", _text("controller started ({state})")),
    "training": ("quiet", _text("attempt {attempt} trains from step {step}")),
    "checkpoint": ("quiet", _text("checkpoint of step {step}")),
    "evaluated": ("good", _text("step {step}: {bits_per_byte:.4f} bits per byte")),
    "evaluation_skipped": ("quiet", _text("step {step} not evaluated: {waiting} others wait")),
    "evaluation_failed": ("fault", _text("step {step} not evaluated: {message}")),
    "attempt_failed": ("fault", _text("attempt {attempt} failed ({kind}): {message}")),
    "preemption_noticed": ("fault", _text("attempt {attempt} is told that its machines go")),
    "teacher_retry": ("fault", _text("step {step}: asked for targets again ({reason})")),
    "stop_asked": ("state", _text("asked to stop")),
    "scaled": ("state", _text("teachers {before} → {teachers}")),
    "settings_changed": ("state", _changes_text),
    "software_changed": ("state", _text("continued with other software")),
}
