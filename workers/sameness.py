"""Which teachers give answers that are equal bit for bit, and how a run comes to use one kind."""

import hashlib
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path

import jax

from workers.storage import join, read_json, write_new

_AGREEMENT = "sameness.json"


def sameness_class(shape: tuple[int, ...], compute_dtype: str, num_devices: int) -> str:
    """Names the kind of device, its software, and what else decides the last bits.

    Args:
        shape: [rows, tokens] of the compiled batch.
        num_devices: over which it is sharded.
    """
    device = jax.local_devices()[0]
    parts = [
        device.device_kind.replace(" ", "-"),
        _cpu_kind() if device.platform == "cpu" else device.client.platform_version,
        f"jax {version('jax')}, jaxlib {version('jaxlib')}",
        f"{compute_dtype} on {num_devices}",
        "x".join(map(str, shape)),
    ]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]
    return f"{parts[0].lower()}-{parts[-1]}-{digest}"


def _cpu_kind() -> str:
    """XLA divides its work by threads and caches, and compiles for the instructions at hand."""
    affine = hasattr(os, "sched_getaffinity")  # not on macOS
    cores = len(os.sched_getaffinity(0)) if affine else os.cpu_count()
    threads = os.environ.get("NPROC") or cores
    told = Path("/proc/cpuinfo")
    if not told.exists():
        return f"{platform.machine()} {platform.processor()} {threads} threads"
    lines = told.read_text().partition("\n\n")[0].splitlines()
    kept = ("vendor_id", "cpu family", "model", "model name", "cache size", "flags")
    fields = (line.partition(":") for line in lines)
    known = sorted(
        f"{name.strip()}={value.strip()}" for name, _, value in fields if name.strip() in kept
    )
    return f"{platform.machine()} {known} {threads} threads"


def agreed_sameness(run_url: str) -> str | None:
    """The class that all targets of a run come from, on every host and in every attempt.

    None while nothing is agreed on.
    """
    try:
        return read_json(join(run_url, _AGREEMENT))["sameness"]
    except FileNotFoundError:
        return None


def agree(run_url: str, sameness: str) -> bool:
    """Proposes a class for a run; of several proposals the first counts.

    Returns whether that was this one.
    """
    return write_new(join(run_url, _AGREEMENT), json.dumps({"sameness": sameness}).encode())
