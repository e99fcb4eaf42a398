"""What it means that two runs were the same."""

import subprocess
import sys
from pathlib import Path

import yaml

from configs.run import RunConfig
from orchestrator import history
from orchestrator.run_folder import RunFolder
from tests.helpers.environment import one_device


def assert_same_run(folder: RunFolder, other: RunFolder) -> None:
    """The same steps, and the same final state."""
    assert_same_steps(folder.url, other.url)
    assert (folder.status() or {})["digest"] == (other.status() or {})["digest"]


def assert_same_in_one_process(*folders: RunFolder) -> None:
    """As `assert_same_run`, of the same runs in one process, in one go and without Ray.

    They ask a teacher of their own for all targets, also for those that are stored.
    """
    references = [_reference(folder) for folder in folders]
    files = [Path(each.storage, f"{each.name}.yaml") for each in references]
    for file, each in zip(files, references, strict=True):
        file.write_text(yaml.safe_dump(each.model_dump(mode="json")))
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.reference", *map(str, files)],
        env=one_device(),  # as the hosts of a run on an embedded Ray
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    digests = done.stdout.split()
    for folder, reference, digest in zip(folders, references, digests, strict=True):
        assert_same_steps(folder.url, RunFolder.of(reference).url)
        assert (folder.status() or {})["digest"] == digest


def _reference(folder: RunFolder) -> RunConfig:
    config = folder.config()
    assert config.teacher is not None
    changes = {
        "name": f"{folder.name}-reference",
        "steps": len(history.read_steps(folder.url)),
        "teacher": config.teacher.model_copy(update={"pool": None, "cache_bytes": 0}),
    }
    return config.model_copy(update=changes)


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
