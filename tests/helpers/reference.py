"""Trains the distilled runs of some files in this process, without Ray; prints their state digests.

A process of its own, since the number of JAX devices and threads decides the last bits.
"""

import sys

from benchmarks.bare import train_here
from configs.load import load_config
from configs.run import RunConfig

if __name__ == "__main__":
    for file in sys.argv[1:]:
        config = load_config(file)
        assert isinstance(config, RunConfig)
        print(train_here(config).finish.digest)
