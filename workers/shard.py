"""One shard of a packed dataset: what a single process does, from documents to a file of rows."""

import contextlib
import errno
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from array_record.python.array_record_module import ArrayRecordWriter

from model.tokenizer import Tokenizer
from workers import storage
from workers.corpus import Piece, read_piece, split_of
from workers.dataset import Shard, Split, SplitManifest, encode_row, token_type_of

COUNTS = ("num_rows", "num_tokens", "num_bytes", "num_documents", "num_skipped", "num_empty")


@dataclass(frozen=True)
class ShardTask:
    """All that a process needs to write one shard, `name` below the dataset's folder."""

    source: int
    split: Split
    folder: str
    name: str
    pieces: tuple[Piece, ...]
    text_field: str
    seed: int
    held_out_fraction: float
    row_length: int

    @property
    def num_bytes(self) -> int:
        return sum(piece.num_bytes for piece in self.pieces)


_process_tokenizer: Tokenizer | None = None


def start_process(model_bytes: bytes) -> None:
    global _process_tokenizer
    _process_tokenizer = Tokenizer.load(model_bytes)


def write_shard(task: ShardTask, tokenizer: Tokenizer | None = None) -> SplitManifest:
    """Write the rows of a task; no file comes of documents that give no row."""
    tokenizer = tokenizer or _process_tokenizer
    assert tokenizer is not None, "the process was not started by start_process"
    counts: Counter[str] = Counter(dict.fromkeys(COUNTS, 0))
    num_slots, token_type = task.row_length + 1, token_type_of(tokenizer.vocab_size)
    rows = pack_rows(_encoded(task, tokenizer, counts), num_slots)
    first = next(rows, None)
    if first is None:
        return SplitManifest(**counts, shards=())
    with storage.atomic_file(storage.join(task.folder, task.name)) as path:
        with _system_errors():
            writer = ArrayRecordWriter(path, "group_size:1")
            for tokens, lengths in itertools.chain([first], rows):
                writer.write(encode_row(tokens, lengths, num_slots, tokenizer.pad_id, token_type))
                counts["num_rows"] += 1
            writer.close()
        sha256 = storage.file_sha256(path)
        num_bytes = os.path.getsize(path)
    shard = Shard(name=task.name, num_rows=counts["num_rows"], num_bytes=num_bytes, sha256=sha256)
    return SplitManifest(**counts, shards=(shard,))


@contextlib.contextmanager
def _system_errors() -> Iterator[None]:
    """Give ArrayRecord's errors the errno that they only tell in words."""
    try:
        yield
    except RuntimeError as error:
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EIO):
            if os.strerror(code) in str(error):
                raise OSError(code, str(error)) from error
        raise


def _encoded(task: ShardTask, tokenizer: Tokenizer, counts: Counter[str]) -> Iterator[list[int]]:
    """Tokens of the task's documents, `<bos> text <eos>` each; what is read is counted."""
    for piece in task.pieces:
        for document in read_piece(piece, task.text_field):
            if split_of(document.name, task.seed, task.held_out_fraction) != task.split:
                continue
            if document.text is None:
                counts["num_skipped"] += 1
            elif not document.text:
                counts["num_empty"] += 1
            else:
                ids = [tokenizer.bos_id, *tokenizer.encode(document.text), tokenizer.eos_id]
                counts["num_documents"] += 1
                counts["num_bytes"] += len(document.text.encode())
                counts["num_tokens"] += len(ids)
                yield ids


def pack_rows(
    documents: Iterable[Sequence[int]], num_slots: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Concatenate documents and cut them into rows of `num_slots` tokens.

    Yields (tokens, lengths of the segments); only the last row may be shorter.
    """
    tokens: list[int] = []
    lengths: list[int] = []
    for document in documents:
        start = 0
        while start < len(document):
            part = document[start : start + num_slots - len(tokens)]
            tokens.extend(part)
            lengths.append(len(part))
            start += len(part)
            if len(tokens) == num_slots:
                yield tokens, lengths
                tokens, lengths = [], []
    if tokens:
        yield tokens, lengths
