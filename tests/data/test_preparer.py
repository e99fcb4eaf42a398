"""Tokenizer and rows are made once, and fit the student and the teacher."""

from pathlib import Path
from typing import Any

import pytest

from configs.data import DataConfig
from model.tokenizer import Tokenizer
from tests.helpers.checkpoints import fresh_state, save_state, tiny_config
from tests.helpers.runs import VOCAB_SIZE, text_folder, tiny_values
from workers import preparer
from workers.dataset import load_manifest
from workers.preparer import TOKENIZER_FILE, Prepared, make_tokenizer, prepare, tokenizer_url


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    text_folder(tmp_path)
    return tmp_path


def data_of(storage: Path, tokenizer: dict[str, Any] | None = None, **changes: Any) -> DataConfig:
    values = tiny_values(storage, "run")["data"] | changes
    if tokenizer is not None:
        values["tokenizer"] = tokenizer
    return DataConfig.model_validate(values)


def prepared(data: DataConfig, storage: Path, run: str, **changes: Any) -> Prepared:
    values = {"vocab_size": VOCAB_SIZE, "teacher_url": None} | changes
    return prepare(
        data,
        values["vocab_size"],
        str(storage),
        str(storage / run),
        values["teacher_url"],
        1,
        values.get("progress", lambda what, done, total: None),
    )


def forbid_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*args: Any, **settings: Any) -> bytes:
        raise AssertionError("a tokenizer is trained again")

    monkeypatch.setattr(preparer, "train_tokenizer", train)


def test_a_second_run_finds_tokenizer_and_rows(storage, monkeypatch):
    told: list[tuple[str, int, int]] = []
    data = data_of(storage)
    first = prepared(data, storage, "one", progress=lambda *step: told.append(step))
    assert told[:2] == [("tokenizer", 0, 1), ("tokenizer", 1, 1)]
    assert told[-1][0] == "rows" and told[-1][1] == told[-1][2] > 0

    forbid_training(monkeypatch)
    again = prepared(data, storage, "two")
    assert again == first
    both = [(storage / run / TOKENIZER_FILE).read_bytes() for run in ("one", "two")]
    assert both[0] == both[1]
    assert Tokenizer.load(both[0]).digest == first.tokenizer_digest
    manifest = load_manifest(str(storage), first.dataset_digest)
    assert manifest.tokenizer_digest == first.tokenizer_digest
    assert first.num_rows == manifest.sources[0].train.num_rows > 0
    assert first.num_tokens == manifest.sources[0].train.num_tokens > 0


def test_other_text_seed_or_size_means_another_tokenizer(storage):
    data = data_of(storage)
    digests = {make_tokenizer(data, str(storage), None).digest}
    larger = data_of(storage, {"kind": "train", "vocab_size": VOCAB_SIZE + 1})
    assert make_tokenizer(larger, str(storage), None).vocab_size == VOCAB_SIZE + 1
    assert len(list((storage / "tokenizers").iterdir())) == 2
    (storage / "text" / "00.txt").write_text("other words altogether, in every file " * 9)
    (storage / "text" / "01.txt").write_text("other words altogether, in every file " * 9)
    digests.add(make_tokenizer(data, str(storage), None).digest)
    assert len(list((storage / "tokenizers").iterdir())) == 3 and len(digests) == 2


def test_another_vocabulary_than_the_models_is_told(storage):
    data = data_of(storage)
    with pytest.raises(ValueError, match=r"model.vocab_size is 512, .* set model.vocab_size=320"):
        prepared(data, storage, "run", vocab_size=512)
    assert not (storage / "run").exists()


def saved_teacher(storage: Path, tokenizer_digest: str) -> str:
    config = tiny_config(storage, "teacher")
    url, _ = save_state(
        str(storage / "teacher"), fresh_state(config), config, tokenizer_digest=tokenizer_digest
    )
    return url


def test_the_teachers_tokenizer_lies_in_its_folder_or_its_runs(storage, monkeypatch):
    facts = prepared(data_of(storage), storage, "teacher")
    url = saved_teacher(storage, facts.tokenizer_digest)
    forbid_training(monkeypatch)
    data = data_of(storage, {"kind": "teacher"})
    student = prepared(data, storage, "student", teacher_url=url)
    assert student == facts
    of_run = storage / "teacher" / TOKENIZER_FILE
    assert Path(tokenizer_url(url)) == of_run
    assert Path(tokenizer_url(url + "/")) == of_run

    in_folder = Path(url) / TOKENIZER_FILE
    of_run.rename(in_folder)
    assert Path(tokenizer_url(url)) == in_folder
    in_folder.unlink()
    with pytest.raises(ValueError, match="has no tokenizer: put its SentencePiece model"):
        prepared(data, storage, "student", teacher_url=url)


def test_a_teacher_of_another_tokenizer_is_refused(storage):
    """With a vocabulary of the same size, nothing else would show it."""
    url = saved_teacher(storage, "f" * 64)
    with pytest.raises(ValueError, match="trained with tokenizer ffffffffffff, the student's is"):
        prepared(data_of(storage), storage, "student", teacher_url=url)


def test_a_tokenizer_can_be_brought_along(storage, monkeypatch):
    trained = make_tokenizer(data_of(storage), str(storage), None)
    path = storage / "mine.model"
    path.write_bytes(trained.model_bytes)
    forbid_training(monkeypatch)
    data = data_of(storage, {"kind": "import", "path": str(path)})
    assert prepared(data, storage, "run").tokenizer_digest == trained.digest
