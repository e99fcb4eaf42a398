"""The commands about stored targets: what teachers have answered, kept for whoever asks again."""

import sys

import click
from rich.console import Console

from orchestrator.cli_options import (
    address_option,
    run_storage_option,
    settings_option,
    storage_option,
)

console = Console()


@click.group()
def targets() -> None:
    """Stored targets: listed, verified, built ahead of a run, removed."""


@targets.command(name="list")
@storage_option
def list_command(storage: str) -> None:
    """What is stored, by key: a codec, a teacher, a data set, a seed and a class of teachers."""
    from orchestrator.run_folder import absolute
    from orchestrator.targets import targets_list

    console.print(targets_list(absolute(storage)))


@targets.command()
@click.argument("keys", metavar="[KEY]...", nargs=-1)
@click.option("--repair", is_flag=True, help="Remove damaged files; their rows are asked again.")
@storage_option
def verify(keys: tuple[str, ...], repair: bool, storage: str) -> None:
    """Reads every row, of all keys or of some; exits with 1 where any is damaged."""
    from orchestrator.run_folder import absolute
    from orchestrator.targets import verify_targets

    if verify_targets(absolute(storage), keys, repair, console):
        sys.exit(1)


@targets.command()
@click.argument("source", metavar="PRESET|FILE")
@settings_option
@address_option
@run_storage_option
@click.option("--steps", type=click.IntRange(min=1), help="First steps only (by default all).")
@click.option(
    "--teachers", type=click.IntRange(min=1), help="Teacher replicas, instead of the run's."
)
def build(
    source: str,
    settings: tuple[str, ...],
    address: str | None,
    storage: str | None,
    steps: int | None,
    teachers: int | None,
) -> None:
    """Stores the targets that a run would ask for, without a student.

    The work is a run of its own, named NAME-targets. Interrupted, the same command goes on.
    """
    from configs.load import load_config
    from configs.run import RunConfig
    from orchestrator.build_targets import build_and_follow

    settings = (*([f"storage={storage}"] if storage else []), *settings)
    config = load_config(source, settings)
    if not isinstance(config, RunConfig):
        raise ValueError(f"{source} is a recipe; name one of its runs")
    sys.exit(build_and_follow(config, steps, teachers, address, console))


@targets.command()
@click.argument("key")
@click.option("--yes", is_flag=True, help="Do not ask.")
@storage_option
def remove(key: str, yes: bool, storage: str) -> None:
    """Removes all targets of a key; a run that needs them asks its teachers again."""
    from orchestrator.run_folder import absolute
    from orchestrator.targets import check_key
    from workers.target_store import remove_targets

    check_key(absolute(storage), key)
    if not yes:
        click.confirm(f"Remove all targets {key} below {absolute(storage)}?", abort=True)
    remove_targets(absolute(storage), key)


@targets.command()
@click.option(
    "--keep-bytes", required=True, type=click.IntRange(min=0), help="How much may stay, at most."
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@storage_option
def prune(keep_bytes: int, yes: bool, storage: str) -> None:
    """Removes what was used least recently, whole keys, until the rest fits.

    Targets of runs under way stay. A run that needs removed ones asks its teachers again.
    """
    from orchestrator.run_folder import absolute
    from orchestrator.targets import prune_targets

    def confirm(question: str) -> None:
        if not yes:
            click.confirm(question, abort=True)

    prune_targets(absolute(storage), keep_bytes, confirm, console)
