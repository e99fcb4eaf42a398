"""Reads a preset or a YAML file, applies `--set`, and reports every fault at once."""

import copy
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from configs.checks import Fault, find_faults
from configs.run import RecipeConfig, RunConfig

_PRESETS = resources.files("configs.presets")


class ConfigError(ValueError):
    """A configuration that cannot be run; its message lists every fault that was found."""

    def __init__(self, where: str, faults: list[Fault]):
        self.faults = faults
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        super().__init__("\n".join([f"{where}: {count}", *(f"  {fault}" for fault in faults)]))


def preset_names() -> list[str]:
    """Names of the presets that ship with the project, sorted."""
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in _PRESETS.iterdir()
        if entry.name.endswith(".yaml")
    )


def load_config(source: str, settings: tuple[str, ...] = ()) -> RunConfig | RecipeConfig:
    """The configuration named by a preset or a file, with `a.b=value` settings applied.

    Raises:
        ConfigError: the file, its base or a setting is missing or malformed, or values are
            impossible, each named by its dotted path.
    """
    values = read_source(source)
    for setting in settings:
        apply_setting(values, setting)
    return parse_recipe(values, source) if "recipe" in values else parse_run(values, source)


def parse_run(values: dict[str, Any], where: str) -> RunConfig:
    """Validates the values of one run. Raises ConfigError with all faults."""
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        faults = [_fault(detail) for detail in error.errors()]
        raise ConfigError(where, faults + _faults_of_the_rest(values, error)) from None
    if faults := find_faults(config):
        raise ConfigError(where, faults)
    return config


def parse_recipe(values: dict[str, Any], where: str) -> RecipeConfig:
    """Validates the values of a recipe. Raises ConfigError with all faults."""
    try:
        return RecipeConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(where, [_fault(detail) for detail in error.errors()]) from None


def read_source(source: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """The raw values of a preset or file with everything it `extends:` merged in."""
    if source in seen:
        chain = " → ".join([*seen, source])
        raise ConfigError(source, [Fault("extends", source, f"extends itself ({chain})")])
    values = _parse_yaml(source)
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError(source, [Fault("extends", base, "should be one preset or file")])
    beside = Path(source).parent / base
    if base not in preset_names() and not Path(base).is_absolute() and beside.exists():
        base = str(beside)
    return merge(read_source(base, (*seen, source)), values)


def _parse_yaml(source: str) -> dict[str, Any]:
    if source in preset_names():
        text = (_PRESETS / f"{source}.yaml").read_text()
    elif Path(source).is_file():
        text = Path(source).read_text()
    else:
        known = ", ".join(preset_names())
        raise ConfigError(
            source, [Fault("", source, f"neither a file nor a preset (presets: {known})")]
        )
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(source, [Fault("", source, f"not valid YAML: {error}")]) from None
    if not isinstance(values, dict):
        raise ConfigError(source, [Fault("", source, "should hold `setting: value` lines")])
    return values


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes` laid over it; maps merge key by key, everything else replaces."""
    merged = copy.deepcopy(base)
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            if "preset" in value:
                merged[key] = copy.deepcopy(value)
            else:
                merged[key] = merge(merged[key], value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged


def apply_setting(values: dict[str, Any], setting: str) -> None:
    """Applies one `a.b=value` in place; the value is read as YAML."""
    path, equals, text = setting.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError("--set", [Fault(path, setting, "should look like a.b=value")])
    set_path(values, keys, _parse_value(path, text))


def _parse_value(path: str, text: str) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError("--set", [Fault(path, text, f"not valid YAML: {error}")]) from None
    if isinstance(value, str):
        # YAML 1.1 reads 1e-3 as text; people mean the number.
        try:
            return float(value) if "e" in value.lower() else value
        except ValueError:
            return value
    return value


def set_path(values: dict[str, Any], keys: list[str], value: Any) -> None:
    """Sets `values[keys[0]][keys[1]]…`; numbers in `keys` index lists."""
    node: Any = values
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                path = ".".join(keys[: depth + 1])
                raise ConfigError("--set", [Fault(path, key, f"no such item of {len(node)}")])
            key = int(key)
        elif not isinstance(node, dict):
            path = ".".join(keys[:depth])
            raise ConfigError("--set", [Fault(path, node, "is a value, not a group of settings")])
        elif not last and node.get(key) is None:
            node[key] = {}
        if last:
            node[key] = value
        else:
            node = node[key]


def _fault(detail: Any) -> Fault:
    path = ".".join(str(part) for part in detail["loc"])
    value = detail.get("input")
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        message = "is not a setting"
    elif detail["type"] == "missing":
        message, value = "is missing", None
    return Fault(path, value, message[:1].lower() + message[1:])


def _faults_of_the_rest(values: dict[str, Any], error: ValidationError) -> list[Fault]:
    """Impossible combinations among the values that are sound by themselves.

    Faulty values give way to their defaults; where one has none, or a default would be
    compared, nothing is said about it.
    """
    rest = copy.deepcopy(values)
    dropped = []
    for detail in error.errors():
        dropped.append(".".join(str(part) for part in detail["loc"]))
        node: Any = rest
        for part in detail["loc"][:-1]:
            node = node.get(part) if isinstance(node, dict) else None
        if isinstance(node, dict) and detail["loc"]:
            node.pop(detail["loc"][-1], None)
    try:
        config = RunConfig.model_validate(rest)
    except ValidationError:
        return []
    return [
        fault
        for fault in find_faults(config)
        if not any(path in fault.involves for path in dropped)
    ]
