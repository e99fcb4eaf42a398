"""Making room where targets are stored: whole keys go, the least recently used first."""

import time
from collections.abc import Sequence
from typing import NamedTuple

from orchestrator.liveness import seen_alive
from orchestrator.run_folder import LEASE_EXPIRY_S, list_runs
from workers.storage import list_tree
from workers.target_cache import targets_folder
from workers.target_store import stored_keys


class StoredKey(NamedTuple):
    """What matters of a key when room is wanted."""

    key: str
    num_bytes: int
    used_s: float = 0.0
    """When the last attempt began that used it, in seconds since 1970; 0: no run knows of it."""
    used_by: str = ""
    """The run of that attempt."""
    under_way: tuple[str, ...] = ()
    """Runs that may be using it at this moment."""

    @property
    def last_use(self) -> str:
        if not self.used_s:
            return "no run that is left has used it"
        return time.strftime("last used %Y-%m-%d %H:%M", time.localtime(self.used_s)) + (
            f" by {self.used_by}"
        )


def keys_in_use(storage_url: str) -> list[StoredKey]:
    """All keys below a storage path, with the runs that know of them.

    Raises:
        OSError: storage does not answer.
    """
    used: dict[str, list[tuple[float, str, bool]]] = {}
    users = {folder.name: (folder, folder.targets()) for folder in list_runs(storage_url)}
    alive = seen_alive([folder for folder, told in users.values() if told], LEASE_EXPIRY_S)
    for name, (_, told) in users.items():
        if told is not None:
            used.setdefault(told["key"], []).append((told["used_s"], name, name in alive))
    found: list[StoredKey] = []
    for key in stored_keys(storage_url):
        uses = used.get(key, [])
        last_s, run, _ = max(uses, default=(0.0, "", False))
        num_bytes = sum(list_tree(targets_folder(storage_url, key)).values())
        under_way = tuple(sorted(name for _, name, now in uses if now))
        found.append(StoredKey(key, num_bytes, last_s, run, under_way))
    return found


def to_prune(keys: Sequence[StoredKey], keep_bytes: int) -> list[StoredKey]:
    """The keys to remove so that at most `keep_bytes` stay, as far as runs under way allow it.

    The least recently used go first. One goes whole or stays.
    """
    left_bytes = sum(key.num_bytes for key in keys)
    chosen: list[StoredKey] = []
    for key in sorted(keys, key=lambda each: (each.used_s, each.key)):
        if left_bytes > keep_bytes and not key.under_way:
            chosen.append(key)
            left_bytes -= key.num_bytes
    return chosen
