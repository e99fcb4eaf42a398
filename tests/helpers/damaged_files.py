"""Damage to what a run has stored."""

from pathlib import Path

from orchestrator.catalogue import checkpoint_url, committed_steps


def newest_params(run_url: str) -> Path:
    """The largest file of the newest checkpoint's parameters."""
    step = committed_steps(run_url)[-1]
    files = Path(checkpoint_url(run_url, step)).rglob("params/**/d/*")
    return max(files, key=lambda path: path.stat().st_size)


def flip_bit(path: Path) -> None:
    """One in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
