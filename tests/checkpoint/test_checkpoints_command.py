"""`stillhouse checkpoints` on a run with real checkpoints."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from orchestrator import catalogue
from orchestrator.cli import main
from orchestrator.run_folder import RunFolder
from tests.helpers.checkpoints import fresh_state, save_state, tiny_config
from tests.helpers.leases import renewed_lease
from workers.checkpoint import checkpoint_url

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
CONFIG = tiny_config(Path("unused"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run with checkpoints of steps 0, 1 and 2."""
    monkeypatch.setenv("STILLHOUSE_STORAGE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    folder = RunFolder(str(tmp_path), "run")
    folder.create(tiny_config(tmp_path), {"run_id": "run-1"})
    state = fresh_state(CONFIG)
    for _ in range(3):
        save_state(folder.url, state, CONFIG)
        state = state._replace(step=state.step + 1)
    return folder


def call(*args: str, code: int = 0) -> str:
    result = CliRunner().invoke(main, ["checkpoints", "run", *args])
    assert result.exit_code == code, result.output
    return result.output


def test_damage_is_put_away_and_what_is_mended_comes_back(folder: RunFolder):
    damaged = next(Path(checkpoint_url(folder.url, 1)).rglob("params/**/d/*"))
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1])
    told = call("--verify", code=1)
    assert f"has {len(content) - 1} bytes instead of {len(content)}" in told
    assert "step 0: whole" in told and "step 2: whole" in told and "in quarantine" in told
    assert catalogue.committed_steps(folder.url) == [0, 2]
    assert catalogue.quarantined_steps(folder.url) == [1]
    damaged.write_bytes(content)
    assert "in quarantine" not in call("--verify")
    assert catalogue.committed_steps(folder.url) == [0, 1, 2]
    assert catalogue.quarantined_steps(folder.url) == []


def test_a_checkpoint_that_is_made_again_is_not_in_quarantine_any_more(folder: RunFolder):
    catalogue.quarantine(folder.url, 2, "damaged")
    catalogue.quarantine(folder.url, 2, "done once more by a controller's next life")
    assert catalogue.read_quarantined(folder.url, 2)["reason"] == "damaged"
    state = fresh_state(CONFIG)
    save_state(folder.url, state._replace(step=state.step + 2), CONFIG)
    assert catalogue.quarantined_steps(folder.url) == []
    assert "step 2: whole" in call("--verify")


def test_pinned_ones_are_kept_and_others_deleted(folder: RunFolder):
    assert "pinned" in call("--pin", "1")
    assert "is pinned; --unpin 1 first" in call("--delete", "1", code=2)
    assert catalogue.pinned_steps(folder.url) == [1]
    call("--unpin", "1")
    call("--delete", "1")
    assert catalogue.committed_steps(folder.url) == [0, 2]
    assert "there are: 0, 2" in call("--pin", "7", code=2)
    with renewed_lease(folder, clock_behind_s=21.0):
        assert "would go on from step 2" in call("--delete", "2", code=2)
