"""A packed dataset as it lies on storage: its manifest, and the bytes of a row.

`ROOT/datasets/DIGEST/manifest.json` is written last and makes a dataset visible; it names the
ArrayRecord files of each source and split. A row is named (source, index): the place of its
source in the manifest, and its number within the split.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int32
from pydantic import BaseModel, ConfigDict, ValidationError

from workers import storage

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"

Split = Literal["train", "held_out"]
TokenType = Literal["uint16", "uint32"]


class RowId(NamedTuple):
    """The name of a row: the place of its source in the manifest, and its index there."""

    source: int
    index: int


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(_Record):
    """One ArrayRecord file of rows, named below the dataset's folder."""

    name: str
    num_rows: int
    num_bytes: int
    sha256: str


class SplitManifest(_Record):
    """The rows of one split of one source.

    `num_bytes` counts UTF-8 text and `num_tokens` leaves out padding. `num_skipped` documents
    were not UTF-8 and `num_empty` held no text; neither is among `num_documents`.
    """

    num_rows: int
    num_tokens: int
    num_bytes: int
    num_documents: int
    num_skipped: int
    num_empty: int
    shards: tuple[Shard, ...]


class SourceManifest(_Record):
    """The rows of one source."""

    name: str
    train: SplitManifest
    held_out: SplitManifest

    def split(self, split: Split) -> SplitManifest:
        return self.train if split == "train" else self.held_out


class DatasetManifest(_Record):
    """What a packed dataset holds."""

    format_version: Literal[1]
    digest: str
    tokenizer_digest: str
    row_length: int
    token_type: TokenType
    seed: int
    held_out_fraction: float
    sources: tuple[SourceManifest, ...]


def dataset_folder(root_url: str, digest: str) -> str:
    """The folder of a dataset below the storage's root."""
    return storage.join(root_url, "datasets", digest)


def load_manifest(root_url: str, digest: str) -> DatasetManifest:
    """The manifest of a complete dataset, once its shards are seen to be in place.

    Raises:
        FileNotFoundError: there is no such dataset.
        ValueError: the manifest or a shard is damaged.
    """
    folder = dataset_folder(root_url, digest)
    url = storage.join(folder, MANIFEST_NAME)
    mend = f"the dataset is damaged; remove {folder} to have it packed again"
    try:
        manifest = DatasetManifest.model_validate(storage.read_json(url))
    except ValidationError as error:
        raise ValueError(f"{url} does not fit: {mend} ({error})") from error
    if manifest.digest != digest:
        raise ValueError(f"{url} tells of dataset {manifest.digest}: {mend}")
    sizes = storage.list_tree(folder)
    for source in manifest.sources:
        for shard in (*source.train.shards, *source.held_out.shards):
            size = sizes.get(shard.name)
            if size != shard.num_bytes:
                state = "is missing" if size is None else f"has {size} bytes"
                raise ValueError(
                    f"{folder}/{shard.name} {state}, not {shard.num_bytes} bytes: {mend}"
                )
    return manifest


def token_type_of(vocab_size: int) -> TokenType:
    """The smallest stored type that holds every token id."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def encode_row(
    tokens: Sequence[int], lengths: Sequence[int], num_slots: int, pad_id: int, token_type: str
) -> bytes:
    """A stored row: `num_slots` little-endian tokens, then its segments' lengths as uint32."""
    padded = np.full(num_slots, pad_id, np.dtype(token_type).newbyteorder("<"))
    padded[: len(tokens)] = tokens
    return padded.tobytes() + np.asarray(lengths, "<u4").tobytes()


def decode_row(
    record: bytes, num_slots: int, token_type: str
) -> tuple[Int32[np.ndarray, "T1"], Int32[np.ndarray, "T1"]]:
    """(tokens, segments) of a stored row; segments count from 1, and 0 is padding."""
    dtype = np.dtype(token_type).newbyteorder("<")
    tokens = np.frombuffer(record, dtype, count=num_slots).astype(np.int32)
    lengths = np.frombuffer(record, "<u4", offset=num_slots * dtype.itemsize)
    segments = np.zeros(num_slots, np.int32)
    segments[: lengths.sum()] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    return tokens, segments
