"""Rows that wait for the storage, bounded in bytes: which are written next, which are dropped."""

from collections.abc import Iterable

from workers.dataset import RowId


class Backlog:
    """Packed rows, oldest first. Pure, and not thread-safe.

    Args:
        max_bytes: of all rows in it; a single row may be larger.
    """

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._rows: dict[RowId, bytes] = {}
        self._begun: set[RowId] = set()

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, row: RowId) -> bool:
        return row in self._rows

    def get(self, rows: Iterable[RowId]) -> dict[RowId, bytes]:
        """Those of `rows` that wait."""
        return {row: self._rows[row] for row in rows if row in self._rows}

    def fits(self, content: bytes) -> bool:
        """Whether a row can be put without dropping another."""
        return not self._rows or self.num_bytes + len(content) <= self.max_bytes

    def put(self, row: RowId, content: bytes) -> int:
        """Takes a row in; how many were dropped for it: the oldest that are not being written.

        That may be the row itself, where all others are.
        """
        assert row not in self._rows, f"{row} waits already"
        self._rows[row] = content
        self.num_bytes += len(content)
        num_dropped = 0
        while self.num_bytes > self.max_bytes and len(self._rows) > 1:
            oldest = next((each for each in self._rows if each not in self._begun), None)
            if oldest is None:
                break
            self._remove(oldest)
            num_dropped += 1
        return num_dropped

    def begin(self, num_bytes: int) -> dict[RowId, bytes]:
        """The oldest rows, to be written: about `num_bytes`, up to twice that if those are all."""
        assert not self._begun, "one part at a time is written"
        part: dict[RowId, bytes] = {}
        taken, everything = 0, self.num_bytes <= 2 * num_bytes
        for row, content in self._rows.items():
            if taken >= num_bytes and not everything:
                break
            part[row] = content
            taken += len(content)
        self._begun = set(part)
        return part

    def end(self, done: bool) -> None:
        """After the attempt to write what `begin` gave: it waits no longer, or as before."""
        for row in self._begun if done else ():
            self._remove(row)
        self._begun.clear()

    def clear(self) -> int:
        """Drops everything; how many rows there were."""
        num_rows = len(self._rows)
        self._rows.clear()
        self._begun.clear()
        self.num_bytes = 0
        return num_rows

    def _remove(self, row: RowId) -> None:
        self.num_bytes -= len(self._rows.pop(row))
