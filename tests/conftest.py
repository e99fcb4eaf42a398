"""Set before JAX is imported: eight CPU devices. Array annotations are checked in every test."""

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from orchestrator.cpu_devices import cpu_devices

os.environ |= cpu_devices(8)
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # tests compile more than they compute
# What one test or one of its processes compiles the others find, and nobody else does.
os.environ["STILLHOUSE_CACHE"] = tempfile.mkdtemp(prefix="sh-cache-")
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["STILLHOUSE_CACHE"] + "/jax"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
os.environ["RAY_AUTH_MODE"] = "disabled"
# Else what Ray starts gives way to the other tests, and a run takes several times as long.
os.environ |= {"RAY_worker_niceness": "0"}
os.environ.setdefault("WANDB_MODE", "offline")

from jaxtyping import install_import_hook

from tests.helpers import annotations

if TYPE_CHECKING:
    from workers.preparer import Prepared

# The modules that handle arrays.
install_import_hook(
    [
        "model.attention",
        "model.cache",
        "model.codecs.base",
        "model.codecs.bits",
        "model.codecs.blocks",
        "model.codecs.rows",
        "model.codecs.sparse",
        "model.codecs.values",
        "model.codecs.whole",
        "model.chunked_loss",
        "model.chunked_objective",
        "model.chunked_terms",
        "model.chunked_vocabulary",
        "model.kernels",
        "model.layers",
        "model.losses",
        "model.sampling",
        "model.sharding",
        "model.targets",
        "model.tensor_files",
        "model.transformer",
        "model.weights",
        "workers.dataset",
        "workers.digest",
        "workers.evaluator",
        "workers.params_stream",
        "workers.rows",
        "workers.target_stream",
        "workers.targets_protocol",
        "workers.teacher",
        "workers.train_step",
    ],
    f"{annotations.__name__}.checked",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two clusters at once are too much for two cores; tests of a file share what they set up."""
    for item in items:
        alone = item.get_closest_marker("cluster") is not None
        group = "cluster" if alone else item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Versions of pytest and pytest-xdist that do not fit would spread the groups silently."""
    if session.config.getoption("loadgroup", False):
        assert all("@" in item.nodeid for item in session.items), "xdist does not group tests"


def pytest_unconfigure() -> None:
    # A process of a test may still be writing there.
    shutil.rmtree(os.environ["STILLHOUSE_CACHE"], ignore_errors=True)


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder on a disk, and one on object storage."""
    return str(tmp_path) if request.param == "local" else f"memory://{uuid.uuid4().hex}"


@pytest.fixture
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed source of targets is asked again at once."""
    monkeypatch.setattr("workers.target_stream.FIRST_PAUSE_S", 0)


# What imports arrays waits for the hook.


@pytest.fixture(scope="module")
def text_storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with text for runs."""
    from tests.helpers.runs import text_folder

    path = tmp_path_factory.mktemp("storage")
    text_folder(path)
    return path


@pytest.fixture(scope="module")
def facts(text_storage: Path) -> "Prepared":
    """The tokenizer and the rows of the text, for a run `teacher`."""
    from tests.helpers.checkpoints import tiny_config
    from workers.preparer import prepare

    config = tiny_config(text_storage, "teacher")
    run_url, vocab_size = str(text_storage / "runs" / config.name), config.model.vocab_size
    return prepare(config.data, vocab_size, config.storage, run_url, None, 1, lambda *told: None)


@pytest.fixture(scope="module")
def storage(text_storage: Path) -> Path:
    """A storage with text and a finished run `teacher`, with checkpoints of steps 2 and 4."""
    from tests.helpers.runs import make_teacher

    make_teacher(text_storage, text_storage / "text")
    return text_storage


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """An embedded Ray of the module's own."""
    from tests.helpers.distilled_runs import embedded_ray

    with embedded_ray() as address:
        yield address
