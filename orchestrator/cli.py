"""The command line: `stillhouse`, or `python -m orchestrator`.

Each command imports what it needs itself, so that `--help` and commands that only read storage
start at once: they load neither Ray nor JAX.
"""

import json
import sys
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from orchestrator import cli_checkpoints, cli_targets
from orchestrator.cli_options import (
    NumTeachers,
    address_option,
    existing_run,
    run_storage_option,
    settings_option,
    storage_option,
)

if TYPE_CHECKING:
    from configs.run import RunConfig
    from orchestrator.run_folder import RunFolder

console = Console()

_run = click.argument("run")


class _Group(click.Group):
    """Turns the errors that are meant for users into one sentence and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as error:
            click.secho(f"Error: {error}", fg="red", err=True)
        sys.exit(2)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="stillhouse")
def main() -> None:
    """Trains small language models by distillation from a larger teacher, on Ray and JAX.

    A checkpoint is named RUN, RUN@STEP or by its path.
    """


for _command in (*cli_checkpoints.COMMANDS, cli_targets.targets):
    main.add_command(_command)


@main.command()
@click.argument("source", metavar="PRESET|FILE")
@settings_option
@address_option
@run_storage_option
@click.option("--check", is_flag=True, help="Only validate, and print the resolved configuration.")
def run(
    source: str,
    settings: tuple[str, ...],
    address: str | None,
    storage: str | None,
    check: bool,
) -> None:
    """Starts a run (or a recipe of runs) and follows it to its end."""
    from configs.load import load_config
    from configs.run import RecipeConfig

    settings = (*([f"storage={storage}"] if storage else []), *settings)
    config = load_config(source, settings)
    if check:
        from orchestrator.check import show_check

        show_check(config, source, settings, console)
        return
    if isinstance(config, RecipeConfig):
        from orchestrator.recipe import run_recipe

        sys.exit(run_recipe(config, address, console))
    sys.exit(_run_one(config, address))


def _run_one(config: "RunConfig", address: str | None) -> int:
    from orchestrator.follow import is_under_way
    from orchestrator.run_folder import RunFolder

    folder = RunFolder.of(config)
    if folder.exists() and is_under_way(folder, console):
        if folder.config() != config:
            raise ValueError(
                f"A run {config.name!r} with other settings is under way; "
                f"choose another name, or `stillhouse stop {config.name}` first"
            )
        console.print(f"{config.name} is under way already; following it", highlight=False)
        return _follow(folder)
    from orchestrator.recipe import launch_and_follow

    return launch_and_follow(config, address, console)


@main.command()
@_run
@settings_option
@address_option
@storage_option
def resume(run: str, settings: tuple[str, ...], address: str | None, storage: str) -> None:
    """Continues a run from its newest checkpoint, with changed settings where that is sound."""
    from orchestrator.recipe import resume_and_follow

    sys.exit(resume_and_follow(existing_run(storage, run), settings, address, console))


@main.command()
@_run
@storage_option
@click.option("--wait/--no-wait", default=True, help="Wait until the run has stopped.")
def stop(run: str, storage: str, wait: bool) -> None:
    """Asks a run to save a checkpoint and end."""
    folder = _running(storage, run)
    folder.send({"kind": "stop"})
    if wait:
        _follow(folder)


@main.command()
@_run
@click.option(
    "--teachers",
    type=NumTeachers(),
    required=True,
    help="So many replicas from now on; `auto`: as many as the run needs.",
)
@storage_option
def scale(run: str, teachers: int | str, storage: str) -> None:
    """Changes the number of teachers while the run goes on."""
    folder = _running(storage, run)
    config = folder.config()
    if not config.distilled or config.teacher is None:
        raise ValueError(f"{run} is not distilled: it has no teachers")
    if teachers == "auto" and config.teacher.max_replicas is None:
        raise ValueError(
            f"{run} has no teacher.max_replicas to scale up to: stop it, and "
            f"`stillhouse resume {run} --set teacher.max_replicas=…`"
        )
    folder.send({"kind": "scale", "teachers": teachers})
    aim = "as many teachers as it needs" if teachers == "auto" else f"{teachers} teachers"
    console.print(f"{run} is asked to go to {aim}", highlight=False)


@main.command()
@_run
@storage_option
@click.option("--json", "as_json", is_flag=True, help="Everything, as one JSON object.")
def status(run: str, storage: str, as_json: bool) -> None:
    """Where a run stands."""
    from orchestrator.liveness import seen_alive
    from orchestrator.report import status_table
    from orchestrator.report_data import read_ledger

    folder = existing_run(storage, run)
    values = folder.status() or {"name": run, "state": "created"}
    values["alive"] = bool(seen_alive([folder]))
    ledger = read_ledger(folder, values["alive"])
    if as_json:
        goodput = None if ledger is None else ledger.summary()
        click.echo(json.dumps({**values, "goodput": goodput}))
    else:
        console.print(status_table(values, ledger))


def _lines_command(name: str, read: str, text: str) -> None:
    @main.command(name=name, help=text)
    @_run
    @storage_option
    def command(run: str, storage: str) -> None:
        from orchestrator import history

        for line in getattr(history, read)(existing_run(storage, run).url):
            click.echo(json.dumps(line))


_lines_command("log", "read_steps", "One JSON object per training step, each step once.")
_lines_command("events", "read_events", "What happened, when, to whom, as JSON lines.")


@main.command()
@_run
@storage_option
def logs(run: str, storage: str) -> None:
    """What the run's processes logged, whatever machine they were on."""
    from datetime import datetime

    from orchestrator import history

    for line in history.read_logs(existing_run(storage, run).url):
        when = datetime.fromtimestamp(line["time_s"]).isoformat(" ", "seconds")
        click.echo(f"{when} {line['who']} {line['level']} {line['message']}")


@main.command()
@click.argument("runs", nargs=-1, required=True)
@storage_option
@click.option("--output", help="File to write; by default report.html in the first run's folder.")
def report(runs: tuple[str, ...], storage: str, output: str | None) -> None:
    """Writes a page with loss curves and figures of one run, or of several side by side."""
    from orchestrator.report import comparison_table, write_report

    folders = [existing_run(storage, run) for run in runs]
    console.print(comparison_table(folders))
    console.print(f"Report: {write_report(folders, output)}", highlight=False, soft_wrap=True)


@main.command(name="list")
@storage_option
def list_command(storage: str) -> None:
    """All runs below a storage path."""
    from orchestrator.report import runs_table
    from orchestrator.run_folder import absolute, list_runs

    console.print(runs_table(list_runs(absolute(storage))))


@main.command()
@_run
@storage_option
@click.option("--yes", is_flag=True, help="Do not ask.")
def rm(run: str, storage: str, yes: bool) -> None:
    """Removes a run with its checkpoints; data sets, tokenizers and stored targets stay."""
    from orchestrator.follow import is_under_way

    folder = existing_run(storage, run)
    if is_under_way(folder, console):
        raise ValueError(f"{run} is under way; `stillhouse stop {run}` first")
    if not yes:
        click.confirm(f"Remove {folder.url} with all checkpoints?", abort=True)
    folder.remove()


@main.command()
@click.option("--slices", default=2, show_default=True, type=click.IntRange(min=1))
@click.option("--topology", default="2x2x2", show_default=True, help="Chips by dimension.")
@click.option("--accelerator", default="v4", show_default=True)
def simulate(slices: int, topology: str, accelerator: str) -> None:
    """Starts a local Ray cluster that looks like TPU slices, until Ctrl-C."""
    from orchestrator.simulate import simulate_until_interrupted

    simulate_until_interrupted(slices, topology, accelerator, console)


@main.command()
@click.argument("source", metavar="PRESET|FILE")
@settings_option
@click.option("--address", required=True, help="The cluster's dashboard, http://host:8265.")
@click.option(
    "--working-dir", default=".", show_default=True, help="Folder that goes along as the code."
)
@click.option("--runtime-env-json", help="More of Ray's runtime environment, as JSON.")
@click.option("--no-wait", is_flag=True, help="Do not follow the job's output.")
def submit(
    source: str,
    settings: tuple[str, ...],
    address: str,
    working_dir: str,
    runtime_env_json: str | None,
    no_wait: bool,
) -> None:
    """Submits a run as a Ray job; it outlives this terminal."""
    from orchestrator.submit import submit_run

    try:
        environment = json.loads(runtime_env_json or "{}")
    except json.JSONDecodeError as error:
        raise click.BadParameter(f"is no JSON: {error}", param_hint="--runtime-env-json") from error
    sys.exit(submit_run(source, settings, address, working_dir, environment, not no_wait, console))


def _running(storage: str, run: str) -> "RunFolder":
    from orchestrator.liveness import seen_alive

    folder = existing_run(storage, run)
    if not seen_alive([folder]):
        state = (folder.status() or {}).get("state", "created")
        raise ValueError(f"{run} is not under way (it is {state})")
    return folder


def _follow(folder: "RunFolder") -> int:
    from orchestrator.follow import follow

    return follow(folder, console)
