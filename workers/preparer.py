"""Makes a run's tokenizer and rows, once for all runs that need the same."""

import dataclasses
import hashlib
from collections.abc import Callable

from configs.data import DataConfig
from model.tokenizer import Tokenizer, train_tokenizer
from workers.corpus import training_texts
from workers.packing import prepare_dataset
from workers.storage import exists, join, read_bytes, read_json, write_atomic


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What the students and evaluators need to know of the data."""

    dataset_digest: str
    tokenizer_digest: str
    num_rows: int
    num_tokens: int


TOKENIZER_FILE = "tokenizer.model"
Progress = Callable[[str, int, int], None]


def prepare(
    config: DataConfig,
    vocab_size: int,
    storage_url: str,
    run_url: str,
    teacher_url: str | None,
    num_workers: int,
    progress: Progress,
) -> Prepared:
    """Tokenizer and packed rows of a run; what is there already is used again.

    Args:
        vocab_size: of the student.
        progress: told (what, done, total).

    Raises:
        ValueError: the data or the tokenizer do not fit the configuration.
    """
    progress("tokenizer", 0, 1)
    tokenizer = make_tokenizer(config, storage_url, teacher_url)
    progress("tokenizer", 1, 1)
    if tokenizer.vocab_size != vocab_size:
        raise ValueError(
            f"model.vocab_size is {vocab_size}, but the tokenizer has {tokenizer.vocab_size} "
            f"pieces; set model.vocab_size={tokenizer.vocab_size}"
        )
    if teacher_url is not None:
        _check_same_tokenizer(tokenizer, teacher_url)
    write_atomic(join(run_url, TOKENIZER_FILE), tokenizer.model_bytes)
    manifest = prepare_dataset(
        config,
        tokenizer,
        storage_url,
        num_workers=num_workers,
        progress=lambda done, total: progress("rows", done, total),
    )
    return Prepared(
        dataset_digest=manifest.digest,
        tokenizer_digest=tokenizer.digest,
        num_rows=sum(source.train.num_rows for source in manifest.sources),
        num_tokens=sum(source.train.num_tokens for source in manifest.sources),
    )


def tokenizer_url(checkpoint_url: str) -> str:
    """The SentencePiece model that belongs to a checkpoint: in its folder, or in its run's.

    Raises:
        ValueError: there is none.
    """
    run_url = checkpoint_url.rstrip("/").rsplit("/", 2)[0]
    for place in (join(checkpoint_url, TOKENIZER_FILE), join(run_url, TOKENIZER_FILE)):
        if exists(place):
            return place
    raise ValueError(
        f"The checkpoint {checkpoint_url} has no tokenizer: put its SentencePiece model into that "
        f"folder as {TOKENIZER_FILE}"
    )


def make_tokenizer(config: DataConfig, storage_url: str, teacher_url: str | None) -> Tokenizer:
    """The tokenizer that a configuration means: imported, the teacher's, or trained here."""
    settings = config.tokenizer
    if settings.kind == "teacher":
        assert teacher_url is not None, "checked with the configuration"
        return Tokenizer.load(read_bytes(tokenizer_url(teacher_url)))
    if settings.kind == "import":
        assert settings.path is not None, "checked with the configuration"
        return Tokenizer.load(read_bytes(settings.path))
    assert settings.vocab_size is not None, "checked with the configuration"
    texts = list(training_texts(config))
    url = join(storage_url, "tokenizers", f"{_training_digest(texts, config)}.model")
    if not exists(url):
        write_atomic(url, train_tokenizer(texts, settings.vocab_size, seed=config.seed))
    return Tokenizer.load(read_bytes(url))


def _check_same_tokenizer(tokenizer: Tokenizer, teacher_url: str) -> None:
    theirs = _tokenizer_digest_of(teacher_url)
    if theirs != tokenizer.digest:
        raise ValueError(
            f"teacher.checkpoint: {teacher_url} was trained with tokenizer {theirs[:12]}, the "
            f"student's is {tokenizer.digest[:12]}: one number would mean two texts; set "
            f"data.tokenizer.kind=teacher"
        )


def _tokenizer_digest_of(checkpoint_url: str) -> str:
    try:
        return read_json(checkpoint_url.rstrip("/") + ".json")["tokenizer_digest"]
    except FileNotFoundError:  # of imported weights, or copied without what lies beside it
        from workers.checkpoint import read_meta  # JAX and Orbax take a while to import

        return read_meta(checkpoint_url).tokenizer_digest


def _training_digest(texts: list[str], config: DataConfig) -> str:
    """Names what a trained tokenizer depends on."""
    digest = hashlib.sha256(f"{config.tokenizer.vocab_size} {config.seed}".encode())
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()[:32]
