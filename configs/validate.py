"""From the values of a file to a configuration, with every fault at once."""

import copy
import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError

from configs.checks import find_faults
from configs.fault import NO_VALUE, ConfigError, Fault
from configs.run import RecipeConfig, RunConfig
from configs.section import in_words, is_index, pattern_of, settings_of
from model.config import MODEL_PRESETS

# Sound values that stand in for faulty ones while the others are checked.
_SOUND: dict[str, Any] = {
    "name": "run",
    "steps": 1,
    "model": {"preset": "tiny", **MODEL_PRESETS["tiny"].model_dump()},
    "data": {
        "sources": [{"name": "source", "path": "path"}],
        "tokenizer": {"kind": "train", "vocab_size": MODEL_PRESETS["tiny"].vocab_size},
    },
    "teacher": {"checkpoint": "run"},
    "start_from": {"checkpoint": "run"},
}
# Groups are only checked as a whole once their settings are sound, so a few rounds are needed.
_MOST_ROUNDS = 8

# `model.preset` is read before the sizes are, so it is no field of them.
_RUN = {setting.path: setting.field for setting in settings_of(RunConfig)}
_RECIPE = {setting.path: setting.field for setting in settings_of(RecipeConfig)}
_RUN_PATHS = (*_RUN, "model.preset")


def parse_run(values: dict[str, Any], where: str) -> RunConfig:
    """The configuration of one run. Raises ConfigError with all faults; `where` names the file."""
    rest = copy.deepcopy(values)
    faults: list[Fault] = []
    unsound: set[str] = set()
    for _ in range(_MOST_ROUNDS):
        try:
            config = RunConfig.model_validate(rest)
        except ValidationError as error:
            found = list(_faults_of(error, RunConfig))
            faults += [fault for fault in found if not fault.touches(unsound)]
            for fault in found:
                path = fault.path
                while path in unsound and "." in path:  # without it the group is no better
                    path = path.rpartition(".")[0]
                unsound.add(path)
                _replace(rest, path.split("."))
            continue
        faults += [fault for fault in find_faults(config) if not fault.touches(unsound)]
        if not faults:
            return config
        break
    raise ConfigError(where, faults)


def parse_recipe(values: dict[str, Any], where: str) -> RecipeConfig:
    """The configuration of a recipe. Raises ConfigError with all faults."""
    try:
        return RecipeConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(where, list(_faults_of(error, RecipeConfig))) from None


def _faults_of(error: ValidationError, section: type[BaseModel]) -> Iterable[Fault]:
    for detail in error.errors():
        context = detail.get("ctx", {})
        path = ".".join(str(part) or "''" for part in detail["loc"])
        value = detail["input"]
        if detail["type"] == "group_fault":
            group, name = path, context["setting"]
            path = f"{group}.{name}"
            involves = tuple(f"{group}.{other}" for other in context["involves"])
            value = value.get(name, NO_VALUE) if name != "sources" else NO_VALUE
            yield Fault(path, value, context["message"], involves)
        elif detail["type"] == "too_short" and len(value) >= context["min_length"]:
            continue  # pydantic counts sound items only; the others have faults of their own
        elif detail["type"] == "value_error":
            message = detail["msg"].removeprefix("Value error, ")
            yield Fault(path, NO_VALUE if isinstance(value, dict) else value, message)
        elif detail["type"] in ("extra_forbidden", "invalid_key"):
            yield Fault(path, NO_VALUE, _unknown(path, section))
        else:
            missing = detail["type"] == "missing"
            yield Fault(path, NO_VALUE if missing else value, _wanted(path, section, missing))


def _wanted(path: str, section: type[BaseModel], missing: bool) -> str:
    field = (_RUN if section is RunConfig else _RECIPE).get(pattern_of(path))
    if field is None:  # an item of a list
        words = "text" if section is RecipeConfig or "clude" in path else "a group of settings"
        return f"should be {words}"
    words = in_words(field)
    about = f" ({field.description.split(';')[0].rstrip('.')})" if field.description else ""
    if missing:
        return f"is missing; give {words}{about}"
    return f"should be {words}{about}" if " like " in words else f"should be {words}"


def _unknown(path: str, section: type[BaseModel]) -> str:
    """Says which setting was probably meant."""
    group, _, name = pattern_of(path).rpartition(".")
    if section is RecipeConfig:
        if pattern_of(path) in _RUN_PATHS:
            return f"is a setting of a run; write `settings: {{{path}: …}}` for all of a recipe's"
        siblings, paths = list(_RECIPE), []
    else:
        siblings = [each for each in _RUN_PATHS if each.rpartition(".")[0] == group]
        paths = list(_RUN_PATHS)
    near = _nearest(name, siblings, 0.6) or _nearest(name, paths, 0.8)
    if near is not None:
        return f"is not a setting; did you mean `{near}`?"
    known = ", ".join(each.rpartition(".")[2] for each in siblings)
    return f"is not a setting; {f'`{group}`' if group else 'the file'} can have: {known}"


def _nearest(name: str, paths: list[str], cutoff: float) -> str | None:
    by_name: dict[str, str] = {}
    for path in paths:
        by_name.setdefault(path.rpartition(".")[2], path)
    matches = difflib.get_close_matches(name, by_name, 1, cutoff)
    matches += [known for known in by_name if name in known.split("_")]  # `lr` for `peak_lr`
    return by_name[matches[0]] if matches else None


def _replace(values: dict[Any, Any], path: list[str]) -> None:
    """Puts the sound value in the place of a faulty one, or removes it where none is needed."""
    node: Any = values
    for part in path[:-1]:
        node = _children(node).get(part)
    key = next((key for key in _children(node) if str(key) == path[-1]), path[-1])
    sound: Any = _SOUND
    for part in path:
        sound = _children(sound).get("0" if is_index(part) else part)
    if isinstance(node, list):
        node[int(key)] = "text" if sound is None else copy.deepcopy(sound)
    elif isinstance(node, dict) and sound is not None:
        node[key] = copy.deepcopy(sound)
    elif isinstance(node, dict):
        node.pop(key, None)


def _children(node: Any) -> dict[Any, Any]:
    """What lies directly below a map or a list, by key or by number; nothing below a value."""
    if isinstance(node, list):
        return {str(index): item for index, item in enumerate(node)}
    return node if isinstance(node, dict) else {}
