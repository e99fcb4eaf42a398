"""A run that is disturbed, and what has to hold of it in the end."""

import contextlib
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.util import placement_group_table

from configs.load import parse_run
from orchestrator import catalogue
from orchestrator.history import read_attempts, read_events, read_steps
from orchestrator.launch import create_run, start_controller
from orchestrator.report_data import read_ledger
from tests.chaos.world import World
from tests.helpers.distilled_runs import ENDLESS, MORE_STEPS, distilled_values, step_of, wait_until
from tests.helpers.same_run import assert_same_run
from workers.snapshot_keeper import drop_keepers, keepers


class Subject:
    """A run in a world, and the ways to reach what belongs to it.

    Args:
        teacher: settings of the run's teacher.
    """

    def __init__(self, world: World, name: str, steps: int = ENDLESS, **teacher: Any):
        self.world, self._teacher = world, teacher
        teachers = {"replicas": 2, "cpus_per_replica": 0, "answer_within_s": 5.0, **teacher}
        values = distilled_values(world.storage, name, steps, **teachers) | {
            "evaluation": {"rows_per_batch": 4},
            "mesh": {"fsdp": 2, "model": 2},
            "cluster": {"accelerator": "v4", "topology": "2x2x1", "num_slices": 2},
            "checkpoint": {"every_steps": 20, "snapshot_every_steps": 1, "keep_latest": 4},
            "faults": dict.fromkeys(("host_died", "host_hung", "driver_died", "unknown"), 100),
            "watchdog": {"step_at_least_s": 10.0, "step_times": 2.0},
            "tracking": {"wandb": "online"},
        }
        self.folder = create_run(parse_run(values, "chaos"))
        start_controller(self.folder, world.cluster.address)

    @property
    def run_id(self) -> str:
        return self.folder.identity()["run_id"]

    def status(self) -> dict[str, Any]:
        return self.folder.status() or {}

    def goes_on(self) -> None:
        step = step_of(self.folder)
        wait_until(lambda: step_of(self.folder) >= step + MORE_STEPS)

    def events(self, name: str) -> list[dict[str, Any]]:
        return [event for event in read_events(self.folder.url) if event["event"] == name]

    def faults(self) -> list[str]:
        """Kinds of those that ended an attempt."""
        return [event["kind"] for event in self.events("attempt_failed")]

    def starts(self) -> list[str]:
        """From where each attempt that came so far went on."""
        ready = {e["attempt"]: e for e in self.events("host_ready") if e["host"] == 0}
        return ["storage" if e["start"] == "resume" else e["start"] for e in ready.values()]

    def num_lost_steps(self) -> int:
        """Steps in the record that a later attempt made again."""
        attempts = read_attempts(self.folder.url)
        return sum(
            line["step"] > after.start_step
            for before, after in pairwise(attempts)
            for line in before.lines
        )

    def process(self, event: str) -> psutil.Process:
        """One that has said an event and is still there, whatever the clock said then."""
        pids = [said["pid"] for said in self.events(event)]
        return psutil.Process(next(pid for pid in reversed(pids) if psutil.pid_exists(pid)))

    def processes(self, title: str) -> list[psutil.Process]:
        """Of actors, among those that this cluster has started."""
        found = []
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if " ".join(process.cmdline()).startswith(f"ray::{title}"):
                    found.append(process)
        return found

    @contextlib.contextmanager
    def before_a_restart(self) -> Iterator[None]:
        """What is done in the block is met by an attempt that has only storage to start from."""
        wait_until(lambda: len(catalogue.committed_steps(self.folder.url)) >= 2)
        host = self.process("host_ready")
        host.suspend()
        drop_keepers(self.run_id)
        yield
        host.kill()

    def stop(self) -> None:
        """Ends the run, and sees that nothing of it is left."""
        run_id = self.run_id
        pids = {e["pid"] for e in read_events(self.folder.url) if "pid" in e}
        self.folder.send({"kind": "stop"})
        self.finish()
        assert keepers(run_id) == []
        wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids))
        actors: Any = ray.util.list_named_actors(all_namespaces=True)
        assert not [actor["name"] for actor in actors if run_id in actor["name"]]
        # The run is alone on its cluster.
        wait_until(lambda: {e["state"] for e in placement_group_table().values()} <= {"REMOVED"})
        assert not Path(tempfile.gettempdir(), f"stillhouse-train-{run_id}").exists()
        assert read_ledger(self.folder) is not None, "the time is accounted for, by any clock"

    def finish(self, within_s: float = 1200.0) -> None:
        wait_until(lambda: self.folder.lease() is None and "state" in self.status(), within_s)
        assert self.status()["state"] in ("stopped", "finished"), self.status()

    def compare(self) -> None:
        """With a run of the same length that nothing happens to."""
        num_steps = len(read_steps(self.folder.url))
        name = f"{self.folder.name}-undisturbed"
        undisturbed = Subject(self.world, name, num_steps, **self._teacher)
        undisturbed.finish(within_s=1200.0 + num_steps)
        assert undisturbed.faults() == []
        assert_same_run(self.folder, undisturbed.folder)
