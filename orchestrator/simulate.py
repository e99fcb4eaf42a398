"""`stillhouse simulate`: a cluster of TPU slices on this machine, until Ctrl-C."""

import signal
from pathlib import Path

from rich.console import Console

from orchestrator.cluster import simulated_cluster


def simulate_until_interrupted(
    num_slices: int, topology: str, accelerator: str, console: Console
) -> None:
    """Starts the simulated cluster, says how to use it, and waits for Ctrl-C.

    Raises:
        ValueError: there is no such slice.
    """
    with simulated_cluster(num_slices, topology, accelerator, dashboard=True) as cluster:
        console.print(
            f"{num_slices} × {accelerator} {topology} at {cluster.address}; try\n"
            f"  RAY_AUTH_MODE=disabled stillhouse run simulated --address {cluster.address}\n"
            f"  RAY_AUTH_MODE=disabled stillhouse submit simulated --address "
            f"{cluster.dashboard_url} --set storage={Path.cwd() / 'stillhouse-runs'}\n"
            f"Ctrl-C ends it.",
            highlight=False,
            soft_wrap=True,
        )
        signal.sigwait({signal.SIGINT, signal.SIGTERM})
