"""What saving costs a student: checkpoints on storage, and snapshots in memory.

    python -m benchmarks.checkpoint [--rounds N] [--preset NAME]

Three runs in turn, which differ in nothing else: one saves nothing, one makes checkpoints, one
takes snapshots. What a save holds up is read from the record of its own run; what it costs beside
that, in the background of the same two cores, is the difference between the runs' step times.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import click

from benchmarks.figures import Figure, show, tell
from benchmarks.runs import run_to_end, steady_config
from configs.run import RunConfig
from model.config import param_count
from orchestrator.launch import connect, create_run

GOAL = "<= 0.02"


class Arm(NamedTuple):
    """One run.

    Args:
        step_s: the mean of its steps, with what happens in the background of some.
        first_s: what the first save holds up, which loads the programs that digest the state.
        blocked_s: what a later one holds up, on average.
    """

    step_s: float
    first_s: float
    blocked_s: float


@click.command()
@click.option("--rounds", default=3, show_default=True, help="Turns of each arm.")
@click.option("--preset", default="quickstart-control", show_default=True)
@click.option("--storage-every", default=100, show_default=True, help="Steps between checkpoints.")
@click.option("--memory-every", default=10, show_default=True, help="Steps between snapshots.")
def main(rounds: int, preset: str, storage_every: int, memory_every: int) -> None:
    arms: dict[str, dict[str, Any]] = {
        "nothing": {},
        "storage": {"every_steps": storage_every},
        "memory": {"snapshot_every_steps": memory_every},
    }
    done: dict[str, list[Arm]] = {name: [] for name in arms}
    config: RunConfig | None = None
    with tempfile.TemporaryDirectory() as scratch:
        address = connect(None)
        for number in range(rounds):
            for name, settings in arms.items():
                saving = {"every_steps": 10**6, "snapshot_every_steps": None} | settings
                config = steady_config(
                    Path(scratch), f"{name}-{number}", 5 * storage_every, preset, checkpoint=saving
                )
                lines = run_to_end(create_run(config), address, own_core=False)
                done[name].append(_arm(lines, saving))
    assert config is not None, "there is a round"
    _tell(done, config, {"storage": storage_every, "memory": memory_every})


def _arm(lines: list[dict[str, Any]], saving: dict[str, Any]) -> Arm:
    every = min(each for each in saving.values() if each is not None)
    # The line after a save says what it held up.
    blocked = [line["stall_s"]["checkpoint"] for line in lines if line["step"] % every == 1]
    return Arm(
        statistics.fmean(line["step_s"] for line in lines),
        blocked[0] if blocked else 0.0,
        statistics.fmean(blocked[1:]) if blocked else 0.0,
    )


def _tell(done: dict[str, list[Arm]], config: RunConfig, every: dict[str, int]) -> None:
    num_params = param_count(config.model).total
    tokens = config.batch.rows * config.data.row_length
    state_bytes = 12 * num_params
    print(f"{num_params:,} parameters, {state_bytes / 1e6:.1f} MB of state, {tokens} tokens a step")
    table, figures = [], dict[str, Figure]()
    for name, interval in every.items():
        shares = [arm.blocked_s / (interval * arm.step_s) for arm in done[name]]
        slower = [
            arm.step_s / plain.step_s - 1
            for arm, plain in zip(done[name], done["nothing"], strict=True)
        ]
        for number, arm in enumerate(done[name]):
            row = [name, interval, number, *(1e3 * seconds for seconds in arm)]
            table.append([*row, shares[number], slower[number]])
        figure = "save_block_over_step" if name == "storage" else "snapshot_over_step"
        figures[figure] = Figure(statistics.median(shares), "1", GOAL)
        firsts = [arm.first_s / arm.blocked_s for arm in done[name]]
        figures[f"{figure}_first_over_later"] = Figure(statistics.median(firsts), "1")
        figures[f"{figure}_background"] = Figure(statistics.median(slower), "1")
    columns = ["kept in", "every", "round", "step ms", "first ms", "later ms", "share", "slower by"]
    show("What a save costs", columns, table)
    tell(figures)


if __name__ == "__main__":
    main()
