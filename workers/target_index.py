"""What a folder of shards holds: which row lies where, found by the shards' directories alone."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from workers.dataset import RowId
from workers.storage import join, list_tree, open_storage
from workers.target_shards import SUFFIX, DamagedTargetsError, Extent, list_shard

_READERS = 16


class Place(NamedTuple):
    """Where a row lies."""

    shard: str
    extent: Extent


class ShardIndex:
    """The rows of a folder, kept in memory: some 300 bytes for each.

    Args:
        on_damage: told (shard, reason) of each shard without a readable directory, once.
        on_error: told the error when storage does not answer; what it kept from being read is
            read by a later `refresh`.
    """

    def __init__(
        self,
        folder_url: str,
        on_damage: Callable[[str, str], None],
        on_error: Callable[[Exception], None],
    ):
        self._folder_url = folder_url
        self._on_damage, self._on_error = on_damage, on_error
        self._sizes: dict[str, int] = {}
        self._places: dict[RowId, list[Place]] = {}
        self._lock = threading.Lock()
        self._refreshing = threading.Lock()
        self._refreshed = False

    @property
    def num_bytes(self) -> int:
        """Of all shards, damaged ones too."""
        with self._lock:
            return sum(self._sizes.values())

    @property
    def shards(self) -> list[str]:
        with self._lock:
            return sorted(self._sizes)

    def __contains__(self, row: RowId) -> bool:
        with self._lock:
            return row in self._places

    def rows(self) -> list[RowId]:
        """All rows, in order."""
        with self._lock:
            return sorted(self._places)

    def places(self, row: RowId) -> list[Place]:
        """Everywhere that a row is known to lie."""
        with self._lock:
            return list(self._places.get(row, ()))

    def refresh(self) -> None:
        """Takes in shards that others have written, and forgets those that are gone."""
        with self._refreshing:
            self._refresh()

    def refresh_once(self) -> None:
        """Reads what there is, unless that has been done."""
        with self._refreshing:
            if not self._refreshed:
                self._refresh()

    def add(self, shard: str, num_bytes: int, extents: dict[RowId, Extent]) -> None:
        """Takes in a shard's rows."""
        with self._lock:
            self._sizes[shard] = num_bytes
            for row, extent in extents.items():
                self._places.setdefault(row, []).append(Place(shard, extent))

    def forget(self, shard: str) -> None:
        """Drops all rows of a shard that is gone."""
        with self._lock:
            self._sizes.pop(shard, None)
            kept = {
                row: [place for place in places if place.shard != shard]
                for row, places in self._places.items()
            }
            self._places = {row: places for row, places in kept.items() if places}

    def drop(self, row: RowId, place: Place) -> bool:
        """Drops one place of a row; whether it was still known."""
        with self._lock:
            places = self._places.get(row, [])
            if place not in places:
                return False
            places.remove(place)
            if not places:
                del self._places[row]
            return True

    def read(self, places: Sequence[Place]) -> list[bytes | Exception]:
        """The bytes at each place, together where the storage can do that, or what failed."""
        fs, folder = open_storage(self._folder_url)
        try:
            found: Any = fs.cat_ranges(
                [join(folder, place.shard) for place in places],
                [place.extent.offset for place in places],
                [place.extent.offset + place.extent.num_bytes for place in places],
                on_error="return",
            )
        except Exception as error:  # as in `refresh`
            return [error] * len(places)
        return list(found)

    def _refresh(self) -> None:
        try:
            sizes = list_tree(self._folder_url)
        except Exception as error:  # object stores raise errors of their own kinds
            self._on_error(error)
            return
        sizes = {name: size for name, size in sizes.items() if name.endswith(SUFFIX)}
        known = set(self.shards)
        for shard in known - sizes.keys():
            self.forget(shard)
        new = sorted(sizes.keys() - known)
        with ThreadPoolExecutor(_READERS) as readers:
            for shard, extents in zip(new, readers.map(self._list, new), strict=True):
                if extents is not None:
                    self.add(shard, sizes[shard], extents)
        self._refreshed = True

    def _list(self, shard: str) -> dict[RowId, Extent] | None:
        """A shard's rows, none if it is damaged; None if storage does not answer."""
        try:
            return list_shard(join(self._folder_url, shard))
        except DamagedTargetsError as error:
            self._on_damage(shard, str(error))
            return {}
        except FileNotFoundError:
            return None  # removed since it was listed
        except Exception as error:  # as in `refresh`
            self._on_error(error)
            return None
