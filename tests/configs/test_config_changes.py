"""What may change when a run is resumed, and what `--check` shows."""

import io

import pytest
from rich.console import Console

from configs.load import (
    ConfigError,
    load_config,
    parse_run,
)
from configs.run import RecipeConfig, RunConfig
from configs.section import in_words, settings_of
from configs.settings import changed_settings
from configs.yaml_text import parse_yaml
from orchestrator.check import run_facts, show_check
from tests.helpers.configurations import TEACHER, TPU, recipe, run, write

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
        # 48 ids of 9 bits in 14 words, and 16 probabilities in bfloat16.
        "targets per token": "88 bytes",
        "targets per step": "4,096 × 88 = 360,448 bytes",
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
