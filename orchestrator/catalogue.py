"""Which checkpoints a run has, what names them, and which of them are kept.

Beside a checkpoint's entry `<s>.json` may lie `<s>.pin`, with which it is kept. A damaged one has
`<s>.quarantined` in place of its entry, so that nobody finds it.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

from configs.run import CheckpointConfig
from orchestrator.run_folder import RunFolder, absolute
from workers.storage import exists, join, list_names, read_json, remove_tree, write_json

_FOLDER = "checkpoints"


def checkpoint_url(run_url: str, step: int) -> str:
    """Where a checkpoint lies; as in `workers.checkpoint`, without JAX."""
    return _file(run_url, step, "")


def committed_steps(run_url: str) -> list[int]:
    """Steps of the run's complete checkpoints, ascending."""
    return _steps(run_url, ".json")


def pinned_steps(run_url: str) -> list[int]:
    """Steps that a user wants kept, ascending."""
    return _steps(run_url, ".pin")


def quarantined_steps(run_url: str) -> list[int]:
    """Steps whose checkpoint was found damaged and has not been made again, ascending."""
    return sorted(set(_steps(run_url, ".quarantined")) - set(committed_steps(run_url)))


def _steps(run_url: str, ending: str) -> list[int]:
    names = list_names(join(run_url, _FOLDER))
    return sorted(int(name.removesuffix(ending)) for name in names if name.endswith(ending))


def _file(run_url: str, step: int, ending: str) -> str:
    return join(run_url, _FOLDER, f"{step:08d}{ending}")


def pin_checkpoint(run_url: str, step: int) -> None:
    """No rule deletes it any more."""
    write_json(_file(run_url, step, ".pin"), {"step": step})


def unpin_checkpoint(run_url: str, step: int) -> None:
    """It goes when no rule keeps it."""
    remove_tree(_file(run_url, step, ".pin"))


def quarantine(run_url: str, step: int, reason: str) -> None:
    """Has nobody find a checkpoint any more; its files stay, to be looked at."""
    try:
        entry = read_checkpoint_entry(run_url, step)
    except FileNotFoundError:
        return  # it has been deleted, or is in quarantine already
    write_json(_file(run_url, step, ".quarantined"), {"reason": reason, "entry": entry})
    remove_tree(_file(run_url, step, ".json"))


def read_quarantined(run_url: str, step: int) -> dict:
    """Why a checkpoint is in quarantine (`reason`), and the `entry` that it had."""
    return read_json(_file(run_url, step, ".quarantined"))


def release_from_quarantine(run_url: str, step: int) -> None:
    """Puts back a checkpoint that turned out to be whole."""
    write_json(_file(run_url, step, ".json"), read_quarantined(run_url, step)["entry"])
    remove_tree(_file(run_url, step, ".quarantined"))


def read_checkpoint_entry(run_url: str, step: int) -> dict:
    """The entry of one checkpoint. Raises FileNotFoundError if there is none."""
    return read_json(_file(run_url, step, ".json"))


def steps_to_delete(
    steps: Collection[int],
    bits_per_byte: Mapping[int, float],
    pinned: Collection[int],
    config: CheckpointConfig,
) -> list[int]:
    """Steps that no rule keeps: neither the latest, nor the best, nor pinned."""
    latest = sorted(steps)[-config.keep_latest :]
    judged = sorted(
        (value, step)
        for step, value in bits_per_byte.items()
        if step in steps and not math.isnan(value)
    )
    best = [step for _, step in judged[: config.keep_best]]
    return sorted(set(steps) - set(latest) - set(best) - set(pinned))


def delete_checkpoint(run_url: str, step: int) -> None:
    """Removes a checkpoint: the entry first, so that no one finds it half gone."""
    for ending in (".json", ".quarantined", ".pin", ""):
        remove_tree(_file(run_url, step, ending))


def find_checkpoint(name: str, storage_url: str) -> tuple[str, dict[str, Any]]:
    """The place of `RUN`, `RUN@STEP` or a path, and what the checkpoint says about itself.

    Raises:
        ValueError: there is none.
    """
    if "/" in name:
        return _checkpoint_at(absolute(name))
    run, _, step_text = name.partition("@")
    folder = RunFolder(storage_url, run)
    if not folder.exists():
        raise ValueError(f"{name}: there is no run {run!r} below {storage_url}")
    steps = committed_steps(folder.url)
    if not steps:
        raise ValueError(f"{name}: the run {run!r} has no checkpoint yet")
    if step_text and not (step_text.isdigit() and int(step_text) in steps):
        shown = ", ".join(str(step) for step in steps)
        raise ValueError(f"{name}: no checkpoint of step {step_text}; there are {shown}")
    step = int(step_text) if step_text else steps[-1]
    url = checkpoint_url(folder.url, step)
    return url, read_checkpoint_entry(folder.url, step)


def _checkpoint_at(url: str) -> tuple[str, dict[str, Any]]:
    if not exists(url):
        raise ValueError(f"{url}: there is nothing there")
    from workers.checkpoint import read_meta

    return url, dataclasses.asdict(read_meta(url))
