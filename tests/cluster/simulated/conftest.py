"""One simulated cluster for the tests of this folder: two slices of one machine each."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.world import World, world
from tests.helpers.runs import copy_storage


@pytest.fixture(scope="package")
def shared_world(trained: Path) -> Iterator[World]:
    """Its storage has a trained run `teacher`."""
    with world() as made:
        copy_storage(trained, made.storage)
        yield made
