"""One host of a gang of two: `python -m tests.helpers.saving_host JOB PORT HOST LIFT_AT`.

It cannot write more than a few kilobytes to a file until it dispatches its step number LIFT_AT.
"""

import os
import pickle
import resource
import signal
import sys
from pathlib import Path

import jax

from workers.jobs import StudentJob
from workers.student import Hooks, train

_MOST_BYTES = 1 << 14


def main(job_file: str, port: str, host: str, lift_at: str) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(host))
    job: StudentJob = pickle.loads(Path(job_file).read_bytes())
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, most_bytes = resource.getrlimit(resource.RLIMIT_FSIZE)
    num_steps = 0

    def lift() -> int:
        nonlocal num_steps
        num_steps += 1
        limit_bytes = _MOST_BYTES if num_steps < int(lift_at) else most_bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, most_bytes))
        return 0

    finish = train(job, hooks=Hooks(signal=lift))
    print(finish.digest, flush=True)
    # Orbax has threads that go on waiting, for minutes, for a host that has failed.
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
