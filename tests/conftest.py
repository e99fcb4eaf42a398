"""Set before JAX is imported: eight CPU devices. Array annotations are checked in every test."""

import os
import shutil
import tempfile
import uuid
from collections import defaultdict
from collections.abc import Iterator
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.helpers.environment import eight_devices

os.environ |= eight_devices()
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

_CLUSTERS = Path(__file__).parent / "cluster"

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


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "Run the tests of a night too, and property tests with more examples."
    parser.addoption("--all", action="store_true", help=text)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--all"):
        os.environ["STILLHOUSE_ALL_TESTS"] = "1"  # modules of tests ask when they are imported


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that start a cluster come first: they take longest."""
    for item in items:
        if _CLUSTERS in item.path.parents:
            item.add_marker(pytest.mark.cluster)
        item.add_marker(pytest.mark.xdist_group(_group(item)))
    # The next small ones follow: pytest-xdist has one wait behind the clusters.
    items.sort(key=lambda item: (_CLUSTERS not in item.path.parents, len(item.path.parents)))
    if not config.getoption("--all"):
        night = [item for item in items if item.get_closest_marker("night") is not None]
        config.hook.pytest_deselected(items=night)
        items[:] = [item for item in items if item not in night]


def _group(item: pytest.Item) -> str:
    """What runs in one process, one after the other, since it shares what it sets up.

    More than two clusters at once are too much for two cores.
    """
    if _CLUSTERS / "simulated" in item.path.parents:
        return "simulated"
    return "embedded" if _CLUSTERS in item.path.parents else item.nodeid.partition("::")[0]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Versions of pytest and pytest-xdist that do not fit would spread the groups silently."""
    if session.config.getoption("loadgroup", False):
        assert all("@" in item.nodeid for item in session.items), "xdist does not group tests"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Seconds by part, and the tests that take longest."""
    by_part: dict[str, float] = defaultdict(float)
    by_test: dict[str, float] = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                name = report.nodeid.rpartition("@")[0] or report.nodeid
                by_part[name.partition("::")[0].rpartition("/")[0]] += report.duration
                by_test[name] += report.duration
    terminalreporter.section("seconds by part")
    for part, seconds in sorted(by_part.items(), key=itemgetter(1), reverse=True):
        terminalreporter.write_line(f"{seconds:8.1f} {part}")
    terminalreporter.section("the ten longest")
    for name, seconds in sorted(by_test.items(), key=itemgetter(1), reverse=True)[:10]:
        terminalreporter.write_line(f"{seconds:8.1f} {name}")


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


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> "tuple[Path, Prepared]":
    """A storage with text, and with the tokenizer and the rows of it."""
    from tests.helpers.checkpoints import tiny_config
    from tests.helpers.runs import text_folder
    from workers.preparer import prepare

    path = tmp_path_factory.mktemp("prepared")
    text_folder(path)
    config = tiny_config(path, "teacher")
    run_url, vocab_size = str(path / "runs" / config.name), config.model.vocab_size
    facts = prepare(config.data, vocab_size, config.storage, run_url, None, 1, lambda *told: None)
    return path, facts


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage with text and a finished run `teacher`; to be copied, not to be changed."""
    from tests.helpers.runs import make_teacher, text_folder

    path = tmp_path_factory.mktemp("trained")
    make_teacher(path, text_folder(path))
    return path


@pytest.fixture(scope="module")
def text_storage(
    prepared: "tuple[Path, Prepared]", tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A storage of the module's own with text for runs."""
    from tests.helpers.runs import copy_storage

    return copy_storage(prepared[0], tmp_path_factory.mktemp("storage"))


@pytest.fixture(scope="session")
def _one_program_for_equal_steps() -> Iterator[None]:
    """Most runs of tests differ in what happens to them, not in their steps."""
    from tests.helpers.students import memoised
    from workers import student

    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(student, "make_train_step", memoised(student.make_train_step))
        yield


@pytest.fixture(scope="module")
def facts(_one_program_for_equal_steps: None, prepared: "tuple[Path, Prepared]") -> "Prepared":
    """Of the tokenizer and the rows of the text."""
    return prepared[1]


@pytest.fixture(scope="module")
def storage(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A storage of the module's own with text and a finished run `teacher`, with checkpoints of
    steps 2 and 4."""
    from tests.helpers.runs import copy_storage

    return copy_storage(trained, tmp_path_factory.mktemp("storage"))
