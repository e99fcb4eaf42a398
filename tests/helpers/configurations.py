"""Configurations for tests, by settings."""

import copy
from pathlib import Path

import pytest
import yaml

from configs.load import (
    ConfigError,
    apply_setting,
    load_config,
    parse_run,
)
from configs.run import RecipeConfig, RunConfig

RUN = {
    "name": "run",
    "steps": 10,
    "model": {"preset": "tiny"},
    "data": {
        "sources": [{"name": "text", "path": "text"}],
        "tokenizer": {"kind": "train", "vocab_size": 512},
        "row_length": 64,
    },
}
TEACHER = ("objective.kind=distill", "teacher.checkpoint=other")
TPU = ("cluster.accelerator=v4", "cluster.topology=2x2x2", "mesh.fsdp=4")


def values(*settings: str) -> dict:
    result = copy.deepcopy(RUN)
    for setting in settings:
        apply_setting(result, setting)
    return result


def run(*settings: str) -> RunConfig:
    return parse_run(values(*settings), "test")


def faults(*settings: str) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        run(*settings)
    said: dict[str, str] = {}
    for fault in caught.value.faults:
        said[fault.path] = f"{said.get(fault.path, '')}{fault}\n"
    return said


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    return str(folder / name)


def recipe(folder: Path, *settings: str, text: str = "") -> RecipeConfig:
    write(folder, "one.yaml", yaml.safe_dump(RUN))
    file = write(folder, "all.yaml", f"name: all\nrecipe: [one.yaml, tiny]\n{text}")
    config = load_config(file, settings)
    assert isinstance(config, RecipeConfig)
    return config
