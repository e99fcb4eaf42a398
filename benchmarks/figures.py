"""How every benchmark tells its figures: a table for people, one JSON line for machines."""

import dataclasses
import json
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclasses.dataclass(frozen=True)
class Figure:
    """One measured figure, and what it should be."""

    value: float
    unit: str
    goal: str = ""


def show(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """Prints a table."""
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    for row in rows:
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    Console(width=100).print(table)


def tell(figures: dict[str, Figure]) -> None:
    """Prints the figures as a table and, on the last line, as one JSON object."""
    rows = [[name, figure.value, figure.unit, figure.goal] for name, figure in figures.items()]
    show("Figures", ["figure", "value", "unit", "goal"], rows)
    values = {name: dataclasses.asdict(figure) for name, figure in figures.items()}
    print(json.dumps({"figures": values}))
