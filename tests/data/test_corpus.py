"""Which documents a source holds, in which order, under which names and in which split."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from configs.data import DataConfig, SourceConfig, TokenizerConfig
from workers.corpus import (
    Document,
    read_piece,
    scan_file,
    split_of,
    training_texts,
)
from workers.source_files import list_files


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def source(path: Path | str, **settings) -> SourceConfig:
    return SourceConfig(name="src", path=str(path), **settings)


def names(path: Path, **settings) -> list[str]:
    return [file.name for file in list_files(source(path, **settings))]


def documents(path: Path, piece_bytes: int = 2**20, **settings) -> list[Document]:
    config = source(path, **settings)
    return [
        document
        for file in list_files(config)
        for piece in scan_file(file, piece_bytes)[1]
        for document in read_piece(piece, config.text_field)
    ]


def jsonl(texts) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def test_files_are_sorted_and_chosen_by_globs(tmp_path):
    files = ("b.txt", "a/c.py", "a/test/d.py", "e.bin", ".venv/f.py", "a/.g.txt", "contest/h.md")
    write(tmp_path, dict.fromkeys(files, "x"))
    assert names(tmp_path) == ["a/c.py", "a/test/d.py", "b.txt", "contest/h.md"]
    assert names(tmp_path, exclude=["**/test/**"]) == ["a/c.py", "b.txt", "contest/h.md"]
    assert names(tmp_path, include=["*.bin", "a/*"]) == ["a/c.py", "e.bin"]
    assert names(tmp_path / "e.bin") == ["e.bin"]


def test_stdlib_stands_for_the_standard_library():
    (file,) = list_files(source("{stdlib}", include=["json/decoder.py"]))
    assert file.name == "json/decoder.py"
    ((_, pieces),) = [scan_file(file, 2**20)]
    (document,) = read_piece(pieces[0], "text")
    assert document.text is not None and "JSONDecoder" in document.text


@pytest.mark.parametrize("piece_bytes", [1, 50, 2**20])
def test_jsonl_records_are_named_by_line(tmp_path, piece_bytes, monkeypatch):
    monkeypatch.setattr("workers.corpus._BLOCK_BYTES", 64)
    texts = [f"text {i} " + "é" * (i % 40) for i in range(60)]
    write(tmp_path, {"x.jsonl": jsonl(texts).rstrip("\n")})
    expected = [Document(f"x.jsonl#{i}", text) for i, text in enumerate(texts)]
    assert documents(tmp_path, piece_bytes) == expected


@pytest.mark.parametrize("piece_bytes", [1, 2**20])
def test_parquet_records_are_named_by_row(tmp_path, piece_bytes):
    texts = [f"text {i}" for i in range(25)]
    table = pa.table({"body": texts, "n": list(range(25))})
    pq.write_table(table, tmp_path / "x.parquet", row_group_size=10)
    found = documents(tmp_path, piece_bytes, text_field="body")
    assert found == [Document(f"x.parquet#{i}", text) for i, text in enumerate(texts)]


def test_parquet_categories_are_text_and_null_is_empty(tmp_path):
    column = pa.array(["a", None, "b", "a"]).dictionary_encode()
    pq.write_table(pa.table({"text": column}), tmp_path / "x.parquet")
    assert [document.text for document in documents(tmp_path)] == ["a", "", "b", "a"]


def test_bytes_that_are_not_utf8_are_told_apart(tmp_path):
    lone_surrogate = b'{"text": "\\ud800"}\n'
    lines = b'{"text": "caf\xe9"}\n' + lone_surrogate + b'{"text": "ok"}\n\n{"text": null}\n'
    write(tmp_path, {"a.txt": b"caf\xe9", "b.txt": "\ufeffcafé", "c.jsonl": lines})
    column = pa.array([b"caf\xe9", b"ok"], pa.binary())
    pq.write_table(pa.table({"text": column}), tmp_path / "d.parquet")
    texts = {document.name: document.text for document in documents(tmp_path)}
    assert texts == {
        "a.txt": None,
        "b.txt": "café",
        "c.jsonl#0": None,
        "c.jsonl#1": None,
        "c.jsonl#2": "ok",
        "c.jsonl#3": "",
        "c.jsonl#4": "",
        "d.parquet#0": None,
        "d.parquet#1": "ok",
    }


def test_max_bytes_ends_with_the_document_that_crosses_it(tmp_path):
    write(tmp_path / "text", {f"{i}.txt": "x" * 10 for i in range(5)})
    assert names(tmp_path / "text", max_bytes=20) == ["0.txt", "1.txt"]
    assert names(tmp_path / "text", max_bytes=21) == ["0.txt", "1.txt", "2.txt"]

    line = len(jsonl(["aaaa"]))
    write(tmp_path / "lines", {"x.jsonl": jsonl(["aaaa"] * 50), "y.jsonl": jsonl(["b"])})
    for limit, expected in ((1, 1), (line, 1), (line + 1, 2), (3 * line, 3), (49 * line + 1, 50)):
        assert len(documents(tmp_path / "lines", max_bytes=limit)) == expected

    (tmp_path / "table").mkdir()
    pq.write_table(pa.table({"text": ["t"] * 30}), tmp_path / "table/x.parquet", row_group_size=10)
    assert len(documents(tmp_path / "table", max_bytes=1)) == 10


@settings(deadline=None)
@given(st.text(), st.integers(0, 2**31 - 1))
def test_the_split_is_a_function_of_name_and_seed(name, seed):
    assert split_of(name, seed, 0.3) == split_of(name, seed, 0.3)
    assert split_of(name, seed, 0.0) == "train"
    if split_of(name, seed, 0.1) == "held_out":  # a larger share keeps what was held out
        assert split_of(name, seed, 0.2) == "held_out"


def test_the_held_out_share_is_kept_and_the_seed_changes_it():
    held = [
        {i for i in range(5000) if split_of(f"d#{i}", seed, 0.1) == "held_out"} for seed in (0, 1)
    ]
    for of_seed in held:
        assert 400 < len(of_seed) < 600
    assert len(held[0] & held[1]) < 100


def test_moving_a_corpus_changes_no_name(tmp_path):
    write(tmp_path / "one", {"a/x.txt": "x", "y.jsonl": jsonl("ab")})
    shutil.copytree(tmp_path / "one", tmp_path / "two" / "deeper")
    assert documents(tmp_path / "one") == documents(tmp_path / "two" / "deeper")


@pytest.mark.parametrize(
    ("files", "settings", "message"),
    [
        ({}, {"path": "missing"}, "source 'src': path .*missing does not exist; correct"),
        ({"a.bin": "x"}, {}, "source 'src': no file below .* matches format auto"),
        ({"a.txt": "x"}, {"exclude": ["**"]}, r"source 'src': no file .* exclude \['\*\*'\]"),
        ({"a.jsonl": "{\n"}, {}, r"source 'src': line 1 of a.jsonl is not JSON"),
        ({"a.jsonl": '{"t": ""}\n'}, {}, r"lacks the field 'text' \(it has fields \['t'\]\)"),
        ({"a.jsonl": '\n["text"]\n'}, {}, "line 2 of a.jsonl lacks the field 'text'"),
        ({"a.jsonl": '{"text": 1}\n'}, {}, "holds int in the field 'text', not text"),
        ({"a.parquet": "no table"}, {}, "source 'src': a.parquet is not a Parquet file"),
    ],
)
def test_faults_name_the_source_and_the_mend(tmp_path, files, settings, message):
    write(tmp_path, files)
    path = tmp_path / settings.pop("path", "")
    with pytest.raises(ValueError, match=message):
        documents(path, **settings)


@pytest.mark.parametrize(
    ("column", "message"),
    [("body", r"lacks the column 'text' \(it has \['body'\]\)"), ("text", "int64 in the column")],
)
def test_parquet_faults(tmp_path, column, message):
    pq.write_table(pa.table({column: [1, 2]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=message):
        documents(tmp_path)


def test_tokenizer_texts_are_training_texts_in_shares_by_weight(tmp_path):
    write(tmp_path / "a", {f"{i}.txt": f"a{i:03d}" + "x" * 96 for i in range(200)})
    write(tmp_path / "b", {"b.jsonl": jsonl("b" * 100 for _ in range(200))})
    config = DataConfig(
        sources=(
            SourceConfig(name="a", path=str(tmp_path / "a"), weight=3),
            SourceConfig(name="b", path=str(tmp_path / "b"), weight=1),
        ),
        tokenizer=TokenizerConfig(vocab_size=512, train_bytes=8000),
        held_out_fraction=0.3,
    )
    texts = list(training_texts(config))
    assert texts == list(training_texts(config))
    from_a = [text for text in texts if text.startswith("a")]
    assert (len(from_a), len(texts) - len(from_a)) == (60, 20)
    assert all(split_of(f"{int(t[1:4])}.txt", config.seed, 0.3) == "train" for t in from_a)
    assert from_a != sorted(from_a)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "train"}, "needs vocab_size"),
        ({"kind": "train", "vocab_size": 512, "path": "x"}, "reads no path"),
        ({"kind": "import"}, "needs path"),
        ({"kind": "import", "path": "x", "vocab_size": 512}, "brings its own vocabulary"),
        ({"kind": "teacher", "path": "x"}, "reads no path"),
        ({"kind": "teacher", "vocab_size": 512}, "brings its own vocabulary"),
    ],
)
def test_impossible_tokenizers_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        TokenizerConfig(**settings)


def test_sources_need_names_of_their_own(tmp_path):
    with pytest.raises(ValidationError, match="two sources are named 'src'"):
        DataConfig(sources=(source("a"), source("b")), tokenizer=TokenizerConfig(vocab_size=512))
    with pytest.raises(ValidationError, match="name"):
        SourceConfig(name="../x", path="x")
