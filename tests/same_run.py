"""What it means that two runs were the same."""

from orchestrator import history
from orchestrator.run_folder import RunFolder


def assert_same_run(folder: RunFolder, other: RunFolder) -> None:
    """The same steps, and the same final state."""
    assert_same_steps(folder.url, other.url)
    assert (folder.status() or {})["digest"] == (other.status() or {})["digest"]


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
