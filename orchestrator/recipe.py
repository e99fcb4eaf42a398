"""Runs followed to their end: one, a resumed one, or several in a row on one Ray."""

from typing import Any

from rich.console import Console

from configs.load import recipe_configs
from configs.run import RecipeConfig, RunConfig
from configs.settings import changed_settings
from orchestrator.follow import follow, is_under_way
from orchestrator.launch import (
    check_address,
    connect,
    create_run,
    start_controller,
)
from orchestrator.report import comparison_table, write_report
from orchestrator.run_folder import RunFolder
from workers.code_identity import software
from workers.jobs import Work
from workers.record import EventWriter


def launch_and_follow(
    config: RunConfig, address: str | None, console: Console, work: Work = "train"
) -> int:
    """Starts a new run and shows it until it ends; returns the exit code."""
    check_address(address)
    folder = create_run(config, work)
    run_id = folder.identity()["run_id"]
    try:
        start_controller(folder, connect(address))
    except BaseException:
        folder.remove_unused(run_id)  # nothing half-made is left behind
        raise
    return follow(folder, console)


def resume_and_follow(
    folder: RunFolder, settings: tuple[str, ...], address: str | None, console: Console
) -> int:
    """Continues a run; settings that may change are changed, and the change is recorded.

    Raises:
        ConfigError: a setting that may not change, or does not fit.
    """
    if is_under_way(folder, console):
        if settings:
            raise ValueError(f"{folder.name} is under way; stop it before changing its settings")
        console.print(f"{folder.name} is under way; following it", highlight=False)
        return follow(folder, console)
    check_address(address)
    config = folder.config()
    changed = changed_settings(config, settings)
    place = connect(address)
    _reopen(folder, config, changed)
    start_controller(folder, place)
    return follow(folder, console)


def run_recipe(recipe: RecipeConfig, address: str | None, console: Console) -> int:
    """Runs each part that is not finished yet, then compares them all."""
    configs = recipe_configs(recipe)
    for config in configs:
        folder = RunFolder.of(config)
        if folder.exists() and folder.config() != config:
            raise ValueError(
                f"The run {config.name!r} was started with other settings; `stillhouse rm "
                f"{config.name}` removes it, and `--set storage=…` keeps it and starts elsewhere"
            )
        if (folder.status() or {}).get("state") == "finished":
            console.print(f"{config.name} is finished already", highlight=False)
            continue
        if folder.exists():
            code = resume_and_follow(folder, (), address, console)
        else:
            code = launch_and_follow(config, address, console)
        if code:
            return code
    folders = [RunFolder.of(config) for config in configs]
    console.print(comparison_table(folders))
    console.print(f"Report: {write_report(folders, None)}", highlight=False, soft_wrap=True)
    return 0


def _reopen(folder: RunFolder, config: RunConfig, changed: RunConfig) -> None:
    """Makes an ended run ready to go on; what has changed is said in its events."""
    events = EventWriter(folder.url, f"resume-{_life()}")
    differences = _differences(config.model_dump(mode="json"), changed.model_dump(mode="json"))
    if differences:
        folder.write_config(changed)
        events.say("settings_changed", changes=differences)
    identity = folder.identity()
    if identity["software"] != software():
        events.say("software_changed", before=identity["software"], now=software())
        folder.write_identity({**identity, "software": software()})
    snapshot = folder.snapshot()
    if snapshot is not None:
        state = "recovering" if snapshot["facts"] else "preparing"
        teachers = changed.teacher.replicas if changed.teacher else 0
        fresh = {"state": state, "stop_asked": False, "reason": None, "used": {}, "recent": {}}
        fresh |= {"relaunch_at_s": 0.0, "teachers": teachers, "scaling": {}}
        folder.write_snapshot({**snapshot, **fresh})
    for name, _ in folder.commands():
        folder.take(name)
    events.close()


def _differences(before: Any, now: Any, path: str = "") -> dict[str, list[Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        return {
            name: change
            for key in before.keys() | now.keys()
            for name, change in _differences(
                before.get(key), now.get(key), f"{path}.{key}" if path else key
            ).items()
        }
    return {} if before == now else {path: [before, now]}


def _life() -> str:
    import uuid

    return uuid.uuid4().hex[:8]
