"""Which checkpoints a run has, and which of them are kept."""

import math
from collections.abc import Collection, Mapping

from configs.run import CheckpointConfig
from workers.storage import join, list_names, read_json, remove_tree

_FOLDER = "checkpoints"


def committed_steps(run_url: str) -> list[int]:
    """Steps of the run's complete checkpoints, ascending."""
    names = list_names(join(run_url, _FOLDER))
    return sorted(int(name.removesuffix(".json")) for name in names if name.endswith(".json"))


def read_checkpoint_entry(run_url: str, step: int) -> dict:
    """The entry of one checkpoint. Raises FileNotFoundError if there is none."""
    return read_json(join(run_url, _FOLDER, f"{step:08d}.json"))


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
    remove_tree(join(run_url, _FOLDER, f"{step:08d}.json"))
    remove_tree(join(run_url, _FOLDER, f"{step:08d}"))
