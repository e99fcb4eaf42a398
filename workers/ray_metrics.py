"""Measures as Prometheus metrics, through Ray's own exporter."""

from collections import Counter as Sums
from typing import Any

from ray.util.metrics import Counter, Gauge

from workers.targets_protocol import CACHE, LABELS


class TeacherMetrics:
    """Of one replica. `tell` is called now and then, with numbers that only grow."""

    def __init__(self, pool: str, replica: str, row_length: int):
        tags = {"pool": pool, "replica": replica}
        self._row_length = row_length
        self._counters = {
            name: Counter(f"stillhouse_teacher_{name}", text, ("pool", "replica"))
            for name, text in {
                "rows": "Rows scored.",
                "tokens": "Tokens scored.",
                "batches": "Batches scored; rows over batches over the batch's size is their fill.",
                "busy_seconds": "Time that the device worked; its rate is the utilisation.",
            }.items()
        }
        self._waiting = Gauge(
            "stillhouse_teacher_waiting_rows", "Rows that wait.", ("pool", "replica")
        )
        for metric in [*self._counters.values(), self._waiting]:
            metric.set_default_tags(tags)
        self._told = dict.fromkeys(self._counters, 0.0)

    def tell(self, rows: int, batches: int, busy_s: float, num_waiting: int) -> None:
        now = {
            "rows": rows,
            "tokens": rows * self._row_length,
            "batches": batches,
            "busy_seconds": busy_s,
        }
        for name, value in now.items():
            if (more := value - self._told[name]) > 0:
                self._counters[name].inc(more)
        self._told = now
        self._waiting.set(num_waiting)


class StudentMetrics:
    """Of the first host of a gang. `add` only adds up; `tell` passes it on."""

    def __init__(self, run: str):
        self._stall = Counter(
            "stillhouse_student_stall_seconds", "Time that the student waited.", ("run", "part")
        )
        self._rows = Counter(
            "stillhouse_student_rows",
            "Rows trained on, by where their targets are from.",
            ("run", "origin"),
        )
        self._counters = {
            name: Counter(f"stillhouse_student_{name}", text, ("run",))
            for name, text in {
                "steps": "Optimizer steps.",
                "tokens": "Tokens trained on.",
                "target_bytes": "Bytes of targets that came from the pool.",
                "retries": "Requests for targets that were repeated.",
                "hedged_rows": "Rows that a second replica was first to answer.",
            }.items()
        }
        self._run = run
        self._sums: Sums[tuple[str, str]] = Sums()

    def add(self, line: dict[str, Any]) -> None:
        """Takes in a step's line of the record."""
        sums = self._sums
        sums["steps", ""] += 1
        sums["tokens", ""] += line["tokens"]
        for part, seconds in line["stall_s"].items():
            sums["stall", part] += seconds
        for origin, rows in line.get("targets", {}).get("from", {}).items():
            sums["rows", origin if origin in (CACHE, LABELS) else "pool"] += rows
        pool = line.get("pool", {})
        for name, key in (("target_bytes", "bytes"), ("retries",) * 2, ("hedged_rows", "hedged")):
            sums[name, ""] += pool.get(key, 0)

    def tell(self) -> None:
        """Passes on what was added since the last time."""
        sums, self._sums = self._sums, Sums()
        for (name, tag), value in sums.items():
            if value <= 0:
                continue
            if name == "stall":
                self._stall.inc(value, {"run": self._run, "part": tag})
            elif name == "rows":
                self._rows.inc(value, {"run": self._run, "origin": tag})
            else:
                self._counters[name].inc(value, {"run": self._run})
