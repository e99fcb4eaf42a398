"""Options that commands of several modules take."""

from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from orchestrator.run_folder import RunFolder

storage_option = click.option(
    "--storage",
    envvar="STILLHOUSE_STORAGE",
    default="./stillhouse-runs",
    show_default=True,
    help="Folder or URL that holds the runs.",
)

run_storage_option = click.option(
    "--storage",
    envvar="STILLHOUSE_STORAGE",
    help="Folder or URL for the run, instead of the configuration's.",
)

address_option = click.option(
    "--address", help="Ray cluster to run on (`auto`, host:port); without it, this machine."
)

settings_option = click.option(
    "--set", "settings", multiple=True, metavar="A.B=C", help="Changes one setting; repeatable."
)


class NumTeachers(click.IntRange):
    """A number from 1, or `auto`."""

    name = "N|auto"

    def __init__(self) -> None:
        super().__init__(min=1)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        return "auto" if value == "auto" else super().convert(value, param, ctx)


def existing_run(storage: str, run: str) -> "RunFolder":
    """The run that a command names. Raises ValueError, with the runs there are."""
    from orchestrator.run_folder import RunFolder, absolute, list_runs

    folder = RunFolder(absolute(storage), run)
    if not folder.exists():
        known = ", ".join(each.name for each in list_runs(absolute(storage))) or "none"
        raise ValueError(f"There is no run {run!r} below {absolute(storage)} (runs: {known})")
    return folder
