"""Rows hold every token of every document once, and the same bytes however they were made."""

import itertools
import json
import random
import uuid
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.data import DataConfig, SourceConfig, TokenizerConfig
from model.tokenizer import Tokenizer, train_tokenizer
from workers import corpus, packing, storage
from workers.corpus import split_of
from workers.dataset import DatasetManifest, Split, decode_row, encode_row, load_manifest
from workers.packing import prepare_dataset
from workers.rows import RowReader
from workers.shard import pack_rows

WORDS = [
    *[
        "the",
        "still",
        "house",
        "by",
        "river",
        "ran",
        "cold",
        "and",
        "warm",
        "under",
        "1",
        "2",
        "3",
        "é",
    ],
    "\n",
]


def joined(parts: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(parts))


def text_of(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randrange(1, 120)))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    rng = random.Random(0)
    return Tokenizer.load(train_tokenizer((text_of(rng) for _ in range(300)), 300))


@pytest.fixture
def texts(tmp_path, monkeypatch) -> dict[str, dict[str, str]]:
    """Documents by source and name, in a folder of text and a JSONL file, of several shards."""
    monkeypatch.setattr(packing, "_MIN_GROUP_BYTES", 1)
    monkeypatch.setattr(corpus, "_BLOCK_BYTES", 4096)
    rng = random.Random(1)
    files = {f"{i // 10}/{i:03d}.txt": text_of(rng) for i in range(100)}
    for name, text in files.items():
        path = tmp_path / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    lines = [text_of(rng) for _ in range(100)]
    content = "".join(json.dumps({"text": text}) + "\n" for text in lines)
    (tmp_path / "lines.jsonl").write_text(content)
    return {"files": files, "lines": {f"lines.jsonl#{i}": text for i, text in enumerate(lines)}}


def config_of(folder: Path, **settings) -> DataConfig:
    sources = (
        SourceConfig(name="files", path=str(folder / "files"), weight=2),
        SourceConfig(name="lines", path=str(folder / "lines.jsonl")),
    )
    values = {"sources": sources, "row_length": 16, "held_out_fraction": 0.2, **settings}
    return DataConfig(tokenizer=TokenizerConfig(vocab_size=300), **values)


def segments_read(
    manifest: DatasetManifest, root: str, split: Split, source: int
) -> list[list[int]]:
    """Tokens of each segment of a source's split, in the order of the rows."""
    reader = RowReader(manifest, root, split, "")
    rows = reader.read([row for row in reader.all_ids() if row.source == source])
    return [
        tokens[segments == n].tolist()
        for tokens, segments in zip(rows.tokens_BT1, rows.segments_BT1, strict=True)
        for n in range(1, segments.max() + 1)
    ]


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=30), max_size=12),
    st.integers(2, 12),
)
def test_packing_loses_and_doubles_no_token(documents, num_slots):
    rows = list(pack_rows(documents, num_slots))
    assert joined(tokens for tokens, _ in rows) == joined(documents)
    assert all(len(tokens) == num_slots for tokens, _ in rows[:-1])
    assert all(sum(lengths) == len(tokens) and 0 not in lengths for tokens, lengths in rows)
    # Each document starts a segment.
    starts, position = set(), 0
    for length in (length for _, lengths in rows for length in lengths):
        starts.add(position)
        position += length
    position = 0
    for document in documents:
        assert position in starts
        position += len(document)


@settings(deadline=None)
@given(st.data())
def test_a_row_is_read_as_it_was_written(data):
    token_type = data.draw(st.sampled_from(["uint16", "uint32"]))
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    largest = 2 ** (16 if token_type == "uint16" else 31) - 1
    total = sum(lengths)
    tokens = data.draw(st.lists(st.integers(0, largest), min_size=total, max_size=total))
    num_slots = total + data.draw(st.integers(0, 5))
    record = encode_row(tokens, lengths, num_slots, 0, token_type)
    found, segments = decode_row(record, num_slots, token_type)
    assert found.tolist() == tokens + [0] * (num_slots - total)
    expected = [n for n, length in enumerate(lengths, 1) for _ in range(length)]
    assert segments.tolist() == expected + [0] * (num_slots - total)


def test_every_document_is_in_the_rows_of_its_split_once(tmp_path, texts, tokenizer):
    config, root = config_of(tmp_path), str(tmp_path / "root")
    manifest = prepare_dataset(config, tokenizer, root, num_workers=1)
    for number, source in enumerate(manifest.sources):
        assert len(source.train.shards) > 2
        for split in packing.SPLITS:
            wanted = [
                [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
                for name, text in texts[source.name].items()
                if split_of(name, config.seed, config.held_out_fraction) == split
            ]
            found = segments_read(manifest, root, split, number)
            assert joined(found) == joined(wanted)
            # No segment reaches into a second document.
            assert not any(tokenizer.bos_id in segment[1:] for segment in found)
            counts = source.split(split)
            assert counts.num_tokens == sum(map(len, wanted))
            assert counts.num_documents == len(wanted) > 0
            assert counts.num_rows == sum(shard.num_rows for shard in counts.shards)
    total = sum(s.split(split).num_bytes for s in manifest.sources for split in packing.SPLITS)
    assert total == sum(len(t.encode()) for source in texts.values() for t in source.values())


def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path, texts, tokenizer):
    def shards(num_workers: int):
        root = str(tmp_path / f"root{num_workers}")
        calls: list[tuple[int, int]] = []
        manifest = prepare_dataset(
            config_of(tmp_path),
            tokenizer,
            root,
            num_workers=num_workers,
            progress=lambda done, total: calls.append((done, total)),
        )
        assert calls == sorted(calls)
        assert calls[0] == (0, calls[0][1]) and calls[-1] == (calls[0][1], calls[0][1])
        return manifest.digest, [
            (shard.sha256, shard.num_rows)
            for source in manifest.sources
            for shard in (*source.train.shards, *source.held_out.shards)
        ]

    one = shards(1)
    assert len(one[1]) > 6
    assert shards(2) == one
    assert shards(3) == one


def test_the_digest_names_the_content(tmp_path, texts, tokenizer):
    root = str(tmp_path / "root")

    def digest(**settings) -> str:
        config = config_of(tmp_path, **settings)
        return prepare_dataset(config, tokenizer, root, num_workers=1).digest

    first = digest()
    assert digest(held_out_rows=7) == first
    changed = [digest(row_length=17), digest(held_out_fraction=0.3), digest(seed=1)]
    (tmp_path / "files/0/000.txt").write_text("another text")
    changed.append(digest())
    (tmp_path / "files/0/000.txt").rename(tmp_path / "files/0/zzz.txt")
    changed.append(digest())
    rng = random.Random(5)
    other = Tokenizer.load(train_tokenizer((text_of(rng) for _ in range(200)), 301))
    changed.append(prepare_dataset(config_of(tmp_path), other, root, num_workers=1).digest)
    assert len({first, *changed}) == 7


def test_a_dataset_is_packed_once_and_checked_when_reused(tmp_path, texts, tokenizer, monkeypatch):
    root = str(tmp_path / "root")
    manifest = prepare_dataset(config_of(tmp_path), tokenizer, root, num_workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(packing, "write_shard", None)
        again = prepare_dataset(config_of(tmp_path), tokenizer, root, num_workers=1)
    assert again == manifest == load_manifest(root, manifest.digest)

    folder = tmp_path / "root/datasets" / manifest.digest
    shard = folder / manifest.sources[0].train.shards[1].name
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"is damaged; remove .* to have it packed again"):
        prepare_dataset(config_of(tmp_path), tokenizer, root, num_workers=1)
    shard.unlink()
    with pytest.raises(ValueError, match=r"00001.arrayrecord is missing"):
        load_manifest(root, manifest.digest)
    with pytest.raises(FileNotFoundError, match="no-such-digest"):
        load_manifest(root, "no-such-digest")


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_failure_leaves_no_dataset_and_no_shard(tmp_path, texts, tokenizer, num_workers):
    with open(tmp_path / "lines.jsonl", "a") as file:
        file.write('{"body": "no text field"}\n')
    root = tmp_path / "root"
    with pytest.raises(ValueError, match=r"line 101 of lines.jsonl lacks the field 'text'"):
        prepare_dataset(config_of(tmp_path), tokenizer, str(root), num_workers=num_workers)
    assert [path for path in root.rglob("*") if path.is_file()] == []


def test_what_is_left_out_is_counted(tmp_path, texts, tokenizer):
    (tmp_path / "files/latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "files/empty.txt").write_bytes(b"")
    root = str(tmp_path / "root")
    files, lines = prepare_dataset(config_of(tmp_path), tokenizer, root, num_workers=1).sources
    assert files.train.num_skipped + files.held_out.num_skipped == 1
    assert files.train.num_empty + files.held_out.num_empty == 1
    assert files.train.num_documents + files.held_out.num_documents == 100
    assert lines.train.num_skipped + lines.held_out.num_skipped == 0


def test_sources_without_rows_are_told(tmp_path, texts, tokenizer):
    root = str(tmp_path / "root")
    (tmp_path / "lines.jsonl").write_text('{"text": ""}\n{"text": null}\n')
    with pytest.raises(ValueError, match=r"source 'lines' gives no training rows: .* 2 are empty"):
        prepare_dataset(config_of(tmp_path), tokenizer, root, num_workers=1)
    (tmp_path / "lines.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(ValueError, match=r"no document of sources .* raise data.held_out_fraction"):
        config = config_of(tmp_path, held_out_fraction=1e-9)
        prepare_dataset(config, tokenizer, root, num_workers=1)
    manifest = prepare_dataset(
        config_of(tmp_path, held_out_fraction=0), tokenizer, root, num_workers=1
    )
    assert all(source.held_out.num_rows == 0 for source in manifest.sources)


def test_an_object_store_serves_as_well_as_a_disk(tmp_path, texts, tokenizer):
    folder, root = f"memory://{uuid.uuid4().hex}", f"memory://{uuid.uuid4().hex}"
    for name, text in texts["files"].items():
        storage.write_atomic(storage.join(folder, name), text.encode())
    config = config_of(tmp_path, sources=(SourceConfig(name="files", path=folder),))
    manifest = prepare_dataset(config, tokenizer, root, num_workers=1)
    local = config_of(tmp_path, sources=config_of(tmp_path).sources[:1])
    assert prepare_dataset(local, tokenizer, str(tmp_path), num_workers=1).digest == manifest.digest

    cache = tmp_path / "cache"
    reader = RowReader.open(root, manifest.digest, "train", str(cache))
    ids = reader.all_ids()
    expected = RowReader(manifest, root, "train", str(cache)).read(ids).tokens_BT1
    assert (reader.read(ids).tokens_BT1 == expected).all()
    copies = sorted(cache.iterdir())
    assert len(copies) == len(manifest.sources[0].train.shards)

    content = bytearray(copies[0].read_bytes())
    content[-1] ^= 1
    copies[0].write_bytes(content)
    with pytest.raises(ValueError, match=r"is not the file .* remove it"):
        RowReader.open(root, manifest.digest, "train", str(cache)).read(ids)
