"""Gemma 2 weights in the layout of Hugging Face, to and from checkpoints of ours."""

import json
import shutil
import uuid
from pathlib import Path

from model.config import ModelConfig
from model.published_config import config_values, read_config
from model.tensor_files import (
    MAX_SHARD_BYTES,
    FileDtype,
    TensorReader,
    TensorWriter,
    read_json_file,
)
from model.tokenizer import Tokenizer
from model.weights import leaves_of, tensor_shapes
from workers.checkpoint import CheckpointMeta, read_meta
from workers.code_identity import software
from workers.integrity import write_file_digests
from workers.params_stream import read_params, save_params
from workers.preparer import TOKENIZER_FILE, tokenizer_url
from workers.storage import exists, join, read_bytes, remove_tree, write_atomic

_CONFIG_FILE = "config.json"


def import_weights(folder: Path, url: str, num_rows: int | None = None) -> CheckpointMeta:
    """Makes a checkpoint at `url` of the Hugging Face folder `folder`, with its tokenizer.

    One stacked parameter is in memory at a time. The numbers are float32 in the checkpoint.

    Args:
        num_rows: of the embedding table; those beyond the vocabulary are zero. None: as many as
            the file has.

    Raises:
        ValueError: there is something at `url`, or the folder is not that of a Gemma 2 model.
        OSError: `url` cannot be written; nothing stays there.
    """
    if exists(url):
        raise ValueError(f"{url} exists already: name a new folder")
    model = _model(folder, num_rows)
    tokenizer = _tokenizer(folder, model)
    reader = TensorReader(folder)
    reader.check(tensor_shapes(model))
    meta = CheckpointMeta(
        step=0,
        data_position=0,
        params_digest="",
        optimizer_digest="",
        config={"model": model.model_dump(mode="json")},
        software=software(),
        tokenizer_digest=tokenizer.digest,
        dataset_digest="",
        teacher_digest=None,
        attempt=0,
        imported_dtype=reader.dtype,
    )
    meta = save_params(url, leaves_of(model), lambda leaf: leaf.join(reader.read), meta)
    try:
        write_atomic(join(url, TOKENIZER_FILE), tokenizer.model_bytes)
        write_file_digests(url)
    except BaseException:
        remove_tree(url)
        raise
    return meta


def export_weights(
    url: str,
    folder: Path,
    dtype: FileDtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> FileDtype:
    """Writes the checkpoint at `url` as a new Hugging Face folder; nothing stays if it fails.

    One stacked parameter is in memory at a time. Embedding rows beyond the vocabulary are left
    out.

    Args:
        dtype: type of the numbers. None: of imported weights that of their file, else bfloat16.

    Returns:
        The type of the numbers.

    Raises:
        ValueError: the folder exists, the checkpoint has no tokenizer, or its model cannot be
            described in a `config.json`.
        CorruptCheckpointError: the checkpoint is damaged.
    """
    if folder.exists():
        raise ValueError(f"{folder} exists already: name a new folder")
    meta = read_meta(url)
    model = meta.model
    dtype = dtype or meta.imported_dtype or "bfloat16"
    tokenizer = Tokenizer.load(read_bytes(tokenizer_url(url)))
    ids = {"pad_id": tokenizer.pad_id, "eos_id": tokenizer.eos_id, "bos_id": tokenizer.bos_id}
    config = config_values(model, dtype, **ids)
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        writer = TensorWriter(temporary, tensor_shapes(model), dtype, max_shard_bytes)
        for leaf, parameter in read_params(url, leaves_of(model)):
            for name, tensor in leaf.split(parameter):
                writer.write(name, tensor)
            del parameter, tensor
        (temporary / _CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        (temporary / TOKENIZER_FILE).write_bytes(tokenizer.model_bytes)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return dtype


def _model(folder: Path, num_rows: int | None) -> ModelConfig:
    path = folder / _CONFIG_FILE
    model = read_config(read_json_file(path), str(path))
    if num_rows is None or num_rows == model.vocab_size:
        return model
    if num_rows < model.vocab_size:
        raise ValueError(
            f"{num_rows} embedding rows are too few for the vocabulary of {model.vocab_size} in "
            f"{path}: name at least {model.vocab_size}"
        )
    return model.model_copy(update={"num_embeddings": num_rows})


def _tokenizer(folder: Path, model: ModelConfig) -> Tokenizer:
    path = folder / TOKENIZER_FILE
    if not path.exists():
        raise ValueError(
            f"{path} is missing: put the model's SentencePiece file there, so that text can be read"
        )
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size != model.vocab_size:
        raise ValueError(
            f"{path} has {tokenizer.vocab_size} pieces, but vocab_size in {_CONFIG_FILE} is "
            f"{model.vocab_size}: use the tokenizer that the model was trained with"
        )
    return tokenizer
