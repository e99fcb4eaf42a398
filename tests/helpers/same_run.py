"""What it means that two runs were the same."""

import os
import subprocess
import sys
from pathlib import Path

import yaml

from orchestrator import history
from orchestrator.run_folder import RunFolder

# In a process of one device, as the hosts of a run on an embedded Ray are.
_OF_THE_TESTS = ("XLA_FLAGS", "NPROC")


def assert_same_run(folder: RunFolder, other: RunFolder) -> None:
    """The same steps, and the same final state."""
    assert_same_steps(folder.url, other.url)
    assert (folder.status() or {})["digest"] == (other.status() or {})["digest"]


def assert_same_in_one_process(folder: RunFolder) -> None:
    """As `assert_same_run`, of the same run in one process, in one go and without Ray.

    It asks a teacher of its own for all its targets, also for those that the run has stored.
    """
    config = folder.config()
    assert config.teacher is not None
    teacher = config.teacher.model_copy(update={"pool": None, "cache_bytes": 0})
    changes = {
        "name": f"{folder.name}-reference",
        "steps": len(history.read_steps(folder.url)),
        "teacher": teacher,
    }
    reference = config.model_copy(update=changes)
    file = Path(config.storage, f"{reference.name}.yaml")
    file.write_text(yaml.safe_dump(reference.model_dump(mode="json")))
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.reference", str(file)],
        env={name: value for name, value in os.environ.items() if name not in _OF_THE_TESTS},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert_same_steps(folder.url, RunFolder(config.storage, reference.name).url)
    assert (folder.status() or {})["digest"] == done.stdout.strip()


def assert_same_steps(url: str, other_url: str) -> None:
    """Every step once, with the same targets and losses bit for bit.

    Args:
        url: the run's folder.
    """
    lines, expected = history.read_steps(url), history.read_steps(other_url)
    assert [line["step"] for line in lines] == list(range(1, len(expected) + 1))
    for name in ("loss", "kd_loss", "ce_loss", "grad_norm"):
        assert [line[name].hex() for line in lines] == [line[name].hex() for line in expected]
    told, wanted = ([line["targets"]["digest"] for line in each] for each in (lines, expected))
    assert told == wanted
