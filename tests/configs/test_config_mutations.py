"""Mutated configuration files: each is a configuration, or refused by its faults."""

import copy
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.fault import ConfigError, Fault
from configs.load import load_config, preset_names, read_source, recipe_configs
from configs.run import RecipeConfig, RunConfig
from configs.section import settings_of
from configs.yaml_text import parse_yaml
from tests.helpers.environment import examples

NUM_EXAMPLES = examples(by_day=500, by_night=5000)
PRESETS = Path(__file__).parents[2] / "configs" / "presets"
PATHS = [setting.path.replace(".N", ".0") for setting in settings_of(RunConfig)]
NAMES = sorted({name for path in PATHS for name in path.split(".") if not name.isdigit()})

# What may stand in the place of a value, as YAML; "_" is a blank.
_ODD = r"""
    ~ null true no 0 -1 1.5 -0.0 .nan .inf -.inf 1e400 1e-400 0x10 2147483648 '1' x '' 2024-01-01
    1:30 [] {} [[[[1]]]] [null] [{}] {x:_1} {1:_2} {~:_1} {[a]:_1} {{a:_1}:_2} [1,x,[y]] {<<:_1}
    {<<:_[1]} &a_[*a] &a_{b:_*a} *unknown !!int_x !!float_x !!bool_x !!null_x !!timestamp_x
    !!timestamp_2024-02-31 !!binary_x !!set_{a} !!omap_[a] !!pairs_[1] !!map_1 !!seq_1 !!str_[1]
    !mine_x !!python/object/apply:os.getcwd_[] "\x00" "\ud800" |_x > -_1 a:_b:_c @x `x` %x
"""
JUNK = [
    *("", "9" * 5000, "1" + "0" * 40, "x" * 500, "[" * 400, "{a: " * 200, "é🔥\u2028", "x: [\n"),
    *(odd.replace("_", " ") for odd in _ODD.split()),
]
# What may stand anywhere in a file.
SCRAPS = [
    *("\t", "  ", "\n", ":", "- ", "[", "]", "{", "}", "#", "&a ", "*a", "!!x ", "? ", "| ", "%"),
    *("---\n", "...\n", "<<: ", "'", '"', "\\", "\x00", "\x07", "\ufeff", "é", "🔥", "\u2028"),
]
SETTINGS = [
    *("", "=", "steps", "=3", "a..b=3", ".=1", "steps=", "steps.x=3", "steps.0=1", "data.0=1"),
    *("data.sources.9.path=x", "data.sources.-1.path=x", "data.sources.x=1", "data.sources.²=1"),
    *("data.sources.0.0.0=1", "a.b.c.d.e=1", "model.preset.x=1", "steps==3", "seed=\x00", "é.ü=1"),
    *("teacher.groups.0.name=x", "recipe=x", "recipe.0=1", "settings.steps=3", "settings=3"),
    *(f"{'data.' * 2000}path=1", f"data.sources.{'9' * 5000}.path=1", "model=", "model.preset=x"),
]
EXTENSIONS = [
    *("loop.yaml", "./loop.yaml", "mutated.yaml", "missing.yaml", "tiny", "quickstart", "tinny"),
    *(".", "..", "/", "''", "~", "3", "[tiny]", "{a: tiny}", "x" * 300, '"\\x00"', "binary.yaml"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where mutated files lie, beside a base that extends them and one that is no text."""
    path = tmp_path_factory.mktemp("mutations")
    (path / "loop.yaml").write_text("extends: mutated.yaml\n")
    (path / "binary.yaml").write_bytes(b"\xff\xfe\x00steps")
    return path


@st.composite
def mutated(draw: st.DrawFn, text: str) -> str:
    """The text of a file after one to three mutations."""
    for _ in range(draw(st.integers(1, 3))):
        lines = text.splitlines() or [""]
        at = draw(st.integers(0, len(lines) - 1))
        line = lines[at]
        key, _, _ = line.partition(":")
        kind = draw(st.sampled_from(KINDS))
        if kind == "delete":
            del lines[at]
        elif kind == "duplicate":
            lines.insert(draw(st.integers(0, len(lines))), line)
        elif kind == "rename":
            indent = len(key) - len(key.lstrip(" -"))
            lines[at] = key[:indent] + draw(st.sampled_from(NAMES)) + line[len(key) :]
        elif kind == "value":
            lines[at] = f"{key}: {draw(st.sampled_from(JUNK))}"
        elif kind == "inner":  # one value of a line's group in braces
            parts = line.split(":")
            part = draw(st.integers(0, len(parts) - 1))
            lines[at] = ":".join([*parts[:part], f" {draw(st.sampled_from(JUNK))}", *parts[part:]])
        elif kind == "indent":
            lines[at] = draw(st.sampled_from([" ", "   ", "\t", "    "])) + line
        elif kind == "dedent":
            lines[at] = line.removeprefix(" ")
        elif kind == "scrap":
            place = draw(st.integers(0, len(line)))
            lines[at] = line[:place] + draw(st.sampled_from(SCRAPS)) + line[place:]
        elif kind == "cut":
            lines[at:] = [line[: draw(st.integers(0, len(line)))]]
        elif kind == "extends":
            lines = [each for each in lines if not each.startswith("extends:")]
            lines.append(f"extends: {draw(st.sampled_from(EXTENSIONS))}")
        else:
            path = draw(st.sampled_from(PATHS)).split(".")
            value = draw(st.sampled_from(JUNK))
            lines.append("".join(f"{name}: {{" for name in path) + value + "}" * len(path))
        text = "\n".join(lines)
    return text


KINDS = [
    *("delete", "duplicate", "rename", "value", "inner", "indent", "dedent", "scrap", "cut"),
    *("extends", "append"),
]
odd_settings = st.lists(
    st.sampled_from(SETTINGS)
    | st.builds("{}={}".format, st.sampled_from(PATHS), st.sampled_from(JUNK)),
    max_size=2,
)


@pytest.fixture
def reads_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that are read again and again are parsed once: most of the time goes into that."""
    parse = functools.cache(parse_yaml)
    monkeypatch.setattr("configs.load.parse_yaml", lambda text: copy.deepcopy(parse(text)))


@pytest.mark.usefixtures("reads_once")
@pytest.mark.parametrize("preset", preset_names())
def test_a_mutated_file_is_refused_by_what_was_mutated(preset: str, folder: Path):
    original = (PRESETS / f"{preset}.yaml").read_text()
    file = folder / "mutated.yaml"
    before = read_source(preset)

    @settings(
        max_examples=-(-NUM_EXAMPLES // len(preset_names())),
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(mutated(original), odd_settings)
    def check(text: str, changes: list[str]) -> None:
        file.write_text(text, encoding="utf-8", newline="")
        changes = [*_NEEDED.get(preset, ()), *changes]
        try:
            config = load_config(str(file), tuple(changes))
            if isinstance(config, RecipeConfig):
                recipe_configs(config)
        except ConfigError as error:
            assert error.faults
            assert str(error).encode(), "it can be printed"
            touched = paths_touched(before, str(file), changes)
            for fault in error.faults:
                assert is_named(fault, touched), f"{error}\ntouched: {touched}"

    check()


# What some presets leave to others, or to the command line.
_NEEDED = {
    "tiny": ("data.sources.0.path=text",),
    "quickstart-base": ("name=base", "steps=9", "model={preset: student-small}"),
}
# What may be wrong with a file as a whole.
_WHOLE = re.compile(r"\(line \d+, column \d+\)|should hold lines of the form|is not UTF-8 text")


def is_named(fault: Fault, touched: set[str] | None) -> bool:
    """Whether a fault says where to look; `touched` is None where the file cannot be read."""
    if fault.message.startswith("`--set "):
        return True
    if touched is None:
        return fault.path == "extends" or _WHOLE.search(fault.message) is not None
    if "recipe" in touched:  # without it, or with it, a file is of another kind altogether
        return fault.path != ""
    return fault.path != "" and fault.touches(touched)


def paths_touched(before: dict[str, Any], file: str, changes: list[str]) -> set[str] | None:
    """The settings that a mutated file and the changes set otherwise than the preset."""
    try:
        values = read_source(file)
    except ConfigError:
        return None
    touched = set(_differences(before, values))
    for path in (change.partition("=")[0] for change in changes):
        touched |= {path, _new_part(values, path.split("."))}
    # A preset stands for its whole group, and the settings of a recipe for those of its runs.
    touched |= {path.removesuffix(".preset") for path in touched}
    return touched | {path.removeprefix("settings.") for path in touched}


def _new_part(values: Any, path: list[str]) -> str:
    """What a change makes that was not there: the setting, or a group around it."""
    for depth, key in enumerate(path, start=1):
        if isinstance(values, list):
            values = {str(index): item for index, item in enumerate(values)}
        values = values.get(key) if isinstance(values, dict) else None
        if values is None:
            return ".".join(path[:depth])
    return ".".join(path)


def _differences(before: Any, now: Any, path: str = "") -> Iterator[str]:
    if isinstance(before, list) and isinstance(now, list):
        before, now = dict(enumerate(before)), dict(enumerate(now))
    if not (isinstance(before, dict) and isinstance(now, dict)):
        if repr(before) != repr(now):  # NaN differs from itself
            yield path
        return
    for key in before.keys() | now.keys():
        below = ".".join(filter(None, (path, str(key) or "''")))
        if key not in before or key not in now:
            yield below
        else:
            yield from _differences(before[key], now[key], below)
