"""Reading configurations: YAML, `--set`, files, presets and recipes."""

import copy
import re

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st

from configs.load import (
    ConfigError,
    load_config,
    merge,
    preset_names,
    read_source,
    set_path,
)
from configs.run import RunConfig
from configs.yaml_text import parse_yaml
from tests.helpers.configurations import RUN, TEACHER, faults, recipe, run, write

# YAML, and `--set`.


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("1e-3", 1e-3), ("3E5", 3e5), (".5", 0.5), ("-1.5e+2", -150.0), ("7", 7)),
        *(("010", 10), ("1:30", "1:30"), ("2024-01-01", "2024-01-01"), ("1_000", "1_000")),
        *(("off", "off"), ("yes", "yes"), ("No", "No"), ("true", True), ("FALSE", False)),
        *(("null", None), ("~", None), ("", None), ("none", "none"), ("e5", "e5")),
        *(("[a, 1]", ["a", 1]), ("{a: {b: 1e3}}", {"a": {"b": 1000.0}}), ("'1'", "1")),
    ],
)
def test_plain_values_of_yaml(text, value):
    result = parse_yaml(text)
    assert result == value
    assert type(result) is type(value)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=8,
    )
)
def test_what_is_written_is_read_again(value):
    assert parse_yaml(yaml.safe_dump(value)) == value


def test_merge_keys_work_and_double_keys_are_refused():
    assert parse_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}")["b"] == {"x": 1, "y": 3}
    with pytest.raises(ValueError, match=r"'x' is set twice in one group \(line 1, column 1\)"):
        parse_yaml("x: 1\ny: 2\nx: 3")
    with pytest.raises(ValueError, match=r"not valid YAML: .*\(line 2"):
        parse_yaml("x: [1\ny: 2")


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        *(("!!int x", "'x' is no whole number"), ("!!float x", "'x' is no number")),
        *(("!!bool x", "'x' is no true or false"), ("9" * 5000, "9… is no whole number that can")),
        *(("'\\ud800'", None), ('"\\ud800"', "is no text"), ('{"\\ud800": 1}', "is no text")),
        *(("[" * 400, "nested more than 50 deep"), ("{a: " * 400, "nested more than 50 deep")),
        *(("!!timestamp x", "could not determine a constructor"), ("&a [*a]", "recursive")),
    ],
)
def test_values_that_cannot_be_read_are_told_with_their_place(value, problem):
    if problem is None:
        assert parse_yaml(value) == r"\ud800"
        return
    with pytest.raises(ValueError, match=rf"not valid YAML: .*{problem}.* \(line 2, column \d+\)"):
        parse_yaml(f"a: 1\nb: {value}")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("steps", "`--set steps` should look like a.b=value"),
        ("=3", "should look like a.b=value"),
        ("a..b=3", "should look like a.b=value"),
        ("steps=", "steps: is set to nothing; write null to unset it"),
        ("steps=[1", "steps: not valid YAML"),
        ("data.sources.1.path=x", "data.sources.1: is not there: the list has the items 0 to 0"),
        ("data.sources.path=x", "is a list; name an item of it, such as `data.sources.0.path`"),
        ("start_from.0=x", None),
        ("steps.x=3", "steps: is a value and has no settings below it"),
        ("other.0.x=3", "other.0: is not there: the list is empty"),
        ("data.sources.²=3", "is a list; name an item of it"),
        (f"data.sources.{'9' * 5000}.path=3", "is a list; name an item of it"),
        (f"{'a.' * 2000}b=3", "is no setting: none lies so deep"),
        ("data.sources=&a [*a]", "data.sources: not valid YAML: .*recursive"),
    ],
)
def test_settings_that_cannot_be_applied(setting, message):
    if message is None:
        assert "start_from.0" in faults(setting)
        return
    with pytest.raises(ConfigError) as caught:
        run(setting)
    assert re.search(re.escape(message).replace(r"\.\*", ".*"), str(caught.value))


def test_settings_are_applied_in_order():
    config = run("optimizer.peak_lr=3e-4", "steps=1e3", "data.sources.0.path=here", "steps=20")
    assert (config.optimizer.peak_lr, config.steps) == (3e-4, 20)
    assert config.data.sources[0].path == "here"
    assert run(*TEACHER, "teacher=null", "objective.kind=next_token").teacher is None


keys = st.text("abc", min_size=1, max_size=2)
trees = st.dictionaries(
    keys,
    st.recursive(st.integers() | st.none(), lambda t: st.dictionaries(keys, t, max_size=3)),
    max_size=3,
)


@given(trees, trees)
def test_merge_keeps_what_is_not_changed(base, changes):
    before = copy.deepcopy((base, changes))
    merged = merge(base, changes)
    assert (base, changes) == before
    assert merge(base, {}) == merge({}, base) == merge(base, base) == base
    assert merge(merged, changes) == merged
    assert merged.keys() == base.keys() | changes.keys()
    for key in base.keys() - changes.keys():
        assert merged[key] == base[key]


@given(trees, st.lists(keys, min_size=1, max_size=3), st.integers())
def test_set_path_changes_one_value(tree, path, value):
    changed = copy.deepcopy(tree)
    try:
        set_path(changed, path, value)
    except ConfigError:
        assume(False)
    node = changed
    for key in path:
        node = node[key]
    assert node == value
    nested = value
    for key in reversed(path):
        nested = {key: nested}
    assert merge(tree, nested) == changed


def test_a_model_preset_starts_the_group_anew():
    base = {"model": {"num_layers": 3, "width": 5}, "mesh": {"data": 1}}
    changes = {"model": {"preset": "tiny"}, "mesh": {"fsdp": 2}}
    assert merge(base, changes) == {"model": {"preset": "tiny"}, "mesh": {"data": 1, "fsdp": 2}}
    config = run("model.num_embeddings=600")
    assert (config.model.vocab_size, config.model.embedding_rows) == (512, 600)


# Files.


def test_files_extend_each_other_from_their_own_folders(tmp_path):
    base = {**RUN, "steps": 5}
    write(tmp_path, "shared/base.yaml", yaml.safe_dump(base))
    write(tmp_path, "shared/middle.yaml", "extends: base.yaml\nbatch: {rows: 4}\nseed: 3")
    top = write(tmp_path, "top.yaml", "extends: shared/middle.yaml\nseed: 4")
    config = load_config(top, ("steps=6",))
    assert isinstance(config, RunConfig)
    assert (config.steps, config.batch.rows, config.seed) == (6, 4, 4)


def test_a_file_can_extend_a_preset(tmp_path):
    file = write(tmp_path, "tiny.yaml", "extends: tiny\nname: mine")
    config = load_config(file, ("data.sources.0.path=x",))
    assert (config.name, "tiny" in preset_names()) == ("mine", True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("extends: loop.yaml", r"extends: .*goes round in a circle: .*loop.yaml → .*loop.yaml"),
        ("extends: ../x/loop.yaml", "goes round in a circle"),
        ("extends: [a]", r'extends: \["a"\] should be one preset or file'),
        ("extends: nowhere.yaml", 'extends: "nowhere.yaml" there is no such file, and no such pre'),
        (f"extends: {'x' * 300}", "extends: .* there is no such file, and no such preset"),
        ('extends: "\\x00"', "extends: .* there is no such file, and no such preset"),
        ("a:\n  b: \x07", r"the character '\\x07' cannot stand in a file \(line 2, column 6\)"),
        ("- a", "should hold lines of the form"),
        ("", "should hold lines of the form"),
        ("just words", "should hold lines of the form"),
        ("a: [", "not valid YAML: .*line 1"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, text, message):
    file = write(tmp_path, "x/loop.yaml", text)
    with pytest.raises(ConfigError, match=message):
        read_source(file)


def test_a_file_of_another_encoding_is_refused(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        read_source(str(tmp_path / "latin.yaml"))


def test_a_mistyped_preset_is_told_its_neighbour():
    with pytest.raises(ConfigError, match="did you mean `tiny`"):
        load_config("tinny")
    with pytest.raises(ConfigError, match=r"the presets are .*tiny"):
        load_config("qqqqqq")


def test_faults_of_settings_and_of_the_file_come_together(tmp_path):
    file = write(tmp_path, "run.yaml", yaml.safe_dump({**RUN, "steps": 0}))
    with pytest.raises(ConfigError) as caught:
        load_config(file, ("data.sources.7.path=x", "seed=", "mesh.data=3"))
    assert [fault.path for fault in caught.value.faults] == [
        *("data.sources.7", "seed", "steps", "mesh", "batch.rows")
    ]


# Recipes.


def test_a_recipe_finds_its_runs_and_hands_settings_on(tmp_path):
    text = "settings: {data: {row_length: 32}, steps: 7}"
    config = recipe(tmp_path, "steps=9", "settings.seed=2", "storage=here", text=text)
    assert config.recipe == (str(tmp_path / "one.yaml"), "tiny")
    assert config.settings == {"data.row_length": 32, "steps": 9, "seed": 2}
    assert config.storage == "here"


def test_a_recipe_names_the_runs_that_are_not_there(tmp_path):
    file = write(tmp_path, "all.yaml", "name: all\nrecipe: [tiny, tinny, nowhere.yaml]")
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert [fault.path for fault in caught.value.faults] == ["recipe.1", "recipe.2"]
    assert "did you mean `tiny`?" in str(caught.value)


def test_a_recipe_with_settings_of_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError) as caught:
        recipe(tmp_path, text="steps: 3\nnmae: x\nstorage: ''")
    assert {fault.path: fault.message for fault in caught.value.faults} == {
        "storage": "should be text that is not empty",
        "steps": "is a setting of a run; write `settings: {steps: …}` for all of a recipe's",
        "nmae": "is not a setting; did you mean `name`?",
    }
