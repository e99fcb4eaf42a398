"""Options that commands of several modules take."""

import click

storage_option = click.option(
    "--storage",
    envvar="STILLHOUSE_STORAGE",
    default="./stillhouse-runs",
    show_default=True,
    help="Folder or URL that holds the runs.",
)
