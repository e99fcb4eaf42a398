"""The rows that wait for a device: each once, in order, in fair shares."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from workers.fair_queue import FairQueue, Waiting

PUTS = st.lists(
    st.tuples(st.sampled_from("abc"), st.integers(0, 9), st.booleans()), min_size=1, max_size=12
)


@given(puts=PUTS, num_rows=st.integers(1, 5), dropped=st.sets(st.integers(0, 11)))
def test_each_row_is_taken_once_and_in_the_order_of_its_student(puts, num_rows, dropped):
    queue = FairQueue()
    expected: dict[str, list[Waiting]] = {}
    students, alone = {}, set()
    for request, (student, count, is_alone) in enumerate(puts):
        queue.put(student, request, range(count), is_alone)
        students[request] = student
        alone |= {request} if is_alone else set()
        if request not in dropped:
            rows = (Waiting(request, place) for place in range(count))
            expected.setdefault(student, []).extend(rows)
    for request in dropped:
        queue.drop(request)
    found: dict[str, list[Waiting]] = {}
    while batch := queue.take(num_rows):
        assert len(batch) <= num_rows
        assert len(batch) == 1 or not alone & {row.request for row in batch}
        for row in batch:
            found.setdefault(students[row.request], []).append(row)
    assert len(queue) == 0
    assert found == {student: rows for student, rows in expected.items() if rows}


@given(backlogs=st.lists(st.integers(1, 40), min_size=2, max_size=4), num_rows=st.integers(1, 6))
def test_students_with_rows_waiting_get_equal_shares(backlogs, num_rows):
    queue = FairQueue()
    for number, backlog in enumerate(backlogs):
        queue.put(f"student-{number}", number, range(backlog))
    taken: Counter[int] = Counter()
    while all(taken[number] < backlog for number, backlog in enumerate(backlogs)):
        taken.update(row.request for row in queue.take(num_rows))
        unfinished = [taken[n] for n, backlog in enumerate(backlogs) if taken[n] < backlog]
        if len(unfinished) == len(backlogs):
            assert max(unfinished) - min(unfinished) <= 1


def test_one_that_comes_late_has_no_claim_on_the_past():
    queue = FairQueue()
    queue.put("early", 0, range(100))
    for _ in range(10):
        queue.take(5)
    queue.put("late", 1, range(100))
    shares = Counter(row.request for _ in range(4) for row in queue.take(5))
    assert abs(shares[0] - shares[1]) <= 1


def test_a_dangerous_row_has_the_batch_for_itself():
    queue = FairQueue()
    queue.put("a", 0, range(2))
    queue.put("a", 1, range(2), alone=True)
    queue.put("a", 2, range(2))
    batches = [[row.request for row in queue.take(8)] for _ in range(4)]
    assert batches == [[0, 0], [1], [1], [2, 2]]
