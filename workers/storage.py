"""Files on a local disk or an object store, through fsspec: atomic writes and plain reads.

A name is a local path or an fsspec URL (`gs://bucket/folder`, `memory://folder`). Errors of the
operating system keep their type and errno, and say which file was being worked on; what an object
store raises instead is an OSError too.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem


def open_storage(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a path or URL, and the path within it.

    Listings are never cached: other processes write to the same folders. Raises ValueError where
    the file system is unknown, or the package that it needs is not installed.
    """
    try:
        fs, path = fsspec.url_to_fs(url, use_listings_cache=False)
    except ImportError as error:
        raise ValueError(f"{url}: {error} (for gs://, `pip install stillhouse[gcs]`)") from error
    return fs, path


def is_local(url: str) -> bool:
    """Whether a path or URL lies on a local disk."""
    return isinstance(open_storage(url)[0], LocalFileSystem)


def join(url: str, *parts: str) -> str:
    """A path or URL with `parts` below it."""
    return "/".join([url.rstrip("/"), *(part.strip("/") for part in parts)])


# Of what is read, or of a program that is wrong, and not of a storage that fails.
_NOT_OF_STORAGE = (
    *(TypeError, ValueError, AttributeError, LookupError, AssertionError),
    *(EOFError, zlib.error),
)


@contextlib.contextmanager
def naming(action: str, url: str) -> Iterator[None]:
    """Add to errors what was being done to which file; the type and errno stay.

    Raises:
        OSError: also where a client of an object store has a type of its own for a failure.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            error.add_note(f"while {action} {url}")
            raise
        reason = f"{error.strerror}, while {action} {url}"
        raise OSError(error.errno, reason) from error
    except _NOT_OF_STORAGE as error:
        error.add_note(f"while {action} {url}")
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}, while {action} {url}") from error


@contextlib.contextmanager
def atomic_file(url: str) -> Iterator[str]:
    """A local path to write to, which becomes `url` when the block ends well.

    On a local disk the file is synced and renamed; on an object store it is uploaded in one put.
    After an exception nothing is left behind.
    """
    fs, path = open_storage(url)
    with naming("writing", url), contextlib.ExitStack() as cleanup:
        if isinstance(fs, LocalFileSystem):
            folder = _folder_of(path)
        else:
            folder = cleanup.enter_context(tempfile.TemporaryDirectory())
        temporary = os.path.join(folder, f".{os.path.basename(path)}.{uuid.uuid4().hex}")
        cleanup.callback(Path(temporary).unlink, missing_ok=True)
        yield temporary
        if isinstance(fs, LocalFileSystem):
            _sync(temporary)
            os.replace(temporary, path)
            _sync(folder)
        else:
            fs.put_file(temporary, path)


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(url: str, content: bytes) -> None:
    """Write a whole file: readers see the old content or the new, never a part.

    Raises:
        OSError: the disk is full or the place may not be written; nothing half-made stays.
    """
    fs, path = open_storage(url)
    if isinstance(fs, LocalFileSystem):
        with atomic_file(url) as temporary:
            Path(temporary).write_bytes(content)
    else:
        with naming("writing", url):
            fs.pipe_file(path, content)


def write_new(url: str, content: bytes) -> bool:
    """Write a whole file unless there is one: of several writers exactly one succeeds.

    Returns whether it was this one.
    """
    fs, path = open_storage(url)
    try:
        if isinstance(fs, LocalFileSystem):
            with (
                naming("writing", url),
                tempfile.TemporaryDirectory(prefix=".", dir=_folder_of(path)) as room,
            ):
                temporary = os.path.join(room, "new")
                Path(temporary).write_bytes(content)
                _sync(temporary)
                os.link(temporary, path)  # unlike a rename, refuses to replace
        else:
            with naming("writing", url):
                fs.pipe_file(path, content, mode="create")
    except FileExistsError:
        return False
    return True


def _folder_of(path: str) -> str:
    folder = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    return folder


def read_bytes(url: str) -> bytes:
    """The whole content of a file.

    Raises:
        FileNotFoundError: there is none.
    """
    fs, path = open_storage(url)
    with naming("reading", url):
        content = fs.cat_file(path)
    assert isinstance(content, bytes)
    return content


def write_json(url: str, value: Any) -> None:
    """Write a value as JSON, atomically."""
    write_atomic(url, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(url: str) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not JSON.
    """
    content = read_bytes(url)
    try:
        return json.loads(content)
    except ValueError as error:
        raise ValueError(
            f"{url} is not JSON ({error}); it was damaged or is another kind of file"
        ) from error


def file_sha256(path: str) -> str:
    """SHA-256 of a local file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def exists(url: str) -> bool:
    """Whether there is a file or folder.

    Raises:
        OSError: storage does not answer, which says nothing about what is there.
    """
    fs, path = open_storage(url)
    with naming("looking for", url):
        try:
            fs.info(path)  # `fs.exists` answers no whatever went wrong
        except FileNotFoundError:
            return False
    return True


def free_bytes(url: str) -> int | None:
    """Bytes that are free on the disk of a path, which need not exist; None on an object store."""
    fs, path = open_storage(url)
    if not isinstance(fs, LocalFileSystem):
        return None
    place = Path(path)
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def list_names(url: str) -> list[str]:
    """Sorted names of what lies directly in a folder; none where there is no folder.

    Files that are still being written have hidden names, and are left out.
    """
    fs, path = open_storage(url)
    with naming("listing", url):
        try:
            entries = fs.ls(path, detail=False)
        except FileNotFoundError:
            return []
    names = (entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries)
    return sorted(name for name in names if name and not name.startswith("."))


def list_tree(url: str) -> dict[str, int]:
    """Size in bytes of each file at any depth of a folder, sorted by its path below the folder."""
    fs, path = open_storage(url)
    root = path.rstrip("/")
    with naming("listing", url):
        found: Any = fs.find(path, detail=True)
    sizes = {name[len(root) :].lstrip("/"): info["size"] for name, info in found.items()}
    return dict(sorted(sizes.items()))


def remove_tree(url: str) -> None:
    """Remove a file or a folder with all it holds; nothing happens where there is none.

    Somebody else may be removing it too.
    """
    fs, path = open_storage(url)
    with naming("removing", url), contextlib.suppress(FileNotFoundError):
        fs.rm(path, recursive=True)


def local_copy(url: str, cache_dir: str) -> str:
    """A local path that holds the content of `url`.

    A local file is its own copy; another is downloaded into `cache_dir` once, under a name
    made from its URL. So use it for files that never change.
    """
    fs, path = open_storage(url)
    if isinstance(fs, LocalFileSystem):
        return path
    key = hashlib.sha256(url.encode()).hexdigest()[:16]
    copy = os.path.join(os.path.abspath(cache_dir), f"{key}-{os.path.basename(path)}")
    if not os.path.exists(copy):
        with atomic_file(copy) as temporary, naming("downloading", url):
            fs.get_file(path, temporary)
    return copy
