"""The documents of a source, in a fixed order, each with a name that decides its split.

A text file is one document, named by its path below the source. A line of a JSONL file and a
record of a Parquet file are documents named `path#n`, counted from 0.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from configs.data import DataConfig
from workers import storage
from workers.dataset import Split
from workers.source_files import SourceFile, list_files

_BLOCK_BYTES = 2**20


@dataclass(frozen=True)
class Piece:
    """A part of a file that one process reads: bytes [start, stop), or Parquet row groups.

    `stop` None means the file's end; `first_record` is the number of its first record.
    """

    file: SourceFile
    start: int
    stop: int | None
    first_record: int
    num_bytes: int


@dataclass(frozen=True)
class Document:
    """One document; `text` is None where its bytes are not UTF-8."""

    name: str
    text: str | None


def split_of(name: str, seed: int, held_out_fraction: float) -> Split:
    """The split of a document: a pure function of the seed and the document's name."""
    return "held_out" if _uniform(name, seed) < held_out_fraction else "train"


def _uniform(name: str, seed: int) -> float:
    digest = hashlib.blake2b(f"{seed}/{name}".encode("utf-8", "surrogateescape"), digest_size=8)
    return int.from_bytes(digest.digest(), "big") / 2**64


def scan_file(file: SourceFile, piece_bytes: int) -> tuple[str, list[Piece]]:
    """Read a file once: the sha256 of its content (hex), and pieces of about `piece_bytes`."""
    digest = hashlib.sha256()
    pieces: list[Piece] = []
    position = start = num_lines = first_line = 0
    for block in _blocks(file):
        digest.update(block)
        cut = block.rfind(b"\n") + 1 if file.format == "jsonl" else 0
        if cut and position + cut - start >= piece_bytes:
            stop = position + cut
            pieces.append(Piece(file, start, stop, first_line, stop - start))
            start, first_line = stop, num_lines + block.count(b"\n")
        num_lines += block.count(b"\n")
        position += len(block)
    if file.format == "parquet":
        pieces = _parquet_pieces(file, piece_bytes)
    elif position > start or file.format == "text":
        pieces.append(Piece(file, start, position, first_line, position - start))
    return digest.hexdigest(), pieces


@contextlib.contextmanager
def _open(file: SourceFile) -> Iterator[BinaryIO]:
    fs, path = storage.open_storage(file.url)
    with storage.naming("reading", file.url), fs.open(path, "rb") as stream:
        yield cast(BinaryIO, stream)


def _blocks(file: SourceFile) -> Iterator[bytes]:
    """The bytes of a file; those of a JSONL file end with the line that crosses its limit."""
    limit = file.limit if file.format == "jsonl" else None
    position = 0
    with _open(file) as stream:
        while block := stream.read(_BLOCK_BYTES):
            if limit is not None and position + len(block) >= limit:
                end = block.find(b"\n", max(0, limit - 1 - position)) + 1
                if end:
                    yield block[:end]
                    return
            yield block
            position += len(block)


def _parquet_pieces(file: SourceFile, piece_bytes: int) -> list[Piece]:
    pieces: list[Piece] = []
    start = record = first_record = num_bytes = total_bytes = 0
    with _open_parquet(file) as parquet:
        metadata = parquet.metadata
        for group in range(metadata.num_row_groups):
            columns = metadata.row_group(group)
            size = sum(columns.column(i).total_compressed_size for i in range(columns.num_columns))
            num_bytes, total_bytes = num_bytes + size, total_bytes + size
            record += columns.num_rows
            full = file.limit is not None and total_bytes >= file.limit
            if num_bytes >= piece_bytes or full or group == metadata.num_row_groups - 1:
                pieces.append(Piece(file, start, group + 1, first_record, num_bytes))
                start, first_record, num_bytes = group + 1, record, 0
            if full:
                break
    return pieces


def _open_parquet(file: SourceFile):
    # Imported here: pyarrow is slow to load, and most sources do not need it.
    import pyarrow
    import pyarrow.parquet

    fs, path = storage.open_storage(file.url)
    try:
        with storage.naming("reading", file.url):
            return pyarrow.parquet.ParquetFile(path, filesystem=fs)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(
            f"source {file.source!r}: {file.name} is not a Parquet file ({error}); "
            "exclude it or correct the source's format"
        ) from error


def read_piece(piece: Piece, text_field: str) -> Iterator[Document]:
    """The documents of a piece, in order.

    Raises:
        ValueError: a record is not JSON, or its text field is missing or is not text.
    """
    if piece.file.format == "text":
        yield Document(piece.file.name, _decode(storage.read_bytes(piece.file.url)))
        return
    read = _jsonl_values if piece.file.format == "jsonl" else _parquet_values
    for number, value in enumerate(read(piece, text_field), piece.first_record):
        yield Document(f"{piece.file.name}#{number}", value)


def _decode(content: bytes) -> str | None:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def _jsonl_values(piece: Piece, text_field: str) -> Iterator[str | None]:
    with _open(piece.file) as stream:
        stream.seek(piece.start)
        for number, line in enumerate(stream, piece.first_record):
            yield _jsonl_text(line, text_field, piece.file, number)
            if piece.stop is not None and stream.tell() >= piece.stop:
                return


def _jsonl_text(line: bytes, text_field: str, file: SourceFile, number: int) -> str | None:
    where = f"source {file.source!r}: line {number + 1} of {file.name}"
    decoded = _decode(line)
    if decoded is None:
        return None
    if not decoded.strip():
        return ""
    try:
        record: Any = json.loads(decoded)
    except ValueError as error:
        raise ValueError(
            f"{where} is not JSON ({error}); mend the line, exclude the file or correct the format"
        ) from error
    if not isinstance(record, dict) or text_field not in record:
        fields = f"has fields {sorted(record)}" if isinstance(record, dict) else "is no object"
        raise ValueError(
            f"{where} lacks the field {text_field!r} (it {fields}); correct the source's text_field"
        )
    text = record[text_field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(
            f"{where} holds {type(text).__name__} in the field {text_field!r}, not text; "
            "correct the source's text_field"
        )
    try:
        text.encode()  # JSON can spell half of a surrogate pair, which is no character
    except UnicodeEncodeError:
        return None
    return text


def _parquet_values(piece: Piece, text_field: str) -> Iterator[str | None]:
    import pyarrow

    where = f"source {piece.file.source!r}: {piece.file.name}"
    with _open_parquet(piece.file) as parquet:
        fields = parquet.schema_arrow.names
        if text_field not in fields:
            raise ValueError(
                f"{where} lacks the column {text_field!r} (it has {sorted(fields)}); "
                "correct the source's text_field"
            )
        stop = parquet.metadata.num_row_groups if piece.stop is None else piece.stop
        groups = list(range(piece.start, stop))
        for batch in parquet.iter_batches(row_groups=groups, columns=[text_field]):
            try:
                values = batch.column(0).cast(pyarrow.large_binary())
            except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
                raise ValueError(
                    f"{where} holds {batch.column(0).type} in the column {text_field!r}, not "
                    "text; correct the source's text_field"
                ) from error
            for value in values:
                content = value.as_py()
                yield "" if content is None else _decode(content)


def training_texts(config: DataConfig) -> Iterator[str]:
    """Texts of the training split to make a tokenizer from, about `train_bytes` in all.

    Each source gives its share by weight, from files in an order drawn from the seed: the first
    ones by name may be all of one kind.

    Raises:
        ValueError: a source cannot be read, or holds no training text.
    """
    total_weight = sum(source.weight for source in config.sources)
    for source in config.sources:
        remaining = config.tokenizer.train_bytes * source.weight / total_weight
        files = sorted(list_files(source), key=lambda file: _uniform(file.name, config.seed + 1))
        found = False
        for text in _texts(files, source.text_field, config):
            found = True
            yield text
            remaining -= len(text.encode())
            if remaining <= 0:
                break
        if not found:
            raise ValueError(
                f"source {source.name!r} holds no training text; add documents to it, or lower "
                "data.held_out_fraction"
            )


def _texts(files: list[SourceFile], text_field: str, config: DataConfig) -> Iterator[str]:
    for file in files:
        piece = Piece(file, 0, file.limit, 0, file.num_bytes)
        if file.format == "parquet":
            piece = Piece(file, 0, None, 0, file.num_bytes)
        for document in read_piece(piece, text_field):
            split = split_of(document.name, config.seed, config.held_out_fraction)
            if document.text and split == "train":
                yield document.text
