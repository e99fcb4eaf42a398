"""Applies faults to one run, one after the other.

    python -m tests.chaos [--seed N] [--only NAME …] [--page FILE]

The next fault follows when the run has made new steps. In the end it is compared, bit for bit,
with a run of the same length that nothing happened to, and nothing of it may be left.
"""

import os
import random
import signal
import sys
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from tests.chaos.applying import apply_all
from tests.chaos.faults import FAULTS
from tests.chaos.world import world
from tests.helpers.environment import eight_devices
from tests.helpers.runs import make_teacher, text_folder

COLUMNS = (
    "what happens",
    "to",
    "fault told",
    "goes on from",
    "steps made again",
    "seconds to new steps",
)


@click.command()
@click.option("--seed", default=0, show_default=True, help="Of the faults' order.")
@click.option("--only", multiple=True, type=click.Choice(list(FAULTS)))
@click.option("--page", type=click.Path(path_type=Path, dir_okay=False), help="Writes the table.")
def main(seed: int, only: tuple[str, ...], page: Path | None) -> None:
    os.environ |= eight_devices()  # JAX has read nothing yet
    # What was made is taken away whatever ends this process.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
    console = Console()
    names = list(only) or random.Random(seed).sample(list(FAULTS), len(FAULTS))
    with world() as made:
        make_teacher(made.storage, text_folder(made.storage))
        outcomes = apply_all(made, "disturbed", [FAULTS[name] for name in names], console)
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
