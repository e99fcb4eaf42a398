"""`stillhouse targets list`: each class of a teacher's targets, readable on a narrow terminal."""

import dataclasses
from pathlib import Path

import pytest
from click.testing import CliRunner

from orchestrator.cli import main
from tests.helpers.stored_targets import store
from workers.dataset import RowId
from workers.targets_protocol import MIXED, TargetSpec

CLASSES = ("cpu-8x2048-0123abcd", "tpu-v5-lite-8x2048-4567cdef", MIXED)
SPEC = TargetSpec("d" * 32, "7" * 32, "hybrid(k=16,draws=32,values=uint8)", 7, "")


def listed(storage: Path) -> list[str]:
    result = CliRunner().invoke(main, ["targets", "list", "--storage", str(storage)])
    assert result.exit_code == 0, result.output
    return result.stdout.splitlines()


@pytest.mark.parametrize("columns", [80, 200])
def test_each_class_is_listed_with_its_rows_and_bytes(tmp_path, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    specs = [dataclasses.replace(SPEC, sameness=name) for name in CLASSES]
    for number, spec in enumerate(specs):
        store(tmp_path, spec, [RowId(0, index) for index in range(1200 * (number + 1))])
    store(tmp_path, dataclasses.replace(specs[0], seed=8), [RowId(0, 0)])
    lines = listed(tmp_path)
    assert max(map(len, lines)) <= columns
    starts = [number for number, line in enumerate(lines) if line.startswith(SPEC.codec)]
    assert [lines[start].rstrip() for start in starts] == [
        f"{SPEC.codec}, seed 7",
        f"{SPEC.codec}, seed 8",
    ]
    of_seven = [line.split() for line in lines[: starts[1]]]
    assert ["teacher", SPEC.teacher_digest] in of_seven
    assert ["data", "set", SPEC.dataset_digest] in of_seven
    for number, spec in enumerate(specs):
        folder = tmp_path / "targets" / spec.key
        num_bytes = sum(path.stat().st_size for path in folder.iterdir())
        assert [spec.key, spec.sameness, f"{1200 * (number + 1):,}", f"{num_bytes:,}"] in of_seven


def test_a_storage_without_targets_says_so(tmp_path):
    assert listed(tmp_path)[0].startswith("No targets are stored below")
