"""`stillhouse targets prune`: the least recently used keys go; what a run is using stays."""

import dataclasses
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.cli import main
from orchestrator.prune_targets import StoredKey, keys_in_use, to_prune
from orchestrator.run_folder import RunFolder
from tests.helpers.checkpoints import tiny_config
from tests.helpers.stored_targets import store
from workers.dataset import RowId
from workers.storage import join, list_names, write_json
from workers.targets_protocol import MIXED, TargetSpec

SPECS = [TargetSpec("dataset", "teacher", "codec", seed, MIXED) for seed in range(3)]
FIRST, SECOND, THIRD = (spec.key for spec in SPECS)


@given(
    st.lists(
        st.builds(
            StoredKey,
            st.uuids().map(str),
            st.integers(0, 9),
            st.sampled_from([0.0, 1.0, 2.0, 3.0]),
            under_way=st.sampled_from([(), (), ("run",)]),
        ),
        max_size=8,
    ),
    st.integers(0, 30),
)
def test_no_more_goes_than_has_to_and_the_oldest_first(keys, keep_bytes):
    gone = to_prune(keys, keep_bytes)
    kept = [key for key in keys if key not in gone]
    assert not any(key.under_way for key in gone)
    free = [key for key in kept if not key.under_way]
    assert sum(key.num_bytes for key in kept) <= keep_bytes or not free
    assert all(old.used_s <= young.used_s for old in gone for young in free)
    if gone:
        but_one = [*kept, gone[-1]]
        assert sum(key.num_bytes for key in but_one) > keep_bytes


@pytest.fixture(autouse=True)
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three keys: used by a run, used by it and a later one, unknown to all."""
    monkeypatch.setenv("STILLHOUSE_STORAGE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    for spec in SPECS:
        store(tmp_path, spec, [RowId(0, index) for index in range(3)])
    for name, key, used_s in (("a", FIRST, 100.0), ("b", SECOND, 50.0), ("c", SECOND, 200.0)):
        folder = RunFolder(str(tmp_path), name)
        folder.create(tiny_config(tmp_path, name), {"run_id": name})
        write_json(join(folder.url, "targets.json"), {"key": key, "used_s": used_s})
    return tmp_path


def num_bytes(storage: Path) -> int:
    (size,) = {key.num_bytes for key in keys_in_use(str(storage))}
    return size


def prune(keep_bytes: int, *more: str, answer: str | None = None) -> Result:
    command = ["targets", "prune", "--keep-bytes", str(keep_bytes), *more]
    result = CliRunner().invoke(main, command, input=answer)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def left(storage: Path) -> set[str]:
    return set(list_names(str(storage / "targets")))


def test_keys_go_in_the_order_of_their_last_use(storage):
    size = num_bytes(storage)
    assert "0 keys are removed" in prune(3 * size).stdout
    result = prune(3 * size - 1, "--yes")
    assert f"{THIRD} {size:,} bytes, no run that is left has used it" in result.stdout
    assert left(storage) == {FIRST, SECOND}
    result = prune(size, "--yes")
    assert f"{FIRST} {size:,} bytes, last used 1970-01-0" in result.stdout
    assert f"1 keys are removed, {size:,} bytes stay" in result.stdout
    assert left(storage) == {SECOND}, "by its later use"
    assert result.exit_code == 0


def test_nothing_goes_without_a_yes(storage):
    assert prune(0, answer="n\n").exit_code == 1
    assert left(storage) == {FIRST, SECOND, THIRD}
    assert prune(0, answer="y\n").exit_code == 0
    assert left(storage) == set()


def test_what_a_run_under_way_uses_stays(storage):
    RunFolder(str(storage), "a").write_lease("controller", "here")
    result = prune(0, "--yes")
    assert left(storage) == {FIRST}
    assert "The rest is used by runs under way: a" in result.stdout
    RunFolder(str(storage), "a").release_lease()
    assert left(storage) == {FIRST}
    prune(0, "--yes")
    assert left(storage) == set()


def test_a_damaged_spec_does_not_keep_a_key(storage):
    dead = dataclasses.replace(SPECS[0], seed=9)
    store(storage, dead, [RowId(0, 0)])
    (storage / "targets" / dead.key / "spec.json").write_text("{")
    prune(0, "--yes")
    assert left(storage) == set()
