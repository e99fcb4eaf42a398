"""`stillhouse targets`: what is stored is listed, verified, repaired and removed."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from orchestrator.cli import main
from workers.dataset import RowId
from workers.storage import list_names
from workers.target_cache import TargetCache
from workers.targets_protocol import MIXED, TargetChunk, TargetSpec, row_digest

SPEC = TargetSpec("dataset", "teacher", "hybrid(k=1,draws=0)", 7, MIXED)
OTHER = dataclasses.replace(SPEC, seed=8)


@pytest.fixture(autouse=True)
def storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two keys, each with two shards of three rows."""
    monkeypatch.setenv("STILLHOUSE_STORAGE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    for spec in (SPEC, OTHER):
        cache = TargetCache(str(tmp_path), spec, 2**40, told)
        for source in range(2):
            cache.put(chunk_of(spec, [RowId(source, index) for index in range(3)]))
            cache.flush()
        cache.close()
    return tmp_path


def told(event: str, **details: object) -> None:
    pytest.fail(f"{event}: {details}")


def chunk_of(spec: TargetSpec, rows: list[RowId]) -> TargetChunk:
    ids = np.arange(len(rows) * 40, dtype=np.uint16).reshape(len(rows), 40)
    parts = [{"ids": each} for each in ids]
    digests = tuple(row_digest(spec, *pair) for pair in zip(rows, parts, strict=True))
    return TargetChunk(tuple(rows), {"ids": ids}, digests, "replica")


def call(*args: str, answer: str | None = None) -> Result:
    result = CliRunner().invoke(main, ["targets", *args], input=answer)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def shards(storage: Path, spec: TargetSpec) -> list[Path]:
    return sorted((storage / "targets" / spec.key).glob("*.npz"))


def damage(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


def lines_of(result: Result, key: str) -> list[str]:
    return [line for line in result.stdout.splitlines() if line.startswith(key)]


def test_each_key_is_listed_with_what_it_stands_for(storage):
    (storage / "targets" / OTHER.key / "spec.json").unlink()
    result = call("list")
    assert result.exit_code == 0
    (line,) = lines_of(result, SPEC.key)
    num_bytes = sum(path.stat().st_size for path in (storage / "targets" / SPEC.key).iterdir())
    assert line.split() == [SPEC.key, MIXED, "6", f"{num_bytes:,}"]
    (line,) = lines_of(result, OTHER.key)
    assert "–" in line and "1 files" in line


def test_sound_targets_are_said_to_be(storage):
    result = call("verify")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        f"{key} is sound" for key in sorted([SPEC.key, OTHER.key])
    ]


def test_damage_is_named_and_repaired(storage):
    one, other = shards(storage, SPEC)
    damage(one, one.stat().st_size // 3)
    other.write_bytes(other.read_bytes()[:-30])
    for _ in range(2):
        result = call("verify", SPEC.key)
        assert result.exit_code == 1
        said = lines_of(result, SPEC.key)
        assert len(said) == 2
        assert any(line.startswith(f"{SPEC.key}/{one.name} row ") for line in said)
        assert any(line.startswith(f"{SPEC.key}/{other.name} has no readable") for line in said)
    assert call("verify", OTHER.key).exit_code == 0
    result = call("verify", "--repair")
    assert result.exit_code == 1, "there was damage"
    assert len([line for line in lines_of(result, SPEC.key) if line.endswith("is removed")]) == 2
    assert shards(storage, SPEC) == []
    assert call("verify").exit_code == 0
    assert len(shards(storage, OTHER)) == 2


@pytest.mark.parametrize("content", ["{", "{}", '{"seed": 1}', "[]", None])
def test_a_key_that_does_not_say_what_it_is_comes_back_with_the_next_shard(storage, content):
    path = storage / "targets" / SPEC.key / "spec.json"
    if content is None:
        path.write_text((storage / "targets" / OTHER.key / "spec.json").read_text())
    else:
        path.write_text(content)
    result = call("verify", "--repair")
    assert result.exit_code == 1
    assert any(
        "spec.json is damaged" in line or "tells of the key" in line
        for line in lines_of(result, SPEC.key)
    )
    assert "spec.json is missing" in call("verify").stdout
    cache = TargetCache(str(storage), SPEC, 2**40, told)
    cache.put(chunk_of(SPEC, [RowId(2, 0)]))
    cache.close()
    assert call("verify").exit_code == 0


def test_a_key_is_removed_and_no_other(storage):
    assert call("remove", SPEC.key, answer="n\n").exit_code == 1
    assert len(list_names(str(storage / "targets"))) == 2
    assert call("remove", SPEC.key, "--yes").exit_code == 0
    assert list_names(str(storage / "targets")) == [OTHER.key]


@pytest.mark.parametrize("command", [["verify"], ["remove", "--yes"]])
def test_a_key_that_is_not_there_is_refused(storage, command):
    result = call(*command, "0123")
    assert result.exit_code == 2
    assert f"no targets '0123' below {storage} (keys: " in result.stderr
    assert SPEC.key in result.stderr
