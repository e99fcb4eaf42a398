"""One embedded Ray for the tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.distilled_runs import embedded_ray
from tests.helpers.runs import copy_storage


@pytest.fixture(scope="package")
def address() -> Iterator[str]:
    """Where it is reached."""
    with embedded_ray() as address:
        yield address


@pytest.fixture(scope="package")
def storage(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with a trained run `teacher`."""
    return copy_storage(trained, tmp_path_factory.mktemp("storage"))
