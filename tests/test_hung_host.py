"""A student host that is stopped in the middle of a step, in a real run of two hosts."""

import os
import signal
from pathlib import Path

import pytest

from configs.load import parse_run
from orchestrator.history import read_events, read_steps
from orchestrator.launch import create_run, start_controller
from orchestrator.run_folder import RunFolder
from tests.distilled_runs import ENDLESS, embedded_ray, end_of, wait_until
from tests.runs import text_folder, tiny_values
from workers.host_watch import hosts_with_stacks, stacks_url

pytestmark = pytest.mark.cluster


def start(storage: Path, address: str, name: str, steps: int) -> RunFolder:
    values = tiny_values(storage, name) | {
        "steps": steps,
        "optimizer": {"final_lr_ratio": 1.0},
        "cluster": {"num_hosts": 2, "devices_per_host": 2},
        "checkpoint": {"every_steps": 40},
        "evaluation": {"enabled": False},
        "watchdog": {"step_at_least_s": 5.0, "step_times": 2.0},
    }
    folder = create_run(parse_run(values, "test"))
    start_controller(folder, address)
    return folder


def step_of(folder: RunFolder) -> int:
    return max((line["step"] for line in read_steps(folder.url)), default=0)


def test_a_run_outlives_a_host_that_hangs_and_is_the_same_in_the_end(tmp_path: Path):
    text_folder(tmp_path)
    with embedded_ray() as address:
        folder = start(tmp_path, address, "hung", ENDLESS)
        wait_until(lambda: step_of(folder) >= 50)
        ready = [e for e in read_events(folder.url) if e["event"] == "host_ready"]
        stopped = next(event for event in ready if event["host"] == 1)
        os.kill(stopped["pid"], signal.SIGSTOP)
        wait_until(lambda: (folder.status() or {}).get("faults") == {"host_hung": 1})
        at = step_of(folder)
        wait_until(lambda: step_of(folder) > at)
        folder.send({"kind": "stop"})
        losses, digest = end_of(folder)
        assert not Path(f"/proc/{stopped['pid']}").exists()

        # The host that waited says where; the one that was stopped could not.
        assert hosts_with_stacks(folder.url, 1) == [0]
        assert "in _settle" in Path(stacks_url(folder.url, 1, 0)).read_text()
        failed = [e for e in read_events(folder.url) if e["event"] == "attempt_failed"]
        assert [event["kind"] for event in failed] == ["host_hung"]
        assert "those of hosts [0], and none of hosts [1]" in failed[0]["message"]

        undisturbed = start(tmp_path, address, "undisturbed", len(losses))
        assert end_of(undisturbed) == (losses, digest)
