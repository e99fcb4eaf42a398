"""Stored targets as users see them: what there is, whether it is sound, and having it made."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from configs.load import parse_run
from configs.run import RunConfig
from orchestrator.follow import follow, is_under_way
from orchestrator.launch import LaunchError, run_folder
from orchestrator.recipe import launch_and_follow
from workers.target_store import (
    Damage,
    describe_targets,
    find_damage,
    remove_targets,
    stored_keys,
)

MISSING = "–"


def targets_table(storage_url: str) -> Table:
    """One row per key below a storage path."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("key", "codec", "teacher", "data set", "seed", "rows", "bytes", "damaged"):
        table.add_column(name, overflow="fold")
    for key in stored_keys(storage_url):
        stored = describe_targets(storage_url, key)
        spec = stored.spec
        names = [MISSING] * 4
        if spec is not None:
            names = [spec.codec, spec.teacher_digest, spec.dataset_digest, str(spec.seed)]
        damaged = f"{stored.num_damaged} files" if stored.num_damaged else ""
        numbers = [f"{stored.num_rows:,}", f"{stored.num_bytes:,}", damaged]
        table.add_row(*map(Text, (key, *names, *numbers)))
    return table


def verify_targets(
    storage_url: str, keys: Sequence[str], repair: bool, console: Console
) -> list[Damage]:
    """Reads all rows of some keys, or of all, and names what is damaged.

    With `repair`, damaged files are removed, so that their rows are asked for again.

    Raises:
        ValueError: there is no such key.
    """
    found: list[Damage] = []
    for key in keys or stored_keys(storage_url):
        check_key(storage_url, key)
        of_key = list(find_damage(storage_url, key))
        for damage in of_key:
            row = f" row {damage.row.source}-{damage.row.index}" if damage.row else ""
            console.print(f"{key}/{damage.file}{row} {damage.reason}", highlight=False)
        for file in sorted({damage.file for damage in of_key} if repair else ()):
            remove_targets(storage_url, key, file)
            console.print(f"{key}/{file} is removed", highlight=False)
        if not of_key:
            console.print(f"{key} is sound", highlight=False)
        found += of_key
    return found


def check_key(storage_url: str, key: str) -> None:
    """Raises ValueError, which names those that there are, for a key without targets."""
    known = stored_keys(storage_url)
    if key not in known:
        raise ValueError(
            f"There are no targets {key!r} below {storage_url} (keys: {', '.join(known) or 'none'})"
        )


def build_and_follow(
    config: RunConfig,
    num_steps: int | None,
    num_teachers: int | None,
    address: str | None,
    console: Console,
) -> int:
    """Has the targets of a run's first steps stored, by a run that trains nothing.

    What is stored already is not asked for, so the same again goes on where the last one ended.

    Raises:
        ValueError: the run needs no targets or keeps none, or the name is taken.
    """
    building = _building_config(config, num_steps, num_teachers)
    folder = run_folder(building)
    if folder.exists():
        if folder.identity().get("work") != "targets":
            raise LaunchError(
                f"{folder.name!r}, the name for this work, is that of a run; choose another with "
                "--set name=…"
            )
        if is_under_way(folder, console):
            if folder.config() != building:
                raise LaunchError(
                    f"Targets of {config.name!r} are being built with other settings; "
                    f"`stillhouse stop {folder.name}` first"
                )
            console.print(f"{folder.name} is under way already; following it", highlight=False)
            return follow(folder, console)
        folder.remove()  # what it has built lies elsewhere
    return launch_and_follow(building, address, console, "targets")


def _building_config(
    config: RunConfig, num_steps: int | None, num_teachers: int | None
) -> RunConfig:
    """A run's configuration, for one CPU host that asks for the same rows."""
    if config.teacher is None or not config.distilled:
        raise ValueError(f"{config.name} is not distilled: it needs no targets")
    if not config.teacher.cache_bytes:
        raise ValueError(f"{config.name} keeps no targets: set teacher.cache_bytes above 0")
    values = config.model_dump(mode="json")
    changes = {"name": f"{config.name}-targets", "start_from": None, "cluster": {}, "mesh": {}}
    values |= {**changes, "steps": num_steps or config.steps}
    values["batch"]["microbatches"] = 1
    values["optimizer"]["warmup_steps"] = 0
    values["evaluation"]["enabled"] = False
    values["tracking"]["wandb"] = "off"
    values["teacher"]["replicas"] = num_teachers or config.teacher.replicas
    return parse_run(values, "targets build")
