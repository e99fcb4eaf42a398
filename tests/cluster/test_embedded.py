"""The command line as people use it on one machine: Ctrl-C, a lost command, other terminals."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml

from orchestrator.history import read_events, read_steps
from orchestrator.run_folder import RunFolder
from tests.helpers.distilled_runs import ENDLESS, distilled_values
from tests.helpers.same_run import assert_same_in_one_process

pytestmark = pytest.mark.cluster

# After a kill -9, Ray's two agents try to report it for about a minute before they leave.
SLOW_TO_LEAVE = ("ray::DashboardAgent", "ray::RuntimeEnvAgent", None)


@pytest.fixture(scope="module")
def temp_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for Ray's sockets, whose paths have to be short."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="sh-") as path:
        yield Path(path)


def test_a_run_survives_ctrl_c_and_a_killed_command(storage: Path, temp_dir: Path) -> None:
    file = storage / "run.yaml"
    values = distilled_values(storage, "embedded", ENDLESS)
    file.write_text(yaml.safe_dump(values | {"tracking": {"wandb": "offline"}}))
    folder = RunFolder(str(storage), "embedded")
    where = ["--storage", str(storage)]

    first = start(["run", str(file)], temp_dir)
    wait_until(lambda: step_of(folder) >= 20, first)
    check_other_terminals(storage, folder, file, temp_dir)
    children = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGINT)
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 130, output
    assert "`stillhouse resume embedded` continues it" in output
    assert_gone(children)
    stopped_at = read_steps(folder.url)[-1]["step"]

    second = start(["resume", "embedded", *where], temp_dir)
    wait_until(lambda: step_of(folder) >= stopped_at + 40, second)
    children = psutil.Process(second.pid).children(recursive=True)
    second.kill()
    second.wait()
    assert_gone(children)
    killed_at = read_steps(folder.url)[-1]["step"]

    third = start(["resume", "embedded", *where], temp_dir)
    wait_until(lambda: step_of(folder) >= killed_at + 40, third)
    assert finished(["stop", "embedded", *where], temp_dir).returncode == 0
    output, _ = third.communicate(timeout=120)
    assert third.returncode == 130, output
    lines = read_steps(folder.url)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert {line["attempt"] for line in lines} == {1, 2, 3}
    assert_same_in_one_process(folder)
    assert list(Path(folder.url, "wandb").rglob("*.wandb")), "W&B mirrors the run offline"


def check_other_terminals(storage: Path, folder: RunFolder, file: Path, temp_dir: Path) -> None:
    """`status`, `scale` and a second `run` from elsewhere, while the run goes on."""
    where = ["--storage", str(storage)]
    status = json.loads(finished(["status", "embedded", "--json", *where], temp_dir).stdout)
    assert status["alive"] and status["state"] == "training"
    other = finished(["run", str(file), "--set", "steps=401"], temp_dir)
    assert other.returncode == 2
    assert "with other settings is under way" in other.stderr
    assert finished(["scale", "embedded", "--teachers", "2", *where], temp_dir).returncode == 0
    wait_until(lambda: count(folder, "scaled") == 1)
    refused = finished(["rm", "embedded", "--yes", *where], temp_dir)
    assert refused.returncode == 2
    assert "is under way" in refused.stderr


def environment(temp_dir: Path) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC", "RAY_AUTH_MODE")}
    return {
        **kept,
        "JAX_PLATFORMS": "cpu",
        "RAY_TMPDIR": str(temp_dir),
        "HOME": str(temp_dir),
        "COLUMNS": "200",
    }


def start(arguments: list[str], temp_dir: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "orchestrator", *arguments],
        env=environment(temp_dir),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(arguments: list[str], temp_dir: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "orchestrator", *arguments],
        env=environment(temp_dir),
        capture_output=True,
        text=True,
        timeout=120,
    )


def step_of(folder: RunFolder) -> int:
    return (folder.status() or {}).get("step") or 0


def count(folder: RunFolder, event: str) -> int:
    return sum(line["event"] == event for line in read_events(folder.url))


def wait_until(
    condition: Callable[[], bool],
    process: "subprocess.Popen[str] | None" = None,
    timeout_s: float = 180,
) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if process is not None and process.poll() is not None:
            output, _ = process.communicate()
            pytest.fail(f"the command ended early: {output}")
        assert time.monotonic() < deadline, "the run did not get there"
        time.sleep(0.2)


def assert_gone(processes: list[psutil.Process]) -> None:
    """Nothing of the embedded Ray is left that could train or hold anything."""

    def left() -> list[str | None]:
        _, alive = psutil.wait_procs(processes, timeout=0)
        return [name for name in map(name_of, alive) if name not in SLOW_TO_LEAVE]

    wait_until(lambda: left() == [], timeout_s=20)


def name_of(process: psutil.Process) -> str | None:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return None
