"""Which code is running: compared between driver and workers, and kept in each checkpoint."""

import functools
import hashlib
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("model", "configs", "workers", "orchestrator")


@functools.cache
def code_digest() -> str:
    """SHA-256 (16 hex digits) of the project's sources, as they lie on this machine."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0")
            digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@functools.cache
def software() -> dict[str, str]:
    """Versions of what decides the numbers, and the digest of our own code."""
    libraries = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "ray")
    return {"code": code_digest(), **{name: version(name) for name in libraries}}


def check_same_code(expected: str) -> None:
    """Raises ValueError where this process runs other sources than the one that sent it here."""
    if code_digest() != expected:
        raise ValueError(
            f"This machine runs Stillhouse sources {code_digest()}, but the run was launched with "
            f"{expected}: install the same version on every node, or submit the working "
            f"directory with the job (`stillhouse submit` does)"
        )
