"""A step's entry names its targets whole, however the batch was divided between hosts."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from workers.target_ledger import joined, ledger_entry
from workers.targets_protocol import MIXED, TargetSpec

SPEC = TargetSpec("dataset", "teacher", "codec", 0, MIXED)
digests_of_rows = st.lists(st.text("0123456789abcdef", min_size=32, max_size=32), min_size=1)


@given(digests_of_rows, st.data())
def test_the_entries_of_hosts_join_to_that_of_one_host(digests, data):
    origins = data.draw(st.lists(st.sampled_from("abc"), min_size=len(digests)))[: len(digests)]
    cuts = sorted({0, len(digests), *data.draw(st.lists(st.integers(0, len(digests))))})
    entries = [
        ledger_entry(SPEC, first, digests[first:last], origins[first:last])
        for first, last in itertools.pairwise(cuts)
    ]
    whole = ledger_entry(SPEC, 0, digests, origins)
    assert joined(data.draw(st.permutations(entries))) == whole
    assert sum(whole["from"].values()) == len(digests)
    assert (whole["codec"], whole["teacher"]) == ("codec", "teacher")


@given(digests_of_rows.filter(lambda digests: digests[0] != digests[-1]))
def test_the_order_of_rows_counts(digests):
    origins = ["a"] * len(digests)
    swapped = [digests[-1], *digests[1:-1], digests[0]]
    one, other = (ledger_entry(SPEC, 0, each, origins) for each in (digests, swapped))
    assert one["digest"] != other["digest"]
