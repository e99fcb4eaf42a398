"""Whether a checkpoint's files are still those that were written: a digest of each at rest.

The digests lie in the checkpoint's own folder, so that they travel with it.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import xxhash

from workers.storage import join, list_tree, naming, open_storage, read_bytes, read_json, write_json

FILE_DIGESTS = "files.json"
_SEAL = "seal"
_BLOCK_BYTES = 8 << 20
_FILES_AT_ONCE = 8

Files = dict[str, tuple[int, str]]
"""Size in bytes and digest of each file, by its path in the folder."""


class CorruptCheckpointError(ValueError):
    """The bytes of a checkpoint are not those that were saved."""


class UnreadableCheckpointError(CorruptCheckpointError):
    """They could not be read: they are damaged, or storage did not answer."""


class CorruptOwnCheckpointError(RuntimeError):
    """A checkpoint of the very run that wants to use it: the one before it may be whole."""


@contextlib.contextmanager
def own_checkpoint(url: str) -> Iterator[None]:
    """Tells damage to the run's own checkpoint from damage to a teacher's, or another run's.

    Raises:
        CorruptOwnCheckpointError: it is damaged.
        OSError: it could not be read, and its files are whole.
    """
    try:
        yield
    except UnreadableCheckpointError as error:
        try:
            check_files(url)
        except CorruptCheckpointError as damage:
            raise CorruptOwnCheckpointError(str(damage)) from error
        raise OSError(f"{error}; yet its files are those that were saved") from error
    except CorruptCheckpointError as error:
        raise CorruptOwnCheckpointError(str(error)) from error


def sealed(values: dict[str, Any]) -> dict[str, Any]:
    """JSON values with a digest of their own, so that a bit that flips in them is seen."""
    text = json.dumps(values, sort_keys=True)
    return {**values, _SEAL: hashlib.sha256(text.encode()).hexdigest()[:16]}


def unsealed(values: dict[str, Any]) -> dict[str, Any] | None:
    """What was sealed; None if it has changed since."""
    content = {name: value for name, value in values.items() if name != _SEAL}
    return content if sealed(content) == values else None


def write_file_digests(url: str) -> None:
    """Reads every file of the checkpoint at `url`, and writes down what is in it."""
    names = [name for name in list_tree(url) if name != FILE_DIGESTS]
    files = dict(zip(names, _digests(url, names), strict=True))
    write_json(join(url, FILE_DIGESTS), sealed({"files": files}))


def check_files(
    url: str,
    wanted: Callable[[str], bool] = lambda name: True,
    part: int = 0,
    num_parts: int = 1,
) -> None:
    """Reads files of the checkpoint at `url` and compares them with what was written.

    Args:
        wanted: of which paths.
        part, num_parts: which of them fall to this process, where several share the work.

    Raises:
        CorruptCheckpointError: names those that are missing, cut off or changed.
    """
    files = {name: file for name, file in _read(url).items() if wanted(name)}
    sizes = list_tree(url)
    for name in files.keys() - sizes.keys():
        # A listing leaves out what it cannot look at; this raises where storage does not answer.
        with contextlib.suppress(FileNotFoundError):
            sizes[name] = len(read_bytes(join(url, name)))
    damaged = {
        name: "is missing" if name not in sizes else f"has {sizes[name]} bytes instead of {size}"
        for name, (size, _) in files.items()
        if sizes.get(name) != size
    }
    mine = [name for name in sorted(files)[part::num_parts] if name not in damaged]
    for name, found in zip(mine, _digests(url, mine), strict=True):
        if found != files[name]:
            damaged[name] = "has changed"
    if damaged:
        told = ", ".join(f"{name} {how}" for name, how in sorted(damaged.items()))
        raise CorruptCheckpointError(f"{url} is damaged: {told}; use another checkpoint")


def _read(url: str) -> Files:
    try:
        values: Any = read_json(join(url, FILE_DIGESTS))
    except (FileNotFoundError, ValueError) as error:
        raise CorruptCheckpointError(
            f"{url} is damaged: {FILE_DIGESTS} is missing or cannot be read; use another checkpoint"
        ) from error
    content = unsealed(values) if isinstance(values, dict) else None
    if content is None:
        raise CorruptCheckpointError(
            f"{url} is damaged: {FILE_DIGESTS} has changed; use another checkpoint"
        )
    return {name: (size, digest) for name, (size, digest) in content["files"].items()}


def _digests(url: str, names: Iterable[str]) -> list[tuple[int, str]]:
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        return list(pool.map(lambda name: _digest(join(url, name)), names))


def _digest(url: str) -> tuple[int, str]:
    fs, path = open_storage(url)
    hasher, size = xxhash.xxh3_128(), 0
    with naming("reading", url), fs.open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            assert isinstance(block, bytes)
            hasher.update(block)
            size += len(block)
    return size, hasher.hexdigest()
