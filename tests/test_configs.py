"""Reading, checking and changing of configurations: every fault by its path, all at once."""

import copy
import io
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st
from rich.console import Console

from configs.checks import DIVIDED_DIMS, find_faults, layout
from configs.load import (
    ConfigError,
    apply_setting,
    load_config,
    merge,
    parse_run,
    preset_names,
    read_source,
    set_path,
)
from configs.run import RecipeConfig, RunConfig
from configs.section import in_words, settings_of
from configs.settings import changed_settings
from configs.topology import GENERATIONS
from configs.yaml_text import parse_yaml
from model import sharding
from orchestrator.check import run_facts, show_check

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


@pytest.mark.parametrize(
    ("setting", "path", "message"),
    [
        ("steps=many", "steps", '"many" should be a whole number ≥ 1'),
        ("steps=0", "steps", "0 should be a whole number ≥ 1"),
        ("steps=1.5", "steps", "1.5 should be a whole number ≥ 1"),
        ("steps=true", "steps", "true should be a whole number ≥ 1"),
        ("steps=null", "steps", "null should be a whole number ≥ 1"),
        ("name=A b", "name", "small letters, digits"),
        ("storage=''", "storage", '"" should be text that is not empty'),
        ("seed=2147483648", "seed", "< 2147483648"),
        ("optimizer.peak_lr=.inf", "optimizer.peak_lr", "should be a number > 0"),
        ("optimizer.beta1=1", "optimizer.beta1", "1 should be a number ≥ 0 and < 1"),
        ("evaluation.enabled=maybe", "evaluation.enabled", '"maybe" should be true or false'),
        ("tracking.wandb=none", "tracking.wandb", "`auto`, `online`, `offline` or `off`"),
        ("cluster.accelerator=v9", "cluster.accelerator", "`cpu`, `v4`, `v5e`, `v5p` or `v6e`"),
        ("mesh.data=0", "mesh.data", "0 should be a whole number ≥ 1 or null"),
        ("mesh=2", "mesh", "2 should be a group of settings"),
        ("data.sources=[]", "data.sources", "[] should be a list of groups that is not empty"),
        ("data.sources=[3]", "data.sources.0", "3 should be a group of settings"),
        ("data.sources.0.weight=0", "data.sources.0.weight", "0 should be a number > 0"),
        ("data.sources.0={name: a}", "data.sources.0.path", "is missing; give text"),
        ("data.sources.0.include=[1]", "data.sources.0.include.0", "1 should be text"),
        ("data.sources.0.pth=x", "data.sources.0.pth", "did you mean `data.sources.N.path`?"),
        ("setps=3", "setps", "is not a setting; did you mean `steps`?"),
        ("row_length=3", "row_length", "did you mean `data.row_length`?"),
        ("optimizer.lr=3", "optimizer.lr", "did you mean `optimizer.peak_lr`?"),
        ("optimizer.learning=3", "optimizer.learning", "`optimizer` can have: peak_lr"),
        ("model.preset=huge", "model.preset", '"huge" is not a known size; choose one of'),
        ("model.preset=[1]", "model.preset", "[1] is not a known size"),
        ("model.widht=3", "model.widht", "did you mean `model.width`?"),
        ("model.pre_set=tiny", "model.pre_set", "did you mean `model.preset`?"),
        ("model.num_kv_heads=3", "model", "num_heads=4 is not a multiple of num_kv_heads=3"),
        ("model=small", "model", '"small" should be a group of settings'),
        ("data.tokenizer.kind=import", "data.tokenizer.path", "needs path"),
        ("data.tokenizer.path=x", "data.tokenizer.path", '"x" kind `train` reads no path'),
    ],
)
def test_faults_of_single_settings(setting, path, message):
    found = faults(setting)
    assert list(found) == [path]
    assert message in found[path]


@pytest.mark.parametrize(
    ("settings", "path", "message"),
    [
        (("cluster.topology=2x2x2",), "cluster.topology", "only TPU slices"),
        (("cluster.num_slices=2",), "cluster.num_slices", "only TPUs come in slices"),
        (("cluster.accelerator=v4",), "cluster.topology", "is missing; give the chips"),
        (
            ("cluster.accelerator=v4", "cluster.topology=3x3x3"),
            "cluster.topology",
            "there is no v4 slice of topology '3x3x3'",
        ),
        ((*TPU, "cluster.num_hosts=3"), "cluster.num_hosts", "should be 2, which follows"),
        ((*TPU, "cluster.devices_per_host=8"), "cluster.devices_per_host", "should be 4"),
        (("mesh.data=2",), "mesh", "2 × 1 × 1 = 2, but there are 1 devices"),
        ((*TPU, "mesh.data=4"), "mesh", "4 × 4 × 1 = 16, but a slice has 8 devices"),
        (("batch.rows=10", "batch.microbatches=4"), "batch.rows", "= 4; for example 12"),
        (("cluster.devices_per_host=32",), "batch.rows", "16 should be divisible by"),
        (("cluster.devices_per_host=3", "mesh.model=3"), "mesh.model", "num_heads of 4"),
        (
            ("cluster.devices_per_host=3", "batch.rows=3", "mesh.fsdp=3"),
            "mesh.fsdp",
            "does not divide the model's width of 32",
        ),
        (
            ("cluster.devices_per_host=4", "mesh.model=4", "model.feed_forward=66"),
            "mesh.model",
            "feed_forward of 66",
        ),
        (
            (
                *("cluster.devices_per_host=4", "mesh.model=4"),
                *("model.vocab_size=513", "data.tokenizer.vocab_size=513"),
            ),
            "mesh.model",
            "513 rows of the embedding; choose a divisor, or set model.num_embeddings to 516",
        ),
        (("data.row_length=257",), "data.row_length", "longer than the model's context of 256"),
        (("model.vocab_size=600",), "model.vocab_size", "data.tokenizer.vocab_size = 512"),
        (("data.tokenizer={kind: teacher}",), "data.tokenizer.kind", "only a distilled run"),
        (("data.held_out_fraction=0",), "data.held_out_fraction", "nothing to evaluate on"),
        (("objective.kind=distill",), "teacher", "is missing, but objective.kind"),
        (("teacher.checkpoint=other",), "teacher", "would not be asked"),
        (("objective.label_weight=0.5",), "objective.label_weight", "only a distilled run"),
        (
            (*TEACHER, "teacher.codec={k: 0, draws: 0}"),
            "teacher.codec",
            "k and draws are both 0",
        ),
        ((*TEACHER, "teacher.codec.k=513"), "teacher.codec.k", "vocabulary of 512"),
        (("optimizer.warmup_steps=10",), "optimizer.warmup_steps", "fewer than the 10 steps"),
    ],
)
def test_faults_of_combinations(settings, path, message):
    found = faults(*settings)
    assert path in found
    assert message in found[path]


@pytest.mark.parametrize(
    "settings",
    [
        (),
        TEACHER,
        TPU,
        (*TPU, "cluster.num_slices=4", "cluster.num_hosts=8", "batch.rows=64"),
        ("data.held_out_fraction=0", "evaluation.enabled=false"),
        ("mesh.model=2", "cluster.devices_per_host=2", "model.num_kv_heads=1"),
        ("data.tokenizer={kind: import, path: x}", "model.vocab_size=600"),
        (*TEACHER, "data.tokenizer={kind: teacher}"),
    ],
)
def test_sound_configurations_pass(settings):
    assert find_faults(run(*settings)) == []


def test_every_fault_of_a_file_is_said_at_once():
    found = faults(
        *("steps=many", "optimizer.lr=3", "model.preset=huge", "data.sources.0.weight=-1"),
        *("batch.rows=7", "batch.microbatches=2", "objective.label_weight=0.5", "mesh.data=5"),
        *("data.tokenizer.kind=import", "tracking.wandb=3", "optimizer.warmup_steps=99"),
        "teacher.replicas=2",
    )
    assert set(found) == {
        *("steps", "optimizer.lr", "model.preset", "data.sources.0.weight", "batch.rows"),
        *("objective.label_weight", "mesh", "data.tokenizer.path", "tracking.wandb"),
        "teacher.checkpoint",
    }


def test_nothing_is_said_about_what_depends_on_a_faulty_setting():
    # The warm-up is compared with the steps, the rows with the mesh: neither is known here.
    found = faults("steps=many", "optimizer.warmup_steps=99", "mesh.fsdp=x", "batch.rows=7")
    assert set(found) == {"steps", "mesh.fsdp"}


def test_an_empty_file_lacks_what_has_no_default():
    with pytest.raises(ConfigError) as caught:
        parse_run({}, "file.yaml")
    assert str(caught.value).startswith("file.yaml: 4 faults\n  name: is missing; give text")
    assert {fault.path for fault in caught.value.faults} == {"name", "steps", "model", "data"}


def test_keys_that_are_no_text_are_refused():
    with pytest.raises(ConfigError, match="5: is not a setting"):
        parse_run(parse_yaml(yaml.safe_dump({**RUN, 5: 1})), "test")


@given(st.data())
def test_any_file_gives_a_configuration_or_faults(data):
    """Whatever stands in the place of a value, the answer is one of the two, never a crash."""
    result = copy.deepcopy(RUN)
    junk = st.sampled_from([None, True, -1, 0, 1e300, "x", "", [], [1], {}, {"x": 1}, [{}], {3: 4}])
    paths = [s.path.replace(".N", ".0").split(".") for s in settings_of(RunConfig)]
    for path in data.draw(st.lists(st.sampled_from(paths), max_size=6)):
        try:
            set_path(result, path, copy.deepcopy(data.draw(junk)))
        except ConfigError:
            continue
    before = copy.deepcopy(result)
    try:
        assert find_faults(parse_run(result, "test")) == []
    except ConfigError as error:
        assert error.faults
    assert result == before


@given(
    num_hosts=st.integers(1, 6),
    devices=st.sampled_from([1, 2, 4, 8]),
    fsdp=st.sampled_from([1, 2, 4, 3]),
    model=st.sampled_from([1, 2, 4]),
    rows=st.integers(1, 400),
    microbatches=st.integers(1, 5),
    slices=st.one_of(
        st.none(),
        st.tuples(
            st.sampled_from([(a, t) for a, g in GENERATIONS.items() for t in sorted(g.topologies)]),
            st.integers(1, 4),
        ),
    ),
)
def test_rows_are_divided_without_a_rest(
    num_hosts, devices, fsdp, model, rows, microbatches, slices
):
    result = values(f"mesh.fsdp={fsdp}", f"mesh.model={model}", f"batch.rows={rows}")
    result["batch"]["microbatches"] = microbatches
    result["cluster"] = {"num_hosts": num_hosts, "devices_per_host": devices}
    if slices is not None:
        (accelerator, topology), num_slices = slices
        result["cluster"] = {
            "accelerator": accelerator,
            "topology": topology,
            "num_slices": num_slices,
        }
    try:
        config = parse_run(result, "test")
    except ConfigError:
        return
    plan = layout(config)
    assert plan.rows_per_shard * plan.row_shards * plan.microbatches == plan.rows
    assert math.prod(plan.mesh_shape) == plan.num_devices
    assert plan.num_hosts % plan.num_slices == 0


def test_the_mesh_divides_the_dims_that_the_shardings_divide():
    divided = {
        (dim, axis)
        for dims in sharding.PARAM_AXES.values()
        for dim in dims
        if (axis := sharding.AXIS_RULES[dim]) and dim not in sharding.REPLICABLE_AXES
    }
    names = {"num_heads": "heads", "embedding_rows": "vocab"}
    assert {(names.get(dim, dim), axis) for dim, axis in DIVIDED_DIMS} == divided


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
    ],
)
def test_settings_that_cannot_be_applied(setting, message):
    if message is None:
        assert "start_from.0" in faults(setting)
        return
    with pytest.raises(ConfigError) as caught:
        run(setting)
    assert message in str(caught.value)


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
        ("extends: nowhere.yaml", "nowhere.yaml: 1 fault\n.*no such file, and no such preset"),
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


def recipe(folder: Path, *settings: str, text: str = "") -> RecipeConfig:
    write(folder, "one.yaml", yaml.safe_dump(RUN))
    file = write(folder, "all.yaml", f"name: all\nrecipe: [one.yaml, tiny]\n{text}")
    config = load_config(file, settings)
    assert isinstance(config, RecipeConfig)
    return config


def test_a_recipe_finds_its_runs_and_hands_settings_on(tmp_path):
    text = "settings: {data: {row_length: 32}, steps: 7}"
    config = recipe(tmp_path, "steps=9", "settings.seed=2", "storage=here", text=text)
    assert config.recipe == (str(tmp_path / "one.yaml"), "tiny")
    assert config.settings == {"data.row_length": 32, "steps": 9, "seed": 2}
    assert config.storage == "here"


def test_a_recipe_with_settings_of_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError) as caught:
        recipe(tmp_path, text="steps: 3\nnmae: x\nstorage: ''")
    assert {fault.path: fault.message for fault in caught.value.faults} == {
        "storage": "should be text that is not empty",
        "steps": "is a setting of a run; write `settings: {steps: …}` for all of a recipe's",
        "nmae": "is not a setting; did you mean `name`?",
    }


# Resuming.


@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("steps=10", "seed=0", "name=run", "data.sources.0.path=text", "teacher=null"),
        ("model.preset=tiny",),
        ("seed=0.0", "data.held_out_fraction=1e-2"),
    ],
)
def test_settings_that_repeat_a_runs_own_change_nothing(settings):
    assert changed_settings(run(), settings) == run()


def test_settings_change_where_that_is_sound():
    config = run(*TEACHER)
    changed = changed_settings(config, ("steps=30", "teacher.replicas=3", "mesh.data=1"))
    assert (changed.steps, changed.teacher and changed.teacher.replicas) == (30, 3)
    assert changed.data == config.data


@pytest.mark.parametrize(
    ("setting", "path", "change"),
    [
        ("seed=1", "seed", "it is 0 and cannot become 1"),
        ("data.sources.0.path=x", "data.sources.0.path", 'it is "text" and cannot become "x"'),
        ("data.row_length=32", "data.row_length", "it is 64 and cannot become 32"),
        ("model.width=64", "model.width", "it is 32 and cannot become 64"),
        ("model={preset: tiny, window: 8}", "model.window", "it is 64 and cannot become 8"),
        ("teacher.codec.k=2", "teacher.codec.k", "it is 16 and cannot become 2"),
        ("start_from.checkpoint=x", "start_from", "it is null and cannot become"),
        ("teacher.checkpoint=x", "teacher.checkpoint", 'it is "other" and cannot become "x"'),
        ("batch.rows=8", "batch.rows", "it is 16 and cannot become 8"),
    ],
)
def test_settings_that_are_fixed_for_life(setting, path, change):
    with pytest.raises(ConfigError) as caught:
        changed_settings(run(*TEACHER), (setting,))
    assert [fault.path for fault in caught.value.faults] == [path]
    message = str(caught.value)
    assert change in message
    assert "start a new run" in message and "start_from.checkpoint" in message


def test_a_preset_keeps_the_runs_vocabulary_on_resume():
    config = run("model.vocab_size=600", "data.tokenizer.vocab_size=600")
    assert changed_settings(config, ("model.preset=tiny",)) == config
    with pytest.raises(ConfigError, match="is not a known size"):
        changed_settings(config, ("model.preset=huge",))


def test_all_faults_of_a_resume_are_said_at_once():
    with pytest.raises(ConfigError) as caught:
        changed_settings(run(), ("seed=x", "steps=0", "batch.microbatches=3", "mesh.dat=1", "a"))
    found = [fault.path for fault in caught.value.faults]
    assert sorted(found) == ["", "batch.rows", "mesh.dat", "seed", "steps"]
    assert "is fixed for the life" in str(caught.value.faults[0])


# `--check`.


def test_check_shows_the_arithmetic():
    facts = dict(run_facts(run(*TPU, *TEACHER, "cluster.num_slices=2", "batch.microbatches=2",
                               "batch.rows=64")))  # fmt: skip
    assert facts == {
        "devices": "2 slices × 2 hosts × 4 devices = 16",
        "mesh": "slice 2 × data 2 × fsdp 4 × model 1",
        "rows per step": "2 microbatches × 16 shards × 2 rows = 64",
        "tokens per step": "64 rows × 64 = 4,096",
        "tokens in all": "10 steps × 4,096 = 40,960",
        "parameters": "16,384 in the embedding + 18,720 others = 35,104",
        # 16 entries of a uint16 id and a float32 probability, and 32 uint16 draws.
        "targets per token": "160 bytes",
        "targets per step": "4,096 × 160 = 655,360 bytes",
    }


def test_check_prints_what_can_be_read_again_and_looks_at_the_text(tmp_path):
    write(tmp_path, "text/a.txt", "hello")
    console = Console(record=True, width=200, file=io.StringIO())
    settings = (f"data.sources.0.path={tmp_path}/text",)
    config = load_config("tiny", settings)
    show_check(config, "tiny", settings, console)
    shown = console.export_text()
    printed = parse_yaml(shown.split("\n\n")[0])
    assert parse_run(printed, "printed") == config
    assert "1 files, 5 bytes" in shown


def test_check_goes_through_a_recipe_and_names_empty_sources(tmp_path):
    console = Console(record=True, width=200, file=io.StringIO())
    config = recipe(tmp_path, f"data.sources.0.path={tmp_path}/nothing")
    with pytest.raises(ConfigError, match=r"data.sources.0: .*nothing does not exist"):
        show_check(config, "all.yaml", (), console)
    assert "name: run\n" in console.export_text(clear=False)
    assert "name: tiny\n" in console.export_text()


def test_every_setting_is_described():
    for setting in [*settings_of(RunConfig), *settings_of(RecipeConfig)]:
        assert in_words(setting.field), setting.path
        assert setting.field.description, setting.path
