"""Files of targets: rows under one key, each with its digest, read one by one.

A shard is an uncompressed zip of NumPy files, which `numpy.load` opens as well. Its entry
`3-17.npy` holds row 17 of source 3: one record of the row's `digest` and its wire arrays. A row is
read by its place alone, so an object store sends no more than that row.
"""

import errno
import functools
import io
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import IO, Any, NamedTuple, cast

import numpy as np
import xxhash

from workers.dataset import RowId
from workers.storage import atomic_file, naming, open_storage

SUFFIX = ".npz"
_DIGEST = "digest"
_DIRECTORY_DIGEST_BYTES = 16
_NAME = re.compile(r"(0|[1-9]\d*)-(0|[1-9]\d*)\.npy", re.ASCII)
# Before each entry: signature, …, CRC-32, size, size, lengths of the name and of extra fields.
_ENTRY_HEADER = struct.Struct("<4s10xIIIHH")
_NPY_HEADER = struct.Struct("<6sBBH")
# What `zipfile` makes of damaged bytes.
_DAMAGE = (
    *(zipfile.BadZipFile, struct.error, ValueError, LookupError, EOFError, OverflowError),
    *(NotImplementedError, RuntimeError),
)


class DamagedTargetsError(ValueError):
    """Bytes of a shard that are not what was written."""


class Extent(NamedTuple):
    """Where an entry lies in its shard, header included."""

    offset: int
    num_bytes: int


class StoredRow(NamedTuple):
    """One row's wire arrays, each with an axis of one row in front, and their digest."""

    arrays: dict[str, np.ndarray]
    digest: str


def pack_row(arrays: Mapping[str, np.ndarray], digest: str) -> bytes:
    """The content of a row's entry.

    Args:
        arrays: the row's own part of each wire array, without the axis of rows.
    """
    assert _DIGEST not in arrays
    fields: list[Any] = [(_DIGEST, f"S{len(digest)}")]
    fields += [
        (name, array.dtype.newbyteorder("<"), array.shape) for name, array in sorted(arrays.items())
    ]
    form = np.dtype(fields)
    record = np.empty((), form)
    record[_DIGEST] = digest
    for name, array in arrays.items():
        record[name] = array
    return _npy_header(form) + record.tobytes()


def unpack_row(content: bytes) -> StoredRow:
    """The row of an entry's content, as views of it.

    Raises:
        DamagedTargetsError: it is no such record.
    """
    try:
        *_, length = _NPY_HEADER.unpack_from(content)
        begin = _NPY_HEADER.size + length
        record = np.frombuffer(content, _form(content[:begin]), 1, begin)
        digest = record[_DIGEST][0].decode()
    except (struct.error, ValueError, LookupError) as error:
        raise DamagedTargetsError(f"is no record of targets: {error}") from error
    names = [name for name in record.dtype.names or () if name != _DIGEST]
    return StoredRow({name: record[name] for name in names}, digest)


def write_shard(url: str, rows: Mapping[RowId, bytes]) -> dict[RowId, Extent]:
    """Writes packed rows as a new shard, and tells where each lies.

    Raises:
        OSError: it cannot be written; nothing half-made stays.
    """
    with atomic_file(url) as path, zipfile.ZipFile(path, "w") as archive:
        for row, content in rows.items():
            archive.writestr(zipfile.ZipInfo(f"{row.source}-{row.index}.npy"), content)
        extents = _extents(archive)
        archive.comment = _directory_digest(extents)
        return extents


def shard_bytes(rows: Mapping[RowId, bytes]) -> int:
    """Size of the shard that `write_shard` would make."""
    fixed = zipfile.sizeFileHeader + zipfile.sizeCentralDir  # pyright: ignore
    names = sum(len(f"{row.source}-{row.index}.npy") for row in rows)
    contents = sum(len(content) for content in rows.values())
    end = zipfile.sizeEndCentDir + _DIRECTORY_DIGEST_BYTES  # pyright: ignore
    return contents + 2 * names + fixed * len(rows) + end


def list_shard(url: str) -> dict[RowId, Extent]:
    """The rows of a shard and where they lie, from its directory alone.

    Raises:
        DamagedTargetsError: it is no such shard, or was cut off.
        OSError: it cannot be read.
    """
    fs, path = open_storage(url)
    try:
        with naming("reading", url), fs.open(path, "rb") as file:
            try:
                archive = zipfile.ZipFile(cast(IO[bytes], file))
                extents = _extents(archive)
            except _DAMAGE as error:
                raise DamagedTargetsError(f"has no readable directory: {error}") from error
    except OSError as error:
        if error.errno != errno.EINVAL:  # a place before the file's first byte
            raise
        raise DamagedTargetsError("has no readable directory") from error
    if archive.comment != _directory_digest(extents):
        raise DamagedTargetsError("has a directory of another digest")
    return extents


def entry_content(entry: bytes, row: RowId) -> bytes:
    """The content of an entry that was read by its extent.

    Raises:
        DamagedTargetsError: it is not the entry of that row, or its checksum is wrong.
    """
    if len(entry) < _ENTRY_HEADER.size:
        raise DamagedTargetsError("was cut off")
    signature, crc, size, _, name_length, extra_length = _ENTRY_HEADER.unpack_from(entry)
    begin = _ENTRY_HEADER.size + name_length
    name, content = entry[_ENTRY_HEADER.size : begin], entry[begin + extra_length :]
    if signature != b"PK\x03\x04" or name != f"{row.source}-{row.index}.npy".encode():
        raise DamagedTargetsError("lies where another entry is")
    if len(content) != size or zlib.crc32(content) != crc:
        raise DamagedTargetsError("has a wrong checksum")
    return content


def _extents(archive: zipfile.ZipFile) -> dict[RowId, Extent]:
    extents: dict[RowId, Extent] = {}
    for info in archive.infolist():
        match = _NAME.fullmatch(info.filename)
        if match is None:
            raise DamagedTargetsError(f"has an entry {info.filename!r}")
        num_bytes = _ENTRY_HEADER.size + len(info.filename) + info.compress_size
        extents[RowId(*map(int, match.groups()))] = Extent(info.header_offset, num_bytes)
    return extents


def _directory_digest(extents: Mapping[RowId, Extent]) -> bytes:
    """The archive's comment: `zipfile` has no checksum of the names and places that it lists."""
    listed = " ".join(str(number) for row, extent in extents.items() for number in (*row, *extent))
    return xxhash.xxh3_64_hexdigest(listed.encode()).encode()


@functools.lru_cache(maxsize=64)
def _npy_header(form: np.dtype) -> bytes:
    description: Any = np.lib.format.dtype_to_descr(form)
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        file, {"descr": description, "fortran_order": False, "shape": ()}
    )
    return file.getvalue()


@functools.lru_cache(maxsize=64)
def _form(header: bytes) -> np.dtype:
    file = io.BytesIO(header)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("not the version of NumPy's format that is written")
    return np.lib.format.read_array_header_1_0(file)[2]
