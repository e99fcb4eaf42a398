"""Curves as SVG that goes into a page and takes the page's colours, light or dark."""

import dataclasses
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

NUM_COLOURS = 6
LINE_STYLES = ("-", "--", ":")
_MAX_POINTS = 600
_FEW_POINTS = 30
_SIZE_INCHES = (5.2, 3.0)
_LEAST_PERCENT = 10.0  # so that little waiting looks little

# matplotlib knows no CSS variables, so it draws in colours that stand for them.
_INK, _RULE = "#020000", "#020001"
_SERIES = "#0100"

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _RULE,
    "xtick.color": _RULE,
    "ytick.color": _RULE,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
}


@dataclasses.dataclass(frozen=True)
class Curve:
    """A value over the steps; NaN leaves a gap."""

    number: int
    """Of the series, which decides its colour and dashes."""
    steps: Sequence[int]
    values: Sequence[float]


def line_svg(curves: Sequence[Curve], unit: str, name: str) -> str:
    """Curves on one pair of axes; long ones are thinned to means of neighbouring steps.

    Args:
        unit: what the upright axis counts.
        name: tells the picture from all others of its page.
    """
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure, axes = _axes(unit)
        for curve in curves:
            steps, values = thinned(curve.steps), thinned(curve.values)
            axes.plot(
                steps,
                np.where(np.isfinite(values), values, np.nan),
                color=f"{_SERIES}{curve.number % NUM_COLOURS:02x}",
                linestyle=LINE_STYLES[curve.number // NUM_COLOURS % len(LINE_STYLES)],
                linewidth=1.6,
                marker="o" if len(steps) <= _FEW_POINTS else None,
                markersize=3.5,
            )
        return _svg(figure)


def stacked_svg(
    steps: Sequence[int],
    parts: Mapping[int, Sequence[float]],
    whole: Sequence[float],
    unit: str,
    name: str,
) -> str:
    """Parts of a whole per step, in percent of it, one upon the other, by their series' numbers."""
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure, axes = _axes(unit)
        total = thinned(whole)
        shares = [100 * thinned(values) / total for values in parts.values()]
        colours = [f"{_SERIES}{number % NUM_COLOURS:02x}" for number in parts]
        if len(total) == 1:  # an area needs two points
            bottom = 0.0
            for share, colour in zip(shares, colours, strict=True):
                axes.bar(list(steps), share, bottom=bottom, color=colour)
                bottom += share[0]
        else:
            axes.stackplot(thinned(steps), *shares, colors=colours, linewidth=0)
        axes.set_ylim(0, max(_LEAST_PERCENT, axes.get_ylim()[1]))
        return _svg(figure)


def spent_svg(
    bins: Float[np.ndarray, " borders"],
    shares: Mapping[int, Float[np.ndarray, " bins"]],
    unit: str,
    name: str,
) -> str:
    """What time went into, in percent of each bin, one upon the other, by their series' numbers.

    Args:
        bins: the bins' borders; one more than shares.
        unit: what the borders count.
    """
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure, axes = _axes("% of the time", unit)
        below = np.zeros(len(bins) - 1)
        for number, values in shares.items():
            above = below + 100 * values
            colour = f"{_SERIES}{number % NUM_COLOURS:02x}"
            axes.stairs(above, bins, baseline=below, fill=True, color=colour, linewidth=0)
            below = above
        axes.set_xlim(bins[0], bins[-1])
        axes.set_ylim(0, 100)
        return _svg(figure)


def thinned(values: Sequence[float | None]) -> Float[np.ndarray, " P"]:
    """At most `_MAX_POINTS` means of equally many neighbours (the last may be of fewer)."""
    array = np.array([np.nan if value is None else value for value in values], float)
    group = -(-len(array) // _MAX_POINTS)
    if group <= 1:
        return array
    starts = np.arange(0, len(array), group)
    counts = np.diff(starts, append=len(array))
    return np.add.reduceat(array, starts) / counts


def _axes(unit: str, across: str = "step") -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(across)
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=across == "step"))
    return figure, axes


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # Several pictures share a page: ids that only count would clash, and nothing refers to them.
    svg = re.sub(r' id="[A-Za-z0-9_.]+_\d+"', "", svg)
    # Its size is the page's business.
    svg = re.sub(r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', svg)
    svg = svg.replace(_INK, "var(--ink)").replace(_RULE, "var(--rule)")
    return re.sub(_SERIES + r"([0-9a-f]{2})", lambda found: _series(int(found[1], 16)), svg)


def _series(number: int) -> str:
    return f"var(--series-{number})"
