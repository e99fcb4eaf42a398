"""A run is under way while its lease changes; clocks of two machines are not compared."""

from pathlib import Path
from typing import Any

import pytest

from configs.load import parse_run
from orchestrator import liveness
from orchestrator.liveness import LOOK_EVERY_S, SHORTLY_S, seen_alive, under_way
from orchestrator.run_folder import LEASE_EXPIRY_S, RunFolder
from tests.helpers.leases import renewed_lease
from tests.helpers.runs import tiny_values
from workers.storage import join, write_json

AN_HOUR_S = 3600.0


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(str(tmp_path), "run")
    folder.create(parse_run(tiny_values(tmp_path, "run"), "test"), {"run_id": "run-1"})
    return folder


@pytest.mark.parametrize("clock_behind_s", [0.0, 21.0, AN_HOUR_S, -AN_HOUR_S])
def test_a_lease_that_is_renewed_by_any_clock_is_seen(folder: RunFolder, clock_behind_s: float):
    with renewed_lease(folder, clock_behind_s):
        assert under_way(folder)
        assert seen_alive([folder]) == {"run"}
    assert not under_way(folder), "it was given back"
    assert seen_alive([folder]) == set()


class Clock:
    """Passes while somebody sleeps."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(liveness, "time", clock)
    return clock


def leave(folder: RunFolder, renewed_s: float) -> None:
    """What a controller leaves that has died."""
    lease: dict[str, Any] = {"holder": "dead", "address": "there:1", "renewed_s": renewed_s}
    write_json(join(folder.url, "lease.json"), lease)


@pytest.mark.parametrize("ahead_s", [0.0, -AN_HOUR_S, AN_HOUR_S])
def test_a_lease_that_was_left_is_certain_to_be_so_after_a_while(
    folder: RunFolder, clock: Clock, ahead_s: float
):
    import time

    leave(folder, time.time() + ahead_s)
    waits: list[float] = []
    assert not under_way(folder, lambda: waits.append(clock.now_s))
    assert LEASE_EXPIRY_S < clock.now_s <= LEASE_EXPIRY_S + 2 * LOOK_EVERY_S
    assert len(waits) == 1 and waits[0] > SHORTLY_S


def test_what_is_only_shown_waits_less_and_for_all_at_once(tmp_path: Path, clock: Clock):
    folders = [RunFolder(str(tmp_path), name) for name in ("a", "b", "c")]
    for folder in folders[:2]:
        leave(folder, 0.0)
    assert seen_alive(folders) == set()
    assert SHORTLY_S < clock.now_s <= SHORTLY_S + 2 * LOOK_EVERY_S
