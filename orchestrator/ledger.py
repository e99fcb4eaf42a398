"""A run's time, divided up: categories, spans of time, and what is told from them. Pure."""

import dataclasses
import enum
import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int


class Category(enum.StrEnum):
    """What a second of a run went into."""

    STEP = "step"
    """Steps that count, without what they waited for."""
    PREPARING = "preparing"
    """Tokenizer and rows are made."""
    CAPACITY = "capacity"
    """From an attempt's launch to the first process of its students."""
    START = "start"
    """The students' processes find each other, and the state is loaded or made."""
    COMPILE = "compile"
    STALL_DATA = "stall_data"
    STALL_TEACHER = "stall_teacher"
    STALL_WIRE = "stall_wire"
    STALL_DECODE = "stall_decode"
    STALL_CHECKPOINT = "stall_checkpoint"
    LOST = "lost"
    """Steps that had to be made again, with all that they waited for."""
    DETECT = "detect"
    """From the last line of an attempt that failed to when its end was noticed."""
    PAUSE = "pause"
    """Between a fault and the next launch."""
    AWAY = "away"
    """No controller was there, and nothing else went on without one."""
    FAILED = "failed"
    """From a failure to `resume`."""
    ENDING = "ending"
    """After an attempt's last step: its last checkpoint, and the end of its processes."""
    EVALUATING = "evaluating"
    """After the training, while checkpoints are still judged."""
    UNTOLD = "untold"
    """Since the newest line of students that train: the record is some seconds behind."""
    STOPPED = "stopped"
    """From an end that was asked for, or the last step, to `resume`; no part of the wall-clock."""


STALLS = {
    "data": Category.STALL_DATA,
    "teacher": Category.STALL_TEACHER,
    "wire": Category.STALL_WIRE,
    "decode": Category.STALL_DECODE,
    "checkpoint": Category.STALL_CHECKPOINT,
}

OF_STEP = (Category.COMPILE, *STALLS.values(), Category.STEP, Category.LOST)
"""The categories of a step's seconds, in the order in which they are put down."""

GROUPS = {
    "steps": (Category.STEP,),
    "start-up": (Category.PREPARING, Category.CAPACITY, Category.START, Category.COMPILE),
    "waiting": tuple(STALLS.values()),
    "lost work": (Category.LOST,),
    "recovery": (Category.DETECT, Category.PAUSE, Category.AWAY, Category.FAILED),
    "rest": (Category.ENDING, Category.EVALUATING, Category.UNTOLD, Category.STOPPED),
}
"""All categories, as few as a picture has colours."""

_CATEGORIES = tuple(Category)


@dataclasses.dataclass(frozen=True)
class Ledger:
    """A run's time, divided up.

    Args:
        began_s: when the run began, in seconds since 1970.
        edges_s: seconds since then at which one span ends and the next begins.
        codes: the spans' categories, by their place in `Category`.
    """

    began_s: float
    edges_s: Float[np.ndarray, " edges"]
    codes: Int[np.ndarray, " spans"]

    @functools.cached_property
    def totals_s(self) -> dict[Category, float]:
        """Seconds by category, of all of them."""
        sums = np.bincount(self.codes, np.diff(self.edges_s), len(_CATEGORIES))
        return dict(zip(_CATEGORIES, sums.tolist(), strict=True))

    @property
    def wall_s(self) -> float:
        """The run's length, without the time in which it was stopped."""
        return float(self.edges_s[-1]) - self.totals_s[Category.STOPPED]

    @property
    def goodput(self) -> float:
        """Seconds of steps that count over wall-clock."""
        return self.totals_s[Category.STEP] / self.wall_s if self.wall_s > 0 else 0.0

    def losses(self) -> list[tuple[Category, float]]:
        """(category, share of the wall-clock) of all but the steps, largest first."""
        shares = [
            (category, seconds / self.wall_s)
            for category, seconds in self.totals_s.items()
            if category not in (Category.STEP, Category.STOPPED) and seconds > 0
        ]
        return sorted(shares, key=lambda each: -each[1])

    def summary(self) -> dict[str, Any]:
        """As plain data: `share` (the goodput), `wall_s`, and `seconds` by category."""
        seconds = {category.value: total_s for category, total_s in self.totals_s.items()}
        return {"share": self.goodput, "wall_s": self.wall_s, "seconds": seconds}

    def timeline(self) -> list[tuple[Category, float, float]]:
        """(category, begin, end), in seconds since the run's begin; neighbours differ."""
        spans: list[tuple[Category, float, float]] = []
        edges = self.edges_s.tolist()
        for code, begin_s, end_s in zip(self.codes.tolist(), edges, edges[1:], strict=False):
            category = _CATEGORIES[code]
            if end_s == begin_s:
                continue
            if spans and spans[-1][0] is category:
                begin_s = spans.pop()[1]
            spans.append((category, begin_s, end_s))
        return spans

    def shares(
        self, bins_s: Float[np.ndarray, " bins+1"]
    ) -> dict[Category, Float[np.ndarray, " bins"]]:
        """Share of each category in the time between neighbouring `bins_s`."""
        widths = np.diff(self.edges_s)
        shares = {}
        for code, category in enumerate(_CATEGORIES):
            until = np.concatenate([[0.0], np.cumsum(widths * (self.codes == code))])
            shares[category] = np.diff(np.interp(bins_s, self.edges_s, until)) / np.diff(bins_s)
        return shares


class Span(NamedTuple):
    """A stretch of time, in seconds since 1970.

    Args:
        what: a category, or the number of the attempt whose steps these are.
    """

    what: Category | int
    begin_s: float
    end_s: float

    def within(self, window: "Span") -> "Span":
        """The part of it that lies in `window`."""
        begin_s, end_s = (
            min(max(time_s, window.begin_s), window.end_s) for time_s in (self.begin_s, self.end_s)
        )
        return self._replace(begin_s=begin_s, end_s=end_s)


def painted(
    spans: Sequence[Span],
    began_s: float,
    end_s: float,
    step_edges: Mapping[int, Float[np.ndarray, " edges"]],
) -> Ledger:
    """Paints the spans one over the other; what is left to be seen divides the time up.

    Args:
        step_edges: by attempt, when each part (`OF_STEP`) of each of its steps began, and when the
            last one ended.
    """
    whole = Span(Category.UNTOLD, began_s, end_s)
    spans = [whole, *(span.within(whole) for span in spans)]
    borders = np.unique([time_s for span in spans for time_s in span[1:]])
    owners = np.zeros(len(borders) - 1, int)
    for number, span in enumerate(spans):
        begin, end = np.searchsorted(borders, span[1:])
        owners[begin:end] = number
    edges, codes = [np.array([began_s])], [np.zeros(0, int)]
    step_codes = [_CATEGORIES.index(category) for category in OF_STEP]
    for owner, begin_s, finish_s in zip(owners, borders, borders[1:], strict=False):
        what = spans[owner].what
        if isinstance(what, Category):
            edges.append(np.array([finish_s]))
            codes.append(np.array([_CATEGORIES.index(what)]))
        else:
            inner = np.clip(step_edges[what], begin_s, finish_s)
            inner[-1] = finish_s  # whatever rounding left
            edges.append(inner[1:])
            codes.append(np.tile(step_codes, len(inner) // len(step_codes)))
    return Ledger(began_s, np.concatenate(edges) - began_s, np.concatenate(codes))
