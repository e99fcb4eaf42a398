"""`stillhouse run … --check`: the resolved configuration and its arithmetic; starts nothing."""

import yaml
from rich.console import Console
from rich.table import Table

from configs.checks import layout
from configs.fault import NO_VALUE, Fault
from configs.load import ConfigError, recipe_configs
from configs.run import RecipeConfig, RunConfig, TeacherConfig
from model.config import param_count
from workers.source_files import list_files


def show_check(
    config: RunConfig | RecipeConfig, source: str, settings: tuple[str, ...], console: Console
) -> None:
    """Prints what a run, or each run of a recipe, would be, and looks at its text.

    Args:
        source: the preset or file that `config` was read from.
        settings: what was changed in it.

    Raises:
        ConfigError: a run of the recipe is faulty, or a source has no text.
    """
    configs = recipe_configs(config) if isinstance(config, RecipeConfig) else [config]
    changes = "".join(f" --set {setting}" for setting in settings)
    faults: list[Fault] = []
    for each in configs:
        text = yaml.safe_dump(each.model_dump(mode="json"), sort_keys=False)
        _print(console, f"# {each.name}, from {source}{changes}\n{text}")
        corpus, empty = corpus_facts(each)
        table = Table("", each.name, show_edge=False, header_style="bold")
        for what, value in [*run_facts(each), *corpus]:
            table.add_row(what, value)
        console.print(table)
        console.print()
        faults += [fault for fault in empty if fault not in faults]
    if faults:
        raise ConfigError(source, faults)


def run_facts(config: RunConfig) -> list[tuple[str, str]]:
    """Devices, mesh, batch, sizes and bytes of a run, each as (what, how much)."""
    plan = layout(config)
    row_length = config.data.row_length
    tokens = plan.rows * row_length
    params = param_count(config.model)
    facts = [
        (
            "devices",
            f"{plan.num_slices} slices × {plan.num_hosts // plan.num_slices} hosts × "
            f"{plan.devices_per_host} devices = {plan.num_devices}",
        ),
        (
            "mesh",
            f"slice {plan.num_slices} × data {plan.data} × fsdp {plan.fsdp} × model {plan.model}",
        ),
        (
            "rows per step",
            f"{plan.microbatches} microbatches × {plan.row_shards} shards × "
            f"{plan.rows_per_shard} rows = {plan.rows}",
        ),
        ("tokens per step", f"{plan.rows} rows × {row_length} = {tokens:,}"),
        ("tokens in all", f"{config.steps:,} steps × {tokens:,} = {config.steps * tokens:,}"),
        (
            "parameters",
            f"{params.embedding:,} in the embedding + {params.other:,} others = {params.total:,}",
        ),
    ]
    if config.teacher is not None:
        facts += _target_facts(config.teacher, config.model.vocab_size, tokens)
    return facts


def corpus_facts(config: RunConfig) -> tuple[list[tuple[str, str]], list[Fault]]:
    """What each source of text holds, and a fault for each that cannot be read."""
    facts: list[tuple[str, str]] = []
    faults: list[Fault] = []
    for index, source in enumerate(config.data.sources):
        try:
            files = list_files(source)
        except (ValueError, OSError) as error:
            faults.append(Fault(f"data.sources.{index}", NO_VALUE, str(error)))
            continue
        num_bytes = sum(file.num_bytes if file.limit is None else file.limit for file in files)
        facts.append((f"source {source.name}", f"{len(files):,} files, {num_bytes:,} bytes"))
    return facts, faults


def _target_facts(teacher: TeacherConfig, vocab_size: int, tokens: int) -> list[tuple[str, str]]:
    per_token = teacher.codec.bytes_per_token(vocab_size)
    if per_token is None:  # the teacher may be a run that is still to come
        return [("targets per token", "2 bytes × the teacher's width + 4")]
    return [
        ("targets per token", f"{per_token:,} bytes"),
        ("targets per step", f"{tokens:,} × {per_token:,} = {tokens * per_token:,} bytes"),
    ]


def _print(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
