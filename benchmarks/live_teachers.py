"""What it costs a student that its targets are made while it trains."""

import statistics
import tempfile
import zipfile
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import click

from benchmarks.figures import Figure, show, tell
from benchmarks.run_pool import bring_up, tiny_teacher
from benchmarks.runs import (
    STALL_PARTS,
    leave_a_core,
    run_to_end,
    stall_shares,
    steady_config,
    step_rate,
)
from configs.run import RunConfig
from orchestrator.build_targets import building_config
from orchestrator.history import Line
from orchestrator.launch import connect, create_run
from workers.dataset import load_manifest
from workers.rows import row_at
from workers.storage import list_tree
from workers.target_cache import targets_folder
from workers.target_shards import SUFFIX, list_shard, write_shard
from workers.target_store import read_spec, stored_keys
from workers.targets_protocol import CACHE

# What each kind of teacher does; the real one is a model of the size `tiny`.
TEACHERS: dict[str, dict[str, Any]] = {"scripted": {"batch_s": 0.2}, "real": {}}
ROWS_PER_BATCH, STEPS_PER_REQUEST, PREFETCH_STEPS = 24, 6, 12
BLOCK_STEPS = 40
# Two layers more than the quickstart, whose student takes more than 0.6 of what the real teacher
# can do on one core.
STUDENT = {"preset": "student-small", "num_layers": 4}


class Block(NamedTuple):
    """The lines of steps in a row whose targets were all live, or all stored."""

    live: bool
    lines: list[Line]


@click.command()
@click.option(
    "--blocks",
    default=15,
    show_default=True,
    type=click.IntRange(min=3),
    help=f"Of {BLOCK_STEPS} steps; the first warms up.",
)
def live(blocks: int) -> None:
    """A student's step rate with live teachers over that with the same targets stored.

    The student has core 0 for itself, everything else has core 1, and the pool is up all the time.
    Blocks of steps take turns within one run: of one block the pool is asked for every row, and
    what comes is stored; the targets of the next were built before the run and are found. So both
    arms are the same process on the same machine, some seconds apart.
    """
    leave_a_core()
    done: dict[str, list[Block]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        storage = Path(scratch)
        tiny_teacher(storage)
        address = connect(None)
        for kind in TEACHERS:
            done[kind] = _blocks(storage, kind, blocks, address)
    _tell(done)


def _blocks(storage: Path, kind: str, num_blocks: int, address: str) -> list[Block]:
    """The blocks of a run, but for the first."""
    teacher = {
        "rows_per_batch": ROWS_PER_BATCH,
        "steps_per_request": STEPS_PER_REQUEST,
        "prefetch_steps": PREFETCH_STEPS,
        "cpus_per_replica": 0,
    }
    # By its seed, what another kind has stored is of no use to this one.
    seed = list(TEACHERS).index(kind)
    steps = num_blocks * BLOCK_STEPS
    config = steady_config(storage, kind, steps, teacher=teacher, model=STUDENT, seed=seed)
    known = stored_keys(str(storage))
    building = create_run(building_config(config), "targets")
    bring_up(building, **TEACHERS[kind])
    run_to_end(building, address, own_core=False)
    (key,) = set(stored_keys(str(storage))) - set(known)
    _keep_every_second_block(config, key)

    folder = create_run(config)
    bring_up(folder, **TEACHERS[kind])
    lines = run_to_end(folder, address, own_core=True)
    blocks = []
    for is_live, block in groupby(lines, lambda line: _is_live(line["step"] - 1)):
        of_block = list(block)
        origins = {origin for line in of_block for origin in line["targets"]["from"]}
        assert (CACHE not in origins) if is_live else (origins == {CACHE}), origins
        # While its last steps are made, the next block's targets are asked for.
        blocks.append(Block(is_live, of_block[:-PREFETCH_STEPS]))
    return blocks[1:]


def _is_live(index: int) -> bool:
    """Whether the targets of a step, counted from 0, are asked for."""
    return index // BLOCK_STEPS % 2 == 0


def _keep_every_second_block(config: RunConfig, key: str) -> None:
    """Removes the stored targets of the live blocks."""
    manifest = load_manifest(config.storage, read_spec(config.storage, key).dataset_digest)
    weights, rows_per_step = [each.weight for each in config.data.sources], config.batch.rows
    kept = {
        row_at(manifest, weights, config.seed, place)
        for place in range(config.steps * rows_per_step)
        if not _is_live(place // rows_per_step)
    }
    folder = targets_folder(config.storage, key)
    for shard in [f"{folder}/{name}" for name in list_tree(folder) if name.endswith(SUFFIX)]:
        with zipfile.ZipFile(shard) as archive:
            rows = {
                row: archive.read(f"{row.source}-{row.index}.npy")
                for row in list_shard(shard)
                if row in kept
            }
        Path(shard).unlink()
        write_shard(shard, rows)


def _tell(done: dict[str, list[Block]]) -> None:
    table, waits, figures = [], [], {}
    for kind, blocks in done.items():
        arms = {
            name: [line for block in blocks if block.live == is_live for line in block.lines]
            for name, is_live in (("live", True), ("cached", False))
        }
        ratios = sorted(_ratio(*pair) for pair in pairwise(blocks))
        ratio = statistics.median(ratios)
        busy_s = sum(line["teacher_busy_s"] for line in arms["live"])
        load = busy_s / sum(line["step_s"] for line in arms["live"])
        rates = [step_rate(lines) for lines in arms.values()]
        table.append([kind, *rates, len(ratios), ratio, ratios[0], ratios[-1], load])
        waits += [[f"{kind}, {arm}", *stall_shares(lines).values()] for arm, lines in arms.items()]
        figures[f"live_over_cached_{kind}"] = Figure(ratio, "1")
        figures[f"teacher_load_{kind}"] = Figure(load, "busy s/s", "<= 0.6")
    columns = ["teacher", "live steps/s", "cached steps/s", "pairs of blocks"]
    show("Steps per second", [*columns, "median ratio", "least", "most", "teachers' load"], table)
    show("Share of the steps' time that the student waits", ["arm", *STALL_PARTS], waits)
    least = min(figures[f"live_over_cached_{kind}"].value for kind in done)
    tell({"live_over_cached": Figure(least, "1", ">= 0.95"), **figures})


def _ratio(one: Block, other: Block) -> float:
    """Steps per second of the live one of two neighbours over those of the other."""
    live_block, cached = (one, other) if one.live else (other, one)
    return step_rate(live_block.lines) / step_rate(cached.lines)
