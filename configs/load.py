"""Reads a preset or a YAML file with what it extends, and applies `--set`."""

import copy
import difflib
import os
from importlib import resources
from pathlib import Path
from typing import Any

from configs.fault import NO_VALUE, ConfigError, Fault, cut
from configs.run import RecipeConfig, RunConfig
from configs.section import is_index
from configs.validate import parse_recipe, parse_run
from configs.yaml_text import MOST_NESTED, parse_yaml

_PRESETS = resources.files("configs.presets")


def preset_names() -> list[str]:
    """Names of the presets that ship with the project, sorted."""
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in _PRESETS.iterdir()
        if entry.name.endswith(".yaml")
    )


def load_config(source: str, settings: tuple[str, ...] = ()) -> RunConfig | RecipeConfig:
    """The configuration named by a preset or a file, with `a.b=value` settings applied.

    A recipe hands settings that are not its own on to all of its runs.

    Raises:
        ConfigError: the file, its base or a setting is missing or malformed, or values are
            impossible, each named by its dotted path.
    """
    values = read_source(source)
    is_recipe = "recipe" in values
    faults = []
    for setting in settings:
        try:
            if is_recipe:
                _apply_to_recipe(values, setting)
            else:
                apply_setting(values, setting)
        except ConfigError as error:
            faults += error.faults
    try:
        config = _parse_recipe(values, source) if is_recipe else parse_run(values, source)
    except ConfigError as error:
        raise ConfigError(source, faults + error.faults) from None
    if faults:
        raise ConfigError(source, faults)
    return config


def _parse_recipe(values: dict[str, Any], source: str) -> RecipeConfig:
    recipe = parse_recipe(values, source)
    runs = tuple(_beside(source, run) for run in recipe.recipe)
    faults = [
        Fault(f"recipe.{index}", recipe.recipe[index], _no_source(run))
        for index, run in enumerate(runs)
        if not _is_source(run)
    ]
    if faults:
        raise ConfigError(source, faults)
    return recipe.model_copy(update={"recipe": runs})


def _apply_to_recipe(values: dict[str, Any], setting: str) -> None:
    path, value = _parse_setting(setting)
    first = path.split(".")[0]
    settings = values.get("settings") or {}
    if path == "settings" or first in RecipeConfig.model_fields.keys() - {"settings"}:
        set_path(values, path.split("."), value)
    elif isinstance(settings, dict):
        path = path.removeprefix("settings.")
        # Put last, so that it wins over the same setting written as a group.
        settings.pop(path, None)
        values["settings"] = {**settings, path: value}


def read_source(source: str) -> dict[str, Any]:
    """The raw values of a preset or file with everything it `extends:` merged in.

    Raises:
        ConfigError: a file is missing or malformed, or extends itself.
    """
    chain = [source]
    layers = []
    while True:
        values = _read_one(chain[-1])
        base = values.pop("extends", None)
        layers.append(values)
        if base is None:
            break
        if not isinstance(base, str):
            raise ConfigError(chain[-1], [Fault("extends", base, "should be one preset or file")])
        chain.append(_beside(chain[-1], base))
        if chain[-1] in chain[:-1]:
            message = f"goes round in a circle: {' → '.join(chain)}"
            raise ConfigError(chain[-2], [Fault("extends", base, message)])
        if not _is_source(chain[-1]):
            raise ConfigError(chain[-2], [Fault("extends", base, _no_source(base))])
    merged: dict[str, Any] = {}
    for values in reversed(layers):
        merged = merge(merged, values)
    return merged


def _beside(source: str, name: str) -> str:
    """What a file calls `name`: a preset, or a file whose path starts at that file's folder."""
    if name in preset_names() or source in preset_names():
        return name
    beside = str(Path(source).parent / name)
    return str(Path(beside).resolve()) if _is_source(beside) else name


def _read_one(source: str) -> dict[str, Any]:
    if source in preset_names():
        content = (_PRESETS / f"{source}.yaml").read_bytes()
    elif _is_source(source):
        content = Path(source).read_bytes()
    else:
        raise ConfigError(source, [Fault("", NO_VALUE, _no_source(source))])
    try:
        values = parse_yaml(content.decode())
    except UnicodeDecodeError:
        raise ConfigError(source, [Fault("", NO_VALUE, "is not UTF-8 text")]) from None
    except ValueError as error:
        raise ConfigError(source, [Fault("", NO_VALUE, str(error))]) from None
    if not isinstance(values, dict):
        message = "should hold lines of the form `setting: value`"
        raise ConfigError(source, [Fault("", NO_VALUE, message)])
    return values


def _is_source(name: str) -> bool:
    """Whether there is a preset or a file of that name."""
    # Unlike `Path.is_file`, it takes a name that no file can have for one that none has.
    return name in preset_names() or os.path.isfile(name)


def _no_source(name: str) -> str:
    near = difflib.get_close_matches(name, preset_names(), 1)
    hint = f"did you mean `{near[0]}`?" if near else f"the presets are {', '.join(preset_names())}"
    return f"there is no such file, and no such preset; {hint}"


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it; maps merge key by key, everything else replaces.

    A `preset` in a group starts that group anew: the base's sizes are not those of the preset.
    """
    merged = copy.deepcopy(base)
    for key, value in changes.items():
        below = merged.get(key)
        if isinstance(value, dict) and isinstance(below, dict) and "preset" not in value:
            merged[key] = merge(below, value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def apply_setting(values: dict[str, Any], setting: str) -> None:
    """Applies one `a.b=value` in place; the value is read as YAML. Raises ConfigError."""
    path, value = _parse_setting(setting)
    set_path(values, path.split("."), value)


def _parse_setting(setting: str) -> tuple[str, Any]:
    path, equals, text = setting.partition("=")
    path = path.strip()
    if not equals or not all(path.split(".")):
        raise _refused("", f"`--set {cut(setting)}` should look like a.b=value")
    if path.count(".") >= MOST_NESTED:
        raise _refused(cut(path), "is no setting: none lies so deep")
    if not text.strip():
        raise _refused(path, "is set to nothing; write null to unset it")
    try:
        return path, parse_yaml(text)
    except ValueError as error:
        raise _refused(path, str(error)) from None


def set_path(values: dict[str, Any], keys: list[str], value: Any) -> None:
    """Sets `values[keys[0]][keys[1]]…`; numbers in `keys` index lists.

    Groups that are not there yet are made. Raises ConfigError where a list lacks the item or a
    value is in the way.
    """
    node: Any = values
    for depth in range(len(keys) - 1):
        key = _key(node, keys, depth)
        child = node[key] if isinstance(node, list) else node.get(key)
        if child is None:
            child = node[key] = [] if is_index(keys[depth + 1]) else {}
        node = child
    node[_key(node, keys, len(keys) - 1)] = value


def _key(node: Any, keys: list[str], depth: int) -> Any:
    """What `keys[depth]` is called in `node`: a key of a map, or an index of a list."""
    here, key = ".".join(keys[:depth]), keys[depth]
    if isinstance(node, dict):
        return key
    if not isinstance(node, list):
        raise _refused(here, "is a value and has no settings below it")
    if not is_index(key):
        raise _refused(here, f"is a list; name an item of it, such as `{here}.0.{key}`")
    if int(key) >= len(node):
        items = f"has the items 0 to {len(node) - 1}" if node else "is empty"
        raise _refused(f"{here}.{key}", f"is not there: the list {items}")
    return int(key)


def _refused(path: str, message: str) -> ConfigError:
    return ConfigError("--set", [Fault(path, NO_VALUE, message)])


def recipe_configs(recipe: RecipeConfig) -> list[RunConfig]:
    """The runs of a recipe, with its storage and settings.

    Raises:
        ConfigError: any of them is faulty.
    """
    configs = []
    for source in recipe.recipe:
        values = read_source(source)
        if "recipe" in values:
            fault = Fault("recipe", source, "is a recipe itself; name single runs")
            raise ConfigError(recipe.name, [fault])
        values["storage"] = recipe.storage
        for path, value in recipe.settings.items():
            set_path(values, path.split("."), value)
        configs.append(parse_run(values, source))
    return configs
