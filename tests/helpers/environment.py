"""What the processes of tests find in their environment."""

import os

from orchestrator.cpu_devices import cpu_devices

# Tests compile more than they compute. Without its own emitters of fused loops, XLA compiles a
# training step in half the time, and in one module it needs no threads.
_COMPILE_SOON = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
_OF_SEVERAL_DEVICES = ("XLA_FLAGS", "NPROC")


def eight_devices() -> dict[str, str]:
    """For the tests themselves."""
    devices = cpu_devices(8)
    if _COMPILE_SOON not in devices["XLA_FLAGS"]:  # as it is in a process that tests have started
        devices["XLA_FLAGS"] += f" {_COMPILE_SOON}"
    return devices | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def one_device() -> dict[str, str]:
    """This process's environment, but with one device, as a user's machine has it."""
    kept = {name: value for name, value in os.environ.items() if name not in _OF_SEVERAL_DEVICES}
    return kept | {"XLA_FLAGS": _COMPILE_SOON}


def examples(by_day: int, by_night: int) -> int:
    """How many a property test tries; by night with `pytest --all`."""
    return by_night if os.environ.get("STILLHOUSE_ALL_TESTS") == "1" else by_day
