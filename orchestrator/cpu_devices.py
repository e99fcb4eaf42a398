"""Several JAX devices on one CPU: what a process has to find in its environment."""

import os

_COUNT = "--xla_force_host_platform_device_count"
# XLA's devices on one CPU share a pool of threads, one for each device or core unless NPROC says
# more, and a collective holds a thread until all devices, of all hosts, have come to it. A device
# may be in two collectives at once, one inside a loop and one beside it, or compile while it is in
# them; then all threads wait for devices that get none.
_THREADS_PER_DEVICE = 4


def cpu_devices(num_devices: int, num_hosts: int = 1) -> dict[str, str]:
    """Environment, to be set before JAX is imported, that shows the CPU as `num_devices`.

    Other flags of XLA stay as this process has them.

    Args:
        num_hosts: processes that compute together, each with as many devices.
    """
    flags = os.environ.get("XLA_FLAGS", "").split()
    kept = [flag for flag in flags if not flag.startswith(_COUNT)]
    environment = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join([*kept, f"{_COUNT}={num_devices}"]),
    }
    if num_devices * num_hosts > 1:
        environment["NPROC"] = str(_THREADS_PER_DEVICE * num_devices)
    return environment
