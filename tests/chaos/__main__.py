"""Applies faults to one run, one after the other.

    python -m tests.chaos [--seed N] [--only NAME …] [--page FILE]

The next fault follows when the run has made new steps. In the end it is compared, bit for bit,
with a run of the same length that nothing happened to, and nothing of it may be left.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import click
from rich.console import Console
from rich.table import Table

from orchestrator.cpu_devices import cpu_devices
from tests.chaos.faults import FAULTS, Fault
from tests.chaos.subject import Subject
from tests.chaos.world import world
from tests.helpers.runs import make_teacher, text_folder


class Outcome(NamedTuple):
    """What a fault did to the run."""

    fault: Fault
    told: str
    """Kinds of those faults that ended an attempt, in the controller's words."""
    starts: str
    """From where the attempts after it went on."""
    num_lost_steps: int
    recovery_s: float

    @property
    def row(self) -> tuple[str, ...]:
        lost = str(self.num_lost_steps) if self.starts else ""
        fault, seconds = self.fault, f"{self.recovery_s:.0f}"
        return fault.mechanism, fault.target, self.told or "none", self.starts, lost, seconds


COLUMNS = (
    "what happens",
    "to",
    "fault told",
    "goes on from",
    "steps made again",
    "seconds to new steps",
)


def disturb(run: Subject, fault: Fault) -> Outcome:
    """Applies a fault; returns when the run has made new steps."""
    run.goes_on()
    num_faults, num_starts = len(run.faults()), len(run.starts())
    num_lost, began = run.num_lost_steps(), time.monotonic()
    fault.apply(run)
    run.goes_on()
    recovery_s = time.monotonic() - began
    return Outcome(
        fault,
        ", ".join(run.faults()[num_faults:]),
        ", ".join(run.starts()[num_starts:]),
        run.num_lost_steps() - num_lost,
        recovery_s,
    )


def chaos(faults: list[Fault], console: Console) -> list[Outcome]:
    """What a run makes of `faults`, in their order; those that need a right we lack are told."""
    outcomes = []
    with world() as made:
        make_teacher(made.storage, text_folder(made.storage))
        run = Subject(made, "disturbed")
        for fault in faults:
            if fault.takes and getattr(made, fault.takes) is None:
                console.print(f"{fault.name}: not tried, this process may not make a {fault.takes}")
                continue
            outcomes.append(disturb(run, fault))
            console.print(" | ".join(outcomes[-1].row), highlight=False, soft_wrap=True)
        run.stop()
        run.compare()
    return outcomes


@click.command()
@click.option("--seed", default=0, show_default=True, help="Of the faults' order.")
@click.option("--only", multiple=True, type=click.Choice(list(FAULTS)))
@click.option("--page", type=click.Path(path_type=Path, dir_okay=False), help="Writes the table.")
def main(seed: int, only: tuple[str, ...], page: Path | None) -> None:
    os.environ |= cpu_devices(8)  # JAX has read nothing yet
    # What was made is taken away whatever ends this process.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
    console = Console()
    names = list(only) or random.Random(seed).sample(list(FAULTS), len(FAULTS))
    outcomes = chaos([FAULTS[name] for name in names], console)
    rows = [each.row for each in outcomes]
    num_mechanisms = len({each.fault.mechanism for each in outcomes})
    title = f"{len(rows)} faults by {num_mechanisms} mechanisms, in the order of seed {seed}"
    table = Table(*COLUMNS, title=title)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if page is not None:
        write_table(page, title, [COLUMNS, *rows])


def write_table(page: Path, title: str, rows: list[tuple[str, ...]]) -> None:
    """Replaces what stands between the page's marks."""
    begin, end = "<!-- chaos: begin -->\n", "<!-- chaos: end -->\n"
    before, _, rest = page.read_text().partition(begin)
    _, _, after = rest.partition(end)
    lines = [" | ".join(row) for row in [rows[0], ("---",) * len(rows[0]), *rows[1:]]]
    table = "".join(f"| {line} |\n" for line in lines)
    page.write_text(f"{before}{begin}{title}:\n\n{table}{end}{after}")


if __name__ == "__main__":
    main()
