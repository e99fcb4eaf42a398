"""Faults of many mechanisms in one run on a simulated cluster, and what the run made of them.

    python -m tests.chaos [--seed N] [--only NAME …]

Each mechanism is applied to a run that trains; the next follows when new steps have been made. In
the end the run is compared, bit for bit, with one of the same length that nothing happened to, and
nothing of it may be left on the cluster.
"""

import contextlib
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import psutil
import ray
from rich.console import Console
from rich.table import Table

from configs.load import parse_run
from orchestrator import catalogue
from orchestrator.attempt import attempt_name
from orchestrator.cluster import SimulatedCluster, simulated_cluster
from orchestrator.cpu_devices import cpu_devices
from orchestrator.history import read_events, read_steps
from orchestrator.launch import connect, create_run, start_controller
from tests.broken_storage import break_storage, mend_storage
from tests.runs import make_teacher, text_folder, tiny_values
from tests.same_run import assert_same_run
from workers.checkpoint import checkpoint_url
from workers.snapshot_keeper import NAMESPACE, keepers

MORE_STEPS = 5
ENDLESS = 10**6
RECOVERS_WITHIN_S = 300.0


class Subject:
    """A run on a cluster, and the ways to reach what belongs to it."""

    def __init__(self, storage: Path, cluster: SimulatedCluster, name: str, steps: int = ENDLESS):
        self.cluster = cluster
        values = tiny_values(storage, name) | {
            "steps": steps,
            "optimizer": {"final_lr_ratio": 1.0},
            "objective": {"kind": "distill"},
            "teacher": {
                "checkpoint": "teacher",
                "replicas": 2,
                "rows_per_batch": 4,
                "cpus_per_replica": 0,
                "answer_within_s": 5.0,
            },
            "mesh": {"fsdp": 2, "model": 2},
            "cluster": {"accelerator": "v4", "topology": "2x2x1", "num_slices": 2},
            "checkpoint": {"every_steps": 20, "snapshot_every_steps": 1, "keep_latest": 4},
            "faults": dict.fromkeys(("host_died", "host_hung", "driver_died", "unknown"), 100),
            "watchdog": {"step_at_least_s": 10.0, "step_times": 2.0},
        }
        self.folder = create_run(parse_run(values, "chaos"))
        start_controller(self.folder, cluster.address)

    @property
    def run_id(self) -> str:
        return self.folder.identity()["run_id"]

    def step(self) -> int:
        return (self.folder.status() or {}).get("step") or 0

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in read_events(self.folder.url) if event["event"] == name]

    def process(self, event: str) -> psutil.Process:
        """The one that said an event last."""
        return psutil.Process(self.events(event)[-1]["pid"])

    def actor(self, title: str) -> psutil.Process:
        """The process of an actor, among those that this cluster has started."""
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if " ".join(process.cmdline()).startswith(f"ray::{title}"):
                    return process
        raise LookupError(f"no actor {title} is there")

    def newest_file(self) -> Path:
        """The largest file of the newest checkpoint."""
        step = catalogue.committed_steps(self.folder.url)[-1]
        files = Path(checkpoint_url(self.folder.url, step)).rglob("params/**/d/*")
        return max(files, key=lambda path: path.stat().st_size)

    def drop_keepers(self) -> None:
        for name in keepers(self.run_id):
            ray.kill(ray.get_actor(name, NAMESPACE))

    def goes_on(self) -> None:
        step = self.step()
        wait_until(lambda: self.step() >= step + MORE_STEPS)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + RECOVERS_WITHIN_S
    while not condition():
        assert time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.1)


Mechanism = Callable[[Subject], None]
MECHANISMS: dict[str, Mechanism] = {}


def mechanism(apply: Mechanism) -> Mechanism:
    MECHANISMS[apply.__name__.replace("_", " ")] = apply
    return apply


@contextlib.contextmanager
def stopped(process: psutil.Process) -> Iterator[None]:
    process.suspend()
    try:
        yield
    finally:
        process.resume()


@mechanism
def student_host_killed(run: Subject) -> None:
    run.process("host_ready").kill()


@mechanism
def student_host_terminated(run: Subject) -> None:
    run.process("host_ready").send_signal(signal.SIGTERM)


@mechanism
def student_host_stopped(run: Subject) -> None:
    failed = len(run.events("attempt_failed"))
    run.process("host_ready").suspend()
    wait_until(lambda: len(run.events("attempt_failed")) > failed)


@mechanism
def slice_lost_and_back(run: Subject) -> None:
    run.cluster.lose_slice(1)
    run.cluster.add_slice(1)


@mechanism
def attempt_driver_killed(run: Subject) -> None:
    attempt = (run.folder.status() or {})["attempt"]
    ray.kill(ray.get_actor(attempt_name(run.run_id, attempt), NAMESPACE))


@mechanism
def controller_killed(run: Subject) -> None:
    run.process("controller_started").kill()


@mechanism
def controller_stopped_for_a_while(run: Subject) -> None:
    with stopped(run.process("controller_started")):
        time.sleep(8)


@mechanism
def evaluator_killed(run: Subject) -> None:
    run.actor("EvaluatorActor").kill()


@mechanism
def teacher_killed(run: Subject) -> None:
    run.process("teacher_ready").kill()


@mechanism
def teacher_stopped(run: Subject) -> None:
    run.process("teacher_ready").suspend()


@mechanism
def all_teachers_killed(run: Subject) -> None:
    for event in run.events("teacher_ready"):
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(event["pid"])
            if "ServeReplica" in " ".join(process.cmdline()):
                process.kill()


@mechanism
def keepers_killed(run: Subject) -> None:
    run.drop_keepers()


@mechanism
def host_and_keepers_killed(run: Subject) -> None:
    run.drop_keepers()
    run.process("host_ready").kill()


@mechanism
def bit_flipped_in_newest_checkpoint(run: Subject) -> None:
    with damaged(run) as path:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@mechanism
def newest_checkpoint_cut_off(run: Subject) -> None:
    with damaged(run) as path:
        path.write_bytes(path.read_bytes()[:-1])


@mechanism
def file_of_newest_checkpoint_lost(run: Subject) -> None:
    with damaged(run) as path:
        path.unlink()


@contextlib.contextmanager
def damaged(run: Subject) -> Iterator[Path]:
    """What is damaged in the block is what the next attempt starts from."""
    wait_until(lambda: len(catalogue.committed_steps(run.folder.url)) >= 2)
    host = run.process("host_ready")
    host.suspend()
    run.drop_keepers()
    yield run.newest_file()
    host.kill()


@mechanism
def checkpoints_cannot_be_written(run: Subject) -> None:
    with replaced_by_a_file(Path(run.folder.url, "checkpoints")):
        time.sleep(8)


@mechanism
def record_cannot_be_written(run: Subject) -> None:
    with replaced_by_a_file(Path(run.folder.url, "record")):
        time.sleep(8)


@mechanism
def storage_away(run: Subject) -> None:
    with replaced_by_a_file(Path(run.folder.url)):
        time.sleep(8)


@contextlib.contextmanager
def replaced_by_a_file(folder: Path) -> Iterator[None]:
    break_storage(folder)
    try:
        yield
    finally:
        mend_storage(folder)


@mechanism
def host_killed_during_a_save(run: Subject) -> None:
    pattern = "*.orbax-checkpoint-tmp*"
    wait_until(lambda: any(Path(run.folder.url, "checkpoints").glob(pattern)))
    run.process("host_ready").kill()


class Outcome(NamedTuple):
    """How long a mechanism kept the run from a new step, and what the controller called it."""

    name: str
    recovery_s: float
    kinds: str


def disturb(run: Subject, name: str) -> Outcome:
    """Applies a mechanism; returns when the run has made new steps."""
    run.goes_on()
    before, began = len(run.events("attempt_failed")), time.monotonic()
    MECHANISMS[name](run)
    run.goes_on()
    recovery_s = time.monotonic() - began
    kinds = [event["kind"] for event in run.events("attempt_failed")[before:]]
    return Outcome(name, recovery_s, ", ".join(kinds) or "none")


def end(run: Subject) -> None:
    """Stops a run, and sees that nothing of it is left."""
    run_id = run.run_id
    pids = {e["pid"] for e in read_events(run.folder.url) if "pid" in e}
    run.folder.send({"kind": "stop"})
    finish(run)
    assert keepers(run_id) == []
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))
    actors: Any = ray.util.list_named_actors(all_namespaces=True)
    assert not [actor["name"] for actor in actors if run_id in actor["name"]]
    assert not Path(tempfile.gettempdir(), f"stillhouse-train-{run_id}").exists()


def finish(run: Subject) -> None:
    wait_until(lambda: run.folder.lease() is None and bool(run.folder.status()))
    state = (run.folder.status() or {})["state"]
    assert state in ("stopped", "finished"), run.folder.status()


def compare(run: Subject, storage: Path) -> None:
    """With a run of the same length that nothing happens to."""
    num_steps = len(read_steps(run.folder.url))
    undisturbed = Subject(storage, run.cluster, "undisturbed", num_steps)
    finish(undisturbed)
    assert_same_run(run.folder, undisturbed.folder)


@click.command()
@click.option("--seed", default=0, show_default=True, help="Of the mechanisms' order.")
@click.option("--only", multiple=True, type=click.Choice(list(MECHANISMS)))
def main(seed: int, only: tuple[str, ...]) -> None:
    os.environ |= cpu_devices(8)  # JAX has read nothing yet
    names = list(only) or random.Random(seed).sample(list(MECHANISMS), len(MECHANISMS))
    console = Console()
    with tempfile.TemporaryDirectory(prefix="sh-chaos-") as scratch:
        storage = Path(scratch)
        make_teacher(storage, text_folder(storage))
        with simulated_cluster(2, "2x2x1", "v4") as cluster:
            connect(cluster.address)
            run = Subject(storage, cluster, "disturbed")
            outcomes = []
            for name in names:
                outcomes.append(disturb(run, name))
                console.print(f"{name}: {outcomes[-1].recovery_s:.0f} s ({outcomes[-1].kinds})")
            end(run)
            compare(run, storage)
    title = f"{len(outcomes)} mechanisms, order of seed {seed}: the same losses and state"
    table = Table(title=title)
    for column in ("mechanism", "fault told", "seconds to new steps"):
        table.add_column(column)
    for each in outcomes:
        table.add_row(each.name, each.kinds, f"{each.recovery_s:.0f}")
    console.print(table)


if __name__ == "__main__":
    main()
