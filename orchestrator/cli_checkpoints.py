"""The commands about checkpoints: judged, continued, brought in and taken out, on this machine."""

import json
import sys
from typing import Literal, TextIO

import click
from rich.console import Console

from orchestrator.cli_options import existing_run, storage_option


@click.command()
@click.argument("checkpoint")
@click.option("--window", type=click.IntRange(min=1), help="Another window of the local layers.")
@storage_option
def evaluate(checkpoint: str, window: int | None, storage: str) -> None:
    """Judges one checkpoint on its run's held-out text, on this machine."""
    from orchestrator.evaluate import evaluate_checkpoint
    from orchestrator.run_folder import absolute

    click.echo(json.dumps(evaluate_checkpoint(checkpoint, absolute(storage), window)))


@click.command()
@click.argument("checkpoint")
@click.argument("prompts", metavar="[PROMPT]...", nargs=-1)
@click.option("--file", type=click.File(encoding="utf-8"), help="One prompt per line; - is stdin.")
@click.option("--max-new-tokens", default=128, show_default=True, type=click.IntRange(min=1))
@click.option("--temperature", default=1.0, show_default=True, help="0: the likeliest token.")
@click.option("--top-k", type=int, help="Draws from that many of the likeliest tokens.")
@click.option("--top-p", default=1.0, show_default=True, help="Draws from that much probability.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**32 - 1))
@click.option("--json", "as_json", is_flag=True, help="One JSON object per prompt.")
@storage_option
def generate(
    checkpoint: str,
    prompts: tuple[str, ...],
    file: TextIO | None,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    seed: int,
    as_json: bool,
    storage: str,
) -> None:
    """Continues prompts with a checkpoint's model, on this machine.

    Without a PROMPT or --file, prompts are the lines of stdin.
    """
    if prompts and file:
        raise ValueError("Prompts come as arguments or by --file, not both")
    from model.sampling import Sampling
    from orchestrator.generate import continue_prompts, show
    from orchestrator.run_folder import absolute

    lines = prompts or [line.rstrip("\r\n") for line in file or sys.stdin]
    sampling = Sampling(temperature, top_k, top_p)
    url = absolute(storage)
    for each in continue_prompts(checkpoint, url, lines, max_new_tokens, sampling, seed):
        click.echo(show(each, as_json))


@click.command(name="import")
@click.argument("folder")
@click.argument("dest")
@click.option(
    "--rows",
    type=click.IntRange(min=1),
    help="Embedding rows, of which those beyond the vocabulary are zero and never predicted "
    "(by default as many as the file has).",
)
def import_command(folder: str, dest: str, rows: int | None) -> None:
    """Makes a checkpoint of published Gemma 2 weights.

    FOLDER is a local one as Hugging Face has it: config.json, model.safetensors or its parts,
    tokenizer.model. DEST is a new folder or URL; name it by that path, with a `/` in it, wherever
    a checkpoint's weights are asked for, such as teacher.checkpoint or start_from.checkpoint.
    """
    from orchestrator.convert import import_checkpoint

    click.echo(import_checkpoint(folder, dest, rows))


@click.command()
@click.argument("checkpoint")
@click.argument("folder")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    help="Type of the numbers (by default that of the file that they were imported from, and "
    "bfloat16 for a run).",
)
@storage_option
def export(
    checkpoint: str, folder: str, dtype: Literal["float32", "bfloat16"] | None, storage: str
) -> None:
    """Writes a checkpoint as a Hugging Face folder: config.json, safetensors, tokenizer.model.

    FOLDER is a new local one.
    """
    from orchestrator.convert import export_checkpoint
    from orchestrator.run_folder import absolute

    click.echo(export_checkpoint(checkpoint, folder, absolute(storage), dtype))


@click.command()
@click.argument("run")
@click.option("--verify", is_flag=True, help="Read every file; exits with 1 if one is damaged.")
@click.option("--pin", metavar="STEP", type=int, multiple=True, help="Keep it, whatever comes.")
@click.option("--unpin", metavar="STEP", type=int, multiple=True, help="Let it go with the others.")
@click.option("--delete", metavar="STEP", type=int, multiple=True, help="Remove it.")
@storage_option
def checkpoints(
    run: str,
    verify: bool,
    pin: tuple[int, ...],
    unpin: tuple[int, ...],
    delete: tuple[int, ...],
    storage: str,
) -> None:
    """Lists a run's checkpoints, after verifying, pinning or deleting some.

    Damaged ones go into quarantine, where no run finds them; those found whole come back.
    """
    from orchestrator import catalogue
    from orchestrator.checkpoints import (
        check_steps,
        checkpoints_table,
        delete_checkpoints,
        verify_checkpoints,
    )

    console = Console()
    folder = existing_run(storage, run)
    check_steps(folder, [*pin, *unpin, *delete])
    for step in pin:
        catalogue.pin_checkpoint(folder.url, step)
    for step in unpin:
        catalogue.unpin_checkpoint(folder.url, step)
    delete_checkpoints(folder, delete)
    whole = verify_checkpoints(folder, console) if verify else True
    console.print(checkpoints_table(folder))
    sys.exit(0 if whole else 1)


COMMANDS = (checkpoints, evaluate, generate, import_command, export)
