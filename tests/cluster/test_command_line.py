"""The command line as people use it on one machine: a killed command, Ctrl-C, other terminals.

Costs two embedded Rays, each with a gang and teachers, and the same run in one process.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from click.testing import CliRunner, Result

from orchestrator.cli import main
from orchestrator.history import read_events, read_steps
from orchestrator.run_folder import RunFolder
from tests.helpers.distilled_runs import ENDLESS, distilled_values
from tests.helpers.environment import one_device
from tests.helpers.same_run import assert_same_in_one_process

# Of a machine that is slow and has much else to do.
_WITHIN_S = 600.0
# After a kill -9, Ray's two agents try to report it for about a minute before they leave.
SLOW_TO_LEAVE = ("ray::DashboardAgent", "ray::RuntimeEnvAgent", None)


@pytest.fixture(scope="module")
def temp_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for Ray's sockets, whose paths have to be short."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="sh-") as path:
        yield Path(path)


@pytest.mark.shows("kill-command", "resume-elsewhere", "ctrl-c", "run-again", "command: killed")
def test_a_run_survives_a_killed_command_and_ctrl_c(storage: Path, temp_dir: Path) -> None:
    file = storage / "run.yaml"
    values = distilled_values(storage, "embedded", ENDLESS)
    file.write_text(yaml.safe_dump(values | {"tracking": {"wandb": "offline"}}))
    folder = RunFolder(str(storage), "embedded")

    first = start(["run", str(file)], temp_dir)
    wait_until(lambda: step_of(folder) >= 20, first)
    check_other_terminals(storage, folder, file)
    children = psutil.Process(first.pid).children(recursive=True)
    first.kill()
    first.wait()
    assert_gone(children)
    killed_at = read_steps(folder.url)[-1]["step"]

    second = start(["resume", "embedded", "--storage", str(storage)], temp_dir)
    wait_until(lambda: step_of(folder) >= killed_at + 20, second)
    children = psutil.Process(second.pid).children(recursive=True)
    second.send_signal(signal.SIGINT)
    output, _ = second.communicate(timeout=_WITHIN_S)
    assert second.returncode == 130, output
    assert "`stillhouse resume embedded` continues it" in output
    assert_gone(children)
    lines = read_steps(folder.url)
    assert (folder.status() or {})["checkpoints"][-1] == lines[-1]["step"]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert {line["attempt"] for line in lines} == {1, 2}
    assert_same_in_one_process(folder)
    assert list(Path(folder.url, "wandb").rglob("*.wandb")), "W&B mirrors the run offline"


def check_other_terminals(storage: Path, folder: RunFolder, file: Path) -> None:
    """`status`, `scale`, `rm` and a second `run` from elsewhere, during the run."""

    def command(*arguments: str) -> Result:
        return CliRunner().invoke(main, arguments)

    where = ("--storage", str(storage))
    status = json.loads(command("status", "embedded", "--json", *where).stdout)
    assert status["alive"] and status["state"] == "training"
    other = command("run", str(file), "--set", "steps=401")
    assert other.exit_code == 2
    assert "with other settings is under way" in other.output
    assert command("scale", "embedded", "--teachers", "2", *where).exit_code == 0
    wait_until(lambda: count(folder, "scaled") == 1)
    refused = command("rm", "embedded", "--yes", *where)
    assert refused.exit_code == 2
    assert "is under way" in refused.output


def environment(temp_dir: Path) -> dict[str, str]:
    kept = one_device()
    del kept["RAY_AUTH_MODE"]
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


def step_of(folder: RunFolder) -> int:
    return (folder.status() or {}).get("step") or 0


def count(folder: RunFolder, event: str) -> int:
    return sum(line["event"] == event for line in read_events(folder.url))


def wait_until(
    condition: Callable[[], bool],
    process: "subprocess.Popen[str] | None" = None,
    timeout_s: float = _WITHIN_S,
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

    wait_until(lambda: left() == [], timeout_s=_WITHIN_S)


def name_of(process: psutil.Process) -> str | None:
    try:
        return process.name()
    except psutil.NoSuchProcess:
        return None
