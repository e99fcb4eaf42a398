"""Everything that is stored of targets, key by key: what it is, whether it is sound."""

from collections.abc import Iterator
from typing import NamedTuple

from workers.dataset import RowId
from workers.storage import join, list_names, list_tree, read_bytes, read_json, remove_tree
from workers.target_cache import SPEC_FILE, targets_folder, verified
from workers.target_shards import SUFFIX, DamagedTargetsError, list_shard
from workers.targets_protocol import TargetSpec


class Stored(NamedTuple):
    """What lies under one key."""

    key: str
    spec: TargetSpec | None
    """None where it is missing or damaged."""
    num_rows: int
    num_bytes: int
    num_damaged: int
    """Files that cannot be read at all; damaged rows are found by `find_damage`."""


class Damage(NamedTuple):
    """A file, or one of a shard's rows, that is not what was written."""

    file: str
    row: RowId | None
    reason: str


def stored_keys(storage_url: str) -> list[str]:
    """The keys under which targets are stored."""
    return list_names(join(storage_url, "targets"))


def describe_targets(storage_url: str, key: str) -> Stored:
    """What lies under a key, by the shards' directories alone.

    Raises:
        OSError: storage does not answer.
    """
    folder = targets_folder(storage_url, key)
    sizes = list_tree(folder)
    rows: set[RowId] = set()
    num_damaged = 0
    for name in _shards(sizes):
        try:
            rows.update(list_shard(join(folder, name)))
        except DamagedTargetsError:
            num_damaged += 1
    spec = None
    try:
        spec = read_spec(storage_url, key)
    except (DamagedTargetsError, FileNotFoundError):
        num_damaged += 1
    return Stored(key, spec, len(rows), sum(sizes.values()), num_damaged)


def find_damage(storage_url: str, key: str) -> Iterator[Damage]:
    """Reads every row of a key, and tells each that is damaged.

    Raises:
        OSError: storage does not answer.
    """
    folder = targets_folder(storage_url, key)
    try:
        spec = read_spec(storage_url, key)
    except FileNotFoundError:
        yield Damage(SPEC_FILE, None, "is missing; it comes back with the next shard")
        return
    except DamagedTargetsError as error:
        yield Damage(SPEC_FILE, None, str(error))
        return
    for shard in _shards(list_tree(folder)):
        url = join(folder, shard)
        try:
            extents = list_shard(url)
        except DamagedTargetsError as error:
            yield Damage(shard, None, str(error))
            continue
        content = read_bytes(url)
        for row, (offset, num_bytes) in extents.items():
            try:
                verified(spec, row, content[offset : offset + num_bytes])
            except DamagedTargetsError as error:
                yield Damage(shard, row, str(error))


def remove_targets(storage_url: str, key: str, file: str | None = None) -> None:
    """Removes all targets of a key, or one file of them."""
    folder = targets_folder(storage_url, key)
    remove_tree(folder if file is None else join(folder, file))


def _shards(names: dict[str, int]) -> list[str]:
    return [name for name in names if name.endswith(SUFFIX)]


def read_spec(storage_url: str, key: str) -> TargetSpec:
    """What a key stands for.

    Raises:
        FileNotFoundError: it does not say.
        DamagedTargetsError: what it says is damaged.
    """
    url = join(targets_folder(storage_url, key), SPEC_FILE)
    try:
        spec = TargetSpec(**read_json(url))
    except (ValueError, TypeError) as error:
        raise DamagedTargetsError(f"is damaged: {error}") from error
    if spec.key != key:
        raise DamagedTargetsError(f"tells of the key {spec.key}")
    return spec
