"""The faults: each is one mechanism, applied to one target."""

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import ray
from ray._private.test_utils import RayletKiller, WorkerKillerActor, get_and_run_resource_killer

from orchestrator import catalogue
from orchestrator.attempt import attempt_name
from tests.chaos.disk import Disk
from tests.chaos.network import Network
from tests.chaos.subject import Subject
from tests.helpers.broken_storage import break_storage, mend_storage
from tests.helpers.damaged_files import flip_bit, newest_params
from tests.helpers.distilled_runs import wait_until
from tests.helpers.preemption import announce_preemption
from tests.helpers.replicas import flip_bit_in_memory, is_actor
from workers.snapshot_keeper import NAMESPACE, drop_keepers, keepers

A_WHILE_S = 8.0
_AN_HOUR_S = 3600.0
_NOTICE_S = 120.0


class Fault(NamedTuple):
    """What happens to what."""

    mechanism: str
    target: str
    apply: Callable[[Subject], None]
    takes: str | None
    """Attribute of the world without which it cannot be made."""

    @property
    def name(self) -> str:
        return f"{self.target}: {self.mechanism}"


FAULTS: dict[str, Fault] = {}


def fault(
    mechanism: str, target: str, takes: str | None = None
) -> Callable[[Callable[[Subject], None]], Callable[[Subject], None]]:
    def note(apply: Callable[[Subject], None]) -> Callable[[Subject], None]:
        made = Fault(mechanism, target, apply, takes)
        FAULTS[made.name] = made
        return apply

    return note


def lasting(
    mechanism: str, target: str, takes: str | None = None, for_s: float = A_WHILE_S
) -> Callable[[Callable[[Subject], AbstractContextManager[None]]], None]:
    """A fault that ends after a while: what is decorated makes it, and mends it again."""

    def note(make: Callable[[Subject], AbstractContextManager[None]]) -> None:
        @fault(mechanism, target, takes)
        def _(run: Subject) -> None:
            with make(run):
                time.sleep(for_s)

    return note


# Processes.


@fault("killed", "student host")
def _(run: Subject) -> None:
    run.process("host_ready").kill()


@fault("killed", "student host and all snapshots")
def _(run: Subject) -> None:
    drop_keepers(run.run_id)
    run.process("host_ready").kill()


@fault("killed", "snapshots")
def _(run: Subject) -> None:
    drop_keepers(run.run_id)


@fault("killed", "attempt driver")
def _(run: Subject) -> None:
    ray.kill(ray.get_actor(attempt_name(run.run_id, run.status()["attempt"]), NAMESPACE))


@fault("killed", "controller")
def _(run: Subject) -> None:
    run.process("controller_started").kill()


@fault("killed", "evaluator")
def _(run: Subject) -> None:
    wait_until(lambda: bool(run.processes("EvaluatorActor")))
    run.processes("EvaluatorActor")[0].kill()


@fault("killed", "teacher")
def _(run: Subject) -> None:
    run.process("teacher_ready").kill()


@fault("killed", "all teachers")
def _(run: Subject) -> None:
    for process in run.processes("ServeReplica"):
        process.kill()


@fault("asked to end", "student host")
def _(run: Subject) -> None:
    run.process("host_ready").terminate()


@fault("stopped", "student host")
def _(run: Subject) -> None:
    with new_fault(run):
        run.process("host_ready").suspend()


@fault("stopped", "teacher")
def _(run: Subject) -> None:
    run.process("teacher_ready").suspend()


@fault("a bit flipped in memory", "teacher")
def _(run: Subject) -> None:
    before = len(run.events("teacher_quarantined"))
    replicas = [event["who"].removeprefix("teacher-") for event in run.events("teacher_ready")]
    flip_bit_in_memory(next(name for name in reversed(replicas) if is_actor(name)))
    wait_until(lambda: len(run.events("teacher_quarantined")) > before)


@lasting("stopped for a while", "controller")
@contextlib.contextmanager
def _(run: Subject) -> Iterator[None]:
    process = run.process("controller_started")
    process.suspend()
    yield
    process.resume()


@fault("killed in a save", "student host")
def _(run: Subject) -> None:
    pattern = "*.orbax-checkpoint-tmp*"
    wait_until(lambda: any(Path(run.folder.url, "checkpoints").glob(pattern)))
    run.process("host_ready").kill()


# Machines.


@fault("lost, and back", "slice")
def _(run: Subject) -> None:
    with new_fault(run):
        run.world.cluster.lose_slice(1)
    run.world.add_slice(1)


@fault("preempted on notice, and back", "slice")
def _(run: Subject) -> None:
    node = run.world.node(1)
    assert node is not None
    with new_fault(run):
        announce_preemption(node, _NOTICE_S)
    run.world.cluster.lose_slice(1)
    run.world.add_slice(1)


@fault("restarted", "head")
def _(run: Subject) -> None:
    run.world.cluster.restart_head()


# What Ray's own tests kill with.


@fault("ended by Ray's RayletKiller", "slice")
def _(run: Subject) -> None:
    with new_fault(run), rays_killer(RayletKiller, None):
        pass
    lost = run.world.lost_slice()
    run.world.cluster.lose_slice(lost)
    run.world.add_slice(lost)


@fault("killed by Ray's WorkerKillerActor", "whoever is at a task")
def _(run: Subject) -> None:
    # It knows itself by another name than it has.
    with rays_killer(WorkerKillerActor, lambda: lambda task: "Killer" not in task.name):
        pass


# The network.


@fault("cut between them", "student hosts", takes="network")
def _(run: Subject) -> None:
    with cables(run).cut_between(), new_fault(run):
        pass


@lasting("cut off for a while", "student host", takes="network")
def _(run: Subject) -> AbstractContextManager[None]:
    return cables(run).cut_off(1)


@fault("cut off for good", "slice", takes="network")
def _(run: Subject) -> None:
    with cables(run).cut_off(1), new_fault(run):
        wait_until(lambda: run.world.node(1) is None)
        run.world.cluster.lose_slice(1)
    run.world.add_slice(1)


# Data at rest.


@fault("a bit flipped", "newest checkpoint")
def _(run: Subject) -> None:
    with damage_to_the_newest(run) as path:
        flip_bit(path)


@fault("cut off", "newest checkpoint")
def _(run: Subject) -> None:
    with damage_to_the_newest(run) as path:
        path.write_bytes(path.read_bytes()[:-1])


@fault("half of it zeros", "newest checkpoint")
def _(run: Subject) -> None:
    with damage_to_the_newest(run) as path:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2].ljust(len(content), b"\0"))


@fault("a file lost", "newest checkpoint")
def _(run: Subject) -> None:
    with damage_to_the_newest(run) as path:
        path.unlink()


@fault("a bit flipped", "snapshots in memory")
def _(run: Subject) -> None:
    host = run.process("host_ready")
    host.suspend()
    for name in keepers(run.run_id):
        ray.get(ray.get_actor(name, NAMESPACE).__ray_call__.remote(flip_snapshots))
    host.kill()


@fault("a bit flipped", "stored targets")
def _(run: Subject) -> None:
    with run.before_a_restart():
        for path in (run.world.storage / "targets").rglob("*.npz"):
            flip_bit(path)


# Storage.

for mechanism, target, folder in [
    ("away", "storage", "."),
    ("refused", "folder of checkpoints", "checkpoints"),
    ("refused", "folder of the record", "record"),
]:
    lasting(mechanism, target)(
        lambda run, folder=folder: replaced_by_a_file(Path(run.folder.url, folder))
    )

for mechanism, make, for_s in [
    ("full", lambda run: drive(run).full(), A_WHILE_S),
    ("write-protected", lambda run: drive(run).protected(), A_WHILE_S),
    ("does not answer", lambda run: drive(run).still(), A_WHILE_S),
    ("slow", lambda run: drive(run).slow(still_s=0.5, pause_s=0.1), 2 * A_WHILE_S),
]:
    lasting(mechanism, "storage", takes="disk", for_s=for_s)(make)


# Around it.


@fault("an hour ahead for a while", "clock")
def _(run: Subject) -> None:
    wrong_clock(run, _AN_HOUR_S)


@fault("an hour behind for a while", "clock")
def _(run: Subject) -> None:
    wrong_clock(run, -_AN_HOUR_S)


@fault("away", "W&B")
def _(run: Subject) -> None:
    # It has tried from the beginning, and does not give up.
    wait_until(lambda: bool(run.processes("_Mirror")))


@contextlib.contextmanager
def new_fault(run: Subject) -> Iterator[None]:
    """Waits for the end of an attempt."""
    before = len(run.faults())
    yield
    wait_until(lambda: len(run.faults()) > before)


@contextlib.contextmanager
def damage_to_the_newest(run: Subject) -> Iterator[Path]:
    """The largest file of the newest checkpoint's parameters, which is found to be damaged."""
    with run.before_a_restart():
        step = catalogue.committed_steps(run.folder.url)[-1]
        yield newest_params(run.folder.url)
    wait_until(lambda: step in {e["step"] for e in run.events("checkpoint_quarantined")})


def wrong_clock(run: Subject, ahead_s: float) -> None:
    with run.world.clock(ahead_s):
        run.goes_on()
        assert abs(run.status()["time_s"] - time.time() - ahead_s) < _AN_HOUR_S / 2
        run.goes_on()


def flip_snapshots(keeper: Any) -> None:
    """In each piece of each snapshot that a keeper holds."""
    for held in keeper._held.values():
        for piece in (piece for each in held for piece in each.pieces):
            piece.array.reshape(-1).view(np.uint8)[0] ^= 1


@contextlib.contextmanager
def rays_killer(kind: Any, choose: Any) -> Iterator[None]:
    """One kill, which is over with the block."""
    killer = get_and_run_resource_killer(kind, 1, max_to_kill=1, kill_filter_fn=choose)
    yield
    assert len(ray.get(killer.get_killed_nodes.remote(), timeout=300)) == 1
    ray.kill(killer)


@contextlib.contextmanager
def replaced_by_a_file(folder: Path) -> Iterator[None]:
    break_storage(folder)
    try:
        yield
    finally:
        mend_storage(folder)


def cables(run: Subject) -> Network:
    assert run.world.network is not None
    return run.world.network


def drive(run: Subject) -> Disk:
    assert run.world.disk is not None
    return run.world.disk
