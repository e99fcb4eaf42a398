"""Trains the distilled run of a file in this process, without Ray; prints its state digest.

A process of its own, since the number of JAX devices and threads decides the last bits.
"""

import sys

from benchmarks.bare import train_here
from configs.load import load_config
from configs.run import RunConfig

if __name__ == "__main__":
    config = load_config(sys.argv[1])
    assert isinstance(config, RunConfig)
    print(train_here(config).finish.digest)
