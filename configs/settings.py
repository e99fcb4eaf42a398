"""Settings that change when a run is resumed, and those that may not."""

import copy
from collections.abc import Iterator
from typing import Any

from configs.fault import NO_VALUE, ConfigError, Fault, shown
from configs.load import apply_setting
from configs.run import RunConfig
from configs.section import pattern_of, settings_of
from configs.validate import parse_run
from model.config import MODEL_PRESETS

_WHERE = "resume"
_CHANGEABLE = {setting.path for setting in settings_of(RunConfig) if setting.changeable}


def changed_settings(config: RunConfig, settings: tuple[str, ...]) -> RunConfig:
    """The configuration of a run with `a.b=value` settings applied, as far as it may change.

    `model.preset` stands for the sizes of that name with the run's own vocabulary. A setting
    that repeats the run's value changes nothing.

    Raises:
        ConfigError: a setting is fixed for the life of a run, or the result cannot be run; all
            faults at once.
    """
    before = config.model_dump(mode="json")
    values = copy.deepcopy(before)
    faults: list[Fault] = []
    for setting in settings:
        try:
            apply_setting(values, setting)
        except ConfigError as error:
            faults += error.faults
    if values["model"] is not None and "preset" in values["model"]:
        values["model"] = _expanded(values["model"], before["model"])
    changed = None
    try:
        changed = parse_run(values, _WHERE)
        values = changed.model_dump(mode="json")
    except ConfigError as error:
        faults += error.faults
    fixed = list(_fixed_faults(before, values))
    known = {fault.path for fault in fixed}
    faults = [*fixed, *(fault for fault in faults if fault.path not in known)]
    if faults or changed is None:
        raise ConfigError(_WHERE, faults)
    return changed


def _expanded(model: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """The model with its preset's sizes, but for those that other settings have changed."""
    if not isinstance(model["preset"], str) or model["preset"] not in MODEL_PRESETS:
        return model
    own = {key: value for key, value in model.items() if before.get(key, NO_VALUE) != value}
    own.pop("preset")
    vocabulary = {key: before[key] for key in ("vocab_size", "num_embeddings")}
    return {**MODEL_PRESETS[model["preset"]].model_dump(mode="json"), **vocabulary, **own}


def _fixed_faults(before: Any, now: Any, path: str = "") -> Iterator[Fault]:
    """What differs between the values of two configurations and may not."""
    if before == now or pattern_of(path) in _CHANGEABLE:
        return
    pairs = None
    if isinstance(before, dict) and isinstance(now, dict):
        pairs = [(key, before[key], now.get(key)) for key in before]
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = [(str(index), *pair) for index, pair in enumerate(zip(before, now, strict=True))]
    if pairs is None:
        message = (
            f"is fixed for the life of a run: it is {shown(before)} and cannot become "
            f"{shown(now)}; start a new run that has it, with start_from.checkpoint set to this run"
        )
        yield Fault(path, NO_VALUE, message)
        return
    for key, old, new in pairs:
        yield from _fixed_faults(old, new, f"{path}.{key}" if path else key)
