"""What the orchestrator costs: an orchestrated run's step rate over that of the bare JAX loop.

    python -m benchmarks.overhead [--rounds N] [--steps N] [--own-core]

Both arms run the same compiled step on the same rows and targets, turn by turn, on one machine
with Ray and the Serve pool up. The targets are made beforehand: the orchestrated arm is a real run
whose pool only hands them out, the bare arm has them in memory. Then one run with a live teacher
shows by part how long the student waits. With `--own-core` the student of either arm has core 0
for itself and everything else has core 1, as on a host with cores to spare.
"""

import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import click

from benchmarks.figures import Figure, show, tell
from benchmarks.runs import (
    TEACHER,
    WARM_UP_STEPS,
    leave_a_core,
    run_to_end,
    stall_shares,
    steady_config,
    step_rate,
    take_own_core,
)
from configs.run import RunConfig


@click.group(invoke_without_command=True)
@click.option("--rounds", default=5, show_default=True, help="Turns of each arm.")
@click.option("--steps", default=220, show_default=True, help="Steps of a turn.")
@click.option("--own-core", is_flag=True, help="The student has a core for itself.")
@click.pass_context
def main(context: click.Context, rounds: int, steps: int, own_core: bool) -> None:
    if context.invoked_subcommand is not None:
        return
    from orchestrator.launch import connect

    if own_core:
        leave_a_core()
    with tempfile.TemporaryDirectory() as scratch:
        storage = Path(scratch)
        _in_process("beforehand", storage, steps)
        address = connect(None)
        rates: list[tuple[float, float]] = []
        for number in range(rounds):
            folder = _run_with_pool(_config(storage, f"orchestrated-{number}", steps), storage)
            bare = float(_in_process("bare", storage, steps, own_core))
            rates.append((bare, step_rate(run_to_end(folder, address, own_core))))
        stalls = _live_stalls(storage, steps, address, own_core)
    rows = [[i, bare, ours, ours / bare] for i, (bare, ours) in enumerate(rates)]
    show("Steps per second", ["round", "bare", "orchestrated", "ratio"], rows)
    ratio = statistics.median(ours / bare for bare, ours in rates)
    where = "_own_core" if own_core else ""
    figures = {f"orchestrated_over_bare{where}": Figure(ratio, "1", ">= 0.95")}
    for part, share in stalls.items():
        figures[f"live_wait_{part}{where}"] = Figure(share, "share of step time")
    tell(figures)


def _config(storage: Path, name: str, steps: int) -> RunConfig:
    # Nothing is stored: each turn asks its pool for everything.
    return steady_config(storage, name, steps, teacher={"cache_bytes": 0})


# The bare arm, in a process of its own each time, so that only this one keeps Ray up.


def _in_process(what: str, storage: Path, steps: int, own_core: bool = False) -> str:
    command = [sys.executable, "-m", "benchmarks.overhead", what, str(storage), str(steps)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        command,
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=take_own_core if own_core else None,
    )
    return done.stdout.strip()


@main.command()
@click.argument("storage", type=Path)
@click.argument("steps", type=int)
def beforehand(storage: Path, steps: int) -> None:
    """A teacher of one step, and the rows and targets of every step of the student."""
    from benchmarks.bare import make_teacher, prepare_here, student_job, train_here
    from model.targets import from_wire
    from workers.cache import cache_dir, keep_compiled_programs
    from workers.rows import RowReader
    from workers.step_rows import StepRows
    from workers.targets_protocol import MIXED, TargetRequest, TargetSpec
    from workers.teacher import codec_of

    keep_compiled_programs()
    train_here(steady_config(storage, TEACHER, 50, "quickstart-teacher"))
    config = _config(storage, "beforehand", steps)
    folder, facts = prepare_here(config)
    job = student_job(config, folder, facts)
    assert config.teacher is not None and job.teacher_digest is not None
    reader = RowReader.open(str(storage), job.dataset_digest, "train", cache_dir())
    rows = StepRows(reader, config, range(config.batch.rows))
    codec = codec_of(config.teacher).name
    spec = TargetSpec(job.dataset_digest, job.teacher_digest, codec, config.seed, MIXED)
    chunks = {}
    loop = []
    together = config.teacher.steps_per_request
    whole = {"rows_per_batch": together * config.batch.rows}
    teacher = make_teacher(
        config.model_copy(update={"teacher": config.teacher.model_copy(update=whole)})
    )
    for group in (range(steps)[first : first + together] for first in range(0, steps, together)):
        request = TargetRequest.joined([rows.request(index, spec) for index in group])
        (chunk,) = teacher.score(request)
        chunks[request.rows] = chunk
        for place, index in enumerate(group):
            part = slice(place * config.batch.rows, (place + 1) * config.batch.rows)
            targets = {name: array[part] for name, array in from_wire(chunk.arrays).items()}
            loop.append((tuple(rows.batch(index)), targets))
    rows.close()
    (storage / "chunks.pkl").write_bytes(pickle.dumps(chunks))
    (storage / "loop.pkl").write_bytes(pickle.dumps(loop))


@main.command()
@click.argument("storage", type=Path)
@click.argument("steps", type=int)
def bare(storage: Path, steps: int) -> None:
    """Prints the steps per second of the plain loop, compilation left out."""
    import jax
    import numpy as np

    from model.sharding import batch_sharding, make_mesh
    from workers.cache import keep_compiled_programs
    from workers.teacher import codec_of
    from workers.train_step import Batch, make_init, make_train_step, signal_sharding

    keep_compiled_programs()
    config = _config(storage, "bare", steps)
    assert config.teacher is not None
    loop = pickle.loads((storage / "loop.pkl").read_bytes())
    mesh = make_mesh({})
    sharding = batch_sharding(mesh)
    signals = jax.device_put(np.zeros(1, np.int32), signal_sharding(mesh))
    train_step = make_train_step(config, codec_of(config.teacher), mesh)
    state = make_init(config, mesh)()
    before: Any = None
    began = 0.0
    for index, (arrays, targets) in enumerate(loop):
        if index == WARM_UP_STEPS:
            jax.block_until_ready(state)
            began = time.perf_counter()
        batch = Batch(*(jax.device_put(array, sharding) for array in arrays))
        encoded = {name: jax.device_put(array, sharding) for name, array in targets.items()}
        state, metrics = train_step(state, batch, encoded, signals)
        if before is not None:
            jax.device_get(before)
        before = metrics
    jax.block_until_ready(state)
    click.echo((steps - WARM_UP_STEPS) / (time.perf_counter() - began))


# The orchestrated arm: a real run, whose pool is up before its controller looks for it.


class PrecomputedReplica:
    """Hands out chunks that were made beforehand."""

    def __init__(self, path: str):
        self._chunks = pickle.loads(Path(path).read_bytes())

    async def score(self, request: Any, route: Any) -> AsyncIterator[Any]:
        yield self._chunks[request.rows]

    async def sameness(self, route: Any) -> str:
        return "mixed"


def _run_with_pool(config: RunConfig, storage: Path) -> Any:
    """The folder of a new run, whose pool is up."""
    from ray import serve
    from ray.serve.config import ProxyLocation

    from orchestrator.launch import create_run
    from orchestrator.run_pool import app_name
    from orchestrator.teacher_pool import DEPLOYMENT

    folder = create_run(config)
    serve.start(proxy_location=ProxyLocation.Disabled)
    replica = serve.deployment(name=DEPLOYMENT, max_ongoing_requests=1024)(PrecomputedReplica)
    serve.run(
        replica.bind(str(storage / "chunks.pkl")),
        name=app_name(folder.identity()["run_id"]),
        route_prefix=None,
        external_scaler_enabled=True,
    )
    return folder


def _live_stalls(storage: Path, steps: int, address: str, own_core: bool) -> dict[str, float]:
    from orchestrator.launch import create_run

    folder = create_run(_config(storage, "live", steps))
    return stall_shares(run_to_end(folder, address, own_core))


if __name__ == "__main__":
    main()
