"""Which checkpoints a run has, and which it keeps."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.run import CheckpointConfig
from orchestrator.catalogue import (
    committed_steps,
    delete_checkpoint,
    read_checkpoint_entry,
    steps_to_delete,
)
from workers.storage import join, write_json

STEPS = st.sets(st.integers(1, 40), min_size=1, max_size=12)
NAN = float("nan")


def put(run_url: str, step: int, entry: bool = True) -> None:
    write_json(join(run_url, "checkpoints", f"{step:08d}", "data.json"), {})
    if entry:
        write_json(join(run_url, "checkpoints", f"{step:08d}.json"), {"step": step})


@given(
    steps=STEPS,
    judged=st.dictionaries(st.integers(1, 40), st.floats(0, 9) | st.just(NAN)),
    pinned=st.sets(st.integers(1, 40)),
    keep_latest=st.integers(1, 4),
    keep_best=st.integers(0, 4),
)
def test_what_is_kept(
    steps: set[int], judged: dict[int, float], pinned: set[int], keep_latest: int, keep_best: int
):
    config = CheckpointConfig(keep_latest=keep_latest, keep_best=keep_best)
    gone = steps_to_delete(steps, judged, pinned, config)
    kept = steps - set(gone)
    assert set(gone) <= steps
    assert not pinned & set(gone)
    assert max(steps) in kept
    assert set(sorted(steps)[-keep_latest:]) <= kept
    # Whatever is kept has a reason; the best are those that no deleted one beats.
    values = {s: v for s, v in judged.items() if s in steps and v == v}
    best = sorted(values, key=lambda step: (values[step], step))[:keep_best]
    assert kept == set(sorted(steps)[-keep_latest:]) | set(best) | (pinned & steps)


@given(steps=STEPS, judged=st.dictionaries(st.integers(1, 40), st.floats(0, 9)))
def test_deleting_is_done_in_one_go(steps: set[int], judged: dict[int, float]):
    config = CheckpointConfig()
    kept = steps - set(steps_to_delete(steps, judged, (), config))
    assert steps_to_delete(kept, judged, (), config) == []


def test_a_loss_that_is_no_number_is_never_the_best():
    config = CheckpointConfig(keep_latest=1, keep_best=1)
    for judged in ({1: NAN, 2: 3.0, 3: 4.0}, {3: 4.0, 2: 3.0, 1: NAN}):
        assert steps_to_delete([1, 2, 3, 4], judged, (), config) == [1, 3]


def test_only_what_has_an_entry_counts(tmp_path: Path):
    url = str(tmp_path)
    assert committed_steps(url) == []
    for step in (200, 8, 100_000_000):
        put(url, step)
    put(url, 16, entry=False)
    # Another writer is not done with its entry.
    (tmp_path / "checkpoints" / ".00000024.json.0123abcd").write_text("{")
    assert committed_steps(url) == [8, 200, 100_000_000]
    assert read_checkpoint_entry(url, 8) == {"step": 8}
    with pytest.raises(FileNotFoundError):
        read_checkpoint_entry(url, 16)


def test_deleting_takes_all_of_one_and_nothing_else(tmp_path: Path):
    url = str(tmp_path)
    put(url, 8)
    put(url, 16)
    delete_checkpoint(url, 8)
    delete_checkpoint(url, 8)  # done once more by a controller's next life
    assert committed_steps(url) == [16]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        "00000016",
        "00000016.json",
    ]


def test_the_entry_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    url = str(tmp_path)
    put(url, 8)
    removed = []
    monkeypatch.setattr("orchestrator.catalogue.remove_tree", removed.append)
    delete_checkpoint(url, 8)
    assert removed[0] == join(url, "checkpoints/00000008.json")
    assert removed[-1] == join(url, "checkpoints/00000008")
