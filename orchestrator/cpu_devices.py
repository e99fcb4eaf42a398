"""Several JAX devices on one CPU: what a process has to find in its environment."""

# XLA's devices on one CPU share a pool of threads, one for each device unless NPROC says more, and
# a collective holds a thread until all devices have come to it. A device may be in two collectives
# at once, one inside a loop and one beside it; then all threads wait for devices that get none.
_THREADS_PER_DEVICE = 4


def cpu_devices(num_devices: int) -> dict[str, str]:
    """Environment, to be set before JAX is imported, that shows the CPU as `num_devices`."""
    environment = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={num_devices}",
    }
    if num_devices > 1:
        environment["NPROC"] = str(_THREADS_PER_DEVICE * num_devices)
    return environment
