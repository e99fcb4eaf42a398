"""Of several that hold a run to be theirs, one does: the last to take up this very run."""

import threading

import pytest

from workers import epochs
from workers.epochs import (
    IDENTITY,
    Epoch,
    SupersededError,
    check_epoch,
    newest_epoch,
    note_removal,
    take_epoch,
)
from workers.storage import join, remove_tree, write_json


@pytest.fixture
def run_url(root: str) -> str:
    """A run `r-1`."""
    url = join(root, "runs", "r")
    write_json(join(url, IDENTITY), {"run_id": "r-1"})
    return url


@pytest.mark.shows("run: taken up on two clusters")
def test_the_newest_epoch_is_the_one_that_counts(run_url: str):
    assert newest_epoch(run_url) == 0
    first = take_epoch(run_url, "r-1", "a", "here:1")
    assert take_epoch(run_url, "r-1", "a", "here:1") == first, "restarted, it keeps its epoch"
    check_epoch(run_url, first)
    second = take_epoch(run_url, "r-1", "b", "there:1")
    check_epoch(run_url, second)
    with pytest.raises(SupersededError, match="there:1"):
        check_epoch(run_url, first)
    assert take_epoch(run_url, "r-1", "a", "here:1") == first


def test_of_many_at_once_each_has_its_own(run_url: str):
    taken: list[Epoch] = []

    def take(holder: str) -> None:
        taken.append(take_epoch(run_url, "r-1", holder, "here:1"))

    threads = [threading.Thread(target=take, args=(str(number),)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(epoch.number for epoch in taken) == list(range(1, 9))


def test_an_epoch_is_of_a_run_and_not_of_its_name(run_url: str):
    """Removed, and made again elsewhere: both begin with the first epoch."""
    before = take_epoch(run_url, "r-1", "a", "here:1")
    note_removal(run_url, "r-1")
    remove_tree(run_url)
    with pytest.raises(SupersededError, match="was removed"):
        check_epoch(run_url, before)
    write_json(join(run_url, IDENTITY), {"run_id": "r-2"})
    after = take_epoch(run_url, "r-2", "b", "there:1")
    assert (before.number, after.number) == (1, 1)
    check_epoch(run_url, after)
    with pytest.raises(SupersededError, match="its name is that of r-2 now"):
        check_epoch(run_url, before)


def test_a_folder_that_does_not_show_its_run_says_nothing(run_url: str):
    """As a mount that is missing for a moment."""
    epoch = take_epoch(run_url, "r-1", "a", "here:1")
    remove_tree(run_url)
    with pytest.raises(FileNotFoundError):
        check_epoch(run_url, epoch)


def test_an_epoch_whose_making_was_told_wrongly_is_had_all_the_same(
    run_url: str, monkeypatch: pytest.MonkeyPatch
):
    """A client of an object store repeats a create whose answer was lost, and then reports that the
    file exists already."""
    make = epochs.write_new

    def lose_the_answer(url: str, content: bytes) -> bool:
        make(url, content)
        return False

    monkeypatch.setattr(epochs, "write_new", lose_the_answer)
    first = take_epoch(run_url, "r-1", "a", "here:1")
    assert first.number == newest_epoch(run_url) == 1
    assert take_epoch(run_url, "r-1", "a", "here:1") == first
