"""What the record says of a step's targets: where they came from, and a digest of all of them."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import xxhash

if TYPE_CHECKING:
    from workers.targets_protocol import TargetSpec

_MODULUS = 1 << 128


def ledger_entry(
    spec: "TargetSpec", first_row: int, digests: Sequence[str], origins: Sequence[str]
) -> dict[str, Any]:
    """One host's entry for a step.

    The digest is a sum over rows, each with its place in the global batch, so that `joined` gives
    the same for any division of the batch between hosts.

    Args:
        first_row: this host's first place in the global batch.
        digests: `row_digest` of each of its rows, in order.
        origins: the replica that scored each row, or `CACHE`.
    """
    places = range(first_row, first_row + len(digests))
    parts = (
        xxhash.xxh3_128_intdigest(f"{place} {digest}".encode())
        for place, digest in zip(places, digests, strict=True)
    )
    return {
        "from": dict(Counter(origins)),
        "digest": f"{sum(parts) % _MODULUS:032x}",
        "codec": spec.codec,
        "teacher": spec.teacher_digest,
    }


def joined(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The entry of a whole step, of those of its hosts."""
    origins = sum((Counter(entry["from"]) for entry in entries), Counter())
    digest = sum(int(entry["digest"], 16) for entry in entries) % _MODULUS
    return {**entries[0], "from": dict(origins), "digest": f"{digest:032x}"}
