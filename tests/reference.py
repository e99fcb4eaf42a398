"""Trains the distilled run of a file in this process, without Ray; prints its state digest.

A process of its own, since the number of JAX devices and threads decides the last bits.
"""

import sys

from configs.load import load_config
from configs.run import RunConfig
from orchestrator.launch import create_run
from tests.runs import InProcessSource, first_job
from workers.student import train

if __name__ == "__main__":
    config = load_config(sys.argv[1])
    assert isinstance(config, RunConfig)
    job = first_job(config, create_run(config))
    print(train(job, InProcessSource(config)).digest)
