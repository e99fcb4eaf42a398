"""`stillhouse checkpoints`: what a run has saved, whether it is whole, and what is kept of it."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from orchestrator import catalogue
from orchestrator.liveness import under_way
from orchestrator.run_folder import RunFolder
from workers.integrity import CorruptCheckpointError, check_files
from workers.storage import list_tree


def checkpoints_table(folder: RunFolder) -> Table:
    """One line for each checkpoint, oldest first."""
    bits = {each["step"]: each["bits_per_byte"] for each in folder.evaluations()}
    pinned = catalogue.pinned_steps(folder.url)
    quarantined = catalogue.quarantined_steps(folder.url)
    table = Table(title=f"Checkpoints of {folder.name}")
    for column in ("step", "MB", "state digest", "bits per byte", ""):
        table.add_column(column, justify="left" if column in ("state digest", "") else "right")
    for step in sorted([*catalogue.committed_steps(folder.url), *quarantined]):
        damaged = step in quarantined
        entry = _entry(folder, step, damaged)
        notes = ["pinned"] * (step in pinned) + ["in quarantine"] * damaged
        table.add_row(
            str(step),
            f"{sum(list_tree(catalogue.checkpoint_url(folder.url, step)).values()) / 1e6:.1f}",
            "-".join(filter(None, (entry["params_digest"], entry["optimizer_digest"]))),
            f"{bits[step]:.4f}" if step in bits else "",
            ", ".join(notes),
        )
    return table


def verify_checkpoints(folder: RunFolder, console: Console) -> bool:
    """Reads every file of every checkpoint; true if all are whole.

    A damaged checkpoint goes into quarantine, and a whole one comes out of it.
    """
    steps = catalogue.committed_steps(folder.url)
    quarantined = catalogue.quarantined_steps(folder.url)
    all_whole = True
    for step in sorted([*steps, *quarantined]):
        if _entry(folder, step, step in quarantined)["format_version"] < 2:
            console.print(f"step {step}: has no digests of its files, of an older release")
            continue
        try:
            check_files(catalogue.checkpoint_url(folder.url, step))
        except CorruptCheckpointError as error:
            all_whole = False
            console.print(f"step {step}: {error}", soft_wrap=True)
            if step in steps:
                catalogue.quarantine(folder.url, step, str(error))
        else:
            console.print(f"step {step}: whole")
            if step in quarantined:
                catalogue.release_from_quarantine(folder.url, step)
    return all_whole


def check_steps(folder: RunFolder, steps: Sequence[int]) -> None:
    """Raises ValueError where the run has no checkpoint of one of the steps."""
    there = [*catalogue.committed_steps(folder.url), *catalogue.quarantined_steps(folder.url)]
    for step in steps:
        if step not in there:
            shown = ", ".join(str(each) for each in sorted(there)) or "none"
            raise ValueError(f"{folder.name} has no checkpoint of step {step}; there are: {shown}")


def delete_checkpoints(folder: RunFolder, steps: Sequence[int]) -> None:
    """Removes checkpoints.

    Raises:
        ValueError: one is pinned, or a run that is under way would go on from it.
    """
    pinned = catalogue.pinned_steps(folder.url)
    committed = catalogue.committed_steps(folder.url)
    for step in steps:
        if step in pinned:
            raise ValueError(f"The checkpoint of step {step} is pinned; --unpin {step} first")
        if committed and step == committed[-1] and under_way(folder):
            raise ValueError(
                f"{folder.name} is under way and would go on from step {step}, its newest "
                f"checkpoint; stop it first"
            )
    for step in steps:
        catalogue.delete_checkpoint(folder.url, step)


def _entry(folder: RunFolder, step: int, quarantined: bool) -> dict[str, Any]:
    if quarantined:
        return catalogue.read_quarantined(folder.url, step)["entry"]
    return catalogue.read_checkpoint_entry(folder.url, step)
