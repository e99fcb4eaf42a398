"""Targets stored ahead of a run, by a run of its own that trains nothing."""

from rich.console import Console

from configs.load import parse_run
from configs.run import RunConfig
from orchestrator.follow import follow, is_under_way
from orchestrator.recipe import launch_and_follow
from orchestrator.run_folder import RunFolder


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
    building = building_config(config, num_steps, num_teachers)
    folder = RunFolder.of(building)
    if folder.exists():
        if folder.identity().get("work") != "targets":
            raise ValueError(
                f"{folder.name!r}, the name for this work, is that of a run; choose another with "
                "--set name=…"
            )
        if is_under_way(folder, console):
            if folder.config() != building:
                raise ValueError(
                    f"Targets of {config.name!r} are being built with other settings; "
                    f"`stillhouse stop {folder.name}` first"
                )
            console.print(f"{folder.name} is under way already; following it", highlight=False)
            return follow(folder, console)
        folder.remove()  # what it has built lies elsewhere
    return launch_and_follow(building, address, console, "targets")


def building_config(
    config: RunConfig, num_steps: int | None = None, num_teachers: int | None = None
) -> RunConfig:
    """A run's configuration, for one CPU host that asks for the same rows.

    Args:
        num_steps: how many steps' targets are built; None: all.
        num_teachers: replicas; None: the run's.

    Raises:
        ValueError: the run needs no targets, or keeps none.
    """
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
