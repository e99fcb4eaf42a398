"""Distilled runs on an embedded Ray, for tests that disturb them or look at their teachers."""

import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.serve.context import _set_global_client

from configs.load import parse_run
from orchestrator import history
from orchestrator.launch import connect, create_run, start_controller
from orchestrator.run_folder import RunFolder
from tests.helpers.environment import one_device
from tests.helpers.runs import tiny_values

# More than any machine gets to: a run goes on until it is told to stop, however fast it is.
ENDLESS = 10**6
MORE_STEPS = 5


@contextlib.contextmanager
def embedded_ray() -> Iterator[str]:
    """A Ray of its own, in a temporary folder of its own; its address."""
    with pytest.MonkeyPatch.context() as changed, tempfile.TemporaryDirectory(prefix="sh-") as path:
        changed.delenv("NPROC")
        changed.setenv("XLA_FLAGS", one_device()["XLA_FLAGS"])
        changed.setenv("RAY_TMPDIR", path)
        try:
            yield connect(None)
        finally:
            ray.shutdown()
            _set_global_client(None)  # the next tests have another Serve


def distilled_values(storage: Path, name: str, steps: int, **teacher: Any) -> dict[str, Any]:
    """A distilled run whose losses do not depend on how many steps it is meant to have."""
    return tiny_values(storage, name) | {
        "steps": steps,
        "optimizer": {"final_lr_ratio": 1.0},
        "objective": {"kind": "distill"},
        "teacher": {"checkpoint": "teacher", "rows_per_batch": 4, **teacher},
        "checkpoint": {"every_steps": 40},
        "evaluation": {"enabled": False},
    }


class DistilledRun:
    """A distilled run without a cache, so that every row is asked of the pool.

    Args:
        apart: launched by another process, and so a Ray job of its own.
        teacher: settings of the teacher.
    """

    def __init__(
        self,
        storage: Path,
        address: str,
        name: str,
        steps: int,
        *,
        apart: bool = False,
        seed: int = 0,
        **teacher: Any,
    ):
        asked = {"cpus_per_replica": 0, "answer_within_s": 3.0, "cache_bytes": 0, **teacher}
        values = distilled_values(storage, name, steps, **asked) | {"seed": seed}
        self.folder = RunFolder(str(storage), name)
        self._process: subprocess.Popen[bytes] | None = None
        if apart:
            file = storage / f"{name}.yaml"
            file.write_text(yaml.safe_dump(values))
            command = [sys.executable, "-m", "orchestrator", "run", str(file), "--address", address]
            self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        else:
            start_controller(create_run(parse_run(values, "test")), address)

    def events(self, name: str) -> list[dict[str, Any]]:
        return [e for e in history.read_events(self.folder.url) if e["event"] == name]

    def status(self) -> dict[str, Any]:
        return self.folder.status() or {}

    def goes_on(self) -> None:
        step = self.status().get("step") or 0
        wait_until(lambda: (self.status().get("step") or 0) >= step + MORE_STEPS)

    def stop(self) -> int:
        """Ends the run; how many steps it made."""
        self.folder.send({"kind": "stop"})
        self.end("stopped")
        return len(history.read_steps(self.folder.url))

    def end(self, state: str) -> None:
        wait_until(lambda: "state" in self.status() and self.folder.lease() is None)
        if self._process is not None:
            self._process.wait()
        assert self.status()["state"] == state, self.status()["reason"]


def step_of(folder: RunFolder) -> int:
    """As the controller last showed it."""
    return (folder.status() or {}).get("step") or 0


def end_of(folder: RunFolder) -> tuple[list[str], str]:
    """Waits for a run's end: the losses of all steps, bit for bit, and the last state's digest."""
    wait_until(lambda: folder.lease() is None)
    status = folder.status() or {}
    assert status["state"] in ("finished", "stopped"), status
    lines = history.read_steps(folder.url)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"].hex() for line in lines], status["digest"]


def wait_until(condition: Callable[[], bool], timeout_s: float = 600) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.2)
