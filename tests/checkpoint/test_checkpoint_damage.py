"""Damaged checkpoints: found, named, and never restored."""

import random
from pathlib import Path

import jax
import pytest

from model.sharding import make_mesh
from tests.helpers.broken_storage import break_storage, mend_storage
from tests.helpers.checkpoints import fresh_state, save_state, tiny_config
from workers import integrity
from workers.checkpoint import CheckpointMeta, load_params, restore_state
from workers.digest import state_digest
from workers.integrity import (
    CorruptCheckpointError,
    CorruptOwnCheckpointError,
    own_checkpoint,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
CONFIG = tiny_config(Path("unused"))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, CheckpointMeta]:
    url, meta = save_state(str(tmp_path), fresh_state(CONFIG), CONFIG)
    return Path(url), meta


@pytest.fixture
def mesh() -> jax.sharding.Mesh:
    return make_mesh({}, jax.devices()[:1])


@pytest.mark.shows("damage-refused", "checkpoint: any bit flipped")
def test_damage_never_comes_back_silently(saved, mesh):
    """A hundred flipped bits and lost ends, in data, manifests and descriptions: none is missed."""
    url, meta = saved
    rng = random.Random(0)
    files = sorted(path for path in url.rglob("*") if path.is_file() and path.stat().st_size)
    for number in range(100):
        path = files[number % len(files)]
        content = path.read_bytes()
        if number % 5 == 4:
            damaged = content[: rng.randrange(len(content))]
        else:
            bit = rng.randrange(8 * len(content))
            damaged = bytearray(content)
            damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(CorruptCheckpointError) as raised:
            restore_state(str(url), CONFIG, mesh)
        assert str(url) in str(raised.value) and "\n" not in str(raised.value)
        path.write_bytes(content)
    assert state_digest(restore_state(str(url), CONFIG, mesh).params) == meta.params_digest


def test_parameters_that_come_back_alone_are_right_or_refused(saved):
    """Who loads parameters reads no file twice; the digest of the state decides."""
    url, meta = saved
    rng = random.Random(0)
    arrays = [path for path in url.rglob("params/**/d/*") if path.stat().st_size > 20_000]
    raised = 0
    for path in 10 * arrays:
        content = path.read_bytes()
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            _, params = load_params(str(url))
        except CorruptCheckpointError as error:
            raised += 1
            assert str(url) in str(error) and "\n" not in str(error)
        else:
            assert state_digest(params) == meta.params_digest
        path.write_bytes(content)
    assert raised >= 5


def test_a_damaged_file_is_named(saved, mesh):
    url, _ = saved
    (url / "params" / "_METADATA").unlink()
    (url / "params" / "manifest.ocdbt").write_bytes(b"half")
    changed = next(path for path in url.rglob("optimizer/**/d/*"))
    changed.write_bytes(bytes(changed.stat().st_size))
    with pytest.raises(CorruptCheckpointError) as raised:
        restore_state(str(url), CONFIG, mesh)
    for told in ("_METADATA is missing", "has 4 bytes instead of", f"{changed.name} has changed"):
        assert told in str(raised.value)


def test_several_hosts_share_the_reading(saved):
    url, _ = saved
    changed = next(path for path in url.rglob("optimizer/**/d/*"))
    changed.write_bytes(bytes(changed.stat().st_size))
    found = 0
    for part in range(3):
        try:
            integrity.check_files(str(url), part=part, num_parts=3)
        except CorruptCheckpointError:
            found += 1
    assert found == 1


def test_a_read_that_fails_is_no_damage_where_the_files_are_whole(saved, mesh, monkeypatch):
    """Storage that stumbles for a moment must not cost the run its newest checkpoint."""
    url, _ = saved

    def stumble(*args: object) -> None:
        raise KeyError("incompatible handler")

    with monkeypatch.context() as stumbling:
        stumbling.setattr("workers.checkpoint.ocp.load_checkpointables", stumble)
        whole = "yet its files are those that were saved"
        with pytest.raises(OSError, match=whole), own_checkpoint(str(url)):
            restore_state(str(url), CONFIG, mesh)
        next(path for path in url.rglob("params/**/d/*") if path.stat().st_size).unlink()
        with pytest.raises(CorruptOwnCheckpointError, match="is missing"), own_checkpoint(str(url)):
            load_params(str(url), mesh)


def test_storage_that_is_away_is_no_damage(saved, mesh):
    url, _ = saved
    break_storage(url)
    with pytest.raises(NotADirectoryError), own_checkpoint(str(url)):
        restore_state(str(url), CONFIG, mesh)
    mend_storage(url)
    restore_state(str(url), CONFIG, mesh)
