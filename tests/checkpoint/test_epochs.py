"""Of several clusters that hold a run to be theirs, one does."""

import threading

import pytest

from workers.epochs import SupersededError, check_epoch, newest_epoch, take_epoch


@pytest.mark.shows("run: taken up on two clusters")
def test_the_newest_epoch_is_the_one_that_counts(root: str):
    assert newest_epoch(root) == 0
    first = take_epoch(root, "a", "here:1")
    assert take_epoch(root, "a", "here:1") == first, "a restarted controller keeps its epoch"
    check_epoch(root, first)
    second = take_epoch(root, "b", "there:1")
    check_epoch(root, second)
    with pytest.raises(SupersededError, match="there:1"):
        check_epoch(root, first)
    assert take_epoch(root, "a", "here:1") == first


def test_of_many_at_once_each_has_its_own(root: str):
    taken: list[int] = []

    def take(holder: str) -> None:
        taken.append(take_epoch(root, holder, "here:1"))

    threads = [threading.Thread(target=take, args=(str(number),)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(1, 9))
