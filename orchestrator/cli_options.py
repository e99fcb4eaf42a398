"""Options that commands of several modules take."""

import click

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
