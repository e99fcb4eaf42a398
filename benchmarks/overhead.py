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
from configs.load import read_source
from configs.run import RunConfig

WARM_UP_STEPS = 20
STUDENT_CORE, OTHER_CORE = 0, 1
STALL_PARTS = ("data", "teacher", "wire", "decode", "checkpoint")


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
        os.sched_setaffinity(0, {OTHER_CORE})
    with tempfile.TemporaryDirectory() as scratch:
        storage = Path(scratch)
        _in_process("beforehand", storage, steps)
        address = connect(None)
        rates: list[tuple[float, float]] = []
        for number in range(rounds):
            folder = _run_with_pool(_config(storage, f"orchestrated-{number}", steps), storage)
            bare = float(_in_process("bare", storage, steps, own_core))
            lines = _run_to_end(folder, address, own_core)
            rates.append((bare, len(lines) / sum(line["step_s"] for line in lines)))
        stalls = _live_stalls(storage, steps, address, own_core)
    rows = [[i, bare, ours, ours / bare] for i, (bare, ours) in enumerate(rates)]
    show("Steps per second", ["round", "bare", "orchestrated", "ratio"], rows)
    ratio = statistics.median(ours / bare for bare, ours in rates)
    where = "_own_core" if own_core else ""
    figures = {f"orchestrated_over_bare{where}": Figure(ratio, "1", ">= 0.95")}
    for part, share in stalls.items():
        figures[f"live_wait_{part}{where}"] = Figure(share, "share of step time")
    tell(figures)


def _config(storage: Path, name: str, steps: int, preset: str = "quickstart-student") -> RunConfig:
    """The quickstart's student, without what only happens now and then."""
    from benchmarks.bare import preset_config

    changes: dict[str, Any] = {
        "steps": steps,
        "evaluation": {"enabled": False},
        "checkpoint": {"every_steps": 10**6},
        "record": {"flush_s": 5.0},
    }
    if preset == "quickstart-student":
        # Nothing is stored: each turn asks its pool for everything.
        here = {"checkpoint": "teacher", "cache_bytes": 0}
        changes["teacher"] = {**read_source(preset)["teacher"], **here}
    return preset_config(preset, storage, name, **changes)


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
        preexec_fn=(lambda: os.sched_setaffinity(0, {STUDENT_CORE})) if own_core else None,
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
    teacher_config = _config(storage, "teacher", 50, "quickstart-teacher")
    train_here(teacher_config)
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
    from orchestrator.teacher_pool import DEPLOYMENT, app_name

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

    lines = _run_to_end(create_run(_config(storage, "live", steps)), address, own_core)
    total_s = sum(line["step_s"] for line in lines)
    return {part: sum(line["stall_s"][part] for line in lines) / total_s for part in STALL_PARTS}


def _run_to_end(folder: Any, address: str, own_core: bool) -> list[dict[str, Any]]:
    from orchestrator.history import read_steps
    from orchestrator.launch import start_controller

    start_controller(folder, address)
    if own_core:
        _give_own_core(folder)
    while folder.lease() is not None:
        time.sleep(0.5)
    status = folder.status() or {}
    assert status.get("state") == "finished", status.get("reason")
    return read_steps(folder.url)[WARM_UP_STEPS:]


def _give_own_core(folder: Any) -> None:
    """Moves the student to its core as soon as it is there."""
    from orchestrator.history import read_events

    ready: list[dict[str, Any]] = []
    while not ready and folder.lease() is not None:
        time.sleep(0.5)
        ready = [event for event in read_events(folder.url) if event["event"] == "host_ready"]
    for event in ready:
        for thread in os.listdir(f"/proc/{event['pid']}/task"):
            os.sched_setaffinity(int(thread), {STUDENT_CORE})


if __name__ == "__main__":
    main()
